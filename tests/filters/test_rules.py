import numpy as np
import pytest
from PIL import Image

from cogview.filters.rules import (
    caption_length,
    has_words,
    is_no_boilerplate,
    is_no_file_name,
    is_well_encoded,
    max_aspect,
    min_contrast,
    min_side,
)
from cogview.filters.verdicts import KEPT, Rejected, Verdict


def reason(verdict: Verdict) -> str:
    return verdict.reason if isinstance(verdict, Rejected) else "kept"


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), "kept"), ((63, 200), "image_too_small"), ((1, 1), "image_too_small")]
)
def test_small_images_are_rejected(size: tuple[int, int], expected: str) -> None:
    assert reason(min_side(Image.new("RGB", size), pixels=64)) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 100), "kept"), ((100, 300), "kept"), ((301, 100), "image_too_long"), ((1, 20_000), "image_too_long")],
)
def test_banners_are_rejected(size: tuple[int, int], expected: str) -> None:
    assert reason(max_aspect(Image.new("RGB", size), ratio=3.0)) == expected


def test_blank_images_are_rejected_and_pale_ones_are_not() -> None:
    flat = Image.new("RGB", (64, 64), (250, 250, 250))
    noisy = Image.fromarray(np.random.default_rng(0).integers(249, 252, (64, 64, 3), dtype=np.uint8))
    drawn = flat.copy()
    drawn.paste((240, 250, 250), (16, 16, 48, 48))
    for image, expected in ((flat, "image_blank"), (noisy, "image_blank"), (drawn, "kept")):
        assert reason(min_contrast(image, deviation=3.0)) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("a", "kept"), ("猫", "kept"), ("x" * 50, "kept"), ("x" * 51, "caption_too_long"), ("", "caption_too_short")],
)
def test_caption_lengths(caption: str, expected: str) -> None:
    assert reason(caption_length(caption, shortest=1, longest=50)) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "IMG_1234.jpg",
        "photo.PNG",
        "DSC00123",
        "img 20210304",
        "PXL_2023",
        "https://a.org/x?y=1",
        "www.example.org",
        "截图.png",
    ],
)
def test_names_of_files_are_no_captions(caption: str) -> None:
    assert is_no_file_name(caption) == Rejected("caption_is_file_name", caption)


@pytest.mark.parametrize("caption", ["Image", "CLICK TO ENLARGE", "暂无图片", "no image"])
def test_page_furniture_is_no_caption(caption: str) -> None:
    assert reason(is_no_boilerplate(caption)) == "caption_boilerplate"


@pytest.mark.parametrize("caption", ["...", "🙂", "—", "!?"])
def test_captions_need_a_letter_or_digit(caption: str) -> None:
    assert reason(has_words(caption)) == "caption_without_words"


def test_misencoded_captions_are_rejected() -> None:
    assert reason(is_well_encoded("caf\ufffd")) == "caption_misencoded"


@pytest.mark.parametrize(
    "caption",
    [
        "a photo of a dog",
        "dog.",
        "a dog, e.g. a poodle",
        "图片中有一只狗",
        "P5 button",
        "keycap: 1",
        "Z",
        "3 dogs",
        "image of 1 cat",
    ],
)
def test_honest_captions_are_kept(caption: str) -> None:
    for rule in (has_words, is_well_encoded, is_no_file_name, is_no_boilerplate):
        assert rule(caption) == KEPT, rule.__name__
