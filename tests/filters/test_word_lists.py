from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.filters.rules import has_no_listed_word
from cogview.filters.verdicts import KEPT, Rejected
from cogview.filters.word_lists import find_listed_word, make_word_list, read_word_list

WORDS = make_word_list(["ass", "Free  Shipping", "包邮", "naïve art", "🙂"])


@pytest.mark.parametrize(
    ("caption", "word"),
    [
        ("a kick in the ASS", "ass"),
        ("free shipping today", "free shipping"),
        ("FREE\tshipping!", "free shipping"),
        ("ＦＲＥＥ ｓｈｉｐｐｉｎｇ", "free shipping"),
        ("红色手机壳包邮到家", "包邮"),
        ("a naïve art painting", "naïve art"),
    ],
)
def test_listed_words_are_found(caption: str, word: str) -> None:
    assert find_listed_word(caption, WORDS) == word
    assert has_no_listed_word(caption, words=WORDS) == Rejected("caption_listed_word", word)


@pytest.mark.parametrize(
    "caption", ["grass", "a class of its own", "free of shipping costs", "邮包", "", "shipping free"]
)
def test_parts_of_other_words_are_not(caption: str) -> None:
    assert has_no_listed_word(caption, words=WORDS) == KEPT


def test_a_list_is_a_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# spam\nfree shipping  # of shops\n\n包邮\n", encoding="utf-8")
    words = read_word_list(path)
    assert (words.phrases, words.pieces) == ({("free", "shipping")}, {"包邮"})


@pytest.mark.parametrize("content", [b"", b"# only a remark\n", b"\xff\xfe\x00", None])
def test_a_list_without_words_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="word_list"):
        read_word_list(path)
