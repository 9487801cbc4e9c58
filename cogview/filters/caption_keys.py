"""Numbers that stand for captions: one by which the same wording is found, a few by which nearly the same is.

The same wording: equal but for case, punctuation and spaces. Nearly the same: MinHash (Broder, 1997) over pairs of
words, or of characters in Chinese, with 4 bands of 8 values: two captions that share nine tenths of them have a band in
common with a probability of 0.9, two that share half of them with one of 0.02.
"""

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import rensa

from cogview.filters.scripts import has_wide_script

BANDS, VALUES_IN_BAND = 4, 8
MINHASH_SEED = 42
MIN_SHINGLES = 5  # shorter captions are nearly the same as too many others


def fold_caption(caption: str) -> str:
    """What of a caption counts when wordings are compared: its letters and digits, without case."""
    return "".join(character for character in caption.casefold() if character.isalnum())


def distinct_wordings(captions: Sequence[str]) -> tuple[str, ...]:
    """The captions without those that an earlier one repeats but for case, punctuation and spaces."""
    first: dict[str, str] = {}
    for caption in captions:
        first.setdefault(fold_caption(caption) or caption, caption)
    return tuple(first.values())


def wording_key(caption: str) -> int:
    """64 bits of the wording's digest."""
    return int.from_bytes(hashlib.blake2b(fold_caption(caption).encode(), digest_size=8).digest(), "big")


def near_keys(captions: Sequence[str]) -> list[npt.NDArray[np.uint64]]:
    """For each caption its bands, uint64 [4]; none for a caption of few words."""
    shingles = [_shingles(caption) for caption in captions]
    is_long = [len(own) >= MIN_SHINGLES for own in shingles]
    digests = rensa.RMinHash.digests_from_token_sets(
        [own for own, long_enough in zip(shingles, is_long, strict=True) if long_enough],
        BANDS * VALUES_IN_BAND,
        MINHASH_SEED,
    )
    found = iter(digests)
    nothing = np.zeros(0, np.uint64)
    return [_bands(next(found)) if long_enough else nothing for long_enough in is_long]


def _shingles(caption: str) -> list[str]:
    words = caption.casefold().split()
    tokens: Sequence[str] = fold_caption(caption) if has_wide_script(caption) else [fold_caption(w) for w in words]
    tokens = [token for token in tokens if token]
    return sorted({*tokens, *(f"{one} {two}" for one, two in itertools.pairwise(tokens))})


def _bands(digest: Sequence[int]) -> npt.NDArray[np.uint64]:
    values = np.asarray(digest, np.uint32).reshape(BANDS, VALUES_IN_BAND)
    digests = [
        hashlib.blake2b(bytes([band]) + row.tobytes(), digest_size=8).digest() for band, row in enumerate(values)
    ]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
