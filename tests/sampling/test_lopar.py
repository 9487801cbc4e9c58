"""LoPAR's order: the release's numbers, the rule that it follows, and that neighbours are not settled together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogview.errors import ConfigError
from cogview.sampling.lopar import (
    RELEASED_RANKS,
    RELEASED_TOP_K,
    Ranks,
    check_ranks,
    codes_drawn,
    diagonal_ranks,
    num_passes,
    rank_grid,
)


def neighbours_settled_together(ranks: Ranks) -> int:
    """Pairs of codes side by side or one above the other, in a grid without borders, of the same pass."""
    height, width = len(ranks), len(ranks[0])
    cells = [(row, column) for row in range(height) for column in range(width) if ranks[row][column] > 0]
    beside = sum(ranks[row][column] == ranks[row][(column + 1) % width] for row, column in cells)
    return beside + sum(ranks[row][column] == ranks[(row + 1) % height][column] for row, column in cells)


def test_passes_draw_as_many_codes_as_in_the_release() -> None:
    assert codes_drawn(60, 60) == [2300, 1900, 1500, 1000, 600, 200]
    assert num_passes(RELEASED_RANKS) == len(RELEASED_TOP_K) == 6
    assert int((rank_grid(60, 60) <= 0).sum()) == 1300  # 36 % stay as they are


def test_the_release_follows_the_diagonals_but_for_what_it_keeps_and_one_code() -> None:
    rule, others = diagonal_ranks(6), []
    for row in range(6):
        for column in range(6):
            if RELEASED_RANKS[row][column] > 0 and RELEASED_RANKS[row][column] != rule[row][column]:
                others.append((row, column, rule[row][column], RELEASED_RANKS[row][column]))
    assert others == [(5, 4, 2, 3)]
    kept = sum(rank <= 0 for row in RELEASED_RANKS for rank in row)
    assert kept - sum(rank <= 0 for row in rule for rank in row) == 10
    assert neighbours_settled_together(RELEASED_RANKS) == 1


@given(side=st.integers(2, 12), kept=st.integers(0, 12))
def test_the_rule_merges_diagonals_a_window_apart(side: int, kept: int) -> None:
    kept = min(kept, side - 1)
    ranks = diagonal_ranks(side, num_kept=kept)
    for row in range(side):
        for column in range(side):
            diagonal = row + column
            if diagonal < kept:
                assert ranks[row][column] <= 0
            else:
                assert ranks[row][column] == (diagonal - kept) - side * ((diagonal - kept) // side) + 1
    assert num_passes(ranks) == side  # instead of 2 side - 1
    check_ranks(ranks)
    assert neighbours_settled_together(ranks) == 0


@given(height=st.integers(1, 20), width=st.integers(1, 20), side=st.integers(1, 7))
def test_a_rank_is_that_of_the_place_in_its_window(height: int, width: int, side: int) -> None:
    ranks = diagonal_ranks(side, num_kept=0)
    grid = rank_grid(height, width, ranks=ranks)
    expected = torch.tensor([[ranks[row % side][column % side] for column in range(width)] for row in range(height)])
    assert torch.equal(grid, expected)
    drawn = codes_drawn(height, width, ranks=ranks)
    assert drawn[0] == height * width
    assert drawn == sorted(drawn, reverse=True)
    settled = [int((grid == number).sum()) for number in range(1, side + 1)]
    assert drawn == [sum(settled[number:]) for number in range(side)]


@pytest.mark.parametrize("ranks", [(), ((),), ((1, 2), (1,)), ((0, -1),), ((1, 3),)])
def test_ranks_with_gaps_are_refused(ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match="ranks="):
        check_ranks(ranks)
    with pytest.raises(ConfigError, match="ranks="):
        rank_grid(3, 3, ranks=ranks)


def test_a_window_without_a_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="side=0"):
        diagonal_ranks(0)
    with pytest.raises(ConfigError, match="num_kept=7"):
        diagonal_ranks(6, num_kept=7)
