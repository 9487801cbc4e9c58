"""SSIM and MS-SSIM against values of pytorch-msssim 1.0.0, and where they cannot be taken."""

import math

import pytest
import torch

from cogview.errors import ConfigError
from cogview.tokenizers.structural_similarity import least_side, ms_ssim, ssim, weights_of


def wave(*, phase: float, height: int, width: int) -> torch.Tensor:
    rows, columns = torch.arange(height).view(-1, 1) / height, torch.arange(width).view(1, -1) / width
    channels = [
        0.5 + 0.5 * torch.sin(2 * math.pi * ((3 + 2 * index) * columns + (5 - index) * rows) + phase * index)
        for index in range(3)
    ]
    return torch.stack(channels).unsqueeze(0)


def pair(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = wave(phase=0.0, height=height, width=width)
    mixed = (first * 0.8 + 0.2 * wave(phase=1.5, height=height, width=width)).clamp(0, 1)
    return first, mixed + 0.05 * wave(phase=7.0, height=height, width=width)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(176, 192, (0.8610175, 0.9442100, 0.9404376)), (181, 163, (0.8669621, 0.9448990, 0.9419337))],
    ids=["even sides", "odd sides"],
)
def test_values_are_those_of_pytorch_msssim(height: int, width: int, expected: tuple[float, ...]) -> None:
    first, second = pair(height, width)
    found = (
        ssim(first, second).item(),
        ms_ssim(first, second).item(),
        ms_ssim(first, second, scale_weights=weights_of(3)).item(),
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_equal_pictures_have_similarity_one_and_the_order_does_not_matter() -> None:
    first, second = pair(176, 176)
    assert ms_ssim(first, first).item() == pytest.approx(1.0, abs=1e-6)
    assert ms_ssim(first, second).item() == pytest.approx(ms_ssim(second, first).item(), abs=1e-6)


def test_each_pair_is_scored_by_itself() -> None:
    first, second = pair(176, 176)
    together = ms_ssim(torch.cat([first, first]), torch.cat([first, second]))
    assert together.tolist() == pytest.approx([1.0, ms_ssim(first, second).item()], abs=1e-5)


def test_opposite_pictures_have_a_finite_gradient() -> None:
    first = wave(phase=0.0, height=176, width=176)
    inverted = (1 - first).requires_grad_()
    ms_ssim(first, inverted).sum().backward()
    assert inverted.grad is not None
    assert bool(torch.isfinite(inverted.grad).all())


def test_pictures_too_small_for_the_scales_are_named() -> None:
    assert (least_side(5), least_side(1)) == (161, 11)
    small = torch.rand(1, 3, 160, 200)
    with pytest.raises(ConfigError, match="need sides of 161"):
        ms_ssim(small, small)
    assert ms_ssim(small, small, scale_weights=weights_of(4)).item() == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ConfigError, match="two equal batches"):
        ssim(small, small[:, :, 1:])
