"""The rules: each is a small function of an image or a caption and its one threshold.

CogView's authors filtered little (watermarks and white borders stayed in); these rules remove what carries no pair at
all: icons, banners, empty pictures, captions that are file names or page furniture.
"""

import re

from PIL import Image, ImageStat

from cogview.filters.verdicts import KEPT, Rejected, Verdict

_FILE_NAME = re.compile(r"^\S*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)$", re.IGNORECASE)
_CAMERA_NAME = re.compile(
    r"^(img|dsc[nf]?|dscn|pict?|p|mvi|vid|pxl|photo|image|screenshot)[-_ ]?\d{3,}\S*$", re.IGNORECASE
)
_ADDRESS = re.compile(r"^(https?://|www\.)\S+$", re.IGNORECASE)
_BOILERPLATE = frozenset(
    {
        *("image", "images", "photo", "photos", "picture", "pictures", "pic", "img", "thumbnail", "thumb", "logo"),
        *("icon", "avatar", "banner", "placeholder", "untitled", "none", "null", "undefined", "n/a", "loading"),
        *("default", "advertisement", "no image", "image not available", "featured image", "profile picture"),
        *("click to enlarge", "click to view", "click for larger image"),
        *("图片", "图像", "照片", "无标题", "缩略图", "加载中", "暂无图片", "点击查看大图"),
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
    largest = max(ImageStat.Stat(image).stddev)
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
    """Reject captions with characters that a wrong decoding left behind."""
    return Rejected("caption_misencoded") if "\ufffd" in caption else KEPT


def is_no_file_name(caption: str) -> Verdict:
    """Reject captions that are a file name, a camera's number or an address."""
    if _FILE_NAME.match(caption) or _CAMERA_NAME.match(caption) or _ADDRESS.match(caption):
        return Rejected("caption_is_file_name", caption[:80])
    return KEPT


def is_no_boilerplate(caption: str) -> Verdict:
    """Reject captions that pages put on any picture."""
    return Rejected("caption_boilerplate", caption[:80]) if caption.lower() in _BOILERPLATE else KEPT
