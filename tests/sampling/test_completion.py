"""A part of a picture is drawn anew: what is read, what may change, and masks at every place and of every size."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogview.errors import ConfigError
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.completion import Completer, CompletionConfig, paste
from cogview.sampling.hierarchical_magnifier import HierarchicalMagnifier, HierarchicalSampling
from cogview.sampling.hierarchy import LoPARConfig
from cogview.sampling.masks import Box, Square, fading, hidden_codes, square_around
from tests.pipelines.trained_folders import GRID, TrainedFolders, write_trained_folders
from tests.sampling.small_coglm import small_coglm
from tests.sampling.small_stages import LARGE, publish_stage

SAMPLING = HierarchicalSampling(by_clusters=False, lopar=LoPARConfig(top_k=(12,)))
SMALL_SIDE = 8 * GRID


class Recorder:
    """Fills hidden codes with the seed, and remembers what it was asked."""

    def __init__(self) -> None:
        self.captions: Sequence[str] = ()
        self.codes, self.hidden = torch.empty(0), torch.empty(0)

    def __call__(
        self, captions: Sequence[str], codes_Bhw: Tensor, hidden_Bhw: Tensor, *, seeds: Sequence[int]
    ) -> Tensor:
        self.captions, self.codes, self.hidden = captions, codes_Bhw, hidden_Bhw
        return torch.where(hidden_Bhw, torch.tensor(seeds)[:, None, None], codes_Bhw)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def magnifier(folders: TrainedFolders, tmp_path_factory: pytest.TempPathFactory) -> HierarchicalMagnifier:
    root = tmp_path_factory.mktemp("stages")
    direct, iterative = (publish_stage(root / name, folders, stage=name) for name in ("direct", "iterative"))
    return HierarchicalMagnifier.load(
        direct, iterative, text_tokenizer=folders.text_tokenizer, image_tokenizer=folders.image_tokenizer
    )


@pytest.fixture
def completer(magnifier: HierarchicalMagnifier) -> Completer:
    return Completer(fill=Recorder(), image_tokenizer=magnifier.image_tokenizer, grid=GRID, magnifier=magnifier)


def picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


MASKS = {
    "the middle": (100, 100, Box(top=0.3, left=0.3, bottom=0.7, right=0.6)),
    "a corner": (100, 80, Box(top=0, left=0, bottom=0.2, right=0.3)),
    "the other corner": (77, 131, Box(top=0.8, left=0.9, bottom=1, right=1)),
    "one pixel": (100, 100, Box(top=0.5, left=0.5, bottom=0.501, right=0.501)),
    "everything": (90, 90, Box(top=0, left=0, bottom=1, right=1)),
    "everything, not square": (40, 120, Box(top=0, left=0, bottom=1, right=1)),
    "a stripe": (120, 50, Box(top=0, left=0.4, bottom=1, right=0.5)),
    "a picture smaller than it is read": (20, 11, Box(top=0.2, left=0.2, bottom=0.7, right=0.9)),
}


def complete(
    completer: Completer, pixels: Tensor, mask: Tensor, *, seeds: Sequence[int] = (3,), seam: int = 6
) -> Tensor:
    drawn = completer.complete(
        pixels, mask, caption="a red circle", seeds=seeds, config=CompletionConfig(seam=seam), sampling=SAMPLING
    )
    return drawn.pictures_BCHW


@pytest.mark.parametrize(("height", "width", "box"), MASKS.values(), ids=MASKS.keys())
def test_nothing_changes_beyond_the_seam(completer: Completer, height: int, width: int, box: Box) -> None:
    pixels, mask = picture(height, width), box.mask(height, width)
    for seam in (0, 6):
        [drawn] = complete(completer, pixels, mask, seam=seam)
        assert (drawn.shape, drawn.dtype) == (pixels.shape, torch.uint8)
        far = torch.ones(height, width, dtype=torch.bool)
        for row, column in mask.nonzero().tolist():
            far[max(0, row - seam) : row + seam + 1, max(0, column - seam) : column + seam + 1] = False
        assert torch.equal(drawn[:, far], pixels[:, far])
        assert not torch.equal(drawn[:, mask], pixels[:, mask])


def test_hidden_codes_are_those_that_the_mask_touches(completer: Completer) -> None:
    fill = completer.fill
    assert isinstance(fill, Recorder)
    pixels = picture(SMALL_SIDE, SMALL_SIDE)  # read as it is: 8 pixels to a code
    mask = torch.zeros(SMALL_SIDE, SMALL_SIDE, dtype=torch.bool)
    mask[9:16, 15:17] = True
    complete(completer, pixels, mask, seeds=(1, 2))
    assert fill.captions == ["a red circle"] * 2
    assert fill.hidden.nonzero().tolist() == [[0, 1, 1], [0, 1, 2], [1, 1, 1], [1, 1, 2]]
    expected = completer.image_tokenizer.encode(pixels[None].float() / 255)
    assert torch.equal(fill.codes, expected.expand(2, -1, -1))


def test_large_squares_pass_both_stages_inside_the_mask(
    completer: Completer, magnifier: HierarchicalMagnifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Tensor]] = []
    magnify = HierarchicalMagnifier.magnify

    def watch(self: HierarchicalMagnifier, captions: Sequence[str], codes: Tensor, **more: object) -> Tensor:
        asked.append({"codes": codes, **more})
        return magnify(self, captions, codes, **more)

    monkeypatch.setattr(HierarchicalMagnifier, "magnify", watch)
    side = 8 * LARGE
    pixels, box = picture(side, side), Box(top=0.25, left=0.25, bottom=0.99, right=0.99)
    complete(completer, pixels, box.mask(side, side), seeds=(1, 2))
    assert torch.equal(asked[0]["known_BGG"][1], magnifier.image_tokenizer.encode(pixels[None].float() / 255)[0])
    inside = torch.zeros(LARGE, LARGE, dtype=torch.bool)
    inside[3:12, 3:12] = True
    assert torch.equal(asked[0]["inside_BGG"], inside.expand(2, -1, -1))
    complete(completer, pixels[:, :SMALL_SIDE, :SMALL_SIDE], torch.ones(SMALL_SIDE, SMALL_SIDE, dtype=torch.bool))
    complete(replace(completer, magnifier=None), pixels, box.mask(side, side))
    assert len(asked) == 1


def test_a_coglm_fills_by_caption_and_seed(tmp_path: Path) -> None:
    coglm = small_coglm(tmp_path)
    plain = CogLMSampling(by_clusters=False, tokens=SamplingConfig(top_k=0))
    completer = Completer(
        fill=partial(coglm.fill, sampling=plain), image_tokenizer=coglm.image_tokenizer, grid=coglm.layout.grid
    )
    pixels, mask = picture(40, 40), Box(top=0.2, left=0.2, bottom=0.8, right=0.8).mask(40, 40)
    together = complete(completer, pixels, mask, seeds=(5, 6))
    assert torch.equal(complete(completer, pixels, mask, seeds=(6,))[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_only_the_best_is_finished(completer: Completer) -> None:
    asked: list[tuple[str, list[int]]] = []

    def judge(caption: str, codes_Bgg: Tensor) -> list[float]:  # the recorder fills with the seeds
        asked.append((caption, codes_Bgg[:, 1, 1].tolist()))
        return [3.0, 1.0, 2.0]

    judged = replace(completer, judge=judge)
    side = 8 * LARGE
    pixels, mask = picture(side, side), Box(top=0.2, left=0.2, bottom=0.8, right=0.8).mask(side, side)
    named = {"caption": "a dot", "config": CompletionConfig(), "sampling": SAMPLING}
    every = judged.complete(pixels, mask, seeds=[4, 5, 6], **named)
    assert every.cap_losses == (3.0, 1.0, 2.0)
    best = judged.complete(pixels, mask, seeds=[4, 5, 6], only_best=True, **named)
    assert best.cap_losses == (1.0,)
    assert torch.equal(best.pictures_BCHW, every.pictures_BCHW[1:2])
    assert asked == [("a dot", [4, 5, 6])] * 2
    unjudged = completer.complete(pixels, mask, seeds=[4, 5, 6], only_best=True, **named)
    assert torch.equal(unjudged.pictures_BCHW, every.pictures_BCHW[:1])
    assert unjudged.cap_losses == ()


@settings(max_examples=60, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    corners=st.tuples(*[st.floats(0, 0.99)] * 2),
    shares=st.tuples(*[st.floats(0.001, 1)] * 2),
    context=st.floats(1, 4),
    smallest=st.integers(1, 64),
)
def test_a_square_holds_its_mask(
    sides: tuple[int, int],
    corners: tuple[float, float],
    shares: tuple[float, float],
    context: float,
    smallest: int,
) -> None:
    height, width = sides
    ends = [corner + max(1e-3, share * (1 - corner)) for corner, share in zip(corners, shares, strict=True)]
    box = Box(top=corners[0], left=corners[1], bottom=min(1, ends[0]), right=min(1, ends[1]))
    mask = box.mask(height, width)
    assert mask.any()
    square = square_around(mask, context=context, smallest=smallest)
    rows, columns = (mask.any(dim=axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    assert square.top <= rows[0] <= rows[-1] < square.top + square.side
    assert square.left <= columns[0] <= columns[-1] < square.left + square.side
    assert square.side <= max(height, width)
    for start, length in ((square.top, height), (square.left, width)):
        assert (0 <= start <= length - square.side) if square.side <= length else (start <= 0 < start + square.side)
    pixels = picture(height, width).float()
    cut = square.cut(pixels)
    assert cut.shape == (3, square.side, square.side)
    for row, column in ((0, 0), (square.side - 1, square.side // 2)):
        inside = (min(max(0, square.top + row), height - 1), min(max(0, square.left + column), width - 1))
        assert torch.equal(cut[:, row, column], pixels[:, inside[0], inside[1]])
    assert torch.equal(square.put_back(cut, onto_CHW=pixels), pixels)


@given(side=st.integers(1, 60), grid=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_masked_pixel_lies_in_a_visible_code(side: int, grid: int, seed: int) -> None:
    mask = torch.rand(side, side, generator=torch.Generator().manual_seed(seed)) < 0.05
    hidden = hidden_codes(mask, grid=grid)
    for row, column in mask.nonzero().tolist():
        assert hidden[row * grid // side, column * grid // side]
    assert mask.any() or not hidden.any()


def test_the_seam_fades_with_the_distance() -> None:
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[3:5, 4:6] = True
    strength = fading(mask, seam=3)
    for row in range(9):
        for column in range(12):
            distance = max(3 - row, row - 4, 4 - column, column - 5, 0)
            assert float(strength[row, column]) == pytest.approx(max(0, 1 - distance / 4))
    assert torch.equal(fading(mask, seam=0), mask.float())


def test_pasting_mixes_by_strength() -> None:
    old, new = torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.ones(1, 3, 2, 2)
    strength = torch.zeros(4, 4)
    strength[1, 1], strength[1, 2] = 1.0, 0.5
    [pasted] = paste(new, old, square=Square(top=1, left=1, side=2), strength_HW=strength)
    assert pasted[0].tolist() == [[100] * 4, [100, 255, 178, 100], [100] * 4, [100] * 4]


def test_what_makes_no_sense_is_refused(completer: Completer) -> None:
    with pytest.raises(ConfigError, match="the mask is empty"):
        complete(completer, picture(9, 9), torch.zeros(9, 9, dtype=torch.bool))
    with pytest.raises(ConfigError, match="and a mask of the same height and width"):
        complete(completer, picture(9, 9), torch.ones(9, 8, dtype=torch.bool))
    with pytest.raises(ConfigError, match="give bytes"):
        complete(completer, picture(9, 9).float(), torch.ones(9, 9, dtype=torch.bool))
    with pytest.raises(ConfigError, match="no seeds"):
        complete(completer, picture(9, 9), torch.ones(9, 9, dtype=torch.bool), seeds=())
    for changes in ({"top": 0.6}, {"right": 1.2}, {"left": -0.1}, {"bottom": float("nan")}):
        with pytest.raises(ConfigError, match="give shares of the picture from 0 to 1"):
            replace(Box(top=0.1, left=0.1, bottom=0.5, right=0.5), **changes)
    with pytest.raises(ConfigError, match=r"context=0\.5"):
        CompletionConfig(context=0.5)
    with pytest.raises(ConfigError, match="seam=-1"):
        CompletionConfig(seam=-1)
    with pytest.raises(ConfigError, match="read 4 codes along a side, and 5 are drawn"):
        replace(completer, grid=5)
