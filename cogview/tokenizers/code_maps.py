"""Between the networks, which see maps [B, D, h, w], and the codebook, which sees vectors [N, D].

In: what an encoder gives, or codes. Out: the same map in code vectors, or codes. All convolutional tokenizers share it.
"""

# B batch, N vectors, D code dimension, h w height and width in codes

import torch
from torch import Tensor

from cogview.tokenizers.code_search import nearest_codes
from cogview.tokenizers.codebook import Codebook, Quantized


def quantize(vectors_BDhw: Tensor, *, codebook: Codebook) -> tuple[Tensor, Quantized]:
    """The map in code vectors, with a gradient to what went in, and the codebook's loss and parts."""
    quantized: Quantized = codebook(_as_vectors(vectors_BDhw))
    batch, dim, height, width = vectors_BDhw.shape
    map_BDhw = quantized.vectors_ND.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
    return map_BDhw, quantized


def encode_map(vectors_BDhw: Tensor, *, codebook: Codebook) -> Tensor:
    """The nearest code of each vector of a map, int64 [B, h, w]."""
    batch, _, height, width = vectors_BDhw.shape
    return nearest_codes(_as_vectors(vectors_BDhw), codebook.codebook_KD).view(batch, height, width)


def decode_map(codes_Bhw: Tensor, *, codebook: Codebook) -> Tensor:
    """The code vectors of a map of codes, [B, D, h, w]."""
    vectors_BDhw: Tensor = codebook.lookup(codes_Bhw.long()).permute(0, 3, 1, 2)
    return vectors_BDhw


def empty_codes(images_BCHW: Tensor, *, stride: int) -> Tensor:
    """The codes of a batch without pictures."""
    height, width = (side // stride for side in images_BCHW.shape[2:])
    return torch.zeros(0, height, width, dtype=torch.long, device=images_BCHW.device)


def _as_vectors(map_BDhw: Tensor) -> Tensor:
    return map_BDhw.permute(0, 2, 3, 1).reshape(-1, map_BDhw.shape[1])
