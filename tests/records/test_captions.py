import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview.records.captions import clean_caption, clean_captions


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\x00b", "ab"),
        ("  two\t words\r\n", "two words"),
        ("\ufeffbom", "bom"),
        ("evil\u202egpj.exe", "evilgpj.exe"),
        ("\u2066isolated\u2069", "isolated"),
        ("zero\u200bwidth", "zerowidth"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("tags\U000e0041\U000e007f", "tags"),
        ("escape \x1b[31mred", "escape [31mred"),
        ("Z" + "\u0301" * 50, "Z" + "\u0301" * 3),
        ("全角　空格", "全角 空格"),
        ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
        (" \u200b\x00 ", ""),
        ("[ROI1] stays as it is", "[ROI1] stays as it is"),
    ],
)
def test_a_caption_loses_what_nobody_can_see(dirty: str, clean: str) -> None:
    assert clean_caption(dirty) == clean


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_clean_captions_are_encodable_and_stay_as_they_are(text: str) -> None:
    once = clean_caption(text)
    once.encode()
    assert "\x00" not in once
    assert once == once.strip()
    assert clean_caption(once) == once


def test_only_distinct_texts_are_captions() -> None:
    assert clean_captions(["a", " a ", "", None, 3, "b\x00"]) == ("a", "b")
