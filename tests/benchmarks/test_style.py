"""The style benchmark's own arithmetic, on small models: what is drawn for whom, and what is counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.style import CANDIDATES, Emoji, draw, draw_objects, judged, kept, pixels_of, reconstructed
from cogview.evaluation.style_judge import train_judge
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from tests.pipelines.trained_folders import GRID, write_trained_folders

SAMPLING = SamplingConfig(top_k=4)
STYLES = ["flat", "noto"]


@pytest.fixture(scope="module")
def painters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextToImage]:
    found = {}
    for seed, style in enumerate(STYLES):
        folders = write_trained_folders(tmp_path_factory.mktemp(style), seed=0)
        found[style] = TextToImage.load(
            folders.checkpoint, text_tokenizer=folders.text_tokenizer, image_tokenizer=folders.image_tokenizer
        )
        torch.manual_seed(seed)
        with torch.no_grad():
            found[style].model.word_embeddings.weight.add_(torch.randn(()))
    return found


def emoji() -> list[Emoji]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (6, 8 * GRID, 8 * GRID, 3), dtype=np.uint8)
    return [
        Emoji(name=f"thing {number}", style=STYLES[number % 2], pixels=pixels[number], is_asked=True)
        for number in range(6)
    ]


def test_each_picture_is_drawn_by_the_model_of_its_style(painters: dict[str, TextToImage], tmp_path: Path) -> None:
    asked = emoji()
    codes = draw(painters, asked, sampling=SAMPLING)
    assert codes.shape == (6, CANDIDATES, GRID, GRID)
    for style in STYLES:
        rows = [number for number, item in enumerate(asked) if item.style == style]
        alone = draw({style: painters[style]}, [asked[number] for number in rows], sampling=SAMPLING)
        assert torch.equal(codes[rows], alone)
    assert draw_objects(painters, painters["flat"], sampling=SAMPLING).width > 3 * 128


def test_figures_are_shares(painters: dict[str, TextToImage]) -> None:
    asked, pretrained = emoji(), painters["flat"]
    judge = train_judge(pixels_of(asked), torch.tensor([0, 1] * 3), num_styles=2, epochs=1, seed=0)
    codes = draw(painters, asked, sampling=SAMPLING)
    found = judged(codes, asked, STYLES, judge=judge, painters=painters, pretrained=pretrained)
    assert set(found) == {"named", "best", "kept", "named/flat", "named/noto"}
    assert all(0 <= value <= 1 for value in found.values())
    assert found["named"] == pytest.approx((found["named/flat"] + found["named/noto"]) / 2)
    assert kept(pretrained, asked, codes[:, 0]) == found["kept"]
    assert reconstructed(asked, pretrained).shape == (6, 3, 8 * GRID, 8 * GRID)
