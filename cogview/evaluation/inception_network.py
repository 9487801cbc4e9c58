"""The Inception network of FID: Inception v3 as TensorFlow published it in 2015, from pytorch-fid's weights.

In: pictures of 299 x 299 pixels. Out: 2048 features and 1008 class scores. The weights come from a file that the user
gives: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or torch-fidelity's copy of it under another name. As in
that graph, average pools do not count their border, and the last block pools by the maximum.
"""

# B batch, C channels, H height, W width, D 2048 features, K classes

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cogview.weight_files import check_layout, read_weights

IMAGE_SIDE = 299
NUM_FEATURES, NUM_CLASSES = 2048, 1008
COUNTER = "num_batches_tracked"  # of batch norms: some writers keep it, and nobody needs it

Pool = Literal["average", "maximum", "halve"]


@dataclass(frozen=True)
class Conv:
    """A convolution with batch norm and ReLU. `kernel` is (height, width); with stride 1 it keeps the size."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


Step = Conv | Pool | tuple[Conv, Conv]  # two convolutions side by side
Branch = tuple[Step, ...]

THREE, FIVE, WIDE, HIGH = (3, 3), (5, 5), (1, 7), (7, 1)


def _block_a(pool_channels: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, FIVE)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, THREE), Conv("branch3x3dbl_3", 96, THREE)),
        ("average", Conv("branch_pool", pool_channels)),
    )


def _block_c(middle: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", middle), Conv("branch7x7_2", middle, WIDE), Conv("branch7x7_3", 192, HIGH)),
        (
            Conv("branch7x7dbl_1", middle),
            Conv("branch7x7dbl_2", middle, HIGH),
            Conv("branch7x7dbl_3", middle, WIDE),
            Conv("branch7x7dbl_4", middle, HIGH),
            Conv("branch7x7dbl_5", 192, WIDE),
        ),
        ("average", Conv("branch_pool", 192)),
    )


def _block_e(pool: Pool) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, THREE),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, Conv("branch_pool", 192)),
    )


STEM: Branch = (
    Conv("Conv2d_1a_3x3", 32, THREE, 2),
    Conv("Conv2d_2a_3x3", 32, THREE, padded=False),
    Conv("Conv2d_2b_3x3", 64, THREE),
    "halve",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, THREE, padded=False),
    "halve",
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, THREE, 2),),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, THREE), Conv("branch3x3dbl_3", 96, THREE, 2)),
        ("halve",),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, THREE, 2)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, WIDE),
            Conv("branch7x7x3_3", 192, HIGH),
            Conv("branch7x7x3_4", 192, THREE, 2),
        ),
        ("halve",),
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


class InceptionNetwork(nn.Module):
    """The network, with its layers under the names of the weight file."""

    def __init__(self) -> None:
        """Random weights; `load_inception` gives it published ones."""
        super().__init__()
        channels = _add_convs(self, STEM, channels=3)
        for name, branches in BLOCKS.items():
            block = nn.Module()
            channels = sum(_add_convs(block, branch, channels=channels) for branch in branches)
            self.add_module(name, block)
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, D], class scores [B, K]) of pictures [B, 3, 299, 299] in [-1, 1].

        The scores are without the classifier's bias: those that the Inception Score has always been taken from.
        """
        hidden = _walk(self, STEM, pixels_BCHW)
        for name, branches in BLOCKS.items():
            block = self.get_submodule(name)
            hidden = torch.cat([_walk(block, branch, hidden) for branch in branches], dim=1)
        features_BD = hidden.mean(dim=(2, 3))
        return features_BD, features_BD @ self.fc.weight.T


def load_inception(path: Path, *, sha256: str = "") -> InceptionNetwork:
    """The network with the weights of a file. CheckpointError for another sha256, or another layout."""
    found = {name: tensor for name, tensor in read_weights(path, sha256=sha256).items() if not name.endswith(COUNTER)}
    with torch.device("meta"):
        network = InceptionNetwork()
    wanted = {name: tuple(tensor.shape) for name, tensor in _weights(network)}
    check_layout(found, wanted=wanted, path=path, layout="pytorch-fid's Inception network")
    network.load_state_dict({name: tensor.float() for name, tensor in found.items()}, strict=False, assign=True)
    for name, buffer in list(network.named_buffers()):
        if name.endswith(COUNTER):
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, torch.zeros_like(buffer, device="cpu"))
    return network.eval().requires_grad_(False)


def _weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in network.state_dict().items() if not name.endswith(COUNTER))


def _add_convs(owner: nn.Module, branch: Branch, *, channels: int) -> int:
    """Add a branch's convolutions to a module; the channels that it ends with."""
    for step in branch:
        convs = step if isinstance(step, tuple) else (step,) if isinstance(step, Conv) else ()
        for conv in convs:
            height, width = conv.kernel
            padding = (height // 2, width // 2) if conv.stride == 1 and conv.padded else (0, 0)
            layer = nn.Module()
            layer.conv = nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, padding, bias=False)
            layer.bn = nn.BatchNorm2d(conv.channels, eps=1e-3)
            owner.add_module(conv.name, layer)
        channels = sum(conv.channels for conv in convs) or channels
    return channels


def _walk(owner: nn.Module, branch: Branch, hidden: Tensor) -> Tensor:
    """What a branch makes of its input."""
    for step in branch:
        if isinstance(step, tuple):
            hidden = torch.cat([_convolve(owner, conv, hidden) for conv in step], dim=1)
        elif isinstance(step, Conv):
            hidden = _convolve(owner, step, hidden)
        elif step == "average":
            hidden = functional.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False)
        elif step == "maximum":
            hidden = functional.max_pool2d(hidden, 3, stride=1, padding=1)
        else:
            hidden = functional.max_pool2d(hidden, 3, stride=2)
    return hidden


def _convolve(owner: nn.Module, conv: Conv, hidden: Tensor) -> Tensor:
    layer = owner.get_submodule(conv.name)
    convolved: Tensor = layer.get_submodule("bn")(layer.get_submodule("conv")(hidden))
    return convolved.relu()
