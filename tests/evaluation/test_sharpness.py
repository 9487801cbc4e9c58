"""Sharpness of edges: steeper edges have more of it, whatever their length, and faint noise has hardly any."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from cogview.evaluation.sharpness import edge_sharpness, enlarged, mean_edge_sharpness
from cogview.scenes.scene import Scene, Shape, draw_scene


def ramp(width: int, *, height: float = 1.0, side: int = 64) -> torch.Tensor:
    """A picture with one upright edge of one grey channel that is `width` pixels wide."""
    values = (torch.arange(side) - side // 2).clamp(0, width) / width * height
    return values.expand(1, 1, side, side).clone()


@pytest.mark.parametrize("width", [1, 2, 5, 10])
def test_an_edge_is_as_sharp_as_it_is_steep(width: int) -> None:
    assert edge_sharpness(ramp(width)).item() == pytest.approx(1 / width, rel=1e-5)
    assert edge_sharpness(ramp(width, height=0.5)).item() == pytest.approx(0.5 / width, rel=1e-5)
    assert edge_sharpness(ramp(width, side=32)).item() == pytest.approx(1 / width, rel=1e-5)


def test_a_flat_picture_has_none_and_faint_noise_adds_none() -> None:
    assert edge_sharpness(torch.full((2, 3, 16, 16), 0.3)).tolist() == [0.0, 0.0]
    noise = 0.004 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert edge_sharpness(ramp(2) + noise) < edge_sharpness(ramp(2))


def test_blur_and_bicubic_enlargement_take_it_away() -> None:
    shape = Shape(kind="star", colour="red", size="large", position="centre")
    scene = Scene(background="white", shapes=(shape,))
    large = draw_scene(scene, image_size=128)
    larger_copy = enlarged(draw_scene(scene, image_size=64), size=(128, 128))
    blurred = large.filter(ImageFilter.GaussianBlur(2))
    assert mean_edge_sharpness([large]) > 1.2 * mean_edge_sharpness([larger_copy])
    assert mean_edge_sharpness([larger_copy]) > mean_edge_sharpness([blurred])
    assert mean_edge_sharpness([Image.fromarray(np.zeros((8, 8, 3), np.uint8))]) == 0
