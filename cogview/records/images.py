"""Image bytes of unknown origin in, plain RGB pictures out, and pictures back to bytes that we made ourselves.

Served bytes are never stored: a picture is decoded, checked and encoded anew, which strips metadata, trailing archives
and everything else that a decoder can be made to stumble over. Only JPEG, PNG, WebP and GIF are opened.
"""

import io
import struct
import threading
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from cogview.records.containment import decode_contained
from cogview.records.pair import Unusable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 40_000_000  # 120 MB of RGB; Pillow itself only warns up to 179 megapixels
# Of formats that are decoded whole before they are scaled down, as JPEG is not. WebP's decoder holds four copies.
FORMAT_PIXELS = {"PNG": 16_000_000, "GIF": 16_000_000, "WEBP": 8_000_000}
BACKGROUND = (255, 255, 255)
LARGE_PIXELS = 4_000_000
STRIP_ROWS = 512
MAX_SCANS = 100  # a progressive JPEG has about ten; each one costs the time of the whole picture
SMALL_PIXELS = 128 * 128  # below this, PNG costs little and keeps flat colours exact
FLAT_COLOURS, FLAT_SHARE = 256, 0.75  # a drawing has few colours, 16 of them nearly everywhere; a grey photo has not

_one_large = threading.Lock()
_JPEG, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on hostile bytes. Nothing of our own runs inside those try blocks.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_BOMB_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How pictures are stored.

    image_size: longest allowed short side in pixels, larger ones are scaled down (0 keeps the size); crop: cut the
    middle square as well; encoding: "auto" takes PNG for small or flat pictures and JPEG for the rest;
    max_pixels: larger sources are refused, and those beyond FORMAT_PIXELS; honour_data_mining: refuse files whose
    metadata forbid training on them.
    """

    image_size: int = 0
    crop: bool = False
    encoding: Literal["auto", "png", "jpeg"] = "auto"
    jpeg_quality: int = 95
    max_pixels: int = MAX_PIXELS
    honour_data_mining: bool = True


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """A stored picture: its bytes, the suffix of its file ("png" or "jpg") and its size in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int


def store_image(data: bytes, settings: ImageSettings) -> EncodedImage | Unusable:
    """Decode, fit and encode anew: the way of every picture into our tars."""
    with ExitStack() as hold:
        decoded = decode_image(data, max_pixels=settings.max_pixels, short_side=settings.image_size, hold=hold)
        if isinstance(decoded, Unusable):
            return decoded
        fitted = fit_image(decoded, image_size=settings.image_size, crop=settings.crop)
        return encode_image(fitted, encoding=settings.encoding, jpeg_quality=settings.jpeg_quality)


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, short_side: int = 0, hold: ExitStack | None = None
) -> Image.Image | Unusable:
    """The picture in RGB, upright, its first frame, on white where it is transparent; or the reason why not.

    short_side: the caller will scale down to this, so a JPEG, and any large picture, may come at a fraction of its size
    (at least twice this side); hold: is left when the picture is no longer needed, so that a process holds one large
    picture at a time.
    Reasons: image_empty, image_is_html, image_format_refused, not_an_image, image_too_many_pixels,
    image_too_many_scans, image_truncated, image_damaged; decoder_died and decoder_hung where decoding is contained
    (see `containment`).
    """
    return decode_contained(partial(decode_here, hold=hold), data, max_pixels=max_pixels, short_side=short_side)


def decode_here(
    data: bytes, *, max_pixels: int, short_side: int, hold: ExitStack | None = None
) -> Image.Image | Unusable:
    """`decode_image` in this process, whatever becomes of it."""
    refused = _refuse_bytes(data)
    if refused is not None:
        return refused
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        limit = min(max_pixels, FORMAT_PIXELS.get(image.format or "", max_pixels))
        if image.width * image.height > limit:
            return Unusable("image_too_many_pixels", f"{image.width}x{image.height}")
        if short_side:
            _draft(image, short_side)
        if hold is not None and image.width * image.height > LARGE_PIXELS:
            hold.enter_context(_one_large)
        image.load()
        return _upright(_to_rgb(image, factor=_reduction(image, short_side)), orientation=_orientation(image))
    except _BOMB_ERRORS:
        return Unusable("image_too_many_pixels")
    except UnidentifiedImageError:
        return _sniff(data)
    except _DECODE_ERRORS as error:
        truncated = "truncated" in str(error).lower()
        return Unusable("image_truncated" if truncated else "image_damaged", type(error).__name__)


def fit_image(image: Image.Image, *, image_size: int, crop: bool = False) -> Image.Image:
    """Scale down until the short side is `image_size` (never up; 0 leaves it), then cut the middle square if asked."""
    scale = image_size / min(image.size) if image_size else 1.0
    if scale < 1.0:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = _shrink(image, size)
    if not crop:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def encode_image(
    image: Image.Image, *, encoding: Literal["auto", "png", "jpeg"] = "auto", jpeg_quality: int = 95
) -> EncodedImage:
    """Encode an RGB picture without metadata. The same pixels and the same Pillow give the same bytes."""
    as_png = encoding == "png" or (encoding == "auto" and _is_small_or_flat(image))
    clean = image.copy() if image.info else image
    clean.info.clear()  # the PNG writer would copy a colour profile from here
    buffer = io.BytesIO()
    if as_png:
        clean.save(buffer, format="PNG", compress_level=6)
    else:
        clean.save(buffer, format="JPEG", quality=jpeg_quality, subsampling=0)
    suffix = "png" if as_png else "jpg"
    return EncodedImage(data=buffer.getvalue(), suffix=suffix, width=image.width, height=image.height)


def _shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Lanczos on vector instructions: Pillow's own but for the rounding between its two passes, three times as fast.

    Large pictures, which Pillow does not hold in one piece, stay with it; so do all before torch 2.12, which has no
    Lanczos.
    """
    if image.mode != "RGB" or image.width * image.height > LARGE_PIXELS or not _has_lanczos():
        return image.resize(size, Image.Resampling.LANCZOS)
    import pyarrow as pa
    from torch.nn.functional import interpolate
    from torch.utils.dlpack import from_dlpack

    # Both ways in Arrow's form, four bytes a pixel as Pillow holds them, so that nothing is copied.
    pixels = from_dlpack(pa.array(image).values)
    pixels_1CHW = pixels.view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
    small_1CHW = interpolate(pixels_1CHW, size=size[::-1], mode="lanczos", antialias=True)
    small = pa.array(small_1CHW.permute(0, 2, 3, 1).numpy().reshape(-1))
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(small, 4), "RGB", size)


@cache
def _has_lanczos() -> bool:
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)


def _refuse_bytes(data: bytes) -> Unusable | None:
    if not data:
        return Unusable("image_empty")
    has_many = data.startswith(_JPEG) and data.count(_START_OF_SCAN) > MAX_SCANS
    return Unusable("image_too_many_scans") if has_many else None


def _draft(image: Image.Image, short_side: int) -> None:
    scale = 2 * short_side / min(image.size)
    if scale < 1.0:
        image.draft("RGB", (int(image.width * scale), int(image.height * scale)))


def _reduction(image: Image.Image, short_side: int) -> int:
    """By how much a large picture is averaged down at once, a power of two: what is left has twice the side wanted."""
    if not short_side or image.width * image.height <= LARGE_PIXELS:
        return 1
    factor = 1
    while factor < STRIP_ROWS and min(image.size) // (2 * factor) >= 2 * short_side:
        factor *= 2
    return factor


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:
        return None  # broken metadata beside sound pixels
    return orientation if isinstance(orientation, int) else None


def _upright(image: Image.Image, *, orientation: int | None) -> Image.Image:
    method = _TRANSPOSITIONS.get(orientation) if orientation is not None else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, *, factor: int = 1) -> Image.Image:
    """In strips, so that of a large picture only what is left of it is held beside the original."""
    if factor == 1 and image.mode == "RGB" and not image.has_transparency_data:
        return image
    if factor == 1 and image.height <= STRIP_ROWS:
        return _strip_to_rgb(image)
    whole = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + STRIP_ROWS, image.height)))
        strip.info = image.info  # a palette's transparent colour
        whole.paste(_strip_to_rgb(strip).reduce(factor), (0, top // factor))
    return whole


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _from_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; `convert` alone would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.float32)
    return Image.fromarray(np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8))  # 65535 = 255 x 257


def _sniff(data: bytes) -> Unusable:
    """Name what was sent instead of an image."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--")):
        return Unusable("image_is_html")
    if b"<svg" in head or head.startswith((b"%pdf", b"%!ps", b"ii*\x00", b"mm\x00*", b"bm", b"8bps", b"pk\x03\x04")):
        return Unusable("image_format_refused")
    return Unusable("not_an_image")


def _is_small_or_flat(image: Image.Image) -> bool:
    pixels = image.width * image.height
    if pixels <= SMALL_PIXELS:
        return True
    counts = sorted((count for count, _ in image.getcolors(FLAT_COLOURS) or ()), reverse=True)
    return sum(counts[:16]) >= FLAT_SHARE * pixels
