"""Pictures as the image tokenizer takes them: resize the short side, cut the middle square, values in [0, 1].

One function for training the tokenizer and for using it, so that both see the same pixels. Section 2.2 of the paper;
the normalisation is the tokenizer's own. Finetunes may take another square than the middle one (`CropConfig`): which
one is decided by the picture's key and a seed, so that it is the same whenever and wherever the picture is cut.
"""

# B batch, C channels, H height, W width

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from cogview.errors import ConfigError
from cogview.records.images import fit_image


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Which square of a picture is taken.

    place: the centre, or random; smallest: a random square's side is between this share of the short side and all of
    it; seed: another one gives other squares.
    """

    place: Literal["centre", "random"] = "centre"
    smallest: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise ConfigError(f"crop.smallest is {self.smallest}; it is a share of the short side, above 0 and up to 1")
        if self.place == "centre" and (self.smallest, self.seed) != (1.0, 0):
            raise ConfigError("crop.smallest and crop.seed are of random squares; give --crop.place random as well")


CENTRE = CropConfig()


def cut_square(image: Image.Image, *, image_size: int, crop: CropConfig, key: str) -> npt.NDArray[np.uint8]:
    """The square of an RGB picture that `crop` chooses for its key, scaled to image_size, uint8 [H, W, 3].

    The choice does not depend on image_size: at several sizes it is the same square of the picture.
    """
    if crop.place == "centre":
        return square_pixels(image, image_size=image_size)
    draw = hashlib.sha256(f"{crop.seed}:{key}".encode()).digest()
    share, across, down = (int.from_bytes(draw[8 * i : 8 * i + 8], "big") / 2**64 for i in range(3))
    side = min(image.size) * (crop.smallest + share * (1 - crop.smallest))
    left, top = across * (image.width - side), down * (image.height - side)
    box = (left, top, left + side, top + side)
    square = image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)
    pixels: npt.NDArray[np.uint8] = np.asarray(square)
    return pixels


def square_pixels(image: Image.Image, *, image_size: int) -> npt.NDArray[np.uint8]:
    """The middle square of an RGB picture, scaled to image_size x image_size (smaller ones up), uint8 [H, W, 3]."""
    square = fit_image(image, image_size=image_size, crop=True)
    if square.width != image_size:
        square = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
    pixels: npt.NDArray[np.uint8] = np.asarray(square)
    return pixels


def pixel_batch(pixels: Sequence[npt.NDArray[np.uint8]], *, device: str = "cpu") -> torch.Tensor:
    """Pictures of one size, uint8 [H, W, 3] each, as float32 [B, 3, H, W] in [0, 1] on a device."""
    pixels_BHWC = torch.from_numpy(np.stack(pixels)).to(device)  # as bytes: a quarter of the way over the bus
    return pixels_BHWC.permute(0, 3, 1, 2).float().div_(255)
