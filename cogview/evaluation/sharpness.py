"""How sharp the edges of a picture are: whether a larger picture has more to show than a larger copy of a smaller one.

In: pictures. Out: one number, to be compared between pictures of one size that show the same (CogView, section 3.1
speaks of blurred local textures that become clear; it measures this by people's judgement alone).
"""

# B batch, C channels, H height, W width

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cogview.evaluation.grids import from_pictures


def edge_sharpness(images_BCHW: Tensor) -> Tensor:
    """Gradient energy per unit of gradient, of each picture [B]: the sum of g^2 over the sum of g.

    g is the length of the gradient of all colour channels at a pixel, in values of [0, 1] a pixel. An edge of height h
    that is w pixels wide has energy h^2 / w and total gradient h, whatever its length, so the quotient is h / w: the
    mean steepness of edges. Flat areas, and noise that is faint beside the edges, hardly count. A flat picture has 0.
    """
    down_BCHW = images_BCHW[:, :, 1:, :-1] - images_BCHW[:, :, :-1, :-1]
    across_BCHW = images_BCHW[:, :, :-1, 1:] - images_BCHW[:, :, :-1, :-1]
    energy_BHW = (down_BCHW.square() + across_BCHW.square()).sum(dim=1)
    total_B = energy_BHW.sqrt().sum(dim=(1, 2))
    return energy_BHW.sum(dim=(1, 2)) / total_B.clamp_min(torch.finfo(total_B.dtype).tiny)


def mean_edge_sharpness(pictures: Sequence[Image.Image]) -> float:
    """The mean of `edge_sharpness` over pictures of one size."""
    return float(edge_sharpness(from_pictures(pictures)).mean())


def enlarged(picture: Image.Image, *, size: tuple[int, int]) -> Image.Image:
    """The picture scaled up by bicubic interpolation: what every viewer does, and what super-resolution must beat."""
    return picture.resize(size, Image.Resampling.BICUBIC)
