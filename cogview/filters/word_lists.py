"""Lists of words that no caption may have: one word or phrase a line, in any language, `#` for remarks.

Where words are set apart by spaces, whole words are compared, without regard to case: `ass` is not found in `grass`.
Phrases in Chinese, Japanese or Thai are found anywhere in a caption, since nothing sets them apart.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from cogview.errors import ConfigError

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_WITHOUT_SPACES = re.compile(r"[\u0e00-\u0e7f\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True, kw_only=True)
class WordList:
    """phrases: tuples of words; pieces: found anywhere; the longest of each, to know how far to look."""

    phrases: frozenset[tuple[str, ...]]
    pieces: frozenset[str]
    longest_phrase: int
    piece_lengths: tuple[int, ...]


@functools.lru_cache(maxsize=8)
def read_word_list(path: Path) -> WordList:
    """Read a list. ConfigError if the file is missing, not UTF-8, or empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"word_list: {path} cannot be read as UTF-8 text ({error}); give a word a line") from error
    return make_word_list([line.split("#", 1)[0] for line in lines], name=str(path))


def make_word_list(lines: list[str], *, name: str = "the list") -> WordList:
    """The list of these words and phrases."""
    words = {_folded(line).strip() for line in lines} - {""}
    pieces = frozenset(word for word in words if _WITHOUT_SPACES.search(word))
    phrases = frozenset(tuple(_WORD.findall(word)) for word in words - pieces) - {()}
    if not pieces and not phrases:
        raise ConfigError(f"word_list: {name} has no word; write one word or phrase a line")
    return WordList(
        phrases=phrases,
        pieces=pieces,
        longest_phrase=max(map(len, phrases), default=0),
        piece_lengths=tuple(sorted({len(piece) for piece in pieces})),
    )


def find_listed_word(caption: str, words: WordList) -> str:
    """The first listed word or phrase in the caption, or the empty string."""
    text = _folded(caption)
    tokens = tuple(_WORD.findall(text))
    for start in range(len(tokens)):
        for length in range(1, min(words.longest_phrase, len(tokens) - start) + 1):
            if tokens[start : start + length] in words.phrases:
                return " ".join(tokens[start : start + length])
    for length in words.piece_lengths:
        for start in range(len(text) - length + 1):
            if text[start : start + length] in words.pieces:
                return text[start : start + length]
    return ""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
