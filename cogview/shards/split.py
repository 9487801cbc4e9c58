"""On which side of the split a picture is: by a hash of its key, so that it does not depend on the other pictures."""

import hashlib

HASH_RANGE = 1 << 64


def key_hash(key: str) -> int:
    """A number in [0, 2^64) that is the same for a key on any machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def split_of(key: str, *, threshold: int) -> str:
    """`validation` for keys whose hash is below the threshold, else `train`."""
    return "validation" if key_hash(key) < threshold else "train"
