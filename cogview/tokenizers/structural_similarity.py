"""Structural similarity of pictures: SSIM (Wang et al. 2004) and its multi-scale form (Wang et al. 2003).

In: two batches of pixels in [0, 1]. Out: one similarity for each pair, 1 for equal pictures. Means are over an 11 x 11
Gaussian window of spread 1.5 that lies wholly inside the picture; both can be gone back through.
"""

# B batch, C channels, H height, W width

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.errors import ConfigError

WINDOW, SPREAD = 11, 1.5
LUMINANCE_FLOOR, CONTRAST_FLOOR = 0.01**2, 0.03**2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest first, as measured on people
# A power below one is infinitely steep at zero, so similarities are held above this before they are raised to it.
LEAST_SIMILARITY = 1e-4


def ssim(images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
    """SSIM of each pair, [B]: the mean over all windows and channels. ConfigError for sides below 11."""
    _check(images_BCHW, others_BCHW, num_scales=1)
    similarity_BC, _ = _similarities(images_BCHW, others_BCHW)
    return similarity_BC.mean(dim=1)


def ms_ssim(images_BCHW: Tensor, others_BCHW: Tensor, *, scale_weights: Sequence[float] = SCALE_WEIGHTS) -> Tensor:
    """Multi-scale SSIM of each pair, [B]: contrast and structure at each scale, luminance at the coarsest.

    scale_weights: the exponent of each scale; each scale halves the sides. Five scales need sides of 161 or more.
    """
    num_scales = len(scale_weights)
    _check(images_BCHW, others_BCHW, num_scales=num_scales)
    product_BC = images_BCHW.new_ones(images_BCHW.shape[:2])
    for scale, weight in enumerate(scale_weights):
        similarity_BC, structure_BC = _similarities(images_BCHW, others_BCHW)
        factor_BC = similarity_BC if scale == num_scales - 1 else structure_BC
        product_BC = product_BC * factor_BC.clamp_min(LEAST_SIMILARITY) ** weight
        images_BCHW, others_BCHW = _halved(images_BCHW), _halved(others_BCHW)
    return product_BC.mean(dim=1)


def least_side(num_scales: int) -> int:
    """The shortest side in pixels that `num_scales` scales can be taken of."""
    return (WINDOW - 1) * int(2 ** (num_scales - 1)) + 1


def weights_of(num_scales: int) -> tuple[float, ...]:
    """The weights of the finest scales, scaled to the sum of all five, for pictures too small for five."""
    kept = SCALE_WEIGHTS[:num_scales]
    return tuple(weight * sum(SCALE_WEIGHTS) / sum(kept) for weight in kept)


def _similarities(images_BCHW: Tensor, others_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM, and its part for contrast and structure, each [B, C]."""
    products = (images_BCHW.square(), others_BCHW.square(), images_BCHW * others_BCHW)
    means = [_windowed(values) for values in (images_BCHW, others_BCHW, *products)]
    mean_x, mean_y, square_x, square_y, product = means
    variances = (square_x - mean_x.square()) + (square_y - mean_y.square())
    covariance = product - mean_x * mean_y
    structure = (2 * covariance + CONTRAST_FLOOR) / (variances + CONTRAST_FLOOR)
    luminance = (2 * mean_x * mean_y + LUMINANCE_FLOOR) / (mean_x.square() + mean_y.square() + LUMINANCE_FLOOR)
    return (luminance * structure).mean(dim=(2, 3)), structure.mean(dim=(2, 3))


def _windowed(images_BCHW: Tensor) -> Tensor:
    """Gaussian means over every window, one axis after the other."""
    offsets = torch.arange(WINDOW, device=images_BCHW.device, dtype=torch.float32) - WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * SPREAD**2))
    kernel = (kernel / kernel.sum()).to(images_BCHW.dtype)
    channels = images_BCHW.shape[1]
    down = kernel.view(1, 1, WINDOW, 1).expand(channels, 1, WINDOW, 1)
    across = kernel.view(1, 1, 1, WINDOW).expand(channels, 1, 1, WINDOW)
    halfway = torch.nn.functional.conv2d(images_BCHW, down, groups=channels)
    return torch.nn.functional.conv2d(halfway, across, groups=channels)


def _halved(images_BCHW: Tensor) -> Tensor:
    """2 x 2 means; an odd side gets a row of zeros on both ends, as the usual implementations do."""
    padding = [side % 2 for side in images_BCHW.shape[2:]]
    return torch.nn.functional.avg_pool2d(images_BCHW, 2, padding=padding)


def _check(images_BCHW: Tensor, others_BCHW: Tensor, *, num_scales: int) -> None:
    if images_BCHW.shape != others_BCHW.shape or images_BCHW.dim() != 4:
        raise ConfigError(
            f"images of shape {tuple(images_BCHW.shape)} and {tuple(others_BCHW.shape)}: give two equal batches "
            "[batch, channels, height, width]"
        )
    if min(images_BCHW.shape[2:]) < least_side(num_scales):
        height, width = images_BCHW.shape[2:]
        raise ConfigError(
            f"images of {width} x {height} pixels are too small for {num_scales} scales, which need sides of "
            f"{least_side(num_scales)}; use fewer scales or larger pictures"
        )
