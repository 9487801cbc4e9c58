"""What is hidden: how much, where, and that spans and patches keep their shapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogview.errors import ConfigError
from cogview.sequences.hidden_regions import hidden_box, hidden_patches, hidden_spans, runs


def test_the_releases_rule_hides_twenty_squares_and_the_papers_three_quarters() -> None:
    shares = {}
    for rule, share in (("released", 0.8), ("paper", 0.75)):
        hidden = [
            hidden_patches(20, side=4, rule=rule, share=share, generator=np.random.default_rng(seed))
            for seed in range(50)
        ]
        shares[rule] = [one.mean() for one in hidden]
    assert max(shares["released"]) <= 0.8
    assert 0.5 < np.mean(shares["released"]) < 0.65, "twenty squares of sixteen codes overlap"
    assert min(shares["paper"]) >= 0.75
    assert max(shares["paper"]) <= 0.75 + 16 / 400


@given(seed=st.integers(0, 2**32), side=st.integers(1, 5))
def test_every_hidden_code_lies_in_a_whole_square(seed: int, side: int) -> None:
    hidden = hidden_patches(8, side=side, rule="released", share=0.8, generator=np.random.default_rng(seed))
    squares = np.zeros_like(hidden)
    for top in range(9 - side):
        for left in range(9 - side):
            if hidden[top : top + side, left : left + side].all():
                squares[top : top + side, left : left + side] = True
    assert np.array_equal(hidden, squares)


def test_a_patch_fits_into_the_picture() -> None:
    with pytest.raises(ConfigError, match="patch_side=9"):
        hidden_patches(8, side=9, rule="released", share=0.8, generator=np.random.default_rng(0))


@given(seed=st.integers(0, 2**32))
def test_a_box_is_one_rectangle_of_the_sides_that_are_allowed(seed: int) -> None:
    hidden = hidden_box(8, shares=(0.25, 0.75), generator=np.random.default_rng(seed))
    rows, columns = hidden.any(axis=1), hidden.any(axis=0)
    assert np.array_equal(hidden, rows[:, None] & columns[None])
    assert len(runs(rows)) == len(runs(columns)) == 1
    assert 2 <= rows.sum() <= 6
    assert 2 <= columns.sum() <= 6


@given(seed=st.integers(0, 2**32), length=st.integers(2, 200))
def test_spans_are_led_by_one_token_and_do_not_touch(seed: int, length: int) -> None:
    hidden = hidden_spans(length, mean=3.0, share=0.15, generator=np.random.default_rng(seed))
    found = runs(hidden)
    predicted = sum(end - first - 1 for first, end in found)
    assert 1 <= predicted <= max(1, 0.15 * length)
    assert all(end - first >= 2 for first, end in found)


def test_a_text_of_one_token_is_not_hidden() -> None:
    assert not hidden_spans(1, mean=3.0, share=0.15, generator=np.random.default_rng(0)).any()


@given(st.lists(st.booleans(), max_size=30))
def test_runs_are_the_hidden_places_in_their_order(cells: list[bool]) -> None:
    hidden = np.array(cells, dtype=bool)
    places = [place for first, end in runs(hidden) for place in range(first, end)]
    assert places == np.flatnonzero(hidden).tolist()
