"""Which rows make up step `n`: a pure function of (seed, epoch, step), the same on any number of ranks.

In: how many rows there are, the global batch size, a seed. Out: the row indices of any step, in the time of one batch.
Epochs follow each other without a gap: each is a permutation of all rows, and a batch may hold the end of one epoch and
the start of the next, so no row is lost or doubled. A rank takes its slice of the batch elsewhere; resuming is one
integer.

Why a Feistel network and not a stored permutation: 30 million rows would cost every rank 120 MB and seconds at each
epoch, and numpy does not promise that `permutation` stays the same in later releases, which would change the data order
of a run resumed after an upgrade. Here an index is computed from its place, with integer arithmetic of our own.

The price of shuffling all rows is random reads of about 2 KB. Put shards on a local disk or in the page cache; on a
slow network disk copy them first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError

Unsigned = npt.NDArray[np.uint64]

FINEST_SHARE = 2**20  # a corpus's share is rounded to one part of so many
ROUNDS = 12  # half rounds; from 8 on, the tests see no difference to numpy's own permutations


@dataclass(frozen=True)
class SampleOrder:
    """The order of `num_rows` rows in batches of `batch_size` over all ranks. ConfigError for a size below 1."""

    num_rows: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(f"num_rows is {self.num_rows}; there is nothing to train on, tokenize some pairs first")
        if self.batch_size < 1:
            raise ConfigError(f"global batch_size is {self.batch_size}; it must be at least 1")

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Row indices of the global batch of `step` (from 0), int64 [batch_size]."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, places_in_epoch = np.divmod(places, self.num_rows)
        return permuted(places_in_epoch, num_rows=self.num_rows, epochs=epochs, seed=self.seed)

    def epoch(self, step: int) -> float:
        """How many times the data has been seen when `step` starts, such as 1.25."""
        return step * self.batch_size / self.num_rows


@dataclass(frozen=True)
class MixedOrder:
    """The order of several corpora's rows, numbered through, when each has its share of every stretch of the training.

    num_rows: of each corpus; shares: of the rows that are shown, relative to each other; none: as many as there are
    rows. Every corpus is shown in a `SampleOrder` of its own, so one with a large share goes through more epochs. From
    the start to any place it is off its share by fewer rows than there are corpora. ConfigError for shares that do not
    fit.
    """

    num_rows: tuple[int, ...]
    batch_size: int
    seed: int
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for rows in self.num_rows:
            SampleOrder(rows, self.batch_size, self.seed)
        if self.shares and (len(self.shares) != len(self.num_rows) or min(self.shares) <= 0):
            words = ", ".join(f"{share:g}" for share in self.shares)
            raise ConfigError(f"shares={words}: give each of the {len(self.num_rows)} corpora a number above 0")

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Row indices of the global batch of `step` (from 0), int64 [batch_size]; the corpora are numbered through."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        corpora, draws = self._draws(places)
        starts = np.cumsum([0, *self.num_rows[:-1]])
        found = np.empty_like(places)
        for corpus, rows in enumerate(self.num_rows):
            own = corpora == corpus
            epochs, places_in_epoch = np.divmod(draws[own], rows)
            seed = self.seed + corpus * 0x9E3779B97F4A7C15  # no two corpora of a size go in the same order
            found[own] = starts[corpus] + permuted(places_in_epoch, num_rows=rows, epochs=epochs, seed=seed)
        return found

    def _draws(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """At each place of the whole order: the corpus, and how often it came before.

        Of the first n rows of the corpora up to one, n * before // up_to are of those before it, by their weights: so
        counting needs no walk through the earlier rows, and every row belongs to exactly one corpus.
        """
        corpora, draws = np.zeros_like(places), places.copy()
        is_open = np.ones(places.shape, bool)  # among the rows of the corpora from the first to this one
        for corpus in range(len(self.num_rows) - 1, 0, -1):
            weight_before, weight_up_to = self._weights_up_to[corpus - 1 : corpus + 1]
            before = draws * weight_before // weight_up_to
            after = (draws + 1) * weight_before // weight_up_to
            own = is_open & (after == before)
            corpora[own] = corpus
            draws = np.where(own, draws - before, np.where(is_open, before, draws))
            is_open &= ~own
        return corpora, draws

    @cached_property
    def _weights_up_to(self) -> list[int]:
        """Of the corpora from the first to each one: whole numbers, small enough for products with row counts."""
        shares = self.shares or self.num_rows
        return list(accumulate(max(1, round(FINEST_SHARE * share / sum(shares))) for share in shares))


def sample_order(
    num_rows: Sequence[int], *, batch_size: int, seed: int, shares: Sequence[float] = ()
) -> SampleOrder | MixedOrder:
    """The order of one corpus, or of several."""
    if len(num_rows) == 1 and not shares:
        return SampleOrder(num_rows[0], batch_size, seed)
    return MixedOrder(tuple(num_rows), batch_size, seed, tuple(shares))


def permuted(
    places: npt.NDArray[np.int64], *, num_rows: int, epochs: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """The row at each place of its epoch; for one epoch and all places this is a permutation of range(num_rows).

    The network permutes a grid of left x right cells, a little larger than num_rows. A place that lands outside
    is sent through again until it lands inside ("cycle walking"), which keeps the whole a permutation.
    """
    left_size = np.uint64(int(np.ceil(np.sqrt(num_rows))))
    right_size = np.uint64(-(-num_rows // int(left_size)))
    keys = _mixed(_mixed(np.full(epochs.shape, seed % (1 << 64), np.uint64)) + epochs.astype(np.uint64))
    rows = places.astype(np.uint64)
    outside = np.ones(rows.shape, bool)
    while outside.any():
        rows[outside] = _feistel(rows[outside], keys[outside], left_size, right_size)
        outside = rows >= np.uint64(num_rows)
    return rows.astype(np.int64)


def _feistel(cells: Unsigned, keys: Unsigned, left_size: np.uint64, right_size: np.uint64) -> Unsigned:
    """Permute the cells of a left_size x right_size grid: each half round shifts one side by a hash of the other."""
    left, right = np.divmod(cells, right_size)
    for half_round in range(ROUNDS):
        round_keys = keys + np.uint64(half_round * 0xA24BAED4963EE407 % (1 << 64))
        if half_round % 2 == 0:
            left = (left + _mixed(right ^ round_keys) % left_size) % left_size
        else:
            right = (right + _mixed(left ^ round_keys) % right_size) % right_size
    cells_out: Unsigned = left * right_size + right
    return cells_out


def _mixed(values: Unsigned) -> Unsigned:
    """The 64-bit finalizer of SplitMix64: every input bit moves every output bit. Overflow is meant to wrap."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
