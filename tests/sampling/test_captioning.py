"""Image to text: the released template, where a caption ends, what a language allows, and the search for the best."""

from pathlib import Path

import pytest
import torch

from cogview.errors import ConfigError
from cogview.sampling.caption_search import BeamConfig, draw_captions, search_captions
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.tokenizers.text import CHINESE_CHARACTER
from tests.sampling.small_captioner import small_captioner, some_codes

GREEDY = SamplingConfig(temperature=0.0)
CODES = some_codes(6)


@pytest.fixture(scope="module", params=[False, True], ids=["running", "fixed"])
def captioner(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Captioner:
    return small_captioner(tmp_path_factory.mktemp("text"), max_text=6, is_image_fixed=request.param)


def log_probabilities(captioner: Captioner, codes_hw: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Of every choice after some pieces, [K]: computed anew, without a cache."""
    vocabulary = captioner.vocabulary
    ids = [*captioner.prompts(codes_hw[None])[0], *(piece + vocabulary.text_offset for piece in pieces)]
    positions = captioner.positions(num_text=len(pieces))
    hidden = captioner.model(torch.tensor([ids]), torch.tensor([positions]))[0, -1]
    logits = captioner.model.logits(hidden)
    choices = [*vocabulary.text_ids, *([vocabulary.command("SEP")] if captioner.has_end else [])]
    return logits[choices].log_softmax(dim=0)


def test_the_prompt_is_the_released_template(captioner: Captioner) -> None:
    command = captioner.vocabulary.command
    codes = CODES[0].flatten().tolist()
    assert captioner.prompts(CODES[:1])[0] == [
        command("BASE"),
        command("BOI1"),
        *codes,
        command("EOI1"),
        command("ROI1"),
    ]


@torch.inference_mode()
def test_a_greedy_caption_takes_the_likeliest_piece_at_every_step(captioner: Captioner) -> None:
    allowed = captioner.allowed("any")
    written = draw_captions(captioner, CODES, sampling=GREEDY, seeds=[0] * 6)
    assert {caption.is_whole for caption in written} == {True, False}, "the test needs both kinds"
    for codes_hw, caption in zip(CODES, written, strict=True):
        total, pieces = 0.0, []
        while len(pieces) < captioner.max_text:
            chances = log_probabilities(captioner, codes_hw, pieces)
            may_be = allowed.clone()
            may_be[captioner.end] = bool(pieces)
            choice = int(chances.masked_fill(~may_be, -torch.inf).argmax())
            total += float(chances[choice])
            if choice == captioner.end:
                break
            pieces.append(choice)
        assert list(caption.pieces) == pieces
        assert caption.is_whole == (len(pieces) < captioner.max_text)
        assert caption.log_probability == pytest.approx(total, abs=1e-4)
        assert caption.text == captioner.text_tokenizer.decode(pieces)


def test_a_caption_is_decided_by_its_seed_and_not_by_its_batch(captioner: Captioner) -> None:
    sampling = SamplingConfig(temperature=1.0)
    together = draw_captions(captioner, CODES, sampling=sampling, seeds=[3, 4, 5, 6, 7, 8])
    alone = [
        draw_captions(captioner, CODES[n : n + 1], sampling=sampling, seeds=[3 + n])[0].pieces
        for n in range(len(CODES))
    ]
    assert [caption.pieces for caption in together] == alone
    several = draw_captions(captioner, CODES[:1].expand(8, -1, -1), sampling=sampling, seeds=list(range(8)))
    assert len({caption.pieces for caption in several}) > 1
    with pytest.raises(ConfigError, match="1 seeds for 6 images"):
        draw_captions(captioner, CODES, sampling=sampling, seeds=[1])


@pytest.mark.parametrize("seed", range(3))
def test_a_language_keeps_to_its_letters(captioner: Captioner, seed: int) -> None:
    sampling = SamplingConfig(temperature=2.0)
    seeds = list(range(seed, seed + 6))
    for caption in draw_captions(captioner, CODES, sampling=sampling, seeds=seeds, language="en"):
        assert not CHINESE_CHARACTER.search(caption.text)
    for caption in draw_captions(captioner, CODES, sampling=sampling, seeds=seeds, language="zh"):
        assert not any("a" <= letter <= "z" for letter in caption.text)
    with pytest.raises(ConfigError, match="language='fr'"):
        captioner.allowed("fr")  # type: ignore[arg-type]


@torch.inference_mode()
@pytest.mark.parametrize("length_power", [0.0, 1.0])
def test_a_search_that_follows_everything_finds_the_best_caption(tmp_path: Path, length_power: float) -> None:
    captioner = small_captioner(tmp_path, max_text=2)
    allowed, end = captioner.allowed("any"), captioner.end
    pieces = [piece for piece in range(end) if allowed[piece]]
    codes = CODES[:2]
    found = search_captions(captioner, codes, beams=BeamConfig(width=end, length_power=length_power))
    for codes_hw, captions in zip(codes, found, strict=True):
        totals: dict[tuple[int, ...], float] = {}
        first = log_probabilities(captioner, codes_hw, [])
        for one in pieces:
            second = log_probabilities(captioner, codes_hw, [one])
            totals |= {(one, two): float(first[one] + second[two]) for two in [*pieces, end]}
        whole = {choices: total for choices, total in totals.items() if choices[-1] == end}
        # Enough captions are whole, so one that was cut is not asked for.
        possible = whole if len(whole) >= end else totals
        best = max(possible, key=lambda choices: possible[choices] / len(choices) ** length_power)
        assert captions[0].pieces == tuple(choice for choice in best if choice != end)
        assert captions[0].log_probability == pytest.approx(possible[best], abs=1e-4)


def test_the_narrowest_search_without_an_end_is_greedy(tmp_path: Path) -> None:
    captioner = small_captioner(tmp_path, max_text=6, has_end=False)
    drawn = draw_captions(captioner, CODES, sampling=GREEDY, seeds=[0] * 6)
    narrow = search_captions(captioner, CODES, beams=BeamConfig(width=1))
    assert [captions[0].pieces for captions in narrow] == [caption.pieces for caption in drawn]


def test_a_search_finds_different_captions_the_best_first(captioner: Captioner) -> None:
    for captions in search_captions(captioner, CODES, beams=BeamConfig(width=4, length_power=0.0)):
        assert 1 <= len(captions) <= 4
        totals = [caption.log_probability for caption in captions]
        assert totals == sorted(totals, reverse=True)
        assert len({(caption.pieces, caption.is_whole) for caption in captions}) == len(captions)


def test_the_released_captioner_writes_a_fixed_number_of_tokens(tmp_path: Path) -> None:
    captioner = small_captioner(tmp_path, max_text=5, has_end=False)
    written = draw_captions(captioner, CODES, sampling=SamplingConfig(), seeds=list(range(6)))
    found = search_captions(captioner, CODES, beams=BeamConfig(width=2))
    for caption in [*written, *(captions[0] for captions in found)]:
        assert len(caption.pieces) == 5
        assert not caption.is_whole


@pytest.mark.parametrize("settings", [{"width": 0}, {"length_power": -1.0}])
def test_a_senseless_search_is_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        BeamConfig(**settings)
