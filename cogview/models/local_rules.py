"""Who sees whom in local attention: windows in a grid of codes, and in the coarser grid below it (CogView2).

In: the sides of a grid, and windows. Out: the rule as a dense mask, which the forms of `local_attention.py` are held
against, and the cells of each grid, from which they make their own.
"""

# N codes of the fine grid, M of the coarse one, K keys

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cogview.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Window:
    """The codes around a code: height x width of them, itself in the middle, as far as the grid goes; both odd.

    is_causal: only those up to itself, in the order of reading.
    """

    height: int
    width: int
    is_causal: bool = False

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or not self.height % 2 or not self.width % 2:
            raise ConfigError(f"a window of {self.height} x {self.width} codes has no middle; choose odd sides")

    @property
    def reach(self) -> tuple[int, int]:
        """Rows above, and columns to either side."""
        return self.height // 2, self.width // 2


def square_window(side: int, *, is_causal: bool = False) -> Window:
    """CogView2's k x k window in the grid itself: k columns, and 2k - 1 rows, of which causality leaves the upper k."""
    return Window(height=2 * side - 1, width=side, is_causal=is_causal)


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """A grid of height x width codes and what its codes see; the windows are CogView2's.

    ratio: codes along a side for each code of a coarser grid of the same picture, whose keys stand before those of the
    grid; 0 where there is none. coarse_window: in that grid, around the code that a code lies in.
    """

    height: int
    width: int
    window: Window = field(default_factory=lambda: square_window(5))
    ratio: int = 0
    coarse_window: Window = field(default_factory=lambda: Window(height=5, width=5))

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or self.ratio < 0:
            raise ConfigError(f"a grid of {self.height} x {self.width} codes, ratio {self.ratio}: give 1 code or more")
        if self.ratio and (self.height % self.ratio or self.width % self.ratio):
            raise ConfigError(
                f"a grid of {self.height} x {self.width} codes does not lie on one of 1/{self.ratio} of its sides; "
                f"choose multiples of {self.ratio}"
            )
        if self.coarse_window.is_causal:
            raise ConfigError("coarse_window is causal, but all of the coarse grid is known; make it see both ways")

    @property
    def num_fine(self) -> int:
        """Codes of the grid."""
        return self.height * self.width

    @property
    def coarse_sides(self) -> tuple[int, int]:
        """Height and width of the coarse grid; zeros where there is none."""
        return (self.height // self.ratio, self.width // self.ratio) if self.ratio else (0, 0)

    @property
    def num_coarse(self) -> int:
        """Codes of the coarse grid."""
        height, width = self.coarse_sides
        return height * width

    def num_context(self, num_keys: int) -> int:
        """How many keys stand before the grids. ConfigError when there are fewer keys than codes."""
        found = num_keys - self.num_coarse - self.num_fine
        if found < 0:
            raise ConfigError(
                f"{num_keys} keys for {self.num_coarse} coarse codes and a grid of {self.height} x {self.width}; "
                "give those of both grids"
            )
        return found


def cells(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of each code of a grid, int64 [N]."""
    numbers = torch.arange(height * width)
    return numbers // width, numbers % width


def sees(window: Window, down: Tensor, right: Tensor) -> Tensor:
    """Whether a window holds the code that lies so many rows below and columns to the right of its middle; bool."""
    rows, columns = window.reach
    is_near = (down.abs() <= rows) & (right.abs() <= columns)
    return is_near & ((down < 0) | ((down == 0) & (right <= 0))) if window.is_causal else is_near


def allowed_mask(rule: LocalRule) -> Tensor:
    """The rule, dense: bool [N, M + N], True where a code of the grid sees a code of the coarse grid or of its own."""
    row_N, column_N = cells(rule.height, rule.width)
    fine_NN = sees(rule.window, row_N[None, :] - row_N[:, None], column_N[None, :] - column_N[:, None])
    if not rule.ratio:
        return fine_NN
    row_M, column_M = cells(*rule.coarse_sides)
    below_N, beside_N = row_N // rule.ratio, column_N // rule.ratio
    coarse_NM = sees(rule.coarse_window, row_M[None, :] - below_N[:, None], column_M[None, :] - beside_N[:, None])
    return torch.cat([coarse_NM, fine_NN], dim=1)
