"""The rules: each is a small function of an image or a caption and its one threshold.

CogView's authors filtered little (watermarks and white borders stayed in); these rules remove what carries no pair at
all: icons, banners, empty pictures, captions that are file names, page furniture, or in a script that is not wanted.
"""

import re
from collections.abc import Collection

import numpy as np
from PIL import Image

from cogview.filters.scripts import letters_by_script
from cogview.filters.verdicts import KEPT, Rejected, Verdict
from cogview.filters.word_lists import WordList, find_listed_word

_FILE_NAME = re.compile(r"^\S*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)$", re.IGNORECASE)
_CAMERA_NAME = re.compile(
    r"^(img|dsc[nf]?|dscn|pict?|p|mvi|vid|pxl|photo|image|screenshot)[-_ ]?\d{3,}\S*$", re.IGNORECASE
)
_ADDRESS = re.compile(r"^(https?://|www\.)\S+$", re.IGNORECASE)
# One token of hexadecimal digits, or of many digits among letters that make no word: what servers call their files.
_SERIAL_NUMBER = re.compile(
    r"^(?=\S*\d)([0-9a-f]{12,}|[0-9a-f-]{32,}|(?!\S*[a-z]{4})(?=\S*[a-z])(?=(\S*\d){6})[\w-]{16,})$", re.IGNORECASE
)
_NUMBERED = re.compile(
    r"^((image|photo|picture|pic|img|slide|page|figure|fig\.?|thumbnail|screenshot|gallery|图片|图|照片)\s?[#№-]?\s?\d{1,4}"
    r"(\s?(of|/|共)\s?\d{1,4})?|第\s?\d{1,4}\s?张)$",
    re.IGNORECASE,
)
_EVERYDAY = re.compile(
    r"[\u00a0-\u017f\u0370-\u04ff\u2010-\u2044\u20ac\u2122\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]"
)
_BOILERPLATE = frozenset(
    {
        *("image", "images", "photo", "photos", "picture", "pictures", "pic", "img", "thumbnail", "thumb", "logo"),
        *("icon", "avatar", "banner", "placeholder", "untitled", "none", "null", "undefined", "n/a", "loading"),
        *("default", "advertisement", "no image", "image not available", "featured image", "profile picture"),
        *("click to enlarge", "click to view", "click for larger image", "click here", "view larger image", "zoom"),
        *("post image", "post thumbnail", "product image", "product photo", "main image", "cover image", "hero image"),
        *("article image", "blog image", "author avatar", "user avatar", "site logo", "company logo", "stock photo"),
        *("read more", "learn more", "share this", "add to cart", "image may contain", "no description available"),
        *("image no longer available", "this image has been removed", "no alt text provided for this image"),
        *(
            "图片",
            "图像",
            "照片",
            "相片",
            "配图",
            "插图",
            "无标题",
            "缩略图",
            "加载中",
            "暂无图片",
            "点击查看大图",
            "点击放大",
        ),
        *(
            "查看原图",
            "图片加载失败",
            "图片描述",
            "在这里插入图片描述",
            "商品图片",
            "产品图片",
            "头像",
            "网站首页",
            "二维码",
        ),
    }
)


def min_side(image: Image.Image, *, pixels: int) -> Verdict:
    """Reject images whose shorter side is below `pixels`."""
    if min(image.size) < pixels:
        return Rejected("image_too_small", f"{image.width}x{image.height}")
    return KEPT


def max_aspect(image: Image.Image, *, ratio: float) -> Verdict:
    """Reject images whose longer side is more than `ratio` times the shorter one."""
    if max(image.size) > ratio * min(image.size):
        return Rejected("image_too_long", f"{image.width}x{image.height}")
    return KEPT


def min_contrast(image: Image.Image, *, deviation: float) -> Verdict:
    """Reject near-constant images: no colour channel (0..255) has at least this standard deviation."""
    counts_CV = np.array(image.histogram(), np.float64).reshape(-1, 256)  # channels, values
    values, pixels = np.arange(256), image.width * image.height
    means_C = counts_CV @ values / pixels
    largest = float(np.sqrt(np.max(counts_CV @ values**2 / pixels - means_C**2)))
    if largest < deviation:
        return Rejected("image_blank", f"{largest:.2f}")
    return KEPT


def caption_length(caption: str, *, shortest: int, longest: int) -> Verdict:
    """Reject captions with fewer than `shortest` or more than `longest` characters."""
    if len(caption) < shortest:
        return Rejected("caption_too_short", str(len(caption)))
    if len(caption) > longest:
        return Rejected("caption_too_long", str(len(caption)))
    return KEPT


def has_words(caption: str) -> Verdict:
    """Reject captions without a single letter or digit of any script."""
    return KEPT if any(character.isalnum() for character in caption) else Rejected("caption_without_words")


def is_well_encoded(caption: str) -> Verdict:
    """Reject captions that were decoded wrongly: with characters that stand for lost ones, or UTF-8 read as Latin-1."""
    if "\ufffd" in caption or _reads_as_utf8(caption):
        return Rejected("caption_misencoded", caption[:80])
    return KEPT


def is_no_file_name(caption: str) -> Verdict:
    """Reject captions that are a file name, a camera's or a server's number, or an address."""
    if any(name.match(caption) for name in (_FILE_NAME, _CAMERA_NAME, _ADDRESS, _SERIAL_NUMBER)):
        return Rejected("caption_is_file_name", caption[:80])
    return KEPT


def is_no_boilerplate(caption: str) -> Verdict:
    """Reject captions that pages put on any picture."""
    bare = caption.lower().strip(" .,:;!?…-–—|*[]()\"'“”。，：！【】")
    return Rejected("caption_boilerplate", caption[:80]) if bare in _BOILERPLATE or _NUMBERED.match(bare) else KEPT


def script_share(caption: str, *, scripts: Collection[str], least: float) -> Verdict:
    """Reject captions of whose letters less than the share `least` belongs to `scripts`; no scripts: all are kept."""
    letters = letters_by_script(caption) if scripts else None
    if not letters:
        return KEPT
    share = sum(letters[script] for script in scripts) / letters.total()
    return Rejected("caption_other_script", f"{share:.2f} {letters.most_common(1)[0][0]}") if share < least else KEPT


def has_no_listed_word(caption: str, *, words: WordList) -> Verdict:
    """Reject captions with a word or phrase of the list."""
    found = find_listed_word(caption, words)
    return Rejected("caption_listed_word", found) if found else KEPT


def _reads_as_utf8(caption: str) -> bool:
    """Whether the caption's bytes in Windows-1252 are UTF-8 of everyday letters and signs: `caf\u00c3\u00a9`, `â€™`.

    A capital and a sign can look like that by chance (`NESCAFÉ®`); what they would decode to is no everyday letter.
    """
    if caption.isascii():
        return False
    try:
        decoded = caption.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return False
    return all(character.isascii() or _EVERYDAY.match(character) for character in decoded)
