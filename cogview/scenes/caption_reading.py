"""Caption reading: what a caption of the demo corpus says, as a scene; the counterpart of `reading` for text.

In: a text, written by a model. Out: the scene that it describes, or None for one that follows none of the templates of
`wording`. A text that is nearly a caption is none: the reader guesses nothing.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import cast

from cogview.scenes import wording
from cogview.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PAIRS,
    POSITIONS,
    SIZES,
    Background,
    Colour,
    Kind,
    Position,
    Scene,
    Shape,
    Size,
)


def read_caption(caption: str) -> Scene | None:
    """The scene of a caption in either language; without a named position a single shape is in the centre.

    Spaces and full-width forms may have been folded, as a text tokenizer does.
    """
    english, chinese = _folded(caption), _folded(caption).replace(" ", "")
    for is_english, pattern, positions in _patterns():
        match = pattern.fullmatch(english if is_english else chinese)
        if match is not None:
            return _scene(match, positions=positions, names=_ENGLISH if is_english else _CHINESE)
    return None


_ENGLISH = {name: name for name in (*SIZES, *COLOURS, *KINDS, *BACKGROUNDS)} | {
    words: position for position, words in wording.ENGLISH.items()
}
_CHINESE = {words: name for name, words in wording.CHINESE.items()}
_ONE: tuple[Position, ...] = ()


@cache
def _patterns() -> list[tuple[bool, re.Pattern[str], tuple[Position, ...]]]:
    """(whether English, pattern, positions of both shapes) of every template."""
    tables = (
        (True, wording.ENGLISH_ONE, _ONE),
        (True, wording.ENGLISH_BESIDE, PAIRS[0]),
        (True, wording.ENGLISH_ABOVE, PAIRS[1]),
        (False, wording.CHINESE_ONE, _ONE),
        (False, wording.CHINESE_BESIDE, PAIRS[0]),
        (False, wording.CHINESE_ABOVE, PAIRS[1]),
    )
    return [
        (is_english, re.compile(_pattern(template, is_english=is_english)), positions)
        for is_english, templates, positions in tables
        for template in templates
    ]


def _pattern(template: str, *, is_english: bool) -> str:
    def choice(group: str, names: tuple[str, ...]) -> str:
        words = [name if is_english else wording.CHINESE[name] for name in names]
        return f"(?P<{group}>{'|'.join(map(re.escape, words))})"

    def shape(which: str) -> str:
        parts = [
            choice(f"{which}_{part}", names) for part, names in (("size", SIZES), ("colour", COLOURS), ("kind", KINDS))
        ]
        return (" " if is_english else "").join(parts)

    places = [wording.ENGLISH[name] if is_english else wording.CHINESE[name] for name in POSITIONS]
    fields = {
        "a": shape("a"),
        "b": shape("b"),
        "background": choice("background", BACKGROUNDS),
        "position": f"(?P<position>{'|'.join(map(re.escape, places))})",
    }
    text = _folded(template) if is_english else _folded(template).replace(" ", "")
    return "".join(
        fields[part[1:-1]] if part.startswith("{") else re.escape(part) for part in re.split(r"(\{\w+\})", text)
    )


def _scene(match: re.Match[str], *, positions: tuple[Position, ...], names: dict[str, str]) -> Scene:
    words = {group: names[text] for group, text in match.groupdict().items()}
    places = positions or (cast(Position, words.get("position", "centre")),)
    return Scene(
        background=cast(Background, words["background"]),
        shapes=tuple(_shapes(words, places)),
    )


def _shapes(words: dict[str, str], places: tuple[Position, ...]) -> Iterator[Shape]:
    for which, position in zip("ab", places, strict=False):
        yield Shape(
            kind=cast(Kind, words[f"{which}_kind"]),
            colour=cast(Colour, words[f"{which}_colour"]),
            size=cast(Size, words[f"{which}_size"]),
            position=position,
        )


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
