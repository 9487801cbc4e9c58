"""Which scripts a caption is written in: enough to tell Chinese and English from the rest, and easy to explain."""

import re
from collections import Counter

# Letters of a script as character classes; what belongs to none of them counts as `other`.
_RANGES = {
    "latin": r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\ufb00-\ufb06",
    "han": r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
    "kana": r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "hangul": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
    "cyrillic": r"\u0400-\u0481\u048a-\u052f",
    "arabic": r"\u0620-\u064a\u066e-\u06d3\u0750-\u077f",
}
SCRIPTS = (*_RANGES, "other")
_LETTERS = {name: re.compile(f"[{ranges}]") for name, ranges in _RANGES.items()}
_HAN = _LETTERS["han"]
_HAN_OR_KANA = re.compile(f"[{_RANGES['han']}{_RANGES['kana']}]")
_KANA = _LETTERS["kana"]
_MANY_HAN = 0.3  # a Chinese sentence with an English name in it: one character says as much as a word


def letters_by_script(caption: str) -> Counter[str]:
    """How many letters of each script there are; digits, signs and emoji are letters of none."""
    if caption.isascii():
        letters = sum(map(str.isalpha, caption))
        return Counter(latin=letters) if letters else Counter()
    counts = Counter({name: len(pattern.findall(caption)) for name, pattern in _LETTERS.items()})
    counts["other"] = max(0, sum(map(str.isalpha, caption)) - counts.total())
    return +counts


def language_group(caption: str) -> str:
    """`Chinese`, `Latin script`, `Chinese and Latin`, `Japanese`, ...: for tables, by script alone."""
    counts = letters_by_script(caption)
    if not counts:
        return "no letters"
    if counts["kana"]:
        return "Japanese"
    if counts["han"]:
        share = counts["han"] / counts.total()
        return "Chinese" if share >= _MANY_HAN else "Chinese and Latin"
    largest = counts.most_common(1)[0][0]
    return {"latin": "Latin script", "hangul": "Korean", "other": "other scripts"}.get(largest, largest.capitalize())


def has_han(caption: str) -> bool:
    """Whether there is a Chinese character."""
    return not caption.isascii() and _HAN.search(caption) is not None


def has_kana(caption: str) -> bool:
    """Whether there is a Japanese syllable: its Chinese characters are not ours to simplify."""
    return not caption.isascii() and _KANA.search(caption) is not None


def has_wide_script(caption: str) -> bool:
    """Whether the text is Chinese or Japanese, where full-width commas and brackets are the right ones."""
    return not caption.isascii() and _HAN_OR_KANA.search(caption) is not None
