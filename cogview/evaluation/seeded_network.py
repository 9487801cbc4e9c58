"""Features without trained weights: random filters of a fixed seed, and what they answer to a picture on average.

In: pictures of any size. Out: 124 numbers each: the strength of 16 random filters at four scales, of 12 filters on top
of those, and the colours of the four quarters. They know nothing of what a picture shows, but edges, textures,
sharpness and colours move them, so a distance between them is a yardstick for trials without a network. It is no FID.

The filters come from the bits of PCG64, which is the same stream wherever numpy runs.
"""

# B batch, C channels, H height, W width, D features, F filters, G second filters

import hashlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "seeded-conv-1"  # another number for whatever changes a feature
SEED = 20210526
FILTERS, SIDE = 16, 5
SECOND_FILTERS, SECOND_SIDE = 12, 3
SCALES = 4
SILENCE = 0.01  # added before the logarithm: strengths below it are noise of 8-bit pixels
DIM = SCALES * (FILTERS + SECOND_FILTERS) + 3 * 4
LEAST_SIDE = 2 ** (SCALES - 1) * SIDE


class SeededNetwork(nn.Module):
    """The filters, and how they are read."""

    def __init__(self) -> None:
        """Draw the filters."""
        super().__init__()
        generator = np.random.PCG64(SEED)
        filters = _zero_mean(_uniform(generator, (FILTERS, 3, SIDE, SIDE)))
        second = _zero_mean(_uniform(generator, (SECOND_FILTERS, FILTERS, SECOND_SIDE, SECOND_SIDE)))
        self.sha256 = hashlib.sha256(filters.tobytes() + second.tobytes()).hexdigest()
        self.register_buffer("filters_FCHW", torch.from_numpy(filters))
        self.register_buffer("second_GFHW", torch.from_numpy(second))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features [B, D] of pictures float [B, 3, H, W] in [0, 1], with sides of LEAST_SIDE or more."""
        found = [functional.adaptive_avg_pool2d(images_BCHW, 2).flatten(1)]
        for scale in range(SCALES):
            if scale:
                images_BCHW = functional.avg_pool2d(images_BCHW, 2)
            answers_BFHW = functional.conv2d(images_BCHW, self.get_buffer("filters_FCHW")).abs()
            second_BGHW = functional.conv2d(answers_BFHW, self.get_buffer("second_GFHW"), padding=1).abs()
            found += [(answers.mean(dim=(2, 3)) + SILENCE).log() for answers in (answers_BFHW, second_BGHW)]
        return torch.cat(found, dim=1)


def _uniform(generator: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1)."""
    bits = generator.random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape)


def _zero_mean(filters: np.ndarray) -> np.ndarray:
    """Filters that answer to no flat colour, of length 1, in float32."""
    centred = filters - filters.mean(axis=(2, 3), keepdims=True)
    lengths = np.sqrt(np.square(centred).sum(axis=(1, 2, 3), keepdims=True))
    return np.asarray(centred / lengths, dtype=np.float32)
