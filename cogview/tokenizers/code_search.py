"""The search for the nearest code, the step that all codebooks share (CogView, section 2.2).

In: vectors and a codebook, in any precision. Out: the index of the nearest code of each vector. All distances of a
batch together would be far more than the batch itself (8,192 codes x 1,024 positions x 4 bytes are 32 MiB for each
picture), so the search walks through the batch with one buffer of bounded size.
"""

# N vectors, D code dimension, K codes

import torch
from torch import Tensor

from cogview.errors import ConfigError

SEARCH_BYTES = 2**26  # distances held at a time


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def nearest_codes(vectors_ND: Tensor, codebook_KD: Tensor, *, buffer_bytes: int = SEARCH_BYTES) -> Tensor:
    """The index of the nearest code (squared L2) for each vector: int64 [N].

    Distances are computed in fp32 at least, also under autocast: in 16 bits neighbouring codes often come out equal. Of
    codes at exactly the same computed distance the lowest index wins. `buffer_bytes` bounds the distances held at a
    time, though one row of K is held at least. ConfigError for another shape or dimension.
    """
    if vectors_ND.dim() != 2 or codebook_KD.dim() != 2:
        raise ConfigError(
            f"vectors of shape {tuple(vectors_ND.shape)} and a codebook of shape {tuple(codebook_KD.shape)}: give "
            "[vectors, dimension] and [codes, dimension]"
        )
    if vectors_ND.shape[1] != codebook_KD.shape[1]:
        raise ConfigError(
            f"vectors of dimension {vectors_ND.shape[1]} cannot be looked up in a codebook of dimension "
            f"{codebook_KD.shape[1]}; load the encoder and the codebook of one tokenizer"
        )
    codebook_KD = at_least_fp32(codebook_KD)
    # |v - c|^2 = |v|^2 - 2 (v c - |c|^2 / 2), and |v|^2 is the same for all codes.
    half_norms_K = codebook_KD.square().sum(dim=1) / 2
    rows = max(1, buffer_bytes // (codebook_KD.element_size() * len(codebook_KD)))
    buffer_RK = half_norms_K.new_empty(min(rows, len(vectors_ND)), len(codebook_KD))
    codes_N = torch.empty(len(vectors_ND), dtype=torch.long, device=vectors_ND.device)
    with torch.autocast(vectors_ND.device.type, enabled=False):
        for chunk_ND, found_N in zip(torch.split(vectors_ND, rows), torch.split(codes_N, rows), strict=True):
            distances_NK = buffer_RK[: len(chunk_ND)]
            torch.addmm(half_norms_K, chunk_ND.to(codebook_KD.dtype), codebook_KD.T, alpha=-1, out=distances_NK)
            torch.argmin(distances_NK, dim=1, out=found_N)
    return codes_N


def squared_distances(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Squared L2 from each vector to its nearest code, [N]."""
    return (vectors_ND - codebook_KD[nearest_codes(vectors_ND, codebook_KD)]).square().sum(dim=1)
