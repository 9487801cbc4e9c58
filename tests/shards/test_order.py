"""The sample order: permutations without loss, from (seed, step) alone, as mixed as numpy's own."""

from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogview.errors import ConfigError
from cogview.shards.order import MixedOrder, SampleOrder, sample_order


def first_rows(order: SampleOrder, count: int) -> np.ndarray:
    steps = -(-count // order.batch_size)
    return np.concatenate([order.indices(step) for step in range(steps)])[:count]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(-(2**70), 2**70))
def test_every_epoch_holds_each_row_once(num_rows: int, batch_size: int, seed: int) -> None:
    rows = first_rows(SampleOrder(num_rows, batch_size, seed), 3 * num_rows)
    for epoch in rows.reshape(3, num_rows):
        assert sorted(epoch.tolist()) == list(range(num_rows))


def test_a_batch_may_straddle_two_epochs() -> None:
    order = SampleOrder(10, 4, seed=0)
    batches = [order.indices(step).tolist() for step in range(5)]
    assert sorted(batches[0] + batches[1] + batches[2][:2]) == list(range(10))
    assert sorted(batches[2][2:] + batches[3] + batches[4]) == list(range(10))
    assert order.epoch(5) == 2.0


def test_rows_do_not_depend_on_the_batch_size() -> None:
    """So a run continues in the same order when its global batch changes at an equal number of rows."""
    orders = [first_rows(SampleOrder(1000, size, seed=7), 2500).tolist() for size in (1, 17, 1000, 2500)]
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_the_order_never_changes() -> None:
    """Golden values: a resumed run must meet the same rows in any later release."""
    assert SampleOrder(30_000_000, 6, seed=1).indices(0).tolist() == [
        23845350,
        17176423,
        11918967,
        3255514,
        13206825,
        20516237,
    ]
    assert SampleOrder(30_000_000, 6, seed=1).indices(143_999).tolist() == [
        20065657,
        7319918,
        23663461,
        24010901,
        5454276,
        18724070,
    ]


def test_thirty_million_rows_are_permuted() -> None:
    order = SampleOrder(30_000_000, 100_000, seed=3)
    rows = np.concatenate([order.indices(step) for step in (0, 1, 150, 298, 299)])
    assert len(set(rows.tolist())) == 500_000
    assert 0 <= rows.min() < 1000
    assert 29_999_000 < rows.max() < 30_000_000


def test_seeds_and_epochs_differ() -> None:
    epochs = first_rows(SampleOrder(100, 100, seed=0), 300).reshape(3, 100)
    other = SampleOrder(100, 100, seed=1).indices(0)
    assert len({tuple(row.tolist()) for row in [*epochs, other]}) == 4


def test_small_permutations_are_uniform() -> None:
    """All 120 orders of five rows come equally often over 24,000 epochs (chi-square, 119 degrees of freedom)."""
    epochs = first_rows(SampleOrder(5, 1000, seed=0), 5 * 24_000).reshape(-1, 5)
    counts = Counter(map(tuple, epochs.tolist()))
    chi_square = sum((counts[order] - 200) ** 2 / 200 for order in permutations(range(5)))
    assert chi_square < 119 + 4 * np.sqrt(2 * 119)


@pytest.mark.parametrize("num_rows", [100, 997, 10_000])
def test_neighbours_in_an_epoch_are_not_related(num_rows: int) -> None:
    """Neighbours, row and place, and the same place in two epochs have no more correlation than chance allows."""
    epochs = first_rows(SampleOrder(num_rows, num_rows, seed=5), 20 * num_rows).reshape(20, num_rows).astype(float)
    places = np.arange(num_rows)
    for first, second in [(epochs[:, 1:], epochs[:, :-1]), (epochs[1:], epochs[:-1]), (epochs, places + 0 * epochs)]:
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(first.size)


def test_batches_draw_evenly_from_the_whole_corpus() -> None:
    """The numbers of rows that batches take from each hundredth of the corpus vary no more than random draws do."""
    epoch = SampleOrder(100_000, 100_000, seed=2).indices(0).reshape(100, 1000)
    counts = np.stack([np.bincount(batch // 1000, minlength=100) for batch in epoch])
    chi_square = ((counts - 10) ** 2 / 10).sum()
    assert abs(chi_square - 9801) < 5 * np.sqrt(2 * 9801)  # 99 x 99 degrees of freedom


@pytest.mark.parametrize(("num_rows", "batch_size"), [(0, 1), (1, 0), (-1, 1)])
def test_sizes_below_one_are_refused(num_rows: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=r"is -?[01]"):
        SampleOrder(num_rows, batch_size, seed=0)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        SampleOrder(10, 2, seed=0).indices(-1)


def mixed(order: MixedOrder, steps: int) -> np.ndarray:
    return np.concatenate([order.indices(step) for step in range(steps)])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 100)), min_size=2, max_size=5),
    st.integers(1, 40),
    st.integers(0, 2**40),
)
def test_every_corpus_has_its_share_of_every_stretch(
    corpora: list[tuple[int, float]], batch_size: int, seed: int
) -> None:
    sizes, shares = (tuple(column) for column in zip(*corpora, strict=True))
    rows = mixed(MixedOrder(sizes, batch_size, seed, shares), 20)
    ends = np.cumsum(sizes)
    found = np.searchsorted(ends, rows, side="right")
    for corpus, share in enumerate(shares):
        counted = np.concatenate([[0], np.cumsum(found == corpus)])
        expected = np.arange(len(rows) + 1) * share / sum(shares)
        assert np.abs(counted - expected).max() < len(sizes) + len(rows) * 2**-19


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=4), st.integers(1, 40))
def test_no_row_of_a_corpus_comes_again_before_all_have_come(sizes: list[int], batch_size: int) -> None:
    rows = mixed(MixedOrder(tuple(sizes), batch_size, 3, tuple(range(1, len(sizes) + 1))), 30)
    starts = [0, *np.cumsum(sizes)]
    for start, end in pairwise(starts):
        own = rows[(rows >= start) & (rows < end)]
        for epoch in range(len(own) // (end - start)):
            assert len(set(own[epoch * (end - start) : (epoch + 1) * (end - start)].tolist())) == end - start


def test_without_shares_corpora_count_by_their_rows() -> None:
    rows = mixed(MixedOrder((300, 100), 40, 1), 10)
    assert abs(int((rows < 300).sum()) - 300) <= 1


def test_a_mixed_step_depends_on_nothing_before_it() -> None:
    order = MixedOrder((30, 20, 10), 16, 5, (1.0, 2.0, 3.0))
    assert order.indices(10**7).tolist() == MixedOrder((30, 20, 10), 16, 5, (1.0, 2.0, 3.0)).indices(10**7).tolist()
    assert order.indices(3).tolist() == mixed(order, 4)[48:].tolist()


def test_one_corpus_keeps_its_order() -> None:
    assert sample_order([50], batch_size=8, seed=2) == SampleOrder(50, 8, 2)


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, 1.0, 1.0)])
def test_shares_that_do_not_fit_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="shares="):
        MixedOrder((10, 10), 4, 0, shares)
