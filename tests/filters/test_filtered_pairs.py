import pytest
from PIL import Image

from cogview.filters.pairs import FilterRules, judge_pair
from cogview.records.pair import TextImagePair
from tests.records.test_images import RED_TO_BLUE
from tests.records.web_site import encode

RULES = FilterRules(min_side=32)
GOOD = encode(RED_TO_BLUE)


def pair(*captions: str, image: bytes = GOOD) -> TextImagePair:
    return TextImagePair(key="k", captions=captions, image_bytes=image, source="s")


def test_a_good_pair_is_kept_as_it_is() -> None:
    judged = judge_pair(pair("a dog", "一只狗"), RULES)
    assert judged.rejected is None
    assert judged.pair == pair("a dog", "一只狗")
    assert judged.dropped_captions == ()


def test_bad_captions_go_and_the_pair_stays() -> None:
    judged = judge_pair(pair("IMG_1234.jpg", "a\x00 dog", "a dog", "..."), RULES)
    assert judged.rejected is None
    assert judged.pair.captions == ("a dog",)
    assert [(row.rule, row.reason) for row in judged.dropped_captions] == [
        ("is_no_file_name", "caption_is_file_name"),
        ("has_words", "caption_without_words"),
    ]


@pytest.mark.parametrize(
    ("candidate", "rule", "reason"),
    [
        (pair("..."), "has_words", "caption_without_words"),
        (pair(), "judge_pair", "caption_missing"),
        (pair(" \u200b"), "judge_pair", "caption_missing"),
        (pair("a dog", image=encode(RED_TO_BLUE.resize((30, 30)))), "min_side", "image_too_small"),
        (pair("a dog", image=encode(RED_TO_BLUE.resize((400, 40)))), "max_aspect", "image_too_long"),
        (pair("a dog", image=encode(Image.new("RGB", (64, 64)))), "min_contrast", "image_blank"),
        (pair("a dog", image=b"<html>"), "decode_image", "image_is_html"),
    ],
)
def test_a_rejected_pair_names_rule_and_reason(candidate: TextImagePair, rule: str, reason: str) -> None:
    judged = judge_pair(candidate, RULES)
    assert judged.rejected is not None
    assert (judged.rejected.rule, judged.rejected.reason) == (rule, reason)
