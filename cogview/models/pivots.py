"""The pivots of three-region sparse attention: which tokens all later blocks may look at (CogView, appendix B).

In: token ids, a number for each row, a layer. Out: `Pivots`, the text and image tokens drawn at random, without
replacement and anew in every layer and step. The generator is a hash of (row's number, layer, position): it needs no
state, gives the same on every device, and draws the same when a layer is computed again.
"""

# B batch, H heads, L sequence, D head size, P pivots, G blocks, Q queries, K keys (cached and new)

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.config import require_positive

NEVER = 2**31 - 1  # the first query block that may use a pivot which is none
LOTTERY_BITS = 62


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """The three regions; the defaults are the paper's.

    num_pivots: text and image pivots of a row together, the text first; where the text alone is longer, a random part
        of it. block_size, window_blocks: a query sees its own block and the window_blocks - 1 before it.
    corrects_pivots: add log(L // num_pivots) to the scores of pivots, each of which stands for the tokens not drawn.
    in_evaluation: look sparsely outside of training too; the paper's authors advise against it.
    num_image_ids, padding_id: ids below the first are image tokens, the second is padding, all others are text.
    """

    num_pivots: int = 768
    block_size: int = 128
    window_blocks: int = 6
    corrects_pivots: bool = True
    in_evaluation: bool = False
    num_image_ids: int = 8192
    padding_id: int = 58192

    def __post_init__(self) -> None:
        require_positive(self, "num_pivots", "block_size", "window_blocks", prefix="sparse.")

    @property
    def window(self) -> int:
        """Tokens of a full window."""
        return self.block_size * self.window_blocks


@dataclass(frozen=True, kw_only=True)
class Pivots:
    """What one layer drew for the rows of a batch; all heads share it.

    positions_BP: int64, ascending, `length` where a row has fewer tokens than pivots. first_block_BP: int64, the first
    block of queries that may use the pivot, which never comes for those.
    """

    config: SparseConfig
    length: int
    positions_BP: Tensor
    first_block_BP: Tensor

    @property
    def correction(self) -> float:
        """What is added to the scores of pivots."""
        if not self.config.corrects_pivots:
            return 0.0
        return math.log(max(1, self.length // self.config.num_pivots))

    def gather(self, values_BHLD: Tensor) -> Tensor:
        """The pivots' rows of keys or values: [B, H, L, D] -> [B, H, P, D]."""
        index_BP = self.positions_BP.clamp(max=self.length - 1)
        heads, size = values_BHLD.shape[1], values_BHLD.shape[3]
        return values_BHLD.gather(2, index_BP[:, None, :, None].expand(-1, heads, -1, size))

    def reach(self) -> list[int]:
        """For each block of queries, how many of the first pivots some row of the batch may use there."""
        num_blocks = -(-self.length // self.config.block_size)
        blocks_G = torch.arange(num_blocks, device=self.first_block_BP.device)
        counts_BG = (self.first_block_BP[:, None, :] <= blocks_G[:, None]).sum(-1)
        counts: list[int] = counts_BG.amax(0).tolist()
        return counts


def pivot_keys(rows_B: Tensor, *, seed: int, step: int) -> Tensor:
    """A number for each row, int64 [B], from which its pivots in all layers follow; rows_B: int64, global indices.

    With it a row has the same pivots whoever computes it, and a resumed step those of the step that was lost.
    """
    start = torch.tensor(seed, device=rows_B.device)
    return _mix(_mix(_mix(start) + step) + rows_B)


def draw_pivots(ids_BL: Tensor, *, keys_B: Tensor, layer: int, config: SparseConfig) -> Pivots:
    """Draw a layer's pivots without replacement: text first, then image tokens; padding never.

    A function of its arguments alone, so that activations computed again in backward meet the same pivots.
    """
    length = ids_BL.shape[1]
    tickets_BL = _tickets(keys_B, layer=layer, length=length)
    tickets_BL = torch.where(_is_text(ids_BL, config), tickets_BL + 2**LOTTERY_BITS, tickets_BL)
    tickets_BL = tickets_BL.masked_fill(ids_BL == config.padding_id, -1)
    best = tickets_BL.topk(min(config.num_pivots, length), sorted=False)
    positions_BP = best.indices.masked_fill(best.values < 0, length).sort().values
    first_block_BP = positions_BP // config.block_size + config.window_blocks
    return Pivots(
        config=config,
        length=length,
        positions_BP=positions_BP,
        first_block_BP=first_block_BP.masked_fill(positions_BP == length, NEVER),
    )


def inference_mask(
    allowed_B1QK: Tensor, ids_BK: Tensor, *, layer: int, max_positions: int, config: SparseConfig
) -> Tensor:
    """Where queries behind a cache look, bool [B, 1, Q, K]: the last `window` tokens, and from before those the pivots.

    Pivots are the text and a share num_pivots / max_positions of the image tokens. A position that leaves the window
    is kept or dropped for good, in all rows alike, so whether tokens come one by one or together changes nothing.
    ids_BK: of the cached and the new tokens; allowed_B1QK: the dense rule of the cache. Scores are not corrected.
    """
    num_queries, num_keys = allowed_B1QK.shape[-2:]
    share = min(1.0, config.num_pivots / max_positions)
    positions_K = torch.arange(num_keys, device=ids_BK.device)
    tickets_1K = _tickets(torch.zeros(1, dtype=torch.int64, device=ids_BK.device), layer=layer, length=num_keys)
    is_pivot_BK = _is_text(ids_BK, config) | (tickets_1K < int(share * 2**LOTTERY_BITS))
    in_window_QK = positions_K[None, :] > positions_K[num_keys - num_queries :, None] - config.window
    return allowed_B1QK & (in_window_QK | is_pivot_BK[:, None, None, :])


def needed_keys(k_BHKD: Tensor, v_BHKD: Tensor, allowed_B1QK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask without the positions at which no query looks."""
    kept = allowed_B1QK.any(dim=2).any(dim=0)[0].nonzero()[:, 0]
    return k_BHKD.index_select(2, kept), v_BHKD.index_select(2, kept), allowed_B1QK.index_select(3, kept)


def _is_text(ids_BL: Tensor, config: SparseConfig) -> Tensor:
    return (ids_BL >= config.num_image_ids) & (ids_BL != config.padding_id)


def _tickets(keys_B: Tensor, *, layer: int, length: int) -> Tensor:
    """A random number below 2^62 for each position, int64 [B, L], the same on every device."""
    positions_L = torch.arange(length, device=keys_B.device)
    tickets_BL: Tensor = _mix(_mix(keys_B + layer)[:, None] + positions_L) & (2**LOTTERY_BITS - 1)
    return tickets_BL


def _mix(numbers: Tensor) -> Tensor:
    """Scatter int64 numbers over all 64 bits: one step of SplitMix64 (Steele, Lea and Flood, 2014), wrapping around."""
    numbers = numbers * -0x61C8864680B583EB  # 2^64 over the golden ratio, so that neighbours part
    numbers = (numbers ^ _shifted(numbers, 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ _shifted(numbers, 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shifted to the right with zeros coming in, as if unsigned."""
    shifted: Tensor = (numbers >> bits) & (2 ** (64 - bits) - 1)
    return shifted
