"""When two images are the same picture: at another size, in another quality, re-encoded, a shade lighter.

In: RGB images. Out: for each a hash of 63 bits, from the lowest frequencies of its brightness, and a signature of 384
bytes: brightness on 16 x 16 cells and the two colour differences on 8 x 8. Hashes that lie within a few bits propose a
pair, signatures decide it: the hash alone takes a smile for a frown, and a red heart for a blue one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

# N images, P side of the reduced image, F frequencies along one side, S bytes of a signature
SIDE = 32
FREQUENCIES = 8
HASH_BITS = FREQUENCIES**2 - 1
BRIGHTNESS_CELLS, COLOUR_CELLS = 16, 8
SIGNATURE_BYTES = BRIGHTNESS_CELLS**2 + 2 * COLOUR_CELLS**2
_AT_ONCE = 256  # images: what fits the cache
_TO_YCBCR = np.array([[0.299, -0.168736, 0.5], [0.587, -0.331264, -0.418688], [0.114, 0.5, -0.081312]], np.float32)
_COSINES_FP = np.cos(np.pi / SIDE * np.outer(np.arange(FREQUENCIES), np.arange(SIDE) + 0.5)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Of N images: hashes, uint64 [N]; signatures, uint8 [N, 384]."""

    hashes_N: npt.NDArray[np.uint64]
    signatures_NS: npt.NDArray[np.uint8]


def reduce_image(image: Image.Image) -> npt.NDArray[np.uint8]:
    """An RGB image at 32 x 32 pixels, each the mean of what it covers: uint8 [32, 32, 3]."""
    double = 2 * SIDE
    if image.width % double == 0 == image.height % double:  # much quicker, and exact for whole factors
        image = image.reduce((image.width // double, image.height // double))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def likeness(reduced: Sequence[npt.NDArray[np.uint8]]) -> Likeness:
    """Hashes and signatures of images that `reduce_image` has reduced."""
    parts = [_likeness(np.stack(reduced[start : start + _AT_ONCE])) for start in range(0, len(reduced), _AT_ONCE)]
    return Likeness(
        hashes_N=np.concatenate([np.zeros(0, np.uint64), *(part.hashes_N for part in parts)]),
        signatures_NS=np.concatenate([np.zeros((0, SIGNATURE_BYTES), np.uint8), *(p.signatures_NS for p in parts)]),
    )


def _likeness(reduced_NPPC: npt.NDArray[np.uint8]) -> Likeness:
    colours_NPPC = reduced_NPPC.astype(np.float32) @ _TO_YCBCR
    brightness_NPP = np.ascontiguousarray(colours_NPPC[..., 0])
    spectrum_NFF = _COSINES_FP @ brightness_NPP @ _COSINES_FP.T
    waves_NB = spectrum_NFF.reshape(-1, FREQUENCIES**2)[:, 1:]  # the first is the mean brightness
    bits_NB = np.zeros((len(waves_NB), HASH_BITS + 1), np.uint8)
    middle = HASH_BITS // 2
    bits_NB[:, 1:] = waves_NB > np.partition(waves_NB, middle, axis=1)[:, middle : middle + 1]
    hashes_N = np.packbits(bits_NB, axis=1).view(">u8")[:, 0].astype(np.uint64)
    colour_cells = [_cells(colours_NPPC[..., channel], COLOUR_CELLS) + 128.0 for channel in (1, 2)]
    cells_NS = np.concatenate([_cells(brightness_NPP, BRIGHTNESS_CELLS), *colour_cells], axis=1)
    return Likeness(hashes_N=hashes_N, signatures_NS=np.clip(np.rint(cells_NS), 0, 255).astype(np.uint8))


def _cells(values_NPP: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """Means over `count` x `count` cells, [N, count * count]."""
    size = SIDE // count
    cells: npt.NDArray[np.float32] = values_NPP.reshape(-1, count, size, count, size).mean(axis=(2, 4))
    return cells.reshape(-1, count * count)
