"""LoPAR: a picture's codes drawn again in a few passes, many at once (CogView2).

In: the sides of a grid. Out: a rank for each code, and how many codes each pass draws. In pass r all codes whose rank
is r or more are masked and drawn together; those of rank r are then settled, the others are drawn again in the next
pass with more known around them. Codes of rank 0 and below are never masked: direct super-resolution drew them.

Where the order comes from: codes that see each other should not be settled together, and a code should see those above
and to the left of it, as if it were drawn in the order of reading. In a window of s x s codes the anti-diagonals give
that: code (i, j) in pass i + j + 1, 2s - 1 passes. Windows beside each other go at the same time, whatever the size of
the picture. The passes are then merged: pass r + s has codes s diagonals away from those of pass r, so both become one,
and s passes remain instead of 2s - 1. The first diagonals are not masked at all. `diagonal_ranks` is this rule.

`RELEASED_RANKS` is the matrix of the release, for s = 6: the same diagonals, of which the first two are kept and so are
ten codes of the others, fixed points spread over the window; 13 of 36 codes stay. One code more, (5, 4), comes a pass
after its diagonal, and so together with the code below it; no other two neighbours in a row or column are settled
together, and by the rule none.
"""

# G rows, columns of the grid, N codes

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.errors import ConfigError

Ranks = Sequence[Sequence[int]]

RELEASED_RANKS: tuple[tuple[int, ...], ...] = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)
RELEASED_TOP_K = (40, 40, 40, 20, 20, 10)  # of each pass; the temperature is 1


def diagonal_ranks(side: int, *, num_kept: int = 2) -> tuple[tuple[int, ...], ...]:
    """The rule for windows of side x side: anti-diagonals in order, those a window apart together.

    num_kept: of the first diagonals, never masked; 0 masks everything in the first pass. ConfigError for another number
    than 0 to `side`.
    """
    if side < 1 or not 0 <= num_kept <= side:
        raise ConfigError(f"side={side}, num_kept={num_kept}: give a side of 1 or more, and up to that many diagonals")
    return tuple(tuple(_diagonal_rank(i + j - num_kept, side=side) for j in range(side)) for i in range(side))


def check_ranks(ranks: Ranks) -> None:
    """ConfigError unless this is a full rectangle whose ranks above 0 are 1, 2, ... without a gap."""
    widths = {len(row) for row in ranks}
    positive = sorted({rank for row in ranks for rank in row if rank > 0})
    if len(widths) != 1 or 0 in widths:
        raise ConfigError(f"ranks={ranks}: give rows of one length, of one rank or more")
    if not positive or positive != list(range(1, len(positive) + 1)):
        raise ConfigError(f"ranks={ranks}: the passes are {positive}; number them 1, 2, ... without a gap")


def num_passes(ranks: Ranks) -> int:
    """How often the model is called."""
    return max(rank for row in ranks for rank in row)


def rank_grid(height: int, width: int, *, ranks: Ranks = RELEASED_RANKS) -> Tensor:
    """The rank of each code of a grid, int64 [height, width]: the matrix laid over it like tiles, cut at the edges."""
    check_ranks(ranks)
    tile = torch.tensor([list(row) for row in ranks])
    down, across = math.ceil(height / tile.shape[0]), math.ceil(width / tile.shape[1])
    return tile.repeat(down, across)[:height, :width]


def codes_drawn(height: int, width: int, *, ranks: Ranks = RELEASED_RANKS) -> list[int]:
    """How many codes each pass draws: 2300, 1900, 1500, 1000, 600 and 200 of 60 x 60."""
    grid = rank_grid(height, width, ranks=ranks)
    return [int((grid >= number).sum()) for number in range(1, num_passes(ranks) + 1)]


def _diagonal_rank(diagonal: int, *, side: int) -> int:
    """Diagonals from 0 on become passes 1 to `side`, and from the start again; those before it are kept."""
    return diagonal % side + 1 if diagonal >= 0 else diagonal + 1
