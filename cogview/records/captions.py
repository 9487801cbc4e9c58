"""Caption hygiene: any text of the outside world in, text that files, tables and terminals can hold out.

Nothing is judged here (that is the filters' room) and wording is kept: only what no reader can see or what breaks
readers goes away.
"""

import re
import unicodedata
from collections.abc import Iterable

# Joiners stay: they shape Persian and Indic words, and hold emoji sequences together.
_KEPT_FORMAT_CHARACTERS = frozenset("\u200c\u200d")
# Controls, bidi marks and tags, surrogates, private use. Unassigned ones stay: they are the next Unicode's emoji.
_DROPPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co"})
_WHITESPACE = re.compile(r"\s+")
_MAX_MARKS = 3  # combining marks in a row; more is a flood that climbs over the neighbouring lines


def clean_caption(text: str) -> str:
    """The text without invisible controls, with single spaces, trimmed; possibly empty. Idempotent.

    Removed: NUL and other controls, bidirectional overrides, byte order marks, zero-width spaces, tag characters,
    lone surrogates, private code points, and combining marks beyond three in a row.
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    spaced = _WHITESPACE.sub(" ", text)
    kept: list[str] = []
    marks = 0
    for character in spaced:
        category = unicodedata.category(character)
        if category in _DROPPED_CATEGORIES and character not in _KEPT_FORMAT_CHARACTERS:
            continue
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if marks <= _MAX_MARKS:
            kept.append(character)
    return _WHITESPACE.sub(" ", "".join(kept)).strip()


def clean_captions(texts: Iterable[object]) -> tuple[str, ...]:
    """The distinct non-empty captions among `texts`, cleaned, in their order. What is not a string is left out."""
    cleaned = (clean_caption(text) for text in texts if isinstance(text, str))
    return tuple(dict.fromkeys(text for text in cleaned if text))
