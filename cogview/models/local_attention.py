"""Local attention over a grid of codes: each code sees those around it (CogView2, hierarchical generation).

In: queries of a grid of codes, and keys in the order [context | coarse | fine]: tokens that every query may see, such
as a caption; a coarser grid of the same picture; and the grid itself. `LocalRule` says which codes of the grids a query
sees; one softmax runs over all. Out: what each query attends to.

`tiled_attention` runs anywhere: it cuts the grid into tiles, lays the keys around a tile beside it, and lets torch's
fused kernel do the rest, so that time and memory grow with the number of codes. `local_flex.py` has the form for GPUs;
`reference_attention` is the rule as a mask over a dense product, and tests both. Probabilities are not dropped out: the
kernel for GPUs cannot.
"""

# B batch, H heads, N codes of the fine grid, D head size, K keys, C context, T tiles, Q queries of a tile

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from cogview.models.local_rules import LocalRule, Window, allowed_mask, cells, sees

TILE = 8  # codes along a side, about; keys of a 9 x 5 window are then three times the queries
RULES_KEPT = 16
SMALLEST_HEAD = 16  # FlexAttention's kernel wants this many numbers; and it has no backward on the CPU


def local_attention(
    q_BHND: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, *, rule: LocalRule, context_BC: Tensor | None = None
) -> Tensor:
    """Local attention [B, H, N, D] in the form that suits the device.

    context_BC: bool, which keys of the context may be seen; None for all of them. ConfigError for other numbers of
    queries or keys than the rule has codes.
    """
    if q_BHND.is_cuda and q_BHND.shape[-1] >= SMALLEST_HEAD:
        from cogview.models.local_flex import flex_local_attention  # brings torch's compiler, which takes seconds

        return flex_local_attention(q_BHND, k_BHKD, v_BHKD, rule=rule, context_BC=context_BC)
    return tiled_attention(q_BHND, k_BHKD, v_BHKD, rule=rule, context_BC=context_BC)


def reference_attention(
    q_BHND: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, *, rule: LocalRule, context_BC: Tensor | None = None
) -> Tensor:
    """The same as a dense product under a mask, quadratic in memory: what the other forms are tested against."""
    num_context = rule.num_context(k_BHKD.shape[2])
    allowed_NK = nn.functional.pad(allowed_mask(rule), (num_context, 0), value=True).to(q_BHND.device)
    allowed_BNK = allowed_NK.repeat(len(q_BHND), 1, 1)
    if context_BC is not None:
        allowed_BNK[:, :, :num_context] = context_BC[:, None, :]
    scores_BHNK = (q_BHND @ k_BHKD.transpose(-1, -2)) / math.sqrt(q_BHND.shape[-1])
    return scores_BHNK.masked_fill(~allowed_BNK[:, None], -torch.inf).softmax(dim=-1) @ v_BHKD


def tiled_attention(
    q_BHND: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, *, rule: LocalRule, context_BC: Tensor | None = None
) -> Tensor:
    """Tile by tile: the queries of a tile meet the context and the keys of their windows' union, under a small mask."""
    batch, size = len(q_BHND), q_BHND.shape[-1]
    num_context = rule.num_context(k_BHKD.shape[2])
    tiling = _tiling(rule, q_BHND.device)
    queries = tiling.queries.cut(q_BHND / math.sqrt(size))  # [B T, H, Q, D]
    keys, values = (_around_tiles(tensor, tiling, num_context=num_context) for tensor in (k_BHKD, v_BHKD))
    allowed_BTQK = tiling.allowed_TQK.expand(batch, -1, -1, -1)
    if num_context:
        if context_BC is None:
            context_BC = torch.ones(batch, num_context, dtype=torch.bool, device=q_BHND.device)
        context_BTQC = context_BC[:, None, None, :].expand(*allowed_BTQK.shape[:3], -1)
        allowed_BTQK = torch.cat([context_BTQC, allowed_BTQK], dim=-1)
    attended = nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=allowed_BTQK.flatten(0, 1)[:, None], scale=1.0
    )
    return tiling.queries.join(attended, batch=batch)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How a grid is cut into overlapping tiles. height, width: of the grid; tile: rows and columns of it that a tile
    stands for; halo: rows above and below, columns to the left and right that are laid beside them; tiles: down, across
    """

    height: int
    width: int
    tile: tuple[int, int]
    halo: tuple[int, int, int, int]
    tiles: tuple[int, int]

    def cut(self, values_BHND: Tensor) -> Tensor:
        """A grid's vectors [B, H, N, D] as those of its tiles, [B T, H, Q, D]; beyond the grid they are zero."""
        batch, heads, _, size = values_BHND.shape
        (rows, columns), (above, below, left, right) = self.tile, self.halo
        missing = rows * self.tiles[0] - self.height, columns * self.tiles[1] - self.width
        grid = values_BHND.reshape(batch, heads, self.height, self.width, size)
        grid = nn.functional.pad(grid, (0, 0, left, missing[1] + right, above, missing[0] + below))
        tiles = grid.unfold(2, rows + above + below, rows).unfold(3, columns + left + right, columns)
        return tiles.permute(0, 2, 3, 1, 5, 6, 4).reshape(batch * math.prod(self.tiles), heads, -1, size)

    def join(self, tiles: Tensor, *, batch: int) -> Tensor:
        """The way back, for tiles without a halo: [B T, H, Q, D] -> [B, H, N, D]."""
        (down, across), (rows, columns) = self.tiles, self.tile
        heads, size = tiles.shape[1], tiles.shape[3]
        grid = tiles.view(batch, down, across, heads, rows, columns, size).permute(0, 3, 1, 4, 2, 5, 6)
        grid = grid.reshape(batch, heads, down * rows, across * columns, size)
        return grid[:, :, : self.height, : self.width].reshape(batch, heads, self.height * self.width, size)

    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column in the grid of each vector of each tile, int64 [T, Q], and whether it is in the grid."""
        (rows, columns), (above, below, left, right) = self.tile, self.halo
        row_R, column_R = cells(rows + above + below, columns + left + right)
        down_T, across_T = cells(*self.tiles)
        row_TR = rows * down_T[:, None] + row_R - above
        column_TR = columns * across_T[:, None] + column_R - left
        is_inside_TR = (row_TR >= 0) & (row_TR < self.height) & (column_TR >= 0) & (column_TR < self.width)
        return row_TR, column_TR, is_inside_TR


@dataclass(frozen=True, kw_only=True)
class _Tiling:
    """A rule, cut: its queries, the keys around each tile, and who sees whom, bool [T, Q, keys]."""

    queries: _Cut
    coarse: _Cut | None
    fine: _Cut
    allowed_TQK: Tensor


def _around_tiles(values_BHKD: Tensor, tiling: _Tiling, *, num_context: int) -> Tensor:
    """Keys or values of each tile, [B T, H, keys, D]: the context, which all have, then what lies around it."""
    num_tiles = math.prod(tiling.queries.tiles)
    num_coarse = tiling.coarse.height * tiling.coarse.width if tiling.coarse else 0
    lengths = [num_context, num_coarse, values_BHKD.shape[2] - num_context - num_coarse]
    context, coarse, fine = torch.split(values_BHKD, lengths, dim=2)
    parts = [context.repeat_interleave(num_tiles, dim=0)] if num_context else []
    if tiling.coarse is not None:
        parts.append(tiling.coarse.cut(coarse))
    return torch.cat([*parts, tiling.fine.cut(fine)], dim=2)


@lru_cache(maxsize=RULES_KEPT)
def _tiling(rule: LocalRule, device: torch.device) -> _Tiling:
    """Tiles of about 8 x 8 codes, each a whole number of coarse codes."""
    step = max(1, rule.ratio)
    tile = min(rule.height, -(-TILE // step) * step), min(rule.width, -(-TILE // step) * step)
    tiles = -(-rule.height // tile[0]), -(-rule.width // tile[1])
    queries = _Cut(height=rule.height, width=rule.width, tile=tile, halo=(0, 0, 0, 0), tiles=tiles)
    fine = _Cut(height=rule.height, width=rule.width, tile=tile, halo=_halo(rule.window), tiles=tiles)
    row_TQ, column_TQ, is_query_TQ = queries.cells()
    allowed = [_seen(fine, rule.window, row_TQ, column_TQ)]
    coarse = None
    if rule.ratio:
        height, width = rule.coarse_sides
        small = tile[0] // rule.ratio, tile[1] // rule.ratio
        coarse = _Cut(height=height, width=width, tile=small, halo=_halo(rule.coarse_window), tiles=tiles)
        allowed = [_seen(coarse, rule.coarse_window, row_TQ // rule.ratio, column_TQ // rule.ratio), *allowed]
    # Queries beyond the grid see everything: a softmax over nothing is no number, in backward too.
    allowed_TQK = torch.cat(allowed, dim=2) | ~is_query_TQ[:, :, None]
    return _Tiling(queries=queries, coarse=coarse, fine=fine, allowed_TQK=allowed_TQK.to(device))


def _halo(window: Window) -> tuple[int, int, int, int]:
    rows, columns = window.reach
    return rows, 0 if window.is_causal else rows, columns, columns


def _seen(keys: _Cut, window: Window, row_TQ: Tensor, column_TQ: Tensor) -> Tensor:
    """Which keys of its tile a query sees, bool [T, Q, keys]."""
    row_TK, column_TK, is_inside_TK = keys.cells()
    down_TQK = row_TK[:, None, :] - row_TQ[:, :, None]
    right_TQK = column_TK[:, None, :] - column_TQ[:, :, None]
    return sees(window, down_TQK, right_TQK) & is_inside_TK[:, None, :]
