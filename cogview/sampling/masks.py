"""Where a picture is to be drawn anew: boxes and masks in pixels, the square around them, and what fades at their edge.

In: a box in shares of a picture, or a mask of its pixels. Out: the square that is read to fill the hole, the codes that
lie in it, and how strongly each pixel is replaced (CogView2's text-guided completion).
"""

# H W height and width of the picture in pixels, g grid of codes

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of a picture in shares of its height and width, each from 0 to 1. ConfigError for one without an area."""

    top: float
    left: float
    bottom: float
    right: float

    def __post_init__(self) -> None:
        if not (0 <= self.top < self.bottom <= 1 and 0 <= self.left < self.right <= 1):
            raise ConfigError(
                f"box top={self.top}, left={self.left}, bottom={self.bottom}, right={self.right}: give shares of the "
                "picture from 0 to 1, top above bottom and left before right"
            )

    def mask(self, height: int, width: int) -> Tensor:
        """The pixels that it touches, bool [H, W]; at least one."""
        mask_HW = torch.zeros(height, width, dtype=torch.bool)
        rows = slice(math.floor(self.top * height), max(1, math.ceil(self.bottom * height)))
        columns = slice(math.floor(self.left * width), max(1, math.ceil(self.right * width)))
        mask_HW[rows, columns] = True
        return mask_HW


@dataclass(frozen=True, kw_only=True)
class Square:
    """A square of pixels. It may stick out of a picture that is shorter on one side; top and left are then below 0."""

    top: int
    left: int
    side: int

    def cut(self, values_CHW: Tensor) -> Tensor:
        """Its pixels [C, side, side]; beyond the picture those of its edge are repeated."""
        height, width = values_CHW.shape[1:]
        before, after = max(0, -self.top), max(0, self.top + self.side - height)
        left, right = max(0, -self.left), max(0, self.left + self.side - width)
        padded = nn.functional.pad(values_CHW[None], (left, right, before, after), mode="replicate")[0]
        top, first = max(0, self.top), max(0, self.left)
        return padded[:, top : top + self.side, first : first + self.side]

    def put_back(self, values_CSS: Tensor, *, onto_CHW: Tensor) -> Tensor:
        """A copy of a picture with what of the square lies in it replaced."""
        whole_CHW = onto_CHW.clone()
        height, width = onto_CHW.shape[1:]
        top, left = max(0, self.top), max(0, self.left)
        bottom, right = min(height, self.top + self.side), min(width, self.left + self.side)
        rows, columns = slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)
        whole_CHW[:, top:bottom, left:right] = values_CSS[:, rows, columns]
        return whole_CHW


def square_around(mask_HW: Tensor, *, context: float, smallest: int) -> Square:
    """The square that is read to fill a mask: `context` times as long as the mask's longer side, around its middle.

    At least `smallest` pixels, so that a tiny mask has something around it, but no longer than the picture's longer
    side; moved into the picture, and on a side that is shorter than the square, centred. ConfigError for an empty mask.
    """
    height, width = mask_HW.shape
    touched = mask_HW.nonzero()
    if not len(touched):
        raise ConfigError("the mask is empty: there is nothing to complete; mark at least one pixel")
    first, last = touched.amin(0).tolist(), (touched.amax(0) + 1).tolist()
    longest = max(last[0] - first[0], last[1] - first[1])
    side = max(longest, min(max(math.ceil(longest * context), smallest), max(height, width)))
    middle = [(first[axis] + last[axis]) / 2 for axis in (0, 1)]
    top, left = (_start(middle[axis], side, length) for axis, length in ((0, height), (1, width)))
    return Square(top=top, left=left, side=side)


def hidden_codes(mask_SS: Tensor, *, grid: int) -> Tensor:
    """The codes of a square that some pixel of its mask lies in, bool [g, g]."""
    touched = nn.functional.adaptive_max_pool2d(mask_SS[None, None].float(), grid)
    return touched[0, 0] > 0


def fading(mask_HW: Tensor, *, seam: int) -> Tensor:
    """How strongly each pixel is replaced, float [H, W]: 1 in the mask, falling to 0 over `seam` pixels around it.

    Further away it is 0. Distance is counted along the longer axis.
    """
    reached, strength_HW = mask_HW[None].float(), mask_HW.float()
    for distance in range(1, seam + 1):
        reached = nn.functional.max_pool2d(reached, 3, stride=1, padding=1)
        strength_HW = torch.maximum(strength_HW, reached[0] * (1 - distance / (seam + 1)))
    return strength_HW


def _start(middle: float, side: int, length: int) -> int:
    """Where a square begins along an axis."""
    if side >= length:
        return -((side - length) // 2)
    return min(max(0, round(middle - side / 2)), length - side)
