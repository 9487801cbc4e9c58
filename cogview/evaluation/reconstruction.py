"""What an image tokenizer keeps of a picture: the ceiling for every sample that is decoded with it.

In: an image tokenizer and pictures. Out: their reconstructions and how close they are (section 2.2 of the paper
compares tokenizers by their reconstruction loss).
"""

# B batch, C channels, H height, W width

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cogview.errors import ConfigError
from cogview.evaluation.grids import from_pictures, to_pictures
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.structural_similarity import ssim
from cogview.tokenizers.vqvae import ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class ReconstructionScores:
    """What a tokenizer makes of pictures that are encoded to their nearest codes and decoded again.

    l2: mean squared error in normalised pixels, as in training, but of clamped pixels; psnr: in dB, and ssim: means
    over pictures; codes_used: share of the codebook that these pictures use; perplexity: of those codes.
    """

    l2: float
    psnr: float
    ssim: float
    codes_used: float
    perplexity: float


@torch.no_grad()
def score_reconstructions(tokenizer: ImageTokenizer, batches: Iterable[Tensor]) -> ReconstructionScores:
    """Score pictures given as batches float [B, 3, H, W] in [0, 1]. ConfigError without any, or for sides below 11."""
    tokenizer.eval()
    errors, ratios, similarities, counts_K = [], [], [], torch.zeros(tokenizer.num_codes)
    for images_BCHW in batches:
        codes_Bhw = tokenizer.encode(images_BCHW)
        decoded_BCHW = tokenizer.decode(codes_Bhw)
        counts_K += torch.bincount(codes_Bhw.flatten().cpu(), minlength=tokenizer.num_codes)
        errors.append(((decoded_BCHW - images_BCHW) / tokenizer.pixels.std).square().flatten(1).mean(1))
        ratios.append(psnr(decoded_BCHW, images_BCHW))
        similarities.append(ssim(decoded_BCHW, images_BCHW))
    if not errors:
        raise ConfigError("there are no pictures to score a tokenizer on; hold some back from training")
    return ReconstructionScores(
        l2=float(torch.cat(errors).mean()),
        psnr=float(torch.cat(ratios).mean()),
        ssim=float(torch.cat(similarities).mean()),
        codes_used=float((counts_K > 0).float().mean()),
        perplexity=code_perplexity(counts_K),
    )


def code_perplexity(counts_K: Tensor) -> float:
    """The number of codes that, used evenly, would hold as much information as these counts [K] of uses."""
    shares_K = counts_K / counts_K.sum()
    return float(torch.exp(-(shares_K * shares_K.clamp_min(1e-12).log()).sum()))


@torch.no_grad()
def reconstruct(
    pictures: Sequence[Image.Image], *, tokenizer: AnyImageTokenizer, batch_size: int = 32
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
