"""The order in which a picture is magnified: centre-continuous sliding windows (CogView, section 3.1 and figure 5 a).

In: the grid of a picture's codes and the side of the square that the super-resolution model reads. Out: windows in
their order, each with the rows that it draws; what lies there already is kept. For 32 x 32 codes and squares of 16
these are the release's nine windows; the rule that they follow, for any grid:

* Windows lie half a square apart; the last of a row or column ends with the picture.
* A window leaves the last row of codes that it reads to the window below, which sees what comes after it.
* The middle column leads: in the first row of windows, those left of it, which a start from the corner needs, draw no
  more than that row of codes beyond where the next row of windows begins; in the rows between first and last it comes
  first, then its neighbours, outward. So the middle of the picture is drawn by windows that see all that is around it.
* The last row of windows runs from left to right, down to the end.
"""

# G rows, columns of the drawn codes

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError

SCALE = 2  # drawn codes along a side for each code that is read
WindowOrder = Literal["centre", "raster"]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A square of `side` x `side` codes, and twice as many that are drawn for it, the first `rows` rows of them.

    row, column: of the window among the windows; top, left: of the square, in codes that are read.
    """

    row: int
    column: int
    top: int
    left: int
    side: int
    rows: int

    @property
    def read(self) -> tuple[slice, slice]:
        """The square in the grid of codes that are read."""
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)

    @property
    def drawn(self) -> tuple[slice, slice]:
        """Its rows in the grid of codes that are drawn."""
        top, left = SCALE * self.top, SCALE * self.left
        return slice(top, top + self.rows), slice(left, left + SCALE * self.side)


def plan_windows(height: int, width: int, *, side: int, order: WindowOrder = "centre") -> list[Window]:
    """The windows for a picture of height x width codes, in their order; together they draw every code once.

    order: "centre" is the rule above; "raster" goes from left to right and top to bottom, every window to its end.
    Raises ConfigError for a picture smaller than the square, an odd square, or an order that there is not.
    """
    if order not in get_args(WindowOrder):
        raise ConfigError(f"order={order!r}: choose one of {', '.join(get_args(WindowOrder))}")
    if side < 2 or side % 2:
        raise ConfigError(f"side={side}: windows lie half a square apart; choose an even side from 2 on")
    if min(height, width) < side:
        raise ConfigError(
            f"a picture of {height} x {width} codes is smaller than the {side} x {side} that the model reads; "
            "give a larger picture, or a model trained on smaller squares"
        )
    tops, lefts = _starts(height, side=side), _starts(width, side=side)
    if order == "raster":
        places = [(row, column, SCALE * side) for row in range(len(tops)) for column in range(len(lefts))]
    else:
        places = list(_centre_continuous(tops, num_columns=len(lefts), side=side))
    return [
        Window(row=row, column=column, top=tops[row], left=lefts[column], side=side, rows=rows)
        for row, column, rows in places
    ]


def new_codes(windows: Sequence[Window], *, height: int, width: int) -> Iterator[Mask]:
    """For each window in turn, which codes of its rows are new: bool [rows, SCALE * side], False where one lies."""
    is_drawn_GG = np.zeros((SCALE * height, SCALE * width), dtype=bool)
    for window in windows:
        yield ~is_drawn_GG[window.drawn]
        is_drawn_GG[window.drawn] = True


def _starts(length: int, *, side: int) -> list[int]:
    """Where windows begin along one direction: every half square, the last one flush with the end."""
    return [*range(0, length - side, side // 2), length - side]


def _centre_continuous(tops: Sequence[int], *, num_columns: int, side: int) -> Iterator[tuple[int, int, int]]:
    """(row, column, rows to draw) of each window in turn."""
    middle, last_row = (num_columns - 1) // 2, len(tops) - 1
    outward = [middle, *range(middle - 1, -1, -1), *range(middle + 1, num_columns)]
    for row in range(len(tops)):
        is_last = row == last_row
        for column in range(num_columns) if row == 0 or is_last else outward:
            to_read = side if is_last else side - 1
            if row == 0 and column < middle and not is_last:
                to_read = min(to_read, tops[1] + 1)
            yield row, column, SCALE * to_read
