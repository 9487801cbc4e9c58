"""Three-region sparse attention for GPUs, on torch's FlexAttention (CogView, appendix B).

In and out as in `sparse_attention.blockwise_attention`. The keys are the pivots, gathered to the front, followed by the
whole row; the rule that says who sees whom is a function of indices, and the kernel visits only those blocks of keys
in which some query of a block looks. Pivots are in order of their position, so early queries skip the later ones.
"""

# B batch, H heads, L sequence, D head size, P pivots, C blocks of pivots, G blocks of the row

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cogview.models.pivots import NEVER, Pivots, SparseConfig

KERNEL_BLOCK = 128  # the kernel's tiles divide this
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Attend = Callable[..., Tensor | tuple[Tensor, ...]]


def suits_flex(q_BHLD: Tensor, *, config: SparseConfig, dropout: float) -> bool:
    """FlexAttention drops no probabilities out, has no backward on the CPU, and wants blocks of 128 or a multiple."""
    return q_BHLD.is_cuda and not dropout and config.block_size % KERNEL_BLOCK == 0


def flex_sparse_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, pivots: Pivots, is_compiled: bool = True
) -> Tensor:
    """Three-region attention [B, H, L, D]; uncompiled it is slow, and dense in memory: for tests."""
    size = pivots.config.block_size
    first_BP = _padded(pivots.first_block_BP, dim=1, multiple=size, value=NEVER)
    num_pivots = first_BP.shape[1]
    correction = pivots.correction

    def corrected(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        return torch.where(key < num_pivots, score + correction, score)

    attended_BHLD = flex_kernel(is_compiled)(
        _padded(q_BHLD, dim=2, multiple=size),
        _with_pivots(k_BHLD, pivots),
        _with_pivots(v_BHLD, pivots),
        score_mod=corrected if correction else None,
        block_mask=block_mask(pivots),
    )
    assert isinstance(attended_BHLD, Tensor)
    return attended_BHLD[:, :, : pivots.length]


def block_mask(pivots: Pivots) -> BlockMask:
    """The rule, and which blocks of keys it touches. Padding of the row comes last, so that causality hides it."""
    size, times = pivots.config.block_size, pivots.config.window_blocks
    first_BP = _padded(pivots.first_block_BP, dim=1, multiple=size, value=NEVER)
    num_blocks = -(-pivots.length // size)
    blocks_G = torch.arange(num_blocks, device=first_BP.device)
    first_BCP = first_BP.view(len(first_BP), -1, size)
    behind_GG = (blocks_G[:, None] - blocks_G[None, :]).expand(len(first_BP), -1, -1)
    touched_BGK = torch.cat(
        [first_BCP.amin(2)[:, None, :] <= blocks_G[:, None], (behind_GG >= 0) & (behind_GG < times)], dim=2
    )
    whole_BGK = torch.cat(
        [first_BCP.amax(2)[:, None, :] <= blocks_G[:, None], (behind_GG > 0) & (behind_GG < times)], dim=2
    )
    return BlockMask.from_kv_blocks(
        *listed(touched_BGK & ~whole_BGK),
        *listed(whole_BGK),
        BLOCK_SIZE=(size, size),
        mask_mod=mask_rule(first_BP, config=pivots.config),
        seq_lengths=(num_blocks * size, first_BP.shape[1] + num_blocks * size),
    )


def mask_rule(first_block_BP: Tensor, *, config: SparseConfig) -> Rule:
    """Whether a query looks at a key, by indices of batch, head, query, key; the first P keys are the pivots."""
    size, times, num_pivots = config.block_size, config.window_blocks, first_block_BP.shape[1]

    def looks(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block, position = query // size, key - num_pivots
        is_usable = first_block_BP[batch, key.clamp(max=num_pivots - 1)] <= block
        is_in_window = (position <= query) & (block - position // size < times)
        return torch.where(key < num_pivots, is_usable, is_in_window)

    return looks


@cache
def flex_kernel(is_compiled: bool) -> Attend:
    """FlexAttention, compiled once, or as it is."""
    kernel: Attend = torch.compile(flex_attention) if is_compiled else flex_attention  # type: ignore[assignment]
    return kernel


def _with_pivots(values_BHLD: Tensor, pivots: Pivots) -> Tensor:
    size = pivots.config.block_size
    gathered_BHPD = _padded(pivots.gather(values_BHLD), dim=2, multiple=size)
    return torch.cat([gathered_BHPD, _padded(values_BHLD, dim=2, multiple=size)], dim=2)


def _padded(values: Tensor, *, dim: int, multiple: int, value: int = 0) -> Tensor:
    """Lengthened along a dimension to a multiple."""
    missing = -values.shape[dim] % multiple
    behind = [0, 0] * (values.ndim - 1 - dim)
    return nn.functional.pad(values, [*behind, 0, missing], value=value) if missing else values


def listed(is_listed_BGK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, int32 [B, 1, G], and which, those first, [B, 1, G, K]."""
    counts_BG = is_listed_BGK.sum(-1, dtype=torch.int32)
    order_BGK = is_listed_BGK.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts_BG[:, None], order_BGK[:, None]
