"""The perceptual distance LPIPS (Zhang et al. 2018): how different two pictures are to a trained eye.

In: two batches of pixels in [-1, 1] and the weights that the user gives: VGG16 as torchvision publishes it
(`features.0.weight` ...) and the linear heads of LPIPS 0.1 (`lin0.model.1.weight` ...), in two files or in one. Out: a
distance for each pair. Nothing is downloaded.
"""

# B batch, C channels, H height, W width

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview.config import input_field
from cogview.errors import CheckpointError, ConfigError
from cogview.weight_files import read_weights

# VGG16's convolutions in five slices, as numbers of torchvision's `features`; a 2x2 maximum pooling between two slices.
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT = (-0.030, -0.088, -0.188)  # of LPIPS: ImageNet's statistics for pixels in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
LENGTH_EPSILON, LEAST_SQUARE = 1e-10, 1e-16


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """weight: of the distance in the loss; 0 is off, and needs no files.

    vgg16, heads: the files of weights (the same one if it holds both); *_sha256: what the files must be, if given.
    """

    weight: float = 0.0
    vgg16: Path | None = input_field(default=None)
    vgg16_sha256: str = ""
    heads: Path | None = input_field(default=None)
    heads_sha256: str = ""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"weight={self.weight} of the perceptual distance: choose 0 (off) or more")
        for name in ("vgg16", "heads"):
            if self.weight > 0 and getattr(self, name) is None:
                raise ConfigError(
                    f"the perceptual distance has weight {self.weight}, but {name} is not given; name the file of "
                    "weights (torchvision's vgg16 and the heads of LPIPS 0.1), or set the weight to 0"
                )


class PerceptualDistance(nn.Module):
    """LPIPS with VGG16. Its weights are buffers: they follow the module's device, take no gradient, and stay out of
    checkpoints.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *, vgg16: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        """Takes the two state dicts. CheckpointError for a name that is missing or a shape that does not fit."""
        super().__init__()
        width = 3
        for index, numbers in enumerate(SLICES):
            for number in numbers:
                weight = _tensor(vgg16, f"features.{number}.weight", shape=(None, width, 3, 3))
                width = len(weight)
                self.register_buffer(f"weight_{number}", weight, persistent=False)
                bias = _tensor(vgg16, f"features.{number}.bias", shape=(width,))
                self.register_buffer(f"bias_{number}", bias, persistent=False)
            head = _tensor(heads, f"lin{index}.model.1.weight", shape=(1, width, 1, 1))
            self.register_buffer(f"head_{index}", head, persistent=False)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_files(cls, config: PerceptualConfig) -> "PerceptualDistance":
        """ConfigError where a file is not given, CheckpointError where it is missing, unsound or of another sha256."""
        vgg16 = _read(config.vgg16, name="vgg16", sha256=config.vgg16_sha256)
        heads = _read(config.heads, name="heads", sha256=config.heads_sha256)
        return cls(vgg16=vgg16, heads=heads)

    def forward(self, pixels_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        """The distance of each pair, [B]; both in [-1, 1], sides of 16 pixels or more."""
        both_BCHW = (torch.cat([pixels_BCHW, others_BCHW]) - self.shift) / self.scale
        total_B = pixels_BCHW.new_zeros(len(pixels_BCHW))
        for index, numbers in enumerate(SLICES):
            both_BCHW = both_BCHW if index == 0 else nn.functional.max_pool2d(both_BCHW, 2)
            for number in numbers:
                weight, bias = self.get_buffer(f"weight_{number}"), self.get_buffer(f"bias_{number}")
                both_BCHW = nn.functional.conv2d(both_BCHW, weight, bias, padding=1).relu()
            # Held above zero, where a root is infinitely steep.
            lengths_B1HW = both_BCHW.square().sum(dim=1, keepdim=True).clamp_min(LEAST_SQUARE).sqrt() + LENGTH_EPSILON
            ours_BCHW, theirs_BCHW = (both_BCHW / lengths_B1HW).chunk(2)
            weighted_BCHW = (ours_BCHW - theirs_BCHW).square() * self.get_buffer(f"head_{index}")
            total_B = total_B + weighted_BCHW.sum(dim=1).mean(dim=(1, 2))
        return total_B


def _read(path: Path | None, *, name: str, sha256: str) -> Mapping[str, Tensor]:
    if path is None:
        raise ConfigError(f"{name} is not given; name a file of weights for the perceptual distance")
    return read_weights(path, sha256=sha256)


def _tensor(weights: Mapping[str, Tensor], name: str, *, shape: tuple[int | None, ...]) -> Tensor:
    tensor = weights.get(name)
    if tensor is None:
        raise CheckpointError(
            f"the weights of the perceptual distance lack {name}; they have {', '.join(sorted(weights)[:3])}"
        )
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape} (None: any); it is not VGG16's"
        )
    return tensor.detach().float()
