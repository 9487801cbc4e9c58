"""Three-region sparse attention (CogView, appendix B): text and random pivots, and a causal window of blocks.

In: queries, keys and values of whole rows, and the `Pivots` that a layer drew. Out: what each query attends to.
A query looks at (1) the text and (2) image tokens drawn at random anew in every layer and step, together the pivots, as
far as their block lies behind the window, and (3) the blocks of the window: its own, causally, and those before it. So
no key is counted twice, and one softmax runs over all. Time and memory grow with L (pivots + window), not with L^2.

`blockwise_attention` runs anywhere, block by block through torch's fused kernel, whose softmax statistics are fp32;
`sparse_flex.py` has the form for GPUs; `reference_attention` is the rule as a dense mask, and tests both.
"""

# B batch, H heads, L sequence, D head size, P pivots, Q queries, K keys

import math

import torch
from torch import Tensor, nn

from cogview.models.pivots import Pivots
from cogview.models.sparse_flex import flex_sparse_attention, suits_flex


def sparse_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, pivots: Pivots, dropout: float = 0.0) -> Tensor:
    """Three-region attention [B, H, L, D] in the form that suits the device."""
    if suits_flex(q_BHLD, config=pivots.config, dropout=dropout):
        return flex_sparse_attention(q_BHLD, k_BHLD, v_BHLD, pivots=pivots)
    attended: Tensor = blockwise_attention(q_BHLD, k_BHLD, v_BHLD, pivots=pivots, dropout=dropout)
    return attended


@torch.compiler.disable  # type: ignore[untyped-decorator, misc]  # how many keys a block gathers depends on the draw
def blockwise_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, pivots: Pivots, dropout: float = 0.0
) -> Tensor:
    """Gather, for one block of queries after the other, the pivots behind its window and the window's blocks.

    The first blocks gather less and the last may be short, so nothing is padded. Returns [B, H, L, D].
    """
    size, times = pivots.config.block_size, pivots.config.window_blocks
    q_BHLD = q_BHLD / math.sqrt(q_BHLD.shape[-1])
    pivot_k_BHPD, pivot_v_BHPD = pivots.gather(k_BHLD), pivots.gather(v_BHLD)
    q_blocks, k_blocks, v_blocks = (torch.split(values, size, dim=2) for values in (q_BHLD, k_BHLD, v_BHLD))
    attended = []
    for block, (queries, reach) in enumerate(zip(q_blocks, pivots.reach(), strict=True)):
        window = slice(max(0, block + 1 - times), block + 1)
        keys = torch.cat([pivot_k_BHPD[:, :, :reach], *k_blocks[window]], dim=2)
        values = torch.cat([pivot_v_BHPD[:, :, :reach], *v_blocks[window]], dim=2)
        bias = _block_bias(pivots, block=block, reach=reach, num_queries=queries.shape[2], num_keys=keys.shape[2])
        attended.append(
            nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=bias.to(queries.dtype), dropout_p=dropout, scale=1.0
            )
        )
    return torch.cat(attended, dim=2)


def reference_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, pivots: Pivots) -> Tensor:
    """The same as a dense product under a mask, quadratic in memory: what the other forms are tested against."""
    scores_BHLL = (q_BHLD @ k_BHLD.transpose(-1, -2)) / math.sqrt(q_BHLD.shape[-1])
    return (scores_BHLL + score_bias(pivots)[:, None]).softmax(dim=-1) @ v_BHLD


def score_bias(pivots: Pivots) -> Tensor:
    """The rule, dense, [B, Q, K]: 0 in the window, the correction at usable pivots, -inf where no query looks."""
    positions_L = torch.arange(pivots.length, device=pivots.positions_BP.device)
    blocks_L = positions_L // pivots.config.block_size
    behind_QK = blocks_L[:, None] - blocks_L[None, :]
    in_window_QK = (behind_QK < pivots.config.window_blocks) & (positions_L[None, :] <= positions_L[:, None])
    is_pivot_BK = torch.zeros(len(pivots.positions_BP), pivots.length + 1, device=positions_L.device).bool()
    is_pivot_BK = is_pivot_BK.scatter(1, pivots.positions_BP, True)[:, : pivots.length]
    usable_BQK = is_pivot_BK[:, None, :] & (behind_QK >= pivots.config.window_blocks)
    bias_BQK = torch.full(usable_BQK.shape, -torch.inf, device=positions_L.device)
    return bias_BQK.masked_fill(usable_BQK, pivots.correction).masked_fill(in_window_QK, 0.0)


def _block_bias(pivots: Pivots, *, block: int, reach: int, num_queries: int, num_keys: int) -> Tensor:
    """What is added to a block's scores, [B, 1, Q, reach + window]."""
    first_BP = pivots.first_block_BP[:, :reach]
    pivot_BP = torch.where(first_BP <= block, pivots.correction, -torch.inf)
    num_window = num_keys - reach
    future_QK = torch.ones(num_queries, num_window, dtype=torch.bool, device=first_BP.device)
    future_QK = future_QK.triu(diagonal=num_window - num_queries + 1)
    window_QK = torch.zeros(num_queries, num_window, device=first_BP.device).masked_fill(future_QK, -torch.inf)
    pivot_B1QP = pivot_BP[:, None, None, :].expand(-1, 1, num_queries, -1)
    return torch.cat([pivot_B1QP, window_QK.expand(len(first_BP), 1, -1, -1)], dim=-1)
