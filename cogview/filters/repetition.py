"""What can only be judged across a whole corpus: the same image twice, the same caption on too many images."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16  # half a sha256: no two of 30 million images share it by chance (1e-24)


def repeated_images(sha256: Iterable[str]) -> npt.NDArray[np.bool_]:
    """For images in corpus order, whether an earlier one has the same bytes. sha256: hex digests."""
    digests = np.frombuffer(
        b"".join(bytes.fromhex(digest)[:DIGEST_BYTES] for digest in sha256), dtype=f"V{DIGEST_BYTES}"
    ).view(np.dtype([("high", ">u8"), ("low", ">u8")]))
    _, first = np.unique(digests, return_index=True)
    repeated = np.ones(len(digests), dtype=np.bool_)
    repeated[first] = False
    return repeated


def repeated_captions(captions: Iterable[str], *, at_most: int) -> set[str]:
    """Captions that occur more often than `at_most`; none if it is 0."""
    if at_most == 0:
        return set()
    counts: dict[str, int] = {}
    for caption in captions:
        counts[caption] = counts.get(caption, 0) + 1
    return {caption for caption, count in counts.items() if count > at_most}
