import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from cogview.records.images import ImageSettings, decode_image, encode_image, fit_image, store_image
from cogview.records.pair import Unusable
from tests.records.web_site import encode

RED_TO_BLUE = Image.fromarray(
    np.stack(
        [np.linspace(255, 0, 96)[None].repeat(64, 0), np.zeros((64, 96)), np.linspace(0, 255, 96)[None].repeat(64, 0)],
        -1,
    ).astype(np.uint8)
)


def decoded(data: bytes) -> Image.Image:
    image = decode_image(data)
    assert isinstance(image, Image.Image), image
    assert image.mode == "RGB"
    return image


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def svg() -> bytes:
    return b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image_empty"),
        (b"<!DOCTYPE html><html>403</html>", "image_is_html"),
        (b"\xef\xbb\xbf \n<html><body>no</body>", "image_is_html"),
        (svg(), "image_format_refused"),
        (b"%PDF-1.7 ...", "image_format_refused"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image_format_refused"),
        (b"PK\x03\x04" + bytes(40), "image_format_refused"),
        (encode(RED_TO_BLUE, "TIFF"), "image_format_refused"),
        (encode(RED_TO_BLUE, "BMP"), "image_format_refused"),
        (b"hello", "not_an_image"),
        (encode(RED_TO_BLUE, "JPEG")[:-300], "image_truncated"),
        (png_of_size(30_000, 30_000), "image_too_many_pixels"),
        (png_of_size(12_000, 10_000), "image_too_many_pixels"),
        (png_of_size(0, 10), "not_an_image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_image_is_a_reason(data: bytes, reason: str) -> None:
    answer = decode_image(data)
    assert isinstance(answer, Unusable)
    assert answer.reason == reason


def test_a_compressed_text_bomb_is_refused() -> None:
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("a", "0" * 5_000_000, zip=True)
    answer = decode_image(encode(RED_TO_BLUE, pnginfo=bomb))
    assert isinstance(answer, Unusable)
    assert answer.reason == "image_damaged"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_four_formats_are_read(image_format: str) -> None:
    image = decoded(encode(RED_TO_BLUE, image_format))
    assert image.size == (96, 64)
    assert image.getpixel((2, 30))[0] > 200
    assert image.getpixel((93, 30))[2] > 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that undoes what the tag asks for
    stored = RED_TO_BLUE if orientation == 1 else RED_TO_BLUE.transpose(Image.Transpose(turned[orientation]))
    image = decoded(encode(stored, "PNG", exif=exif))
    assert image.size == RED_TO_BLUE.size
    assert image.tobytes() == RED_TO_BLUE.tobytes()


def test_broken_exif_does_not_cost_the_picture() -> None:
    assert decoded(encode(RED_TO_BLUE, "JPEG", exif=b"Exif\0\0garbage" + bytes(50))).size == (96, 64)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        data = encode(image, "PNG", transparency=1)
    else:
        data = encode(Image.new(mode, (8, 8)), "PNG")
    assert decoded(data).getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(4, 0))
    grey = np.asarray(decoded(encode(ramp, "PNG")))[0, :, 0]
    assert np.abs(grey.astype(int) - np.arange(256)).max() <= 1


def test_cmyk_is_converted() -> None:
    red, green, blue = decoded(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert red > 200
    assert max(green, blue) < 60


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for image_format in ("GIF", "WEBP"):
        data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
        assert decoded(data).getpixel((4, 4))[0] > 200


def test_storing_is_deterministic_and_strips_metadata() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    data = encode(RED_TO_BLUE, "JPEG", exif=exif, icc_profile=b"p" * 200, comment=b"where I live") + b"PK<?php evil ?>"
    stored = [store_image(data, ImageSettings(encoding=encoding)) for encoding in ("jpeg", "png", "jpeg", "png")]
    assert not any(isinstance(item, Unusable) for item in stored)
    assert stored[0] == stored[2]
    assert stored[1] == stored[3]
    for item in stored[:2]:
        again = Image.open(io.BytesIO(item.data))
        assert not again.getexif()
        assert not {"icc_profile", "comment", "exif"} & set(again.info)
        assert b"evil" not in item.data


def test_small_or_flat_pictures_are_png_and_others_jpeg() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    assert encode_image(noise).suffix == "jpg"
    assert encode_image(noise.resize((64, 64))).suffix == "png"
    assert encode_image(Image.new("RGB", (500, 500), "red")).suffix == "png"
    grey_photo = Image.linear_gradient("L").rotate(30, fillcolor=99).convert("RGB")
    assert encode_image(grey_photo).suffix == "jpg"
    drawing = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(drawing).ellipse((40, 40, 260, 260), outline=0, width=9)
    smooth = drawing.resize((256, 256), Image.Resampling.LANCZOS).convert("RGB")
    assert 16 < len(smooth.getcolors(256) or ()) <= 256
    assert encode_image(smooth).suffix == "png"


def test_fitting_scales_down_and_never_up() -> None:
    wide = Image.new("RGB", (400, 200))
    assert fit_image(wide, image_size=100).size == (200, 100)
    assert fit_image(wide, image_size=100, crop=True).size == (100, 100)
    assert fit_image(wide, image_size=300).size == (400, 200)
    assert fit_image(wide, image_size=0).size == (400, 200)


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (257, 2000), (300, 900)])
def test_fitting_is_lanczos_as_pillow_does_it(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)  # frequencies as of a photo, and beyond
    fitted = fit_image(image, image_size=100)
    reference = image.resize(fitted.size, Image.Resampling.LANCZOS)
    difference = np.asarray(fitted).astype(int) - np.asarray(reference).astype(int)
    assert 10 * np.log10(255**2 / max(1e-9, np.mean(difference**2))) > 50  # dB; rounded between the passes
    assert fitted.mode == "RGB"


def test_a_large_jpeg_keeps_its_size_after_draft_decoding() -> None:
    stored = store_image(encode(RED_TO_BLUE.resize((1920, 1280)), "JPEG"), ImageSettings(image_size=64))
    assert not isinstance(stored, Unusable)
    assert (stored.width, stored.height) == (96, 64)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_mutated_images_are_pictures_or_reasons(image_format: str) -> None:
    whole = encode(RED_TO_BLUE, image_format)
    dice = random.Random(image_format)
    for _ in range(300):
        data = bytearray(whole[: dice.randrange(1, len(whole) + 1)] if dice.random() < 0.3 else whole)
        for _ in range(dice.randrange(1, 8)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        answer = decode_image(bytes(data), max_pixels=1_000_000)
        assert isinstance(answer, (Image.Image, Unusable))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_large_pictures_come_reduced_and_like_small_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = RED_TO_BLUE.resize((1536, 1100), Image.Resampling.BICUBIC)
    picture = {
        "RGB": ramp,
        "RGBA": ramp.convert("RGBA"),
        "P": ramp.quantize(32),
        "L": ramp.convert("L"),
        "I;16": Image.fromarray(np.asarray(ramp.convert("L")).astype(np.uint16) * 257),
    }[mode]
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture, "PNG", exif=exif)
    whole = store_image(data, ImageSettings(image_size=64, encoding="png"))
    monkeypatch.setattr("cogview.records.images.LARGE_PIXELS", 1000)
    reduced_picture = decode_image(data, short_side=64)
    assert isinstance(reduced_picture, Image.Image)
    assert reduced_picture.size == (138, 192)  # 1536 x 1100 by 8, turned
    reduced = store_image(data, ImageSettings(image_size=64, encoding="png"))
    assert not isinstance(whole, Unusable)
    assert not isinstance(reduced, Unusable)
    assert (reduced.width, reduced.height) == (whole.width, whole.height) == (64, 89)
    first, second = (np.asarray(Image.open(io.BytesIO(item.data))).astype(int) for item in (whole, reduced))
    assert np.abs(first - second)[2:-2, 2:-2].max() <= 4


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded() -> None:
    data = encode(RED_TO_BLUE, "JPEG", progressive=True)
    start, end = data.index(b"\xff\xda"), data.rindex(b"\xff\xd9")
    answer = decode_image(data[:start] + data[start:end] * 50 + data[end:])
    assert isinstance(answer, Unusable)
    assert answer.reason == "image_too_many_scans"
    assert decoded(data).size == (96, 64)


def test_an_animated_png_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert b"acTL" in data
    assert decoded(data).getpixel((4, 4)) == (255, 0, 0)


def test_an_inverted_cmyk_jpeg_keeps_its_colours() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 0, 255, 0)), "JPEG")
    assert b"Adobe" in data
    red, green, blue = decoded(data).getpixel((8, 8))
    assert min(red, green) > 200
    assert blue < 60
