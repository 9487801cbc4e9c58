"""Captions before the rules see them: one spelling for what readers take for the same, and nothing that hides.

In: a caption as a page or a table had it. Out: the caption without HTML, controls and hidden characters, in Unicode's
composed form (NFC), with full-width letters and digits folded and, if asked for, in simplified Chinese. Idempotent.
"""

import functools
import html
import re
import unicodedata

import opencc

from cogview.filters.scripts import has_han, has_kana, has_wide_script
from cogview.records.captions import clean_caption

_ENTITY = re.compile(r"&(#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]{2,31}\d{0,2});", re.IGNORECASE)
_TAG = re.compile(
    r"</?(a|abbr|b|big|br|center|cite|code|div|em|font|h[1-6]|hr|i|img|li|ol|p|s|script|small|span|strike|strong|style"
    r"|sub|sup|td|th|tr|table|tt|u|ul)(\s[^<>]{0,500})?/?>",
    re.IGNORECASE,
)
# Letters and digits are folded everywhere, and so are signs that no Chinese sentence needs; its commas, full stops,
# brackets and marks of exclamation stay as they are there.
_WIDE = range(0xFF01, 0xFF5F)
_CHINESE_PUNCTUATION = frozenset("！，：；？（）～")
_TO_ASCII = {code: code - 0xFEE0 for code in _WIDE if chr(code) not in _CHINESE_PUNCTUATION}
_ALL_TO_ASCII = {code: code - 0xFEE0 for code in _WIDE}
_HALF_WIDTH = re.compile(r"[\uff61-\uff9f]+")
_JOINER = re.compile("[\u200c\u200d]+")
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_EMOJI_STYLE = "\ufe0f"
_JOINING_SCRIPTS = (range(0x0600, 0x0E00), range(0x1000, 0x10A0), range(0x1780, 0x18B0))  # Arabic to Sinhala, ...


def normalise_caption(caption: str, *, simplify: bool) -> str:
    """The caption in its normal form; possibly empty. simplify: traditional to simplified Chinese (not in Japanese)."""
    text = clean_caption(_without_html(caption))
    if text.isascii():
        return text
    text = _JOINER.sub(_needed_joiner, text)
    text = _HALF_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = text.translate(_TO_ASCII if has_wide_script(text) else _ALL_TO_ASCII)
    text = unicodedata.normalize("NFC", text)
    if simplify and has_han(text) and not has_kana(text):
        text = _simplifier().convert(text)
    return text if text == caption else normalise_caption(text, simplify=simplify)


def _without_html(text: str) -> str:
    """Entities resolved and the tags of running text removed, until none are left: some pages escape twice."""
    while "&" in text or "<" in text:
        plain = _TAG.sub(" ", _ENTITY.sub(lambda match: html.unescape(match[0]), text))
        if plain == text:
            break
        text = plain
    return text


def _needed_joiner(match: re.Match[str]) -> str:
    """A joiner stays inside an emoji, and in scripts that it shapes; anywhere else it only hides."""
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    if not before or not after:
        return ""
    if any(ord(before) in script for script in _JOINING_SCRIPTS):
        return match[0][0]
    is_emoji = before == _EMOJI_STYLE or ord(before) in _SKIN_TONES or unicodedata.category(before) == "So"
    return "\u200d" if is_emoji and "\u200d" in match[0] and unicodedata.category(after) in ("So", "Sm") else ""


@functools.lru_cache(maxsize=1)
def _simplifier() -> "opencc.OpenCC":
    return opencc.OpenCC("t2s")
