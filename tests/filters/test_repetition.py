import itertools

import numpy as np
import pytest

from cogview.filters.caption_keys import distinct_wordings, near_keys, wording_key
from cogview.filters.repetition import (
    NEAR_BITS,
    Places,
    band_keys,
    frequent_keys,
    near_images,
    repetition_table,
    same_images,
)


def agree(one: Places, other: Places) -> np.ndarray:
    return np.ones(len(one), np.bool_)


def as_keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_the_earliest_of_the_same_images_is_no_repetition() -> None:
    keys, places = as_keys(7, 9, 7, 3, 9, 7), np.array([50, 10, 20, 30, 40, 60])
    found = same_images(keys, keys, places)
    assert found.places.tolist() == [40, 50, 60]
    assert found.earlier.tolist() == [10, 20, 20]
    assert found.copies.tolist() == [2, 3, 3]
    assert same_images(keys[:0], keys[:0], places[:0]).places.tolist() == []


def test_half_a_digest_is_not_enough() -> None:
    assert len(same_images(as_keys(1, 1), as_keys(2, 3), np.array([0, 1])).places) == 0


def test_what_is_found_does_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 200, dtype=np.uint64)
    hashes[100:] = hashes[:100] ^ (np.uint64(1) << rng.integers(0, 63, 100, dtype=np.uint64))
    places = np.arange(200) * 3
    keys = np.concatenate(band_keys(hashes))
    expected = None
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(keys))
        found = near_images(keys[order], np.tile(hashes, 5)[order], np.tile(places, 5)[order], agree)
        expected = expected or (found.places.tolist(), found.earlier.tolist())
        assert (found.places.tolist(), found.earlier.tolist()) == expected
    assert expected == (places[100:].tolist(), places[:100].tolist())


@pytest.mark.parametrize("bits", range(NEAR_BITS + 1))
def test_hashes_within_the_bound_share_a_band(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for _ in range(200):
        one = rng.integers(0, 1 << 63, 1, dtype=np.uint64)
        flips = sum(1 << int(bit) for bit in rng.choice(63, bits, replace=False))
        other = one ^ np.uint64(flips)
        assert any((a == b).all() for a, b in zip(band_keys(one), band_keys(other), strict=True))
    keys = {int(key[0]) % 5 for key in band_keys(as_keys(123))}
    assert keys == set(range(5))  # a key tells its band


def test_signatures_decide_about_near_hashes() -> None:
    hashes, places = as_keys(0b1, 0b11, 0b111), np.array([0, 1, 2])
    keys = np.concatenate(band_keys(hashes))

    def only_with_the_first(later: Places, earlier: Places) -> np.ndarray:
        return earlier == 0

    found = near_images(keys, np.tile(hashes, 5), np.tile(places, 5), only_with_the_first)
    assert list(zip(found.places.tolist(), found.earlier.tolist(), strict=True)) == [(1, 0), (2, 0)]
    assert len(near_images(keys, np.tile(hashes, 5), np.tile(places, 5), lambda a, b: a < 0).places) == 0


def test_a_thousand_copies_are_found_and_one_is_left() -> None:
    hashes, places = np.full(5000, 42, np.uint64), np.arange(5000)
    found = near_images(hashes, hashes, places, agree)
    assert found.places.tolist() == list(range(1, 5000))
    assert found.unseen > 0  # neighbours beyond the limit were not compared, which is told


def test_a_placeholder_goes_with_all_its_copies() -> None:
    keys = as_keys(5, 5, 5, 6, 6)
    same = same_images(keys, keys, np.arange(5))
    nothing = same_images(keys[:0], keys[:0], np.arange(0))
    table = repetition_table(same, nothing, max_copies=2).to_pylist()
    assert [(row["place"], row["reason"]) for row in table] == [
        (0, "image_placeholder"),
        (1, "image_placeholder"),
        (2, "image_placeholder"),
        (4, "image_duplicate"),
    ]
    assert len(repetition_table(same, nothing, max_copies=0)) == 3


def test_keys_are_frequent_above_a_count() -> None:
    assert frequent_keys(as_keys(1, 2, 1, 1, 2), at_most=2).tolist() == [1]
    assert frequent_keys(as_keys(*[1] * 10), at_most=0).tolist() == []


def test_wordings_are_compared_without_case_and_punctuation() -> None:
    assert wording_key("A dog.") == wording_key("a  DOG") != wording_key("a dogs")
    assert distinct_wordings(["A dog", "一只狗", "a dog!", "...", "!"]) == ("A dog", "一只狗", "...", "!")


def test_nearly_equal_captions_share_a_key() -> None:
    template = "Free shipping: leather phone case for the model number {} with card holder, stand and magnetic closure"
    texts = [template.format(number) for number in range(40)]
    other = "a dog and a cat sleep on a red sofa beside the window of a small house in winter"
    keys = [set(own.tolist()) for own in near_keys([*texts, other, "a dog"])]
    shared = [bool(one & two) for one, two in itertools.combinations(keys[:40], 2)]
    assert np.mean(shared) > 0.5
    assert not any(keys[40] & own for own in keys[:40])
    assert keys[41] == set()  # too short to tell
    assert [own.tolist() for own in near_keys(texts)] == [own.tolist() for own in near_keys(texts)]
