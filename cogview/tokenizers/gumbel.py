"""Gumbel sampling of codes with a straight-through gradient (CogView, section 2.2; Jang et al. 2017, Maddison et al.
2017).

In: encoder outputs, the codebook, a temperature t and the position of the draw. Out: vectors with a gradient to both.
The code of a vector is drawn with probabilities softmax(-distance / t), distance being squared L2, as the argmax of
log-probability plus Gumbel noise; the gradient is that of the softmax of the same sum. As t falls to 0 the draw becomes
the nearest code, which is what a trained tokenizer uses.

Noise is a function of seed, step and the vector's number in the whole batch, so that neither a resumed run nor another
number of workers changes it. On another kind of device it is other noise.
"""

# N vectors, D code dimension, K codes

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cogview.tokenizers.code_search import at_least_fp32

CHUNK_BYTES = 2**26  # one of the few fp32 [N, K] matrices that a chunk needs
NOISE_ROWS = 64  # vectors that share a generator


@dataclass(frozen=True, kw_only=True)
class GumbelDraw:
    """What a draw depends on.

    hard: the decoder sees the drawn code, with the gradient of the mixture; else it sees the mixture of codes itself.
    with_kl: also compute the divergence from the uniform distribution. seed, step: which noise; first_row: the number
    of the first vector in the batch of all workers.
    """

    temperature: float
    hard: bool
    with_kl: bool
    seed: int
    step: int
    first_row: int


def draw_codes(
    vectors_ND: Tensor, codebook_KD: Tensor, *, draw: GumbelDraw, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized vectors [N, D] in fp32 at least, codes int64 [N], and the mean divergence in nats (0 if not asked for).

    The matrices of N x K numbers are held for one chunk of the batch at a time and computed again for the gradient.
    """
    rows = max(1, chunk_bytes // (4 * len(codebook_KD)))
    parts = [
        checkpoint(
            _draw_chunk,
            chunk_ND,
            codebook_KD,
            replace(draw, first_row=draw.first_row + number * rows),
            use_reentrant=False,
            preserve_rng_state=False,  # the noise comes from generators of its own
        )
        for number, chunk_ND in enumerate(torch.split(vectors_ND, rows))
    ]
    quantized, codes, divergences = zip(*parts, strict=True)
    return torch.cat(quantized), torch.cat(codes), torch.cat(divergences).mean()


def gumbel_noise(like_NK: Tensor, *, seed: int, step: int, first_row: int) -> Tensor:
    """Standard Gumbel noise for the vectors from number `first_row` on, of the shape and on the device of `like_NK`."""
    first, last = first_row // NOISE_ROWS, (first_row + len(like_NK) - 1) // NOISE_ROWS
    blocks = []
    for block in range(first, last + 1):
        digest = hashlib.sha256(f"{seed} {step} {block}".encode()).digest()
        generator = torch.Generator(device=like_NK.device).manual_seed(int.from_bytes(digest[:7], "big"))
        clocks = torch.empty(NOISE_ROWS, like_NK.shape[1], device=like_NK.device).exponential_(generator=generator)
        blocks.append(clocks.clamp_min_(1e-30).log_().neg_())
    return torch.cat(blocks)[first_row - first * NOISE_ROWS :][: len(like_NK)]


def _draw_chunk(vectors_ND: Tensor, codebook_KD: Tensor, draw: GumbelDraw) -> tuple[Tensor, Tensor, Tensor]:
    """The same for one chunk; the divergence is that of each vector, [N]."""
    with torch.autocast(vectors_ND.device.type, enabled=False):
        vectors_ND, codebook_KD = at_least_fp32(vectors_ND), at_least_fp32(codebook_KD)
        # -|v - c|^2 without |v|^2, which no softmax over the codes sees.
        closeness_NK = torch.addmm(-codebook_KD.square().sum(dim=1), vectors_ND, codebook_KD.T, alpha=2)
        logits_NK = closeness_NK / draw.temperature
        noisy_NK = logits_NK + gumbel_noise(logits_NK, seed=draw.seed, step=draw.step, first_row=draw.first_row)
        codes_N = noisy_NK.argmax(dim=1)
        mixture_NK = noisy_NK.softmax(dim=1)
        if draw.hard:
            chosen_ND = torch.nn.functional.embedding(codes_N, codebook_KD)
            mixed_ND = mixture_NK @ codebook_KD.detach()
            quantized_ND = chosen_ND + (mixed_ND - mixed_ND.detach())
        else:
            quantized_ND = mixture_NK @ codebook_KD
        return quantized_ND, codes_N, _divergence_from_uniform(logits_NK) if draw.with_kl else logits_NK.new_zeros(1)


def _divergence_from_uniform(logits_NK: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats, [N]: 0 for all codes alike, log K for one certain code."""
    log_probabilities_NK = logits_NK.log_softmax(dim=1)
    uniform = torch.log(torch.tensor(float(logits_NK.shape[1])))
    return (log_probabilities_NK.exp() * log_probabilities_NK).sum(dim=1) + uniform.to(logits_NK.device)
