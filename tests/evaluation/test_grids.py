"""Sheets of pictures: every picture is where it belongs, captions fit, and tensors become the right pixels."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from cogview.evaluation import grids
from cogview.evaluation.grids import Tile, draw_sheet, drawable, from_pictures, to_pictures, wrap_text

COLOURS = [(200, 30, 30), (30, 160, 60), (40, 60, 220), (240, 200, 20), (120, 40, 160), (20, 20, 20)]


def plain(colour, *, size=(8, 8)):
    return Image.new("RGB", size, colour)


def where(sheet, colour):
    return (np.asarray(sheet) == np.array(colour)).all(axis=2)


def count(sheet, colour):
    return int(where(sheet, colour).sum())


def test_a_sheet_shows_every_picture_enlarged_on_white():
    sheet = draw_sheet([Tile(images=(plain(colour),), caption="a plain colour") for colour in COLOURS], picture_side=40)
    assert [count(sheet, colour) for colour in COLOURS] == [40 * 40] * 6
    pixels = np.asarray(sheet)
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_candidates_stand_side_by_side_over_one_caption():
    sheet = draw_sheet([Tile(images=tuple(map(plain, COLOURS[:3])))], picture_side=20)
    tops = {tuple(np.argwhere(where(sheet, colour)).min(axis=0)) for colour in COLOURS[:3]}
    assert len({top for top, _ in tops}) == 1
    assert len({left for _, left in tops}) == 3


def test_wide_pictures_keep_their_proportions():
    sheet = draw_sheet([Tile(images=(plain(COLOURS[0], size=(16, 8)),))], picture_side=64)
    assert count(sheet, COLOURS[0]) == 64 * 32


def test_a_longer_caption_makes_room_for_itself():
    picture = plain(COLOURS[0])
    short = draw_sheet([Tile(images=(picture,), caption="red")], picture_side=120)
    long = draw_sheet([Tile(images=(picture,), caption="a large red circle on a blue background")], picture_side=120)
    assert long.height > short.height
    assert long.width == short.width


def test_a_title_stands_above():
    tiles = [Tile(images=(plain(COLOURS[0]),))]
    assert draw_sheet(tiles, title="Samples").height > draw_sheet(tiles).height


def test_a_chinese_caption_falls_back_where_no_font_has_its_letters(monkeypatch):
    monkeypatch.setattr(grids, "chinese_font_name", lambda: None)
    assert drawable("白色背景上的一个大红色圆形", fallback="zh: large red circle") == "zh: large red circle"
    assert drawable("a large red circle", fallback="zh") == "a large red circle"


def test_a_sheet_needs_a_tile():
    with pytest.raises(ValueError, match="one tile"):
        draw_sheet([])


def test_text_wraps_within_the_width_and_loses_no_word():
    font = ImageFont.load_default(14)
    text = "a small yellow star above a small red square on a black background"
    lines = wrap_text(text, width=160, font=font, max_lines=9)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 160 for line in lines)


def test_text_that_does_not_fit_ends_in_an_ellipsis():
    font = ImageFont.load_default(14)
    lines = wrap_text("word " * 60, width=100, font=font, max_lines=2)
    assert len(lines) == 2
    assert lines[-1].endswith("...")
    (line,) = wrap_text("x" * 400, width=100, font=font)
    assert line.endswith("...")
    assert font.getlength(line) <= 100


def test_chinese_wraps_between_characters():
    font = ImageFont.load_default(14)
    lines = wrap_text("白色背景上的一个大红色圆形", width=60, font=font, max_lines=20)
    assert "".join(lines) == "白色背景上的一个大红色圆形"
    assert len(lines) > 1


def test_no_text_makes_no_lines():
    assert wrap_text("  ", width=50, font=ImageFont.load_default(14)) == []


def test_tensors_become_pictures_and_back():
    images_BCHW = torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    pictures = to_pictures(images_BCHW)
    assert [picture.size for picture in pictures] == [(16, 8)] * 3
    assert torch.allclose(from_pictures(pictures), images_BCHW, atol=0.5 / 255 + 1e-6)


def test_values_outside_are_clipped_and_contrast_is_kept():
    images_BCHW = torch.tensor([-0.5, 0.25, 1.5]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    (picture,) = to_pictures(images_BCHW)
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (64, 64, 64), (255, 255, 255)]
