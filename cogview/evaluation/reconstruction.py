"""What an image tokenizer keeps of a picture: the ceiling for every sample that is decoded with it.

In: an image tokenizer and pictures. Out: their reconstructions and how close they are (section 2.2 of the paper
compares tokenizers by their reconstruction loss).
"""

# B batch, C channels, H height, W width

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cogview.evaluation.grids import from_pictures, to_pictures
from cogview.tokenizers.vqvae import ImageTokenizer


@torch.no_grad()
def reconstruct(
    pictures: Sequence[Image.Image], *, tokenizer: ImageTokenizer, batch_size: int = 32
) -> list[Image.Image]:
    """Encode and decode pictures of one size, whose sides are multiples of the tokenizer's stride."""
    device = next(tokenizer.parameters()).device
    decoded: list[Image.Image] = []
    for start in range(0, len(pictures), batch_size):
        images_BCHW = from_pictures(pictures[start : start + batch_size]).to(device)
        decoded += to_pictures(tokenizer.decode(tokenizer.encode(images_BCHW)))
    return decoded


def psnr(images_BCHW: Tensor, originals_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image `[B]`, for values in [0, 1]; equal images count as 100 dB."""
    mse_B = (images_BCHW.double() - originals_BCHW.double()).square().flatten(1).mean(1)
    return -10 * mse_B.clamp_min(1e-10).log10()


def mean_psnr(pictures: Sequence[Image.Image], *, originals: Sequence[Image.Image]) -> float:
    """The mean over pictures of their PSNR against the originals, in dB."""
    return float(psnr(from_pictures(pictures), from_pictures(originals)).mean())
