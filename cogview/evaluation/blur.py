"""What the machine evaluation of CogView does to pictures before it looks at them (section 4.1).

In: pictures of one size. Out: pixels, after a change of contrast and a Gaussian filter of so many pixels, as Pillow has
it: three box filters, within three steps of 255 of the exact one. The contrast is of drawn pictures alone; the filter
is of both sides.
"""

# B batch, C channels, H height, W width

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

RADII = (0, 1, 2, 4, 8)


def with_contrast(picture: Image.Image, factor: float) -> Image.Image:
    """The picture with its contrast about its mean grey multiplied; the paper's evaluation takes 1.5."""
    return picture if factor == 1 else ImageEnhance.Contrast(picture).enhance(factor)


def blurred(picture: Image.Image, *, radius: float) -> Image.Image:
    """The picture under a Gaussian filter with this standard deviation in pixels; 0 leaves it."""
    return picture if radius == 0 else picture.filter(ImageFilter.GaussianBlur(radius))


def pixels_of(pictures: Sequence[Image.Image], *, contrast: float = 1.0, radius: float = 0.0) -> Tensor:
    """Pictures of one size as uint8 [B, 3, H, W], after contrast and then the filter."""
    changed = [blurred(with_contrast(picture.convert("RGB"), contrast), radius=radius) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in changed])).permute(0, 3, 1, 2)
