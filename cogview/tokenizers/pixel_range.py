"""What an image tokenizer asks of pixels and codes, and the range in which its networks see pixels.

In: images in [0, 1] or codes, unchecked. Out: nothing but an error that names what is wrong, or normalised pixels.
"""

# B batch, C channels, H height, W width, h w height and width in codes

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError, VocabularyError


class PixelRange(nn.Module):
    """(pixel - mean) / std and back. It follows the tokenizer to its device; its numbers are settings, not weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1] as the networks see them."""
        return (images_BCHW - self.mean) / self.std

    def unclamped(self, normalised_BCHW: Tensor) -> Tensor:
        """Pixels around [0, 1], for losses."""
        return normalised_BCHW * self.std + self.mean

    def restored(self, normalised_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1], clamped, not stretched: a per-image stretch would change every picture's contrast."""
        return self.unclamped(normalised_BCHW).clamp(0, 1)


def check_images(images_BCHW: Tensor, *, stride: int) -> None:
    """ConfigError unless these are finite pictures [B, 3, H, W] with sides that are multiples of `stride`."""
    if images_BCHW.dim() != 4 or images_BCHW.shape[1] != 3:
        raise ConfigError(f"images of shape {tuple(images_BCHW.shape)}: give [batch, 3, height, width]")
    height, width = images_BCHW.shape[2:]
    if height % stride or width % stride or not height or not width:
        raise ConfigError(f"images of {width} x {height} pixels: both sides must be multiples of {stride}")
    if not images_BCHW.is_floating_point():
        raise ConfigError(f"images of {images_BCHW.dtype}: give floats in [0, 1]; `pixel_batch` makes them of bytes")
    if not torch.isfinite(images_BCHW).all():
        raise ConfigError("images hold NaN or infinite pixels; decode them again")


def check_codes(codes_Bhw: Tensor, *, num_codes: int) -> None:
    """ConfigError unless these are maps [B, h, w], VocabularyError unless all are codes of this codebook."""
    if codes_Bhw.dim() != 3 or codes_Bhw.is_floating_point():
        raise ConfigError(
            f"codes of shape {tuple(codes_Bhw.shape)} and {codes_Bhw.dtype}: give integers [batch, height, width]"
        )
    if codes_Bhw.numel() and (int(codes_Bhw.min()) < 0 or int(codes_Bhw.max()) >= num_codes):
        raise VocabularyError(
            f"codes from {int(codes_Bhw.min())} to {int(codes_Bhw.max())} for a codebook of {num_codes}; "
            "they come from another tokenizer, or their vocabulary offset was not removed"
        )
