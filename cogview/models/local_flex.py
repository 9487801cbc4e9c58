"""Local attention for GPUs, on torch's FlexAttention, which takes the place of CogView2's CUDA extension.

In and out as in `local_attention.tiled_attention`. Both grids are put into the order of tiles of 8 x 16 codes, one tile
to a block of the kernel, so that the codes around a block lie in few blocks and the work grows with the number of codes
whatever the grid's width. The rule is a function of indices; which blocks touch each other follows from the rows and
columns that they span.
"""

# B batch, H heads, N codes of the fine grid, D head size, K keys, C context, P places after sorting, G blocks

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from cogview.models.local_rules import LocalRule, sees
from cogview.models.sparse_flex import KERNEL_BLOCK, flex_kernel, listed

TILE = (8, KERNEL_BLOCK // 8)  # rows and columns
FAR = 2**20  # the row of a place that holds no code: out of every window
RULES_KEPT = 16
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_local_attention(
    q_BHND: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    *,
    rule: LocalRule,
    context_BC: Tensor | None = None,
    is_compiled: bool = True,
) -> Tensor:
    """Local attention [B, H, N, D]; uncompiled it is slow, and dense in memory: for tests."""
    places = _places(rule, rule.num_context(k_BHKD.shape[2]), q_BHND.device)
    if context_BC is None:
        context_BC = torch.ones(len(q_BHND), max(1, places.num_context), dtype=torch.bool, device=q_BHND.device)
    attended_BHPD = flex_kernel(is_compiled)(
        _sorted(q_BHND, places.queries_P),
        _sorted(k_BHKD, places.keys_P),
        _sorted(v_BHKD, places.keys_P),
        block_mask=_block_mask(rule, places, context_BC),
    )
    assert isinstance(attended_BHPD, Tensor)
    return attended_BHPD[:, :, places.back_N]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where codes go. queries_P, keys_P: which query or key comes to a place, or -1; back_N: where each query went.

    The others are int64 [P]: row and column of a place in its grid. Of keys the context comes first, then the coarse
    grid, then the fine one, each from a new block on.
    """

    num_context: int
    num_context_places: int
    num_coarse_places: int
    queries_P: Tensor
    back_N: Tensor
    query_row_P: Tensor
    query_column_P: Tensor
    keys_P: Tensor
    key_row_P: Tensor
    key_column_P: Tensor


@lru_cache(maxsize=RULES_KEPT)
def _places(rule: LocalRule, num_context: int, device: torch.device) -> _Places:
    context_P = nn.functional.pad(torch.arange(num_context), (0, -num_context % KERNEL_BLOCK), value=-1)
    fine_P, row_P, column_P = _tile_order(rule.height, rule.width)
    coarse_P, coarse_row_P, coarse_column_P = _tile_order(*rule.coarse_sides)
    nowhere_P = torch.full_like(context_P, FAR)
    keys_P = torch.cat(
        [
            context_P,
            torch.where(coarse_P < 0, -1, coarse_P + num_context),
            torch.where(fine_P < 0, -1, fine_P + num_context + rule.num_coarse),
        ]
    )
    tensors = {
        "queries_P": fine_P,
        "back_N": torch.empty(rule.num_fine, dtype=torch.int64).index_copy_(
            0, fine_P[fine_P >= 0], (fine_P >= 0).nonzero()[:, 0]
        ),
        "query_row_P": row_P,
        "query_column_P": column_P,
        "keys_P": keys_P,
        "key_row_P": torch.cat([nowhere_P, coarse_row_P, row_P]),
        "key_column_P": torch.cat([nowhere_P, coarse_column_P, column_P]),
    }
    return _Places(
        num_context=num_context,
        num_context_places=len(context_P),
        num_coarse_places=len(coarse_P),
        **{name: tensor.to(device) for name, tensor in tensors.items()},
    )


def _tile_order(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a grid tile by tile: number, row and column for each place; -1, FAR, FAR where there is no code."""
    rows, columns = TILE
    down, across = -(-height // rows), -(-width // columns)
    place_P = torch.arange(down * across * KERNEL_BLOCK)
    tile_P, inside_P = place_P // KERNEL_BLOCK, place_P % KERNEL_BLOCK
    row_P = tile_P // max(1, across) * rows + inside_P // columns
    column_P = tile_P % max(1, across) * columns + inside_P % columns
    is_code_P = (row_P < height) & (column_P < width)
    return (
        torch.where(is_code_P, row_P * width + column_P, -1),
        torch.where(is_code_P, row_P, FAR),
        torch.where(is_code_P, column_P, FAR),
    )


def _sorted(values_BHKD: Tensor, places_P: Tensor) -> Tensor:
    """Vectors in their places; what stands where there is none is seen by nobody."""
    return values_BHKD[:, :, places_P.clamp(min=0)]


def _block_mask(rule: LocalRule, places: _Places, context_BC: Tensor) -> BlockMask:
    """The rule, and which blocks of keys it touches; all of them are checked place by place."""
    counts_11G, order_11GK = _visited(rule, places.num_context, context_BC.device)
    batch = len(context_BC)
    return BlockMask.from_kv_blocks(
        counts_11G.expand(batch, -1, -1),
        order_11GK.expand(batch, -1, -1, -1),
        BLOCK_SIZE=(KERNEL_BLOCK, KERNEL_BLOCK),
        mask_mod=_mask_rule(rule, places, context_BC),
        seq_lengths=(len(places.queries_P), len(places.keys_P)),
    )


@lru_cache(maxsize=RULES_KEPT)
def _visited(rule: LocalRule, num_context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries visits, and which, those first; the same in every layer."""
    return listed(_touched(rule, _places(rule, num_context, device))[None])


def _mask_rule(rule: LocalRule, places: _Places, context_BC: Tensor) -> Rule:
    """Whether the query at a place sees the key at another, by indices of batch, head, query, key."""
    num_context, step = places.num_context, max(1, rule.ratio)
    first_coarse, first_fine = places.num_context_places, places.num_context_places + places.num_coarse_places
    row_P, column_P = places.query_row_P, places.query_column_P
    key_row_P, key_column_P = places.key_row_P, places.key_column_P

    def looks(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column, key_row, key_column = row_P[query], column_P[query], key_row_P[key], key_column_P[key]
        is_context = (key < num_context) & context_BC[batch, key.clamp(max=max(0, num_context - 1))]
        is_coarse = sees(rule.coarse_window, key_row - row // step, key_column - column // step)
        is_fine = sees(rule.window, key_row - row, key_column - column)
        return torch.where(key < first_coarse, is_context, torch.where(key < first_fine, is_coarse, is_fine))

    return looks


def _touched(rule: LocalRule, places: _Places) -> Tensor:
    """bool [blocks of queries, blocks of keys]: whether some query of a block may see some key of another."""
    step = max(1, rule.ratio)
    parts = [places.num_context_places, places.num_coarse_places, len(places.queries_P)]
    _, *key_rows = torch.split(places.key_row_P, parts)
    _, *key_columns = torch.split(places.key_column_P, parts)
    rows_G2, columns_G2 = _spans(places.query_row_P), _spans(places.query_column_P)
    touched = [rows_G2.new_ones(len(rows_G2), places.num_context_places // KERNEL_BLOCK, dtype=torch.bool)]
    for row_P, column_P, window, by in zip(
        key_rows, key_columns, (rule.coarse_window, rule.window), (step, 1), strict=True
    ):
        rows, columns = window.reach
        is_near_down = _overlap(rows_G2 // by, _spans(row_P), above=rows, below=0 if window.is_causal else rows)
        is_near_right = _overlap(columns_G2 // by, _spans(column_P), above=columns, below=columns)
        touched.append(is_near_down & is_near_right)
    return torch.cat(touched, dim=1)


def _spans(numbers_P: Tensor) -> Tensor:
    """The lowest and highest row, or column, of the codes of each block, int64 [G, 2]."""
    blocks_GP = numbers_P.view(-1, KERNEL_BLOCK)
    return torch.stack([blocks_GP.amin(1), blocks_GP.masked_fill(blocks_GP == FAR, -1).amax(1)], dim=1)


def _overlap(queries_G2: Tensor, keys_K2: Tensor, *, above: int, below: int) -> Tensor:
    """bool [G, K]: whether spans of keys come as near to spans of queries as a window reaches."""
    is_not_above = keys_K2[None, :, 1] >= queries_G2[:, None, 0] - above
    return is_not_above & (keys_K2[None, :, 0] <= queries_G2[:, None, 1] + below)
