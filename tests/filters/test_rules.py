from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogview.errors import ConfigError
from cogview.filters.rules import (
    caption_length,
    has_words,
    is_no_boilerplate,
    is_no_file_name,
    is_well_encoded,
    max_aspect,
    min_contrast,
    min_side,
    script_share,
)
from cogview.filters.score_limits import read_limit, within_limit
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
        "9f86d081884c7d65",
        "3f2b8c1e-9d4a-4c5b-8e7f-0a1b2c3d4e5f",
        "5aB3kd9QQx1z8Yp2",
    ],
)
def test_names_of_files_are_no_captions(caption: str) -> None:
    assert is_no_file_name(caption) == Rejected("caption_is_file_name", caption)


@pytest.mark.parametrize(
    "caption",
    ["Image", "CLICK TO ENLARGE", "暂无图片", "no image", "[image]", "Photo 12", "picture 3 of 10", "图 3", "“图片”"],
)
def test_page_furniture_is_no_caption(caption: str) -> None:
    assert reason(is_no_boilerplate(caption)) == "caption_boilerplate"


@pytest.mark.parametrize("caption", ["...", "🙂", "—", "!?"])
def test_captions_need_a_letter_or_digit(caption: str) -> None:
    assert reason(has_words(caption)) == "caption_without_words"


@pytest.mark.parametrize(
    "caption",
    [
        "caf\ufffd",
        "café".encode().decode("cp1252"),
        "it’s a dog".encode().decode("cp1252"),
        "红猫".encode().decode("cp1252"),
    ],
)
def test_misencoded_captions_are_rejected(caption: str) -> None:
    assert reason(is_well_encoded(caption)) == "caption_misencoded"


@pytest.mark.parametrize("caption", ["NESCAFÉ®", "CAFÉ™", "café « noir »", "Ångström", "猫在睡觉", "50 °C", "½ cup"])
def test_rare_but_right_letters_are_kept(caption: str) -> None:
    assert is_well_encoded(caption) == KEPT


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "kept"),
        ("一只狗 and a cat", "kept"),
        ("2021", "kept"),
        ("кошка", "caption_other_script"),
        ("a кошка", "caption_other_script"),
        ("Redmi Note 7 в наличии", "kept"),
        ("犬がいる", "caption_other_script"),
    ],
)
def test_captions_in_other_scripts_are_rejected(caption: str, expected: str) -> None:
    assert reason(script_share(caption, scripts=("latin", "han"), least=0.5)) == expected
    assert script_share(caption, scripts=(), least=0.5) == KEPT


@pytest.mark.parametrize(
    ("limit", "extra", "expected"),
    [
        ("punsafe<=0.5", {"punsafe": 0.9}, "score_beyond_limit"),
        ("punsafe <= 0.5", {"punsafe": 0.5}, "kept"),
        ("punsafe<0.5", {"punsafe": 0.5}, "score_beyond_limit"),
        ("similarity>=2.8e-1", {"similarity": 0.3}, "kept"),
        ("similarity>0.28", {"similarity": 0.1}, "score_beyond_limit"),
        ("punsafe<=0.5", {}, "kept"),
        ("punsafe<=0.5", {"punsafe": None}, "kept"),
        ("punsafe<=0.5", {"punsafe": "high"}, "kept"),
        ("punsafe<=0.5", {"punsafe": float("nan")}, "kept"),
    ],
)
def test_scores_beyond_a_limit_are_rejected(limit: str, extra: dict[str, Any], expected: str) -> None:
    assert reason(within_limit(extra, limit=read_limit(limit))) == expected


@pytest.mark.parametrize("text", ["", "punsafe", "punsafe=0.5", "<=0.5", "punsafe<=high", "punsafe<=1e"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no limit"):
        read_limit(text)


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
        "mount-everest-89590_1280",
        "red-dress-summer-2019",
        "HMS Beagle 1831",
        "photo 51 by Franklin",
    ],
)
def test_honest_captions_are_kept(caption: str) -> None:
    for rule in (has_words, is_well_encoded, is_no_file_name, is_no_boilerplate):
        assert rule(caption) == KEPT, rule.__name__
