"""Bad pictures: bytes, and the reason that they must get."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from benchmarks.hostile.cases import Case


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(width: int = 320, height: int = 200, *, seed: int = 0) -> Image.Image:
    """A picture with structure, another one for each seed."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / (7 + seed % 11 + band)) + np.cos(rows / (5 + band)) for band in range(3)]
    return Image.fromarray(np.stack([(wave + 2) * 63 for wave in waves], -1).astype(np.uint8))


@cache
def pictures(*, large: bool = True) -> list[tuple[Case, bytes]]:
    """Every bad picture, and every strange one that is good. large: also those that take time and memory."""
    good, jpeg, noise = encode(photo()), encode(photo(), "JPEG"), np.random.default_rng(0).bytes(5_000_000)
    return [
        *_bombs(),
        _bad("a truncated JPEG", jpeg[:-400], "image_truncated"),
        _bad("a truncated PNG", good[:-400], "image_truncated"),
        _bad("a header and nothing else", good[:33], "image_truncated", "image_damaged", "not_an_image"),
        _bad("a page named .jpg", b"<!DOCTYPE html><h1>403</h1>", "image_is_html"),
        _bad("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "image_format_refused"),
        _bad("PDF", b"%PDF-1.7\n%...", "image_format_refused"),
        _bad("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_format_refused"),
        _bad("ZIP", b"PK\x03\x04" + bytes(60), "image_format_refused"),
        *((_bad(kind, encode(photo(), kind), "image_format_refused")) for kind in ("TIFF", "BMP")),
        *((_bad(kind, encode(photo(), kind), "not_an_image")) for kind in ("ICO", "PPM", "SGI")),
        _bad("a PNG of 0 x 10", _png_header(0, 10), "not_an_image"),
        _bad("noise", noise, "not_an_image"),
        _fine("1 x 1", encode(photo(1, 1))),
        _fine("1 x 20,000", encode(photo(1, 20_000))),
        _fine("PNG sent as JPEG", good),
        _fine("CMYK", encode(photo().convert("CMYK"), "JPEG")),
        _fine("grey", encode(photo().convert("L"), "JPEG")),
        _fine("16 bits", encode(Image.fromarray(np.linspace(0, 65535, 9000, dtype=np.uint16).reshape(90, 100)))),
        _fine("RGBA", encode(photo().convert("RGBA"))),
        _fine("grey and alpha", encode(photo().convert("LA"))),
        _fine("a palette with transparency", encode(photo().quantize(16), transparency=0)),
        _fine("a black-and-white PNG", encode(photo().convert("1"))),
        _fine("a solid colour", encode(Image.new("RGB", (64, 64), "red"))),
        _fine("an archive behind a JPEG", jpeg + b"PK\x03\x04<?php evil ?>"),
        _fine("broken EXIF", encode(photo(), "JPEG", exif=b"Exif\0\0garbage" + bytes(500))),
        _fine("a broken colour profile", encode(photo(), "JPEG", icc_profile=b"p" * 60_000)),
        _bad(
            "a colour profile of 5 MB",
            encode(photo(), icc_profile=np.random.default_rng(1).bytes(5_000_000)),
            "image_damaged",
        ),
        *(_fine(f"an animated {kind}", _animation(kind, frames=3)) for kind in ("GIF", "WEBP", "PNG")),
        _fine("a GIF of 10,000 frames", _long_gif(10_000)),
        *(_fine(f"EXIF orientation {number}", _turned(number)) for number in (2, 6, 8)),
        *(_large() if large else ()),
    ]


def _large() -> list[tuple[Case, bytes]]:
    return [
        _fine("16 megapixels of one colour", encode(Image.new("RGB", (4000, 3990), "blue"), compress_level=9)),
        _fine("16 megapixels of glass", _glass("PNG", 4000, 3990)),
        _fine("a WebP of 8 megapixels", _glass("WEBP", 4000, 2000)),
        _bad("a WebP of 39 megapixels", _glass("WEBP", 6500, 6000), "image_too_many_pixels"),
        _bad("a PNG of 39 megapixels", encode(Image.new("L", (6500, 6000))), "image_too_many_pixels"),
        _fine("a progressive JPEG of 39 megapixels", encode(Image.new("RGB", (6500, 6000)), "JPEG", progressive=True)),
    ]


def _bombs() -> list[tuple[Case, bytes]]:
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "0" * 50_000_000, zip=True)
    scans = encode(photo(64, 64), "JPEG", progressive=True)
    start, end = scans.index(b"\xff\xda"), scans.rindex(b"\xff\xd9")
    return [
        _bad("a PNG of 30,000 x 30,000", _png_header(30_000, 30_000), "image_too_many_pixels"),
        _bad("a PNG of 120 megapixels", _png_header(12_000, 10_000), "image_too_many_pixels"),
        _bad(
            "a GIF of 65,535 x 65,535",
            _gif_header(65_535, 65_535),
            "image_too_many_pixels",
        ),
        _bad("50 MB of compressed text in a PNG", encode(photo(), pnginfo=text), "image_damaged"),
        _bad(
            "a JPEG of 10,000 scans",
            scans[:start] + scans[start:end] * (10_000 // scans.count(b"\xff\xda")) + scans[end:],
            "image_too_many_scans",
        ),
    ]


def _bad(name: str, data: bytes, *expected: str) -> tuple[Case, bytes]:
    return Case(topic="pictures", name=name, expected=expected), data


def _fine(name: str, data: bytes) -> tuple[Case, bytes]:
    return Case(topic="pictures", name=name, expected=("ok",)), data


def _glass(image_format: str, width: int, height: int) -> bytes:
    return encode(Image.new("RGBA", (width, height), (9, 9, 9, 99)), image_format)


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def _gif_header(width: int, height: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00\x3b"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def _animation(image_format: str, *, frames: int) -> bytes:
    images = [photo(40, 40, seed=number) for number in range(frames)]
    return encode(images[0], image_format, save_all=True, append_images=images[1:])


def _long_gif(frames: int) -> bytes:
    """A GIF of two frames of which the second comes again and again."""
    data = encode(Image.new("P", (16, 16), 0), "GIF", save_all=True, append_images=[Image.new("P", (16, 16), 1)])
    second = (
        data.index(b"\x21\xf9", data.index(b"\x21\xf9") + 2) if data.count(b"\x21\xf9") > 1 else data.rindex(b"\x2c")
    )
    return data[:second] + data[second:-1] * frames + data[-1:]


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(), "JPEG", exif=exif)
