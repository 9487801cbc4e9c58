"""What can only be judged across a whole corpus: the same image twice, the same wording on too many images.

A pair's place is a number that grows along the corpus. Of images that are the same the earliest stays, so what is
found depends on neither the order nor the division of the work. Keys come in any order; all arrays have N entries.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cogview.filters.likeness import HASH_BITS

NEAR_BITS = 4  # of 63 that hashes of the same image may differ in
BANDS = NEAR_BITS + 1  # so many parts, one of which then has no difference
MAX_NEIGHBOURS = 4096  # that an image is compared with in one band; more share a band only in very large corpora
_BAND_STARTS = [round(HASH_BITS * band / BANDS) for band in range(BANDS + 1)]

REPETITION_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("earlier", pa.int64()),  # the place whose image it repeats
        ("is_near", pa.bool_()),
        ("rule", pa.string()),
        ("reason", pa.string()),
    ]
)

Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
IsSame = Callable[[Places, Places], npt.NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Repetitions:
    """Places that repeat an earlier one (`earlier`), in order; copies: how many images each is one of (0: unknown).

    unseen: comparisons that were left out because too many images share a band.
    """

    places: Places
    earlier: Places
    copies: Places
    unseen: int = 0


def same_images(high_N: Keys, low_N: Keys, places_N: Places) -> Repetitions:
    """Which places have the digest (128 bits in two halves) of an earlier one."""
    order = np.lexsort((places_N, low_N, high_N))
    high_N, low_N, places_N = high_N[order], low_N[order], places_N[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (high_N[1:] != high_N[:-1]) | (low_N[1:] != low_N[:-1])
    firsts = np.flatnonzero(is_new)
    group = np.cumsum(is_new) - 1
    sizes = np.diff(np.append(firsts, len(order)))
    again = np.flatnonzero(~is_new)
    found = again[np.argsort(places_N[again])]
    return Repetitions(places=places_N[found], earlier=places_N[firsts[group[found]]], copies=sizes[group[found]])


def band_keys(hashes_N: Keys) -> list[Keys]:
    """The hashes' bands: hashes that differ in at most `NEAR_BITS` bits have the same key in one of them."""
    keys = []
    for band, (start, stop) in enumerate(itertools.pairwise(_BAND_STARTS)):
        part = (hashes_N >> np.uint64(start)) & np.uint64((1 << (stop - start)) - 1)
        keys.append(part * np.uint64(BANDS) + np.uint64(band))
    return keys


def near_images(keys_N: Keys, hashes_N: Keys, places_N: Places, is_same: IsSame) -> Repetitions:
    """Which places have an image that is near to an earlier one's and that `is_same` confirms.

    keys_N: of any bands; a place may come several times. is_same: of places [M] and earlier ones [M], whether the
    images' signatures agree.
    """
    order = np.lexsort((places_N, hashes_N, keys_N))
    keys_N, hashes_N, places_N = keys_N[order], hashes_N[order], places_N[order]
    is_found = np.zeros(len(order), np.bool_)
    found: dict[int, int] = {}
    left = np.arange(len(order))  # those that have a neighbour at this distance
    unseen = 0
    for distance in range(1, len(order)):
        left = left[left + distance < len(order)]
        left = left[keys_N[left] == keys_N[left + distance]]
        if not len(left):
            break
        if distance > MAX_NEIGHBOURS:
            unseen = len(left)
            break
        one, other = left, left + distance
        is_near = np.bitwise_count(hashes_N[one] ^ hashes_N[other]) <= NEAR_BITS
        one, other = one[is_near], other[is_near]
        is_later = places_N[one] > places_N[other]
        later, earlier = np.where(is_later, one, other), np.where(is_later, other, one)
        is_open = ~is_found[later] & (places_N[later] != places_N[earlier])
        later, earlier = later[is_open], earlier[is_open]
        agrees = is_same(places_N[later], places_N[earlier])
        is_found[later[agrees]] = True
        for place, twin in zip(places_N[later[agrees]].tolist(), places_N[earlier[agrees]].tolist(), strict=True):
            found[place] = min(twin, found.get(place, twin))
    places = np.array(sorted(found), np.int64)
    earlier_places = np.array([found[place] for place in places.tolist()], np.int64)
    return Repetitions(places=places, earlier=earlier_places, copies=np.zeros(len(places), np.int64), unseen=unseen)


def frequent_keys(keys_N: Keys, *, at_most: int) -> Keys:
    """The keys that occur more often than `at_most`, in order; none if it is 0."""
    if at_most == 0:
        return np.zeros(0, np.uint64)
    distinct, counts = np.unique(keys_N, return_counts=True)
    return distinct[counts > at_most]


def repetition_table(same: Repetitions, near: Repetitions, *, max_copies: int) -> pa.Table:
    """What is found as a table, in order of place. Images with more than `max_copies` (0: any number) go altogether."""
    is_placeholder = same.copies > max_copies if max_copies else np.zeros(len(same.places), np.bool_)
    firsts = np.unique(same.earlier[is_placeholder])
    rows = [
        *_rows(firsts, firsts, rule="max_image_copies", reason="image_placeholder"),
        *_rows(
            same.places[is_placeholder],
            same.earlier[is_placeholder],
            rule="max_image_copies",
            reason="image_placeholder",
        ),
        *_rows(
            same.places[~is_placeholder], same.earlier[~is_placeholder], rule="same_images", reason="image_duplicate"
        ),
        *_rows(near.places, near.earlier, rule="near_images", reason="image_near_duplicate"),
    ]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["place"]), schema=REPETITION_SCHEMA)


def _rows(places: Places, earlier: Places, *, rule: str, reason: str) -> list[dict[str, Any]]:
    is_near = rule == "near_images"
    return [
        {"place": place, "earlier": twin, "is_near": is_near, "rule": rule, "reason": reason}
        for place, twin in zip(places.tolist(), earlier.tolist(), strict=True)
    ]
