"""Pictures as the image tokenizer takes them: resize the short side, cut the middle square, values in [0, 1].

One function for training the tokenizer and for using it, so that both see the same pixels. Section 2.2 of the paper;
the normalisation is the tokenizer's own.
"""

# B batch, C channels, H height, W width

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from cogview.records.images import fit_image


def square_pixels(image: Image.Image, *, image_size: int) -> npt.NDArray[np.uint8]:
    """The middle square of an RGB picture, scaled to image_size x image_size (smaller ones up), uint8 [H, W, 3]."""
    square = fit_image(image, image_size=image_size, crop=True)
    if square.width != image_size:
        square = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
    pixels: npt.NDArray[np.uint8] = np.asarray(square)
    return pixels


def pixel_batch(pixels: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """Pictures of one size, uint8 [H, W, 3] each, as float32 [B, 3, H, W] in [0, 1]."""
    pixels_BHWC = torch.from_numpy(np.stack(pixels))
    return pixels_BHWC.permute(0, 3, 1, 2).float().div_(255)
