"""Sheets of pictures with their captions: what people look at first.

In: tiles (one or several pictures that belong together, and a caption). Out: one image on white, evenly spaced, with
small pictures enlarged. Captions need a font that has their letters: Latin ones always do, Chinese ones only where a
Chinese font is installed; a tile therefore carries an English stand-in too (`fallback`), used where there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN = 24
GUTTER = 20
STRIP_GAP = 4
CAPTION_GAP = 8
FONT_SIZE = 14
TITLE_SIZE = 22
MAX_CAPTION_LINES = 4
INK = (38, 42, 50)
FAINT_INK = (128, 134, 144)
HAIRLINE = (222, 225, 230)
PAPER = (255, 255, 255)

# Files under which the usual systems keep a font with Chinese letters; Pillow searches the system's font folders.
CHINESE_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "NotoSansCJKsc-Regular.otf", "SourceHanSansSC-Regular.otf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "uming.ttc"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc", "msyh.ttc", "simhei.ttf", "simsun.ttc"),
)
NO_FONT = "(a Chinese caption)"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Pictures side by side with one caption under them.

    fallback: drawn instead of a caption that no installed font can show; note: a second, fainter line.
    """

    images: tuple[Image.Image, ...]
    caption: str = ""
    fallback: str = NO_FONT
    note: str = ""


def draw_sheet(tiles: Sequence[Tile], *, title: str = "", columns: int = 0, picture_side: int = 160) -> Image.Image:
    """Lay tiles out row by row, every picture `picture_side` pixels wide.

    columns: tiles in a row; 0 chooses a pleasant number. Raises ValueError without tiles.
    """
    if not tiles:
        raise ValueError("a sheet needs one tile at least")
    strip = max(len(tile.images) for tile in tiles)
    columns = columns or _pleasant_columns(len(tiles), strip=strip)
    tile_width = strip * picture_side + (strip - 1) * STRIP_GAP
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(_tile_height(tile, width=tile_width, side=picture_side) for tile in row) for row in rows]
    top = MARGIN + (TITLE_SIZE + GUTTER if title else 0)
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * tile_width + (columns - 1) * GUTTER,
            top + sum(heights) + GUTTER * (len(rows) - 1) + MARGIN,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        font = _font(TITLE_SIZE, _needs_chinese(title) and can_draw(title))
        shown = _cut(drawable(title), width=sheet.width - 2 * MARGIN, font=font)
        draw.text((MARGIN, MARGIN - 4), shown, font=font, fill=INK)
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            left = MARGIN + column * (tile_width + GUTTER)
            _draw_tile(sheet, draw, tile, left=left, top=top, width=tile_width, side=picture_side)
        top += height + GUTTER
    return sheet


def to_pictures(images_BCHW: torch.Tensor) -> list[Image.Image]:
    """Float images in [0, 1] (values outside are clipped; the contrast is left as it is) as RGB pictures."""
    # The released code stretches each image to its own minimum and maximum, which changes contrast; a picture here
    # shows what the tokenizer decoded.
    bytes_BHWC = (images_BCHW.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image_HWC) for image_HWC in bytes_BHWC.cpu().numpy()]


def from_pictures(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures of one size as a float32 tensor `[batch, 3, height, width]` in [0, 1]; the inverse of `to_pictures`."""
    bytes_BHWC = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(bytes_BHWC).permute(0, 3, 1, 2).float() / 255


def can_draw(text: str) -> bool:
    """Whether an installed font has the letters of this text."""
    return not _needs_chinese(text) or chinese_font_name() is not None


def drawable(text: str, *, fallback: str = "") -> str:
    """The text, or its stand-in when no installed font can show it."""
    return text if can_draw(text) else fallback


@cache
def chinese_font_name() -> str | None:
    """The first installed font with Chinese letters, or None."""
    for name in CHINESE_FONTS:
        try:
            ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
        return name
    return None


def wrap_text(text: str, *, width: int, font: Font, max_lines: int = MAX_CAPTION_LINES) -> list[str]:
    """Break text into lines no wider than `width` pixels; what does not fit into `max_lines` ends in an ellipsis.

    Chinese may break between any two characters, everything else at spaces; a longer word is cut.
    """
    lines: list[str] = []
    line = ""
    for piece in _pieces(" ".join(text.split())):
        if font.getlength(line + piece.rstrip()) <= width or not line:
            line += piece
        else:
            lines.append(line.rstrip())
            line = piece
    lines = [*lines, line.rstrip()] if line.strip() else lines
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1] + "..."]
    return [_cut(line, width=width, font=font) for line in lines]


def _pieces(text: str) -> list[str]:
    """The units between which a line may break, each with the space that follows it."""
    pieces: list[str] = []
    word = ""
    for character in text:
        if _is_wide(character):
            pieces += [word, character] if word else [character]
            word = ""
        else:
            word += character
            if character == " ":
                pieces.append(word)
                word = ""
    return [*pieces, word] if word else pieces


def _cut(line: str, *, width: int, font: Font) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("...")
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _draw_tile(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, *, left: int, top: int, width: int, side: int
) -> None:
    bottom = top
    for number, image in enumerate(tile.images):
        picture = _enlarged(image, side=side)
        x = left + number * (side + STRIP_GAP)
        sheet.paste(picture, (x, top))
        # A hairline around each picture: a white one would melt into the paper.
        draw.rectangle((x - 1, top - 1, x + picture.width, top + picture.height), outline=HAIRLINE)
        bottom = max(bottom, top + picture.height)
    y = bottom + CAPTION_GAP
    for line, font, ink in _caption_lines(tile, width=width):
        draw.text((left, y), line, font=font, fill=ink)
        y += _line_height(font)


def _tile_height(tile: Tile, *, width: int, side: int) -> int:
    pictures = max(_shown_size(image, side=side)[1] for image in tile.images)
    lines = _caption_lines(tile, width=width)
    return pictures + (CAPTION_GAP + sum(_line_height(font) for _, font, _ in lines) if lines else 0)


def _caption_lines(tile: Tile, *, width: int) -> list[tuple[str, Font, tuple[int, int, int]]]:
    shown: list[tuple[str, Font, tuple[int, int, int]]] = []
    for text, ink in ((drawable(tile.caption, fallback=tile.fallback), INK), (drawable(tile.note), FAINT_INK)):
        font = _font(FONT_SIZE, _needs_chinese(text))
        shown += [(line, font, ink) for line in wrap_text(text, width=width, font=font)]
    return shown


def _enlarged(image: Image.Image, *, side: int) -> Image.Image:
    return image.convert("RGB").resize(_shown_size(image, side=side), Image.Resampling.BICUBIC)


def _shown_size(image: Image.Image, *, side: int) -> tuple[int, int]:
    return side, max(1, round(image.height * side / image.width))


def _pleasant_columns(count: int, *, strip: int) -> int:
    """A sheet rather wide than high, at most 8 pictures wide, and without a nearly empty last row."""
    most = max(1, 8 // strip)
    wanted = max(1, min(most, round((1.7 * count / strip) ** 0.5)))
    full = [columns for columns in range(max(1, wanted - 1), min(most, wanted + 2) + 1) if count % columns == 0]
    return min(full, key=lambda columns: abs(columns - wanted)) if full else min(wanted, count)


def _line_height(font: Font) -> int:
    return round(getattr(font, "size", FONT_SIZE) * 1.35)


@cache
def _font(size: int, chinese: bool) -> Font:
    name = chinese_font_name() if chinese else None
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


def _needs_chinese(text: str) -> bool:
    return any(_is_wide(character) for character in text)


def _is_wide(character: str) -> bool:
    return "\u2e80" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or "\uff00" <= character <= "\uffef"
