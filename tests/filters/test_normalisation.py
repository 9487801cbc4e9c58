import gzip
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview.filters.normalisation import normalise_caption


@pytest.mark.parametrize(
    ("caption", "normal"),
    [
        ("a\x00 dog\u202e\u2066", "a dog"),
        ("a \ud800dog", "a dog"),
        ("d\U000e0061og\ufeff", "dog"),
        ("[RO\u200dI1] d\u200cog", "[ROI1] dog"),
        ("👩\u200d🚒 at work", "👩\u200d🚒 at work"),
        ("🏃🏽\u200d♂\ufe0f", "🏃🏽\u200d♂\ufe0f"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("e\u0301te\u0301", "été"),
        ("Z" + "\u0301" * 40, "Ź\u0301\u0301"),
        ("ＡＢＣ　１２３！", "ABC 123!"),
        ("红色的ＣＡＲ，很快！（新）", "红色的CAR，很快！（新）"),
        ("ｱｲｳ の", "アイウ の"),
        ("Tom &amp;amp; Jerry&#39;s", "Tom & Jerry's"),
        ("Orchid<br>Dresses <b>100%</b>", "Orchid Dresses 100%"),
        ("<a href='http://a.org/'>A show", "A show"),
        ("x <3 y & z < 4, AT&T; a&copy=2", "x <3 y & z < 4, AT&T; a&copy=2"),
        ("地板上有兩個藍白色的瓷器花瓶", "地板上有两个蓝白色的瓷器花瓶"),
        ("頭髮與發現", "头发与发现"),
        ("漢字のテスト", "漢字のテスト"),
        (" \u200b\u3000", ""),
    ],
)
def test_captions_have_one_normal_form(caption: str, normal: str) -> None:
    assert normalise_caption(caption, simplify=True) == normal


def test_traditional_characters_stay_if_asked() -> None:
    assert normalise_caption("兩個花瓶", simplify=False) == "兩個花瓶"


@given(st.text(alphabet=st.characters(), max_size=40))
def test_a_normal_form_is_final_and_can_be_written(text: str) -> None:
    once = normalise_caption(text, simplify=True)
    assert normalise_caption(once, simplify=True) == once
    once.encode()
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Co") for character in once)


def test_real_captions_change_only_where_something_was_wrong(shared_data: Path) -> None:
    for name, at_most in (("captions_en.txt.gz", 0), ("captions_zh.txt.gz", 6)):
        captions = gzip.decompress((shared_data / name).read_bytes()).decode().splitlines()
        changed = [c for c in captions if normalise_caption(c, simplify=True) != " ".join(c.split())]
        assert len(changed) <= at_most, changed[:5]
    texts = pq.read_table(shared_data / "url_lists" / "img2dataset_test_1000.parquet")["TEXT"].to_pylist()
    changed = [text for text in texts if normalise_caption(text, simplify=True) != " ".join(text.split())]
    assert all({"&", "<"} & set(text) or not text.isascii() for text in changed)
