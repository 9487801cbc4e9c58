"""Sliding windows: the release's nine, and for any grid every code drawn once, from codes that are there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview.errors import ConfigError
from cogview.sampling.windows import SCALE, Window, new_codes, plan_windows

RELEASED = [(0, 0, 18), (0, 1, 30), (0, 2, 30), (1, 1, 30), (1, 0, 30), (1, 2, 30), (2, 0, 32), (2, 1, 32), (2, 2, 32)]
RELEASED_NEW = [576, 672, 480, 512, 448, 256, 576, 288, 288]
GRIDS = st.integers(1, 10).flatmap(
    lambda half: st.tuples(st.just(2 * half), st.integers(2 * half, 50), st.integers(2 * half, 50))
)


def test_the_released_windows_fall_out_of_the_rule() -> None:
    windows = plan_windows(32, 32, side=16)
    assert [(window.row, window.column, window.rows) for window in windows] == RELEASED
    assert [int(is_new.sum()) for is_new in new_codes(windows, height=32, width=32)] == RELEASED_NEW
    for window in windows:
        assert (window.top, window.left) == (8 * window.row, 8 * window.column)
        assert window.read[0] == slice(window.top, window.top + 16)
        assert window.drawn[0].start == 16 * window.row
        assert window.drawn[1] == slice(16 * window.column, 16 * window.column + 32)


@settings(max_examples=150, deadline=None)
@given(GRIDS, st.sampled_from(["centre", "raster"]))
def test_every_code_is_drawn_once(grid: tuple[int, int, int], order: str) -> None:
    side, height, width = grid
    windows = plan_windows(height, width, side=side, order=order)
    times = np.zeros((SCALE * height, SCALE * width), dtype=int)
    for window, is_new in zip(windows, new_codes(windows, height=height, width=width), strict=True):
        times[window.drawn] += is_new
        assert is_new.any()
    assert (times == 1).all()


@settings(max_examples=100, deadline=None)
@given(GRIDS)
def test_a_code_is_drawn_from_the_codes_that_it_stands_for(grid: tuple[int, int, int]) -> None:
    side, height, width = grid
    windows = plan_windows(height, width, side=side)
    assert len({(window.row, window.column) for window in windows}) == len(windows)
    for window in windows:
        for read, drawn in zip(window.read, window.drawn, strict=True):
            assert drawn.start == SCALE * read.start
            assert drawn.stop <= SCALE * read.stop
        assert 0 <= window.top <= height - side
        assert 0 <= window.left <= width - side


@settings(max_examples=100, deadline=None)
@given(GRIDS)
def test_what_a_window_draws_hangs_together_from_its_top(grid: tuple[int, int, int]) -> None:
    """No window finds a row that is not drawn above one that is: it goes on where others stopped."""
    side, height, width = grid
    windows = plan_windows(height, width, side=side)
    for is_new in new_codes(windows, height=height, width=width):
        assert (np.diff(is_new.astype(int), axis=0) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 6), st.integers(2, 6))
def test_the_middle_column_leads_where_there_is_something_above_and_below(half: int, rows: int, columns: int) -> None:
    side = 2 * half
    windows = plan_windows((rows + 1) * half, (columns + 1) * half, side=side)
    middle = (columns - 1) // 2
    for row in range(1, rows - 1):
        in_order = [window.column for window in windows if window.row == row]
        assert in_order[0] == middle
        seen = {middle}
        for column in in_order[1:]:
            assert seen & {column - 1, column + 1}
            seen.add(column)


def test_a_picture_of_one_square_is_one_window() -> None:
    for order in ("centre", "raster"):
        windows = plan_windows(16, 16, side=16, order=order)
        assert windows == [Window(row=0, column=0, top=0, left=0, side=16, rows=32)]


def test_raster_order_draws_every_window_to_its_end() -> None:
    windows = plan_windows(32, 32, side=16, order="raster")
    assert [(window.row, window.column) for window in windows] == [(i, j) for i in range(3) for j in range(3)]
    assert {window.rows for window in windows} == {32}


@pytest.mark.parametrize(
    ("height", "width", "side", "order", "message"),
    [
        (8, 16, 16, "centre", "smaller than the 16 x 16"),
        (16, 16, 5, "centre", "even side"),
        (16, 16, 0, "centre", "even side"),
        (16, 16, 8, "spiral", "choose one of centre, raster"),
    ],
)
def test_what_has_no_windows_is_refused(height: int, width: int, side: int, order: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_windows(height, width, side=side, order=order)
