"""DALL-E's discrete VAE as an image tokenizer (Ramesh et al. 2021, appendix A.1; the released network).

In: pixels [B, 3, H, W] in [0, 1], H and W multiples of 8. Out: codes [B, H/8, W/8], and pixels back from them. The
encoder scores all codes at each place and the best one is taken: there are no distances. Pixels are moved into
[0.1, 0.9] for the logit-Laplace likelihood that it was trained with, and back. It can be used here, not trained.
"""

# B batch, C channels, H height, W width, h w height and width in codes, K codes, N decoder input channels

from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.tokenizers.pixel_range import check_codes, check_images
from cogview.tokenizers.tokenizer_files import known_fingerprint, load_tokenizer, write_tokenizer

KIND = "dvae"
LAPLACE_EPSILON = 0.1  # the margin of the logit-Laplace likelihood on both sides of [0, 1]
NUM_GROUPS = 4  # three halvings between them


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """The released sizes. width: channels at full resolution; code_channels: of the decoder's input."""

    num_codes: int = 8192
    width: int = 256
    code_channels: int = 128
    blocks_per_group: int = 2

    def __post_init__(self) -> None:
        if self.width % 4 or min(self.width, self.num_codes, self.code_channels, self.blocks_per_group) < 1:
            raise ConfigError(f"{self}: all sizes must be 1 or more, and width a multiple of 4")


class DVAETokenizer(nn.Module):
    """Encoder and decoder of convolutions in residual blocks, with max-pooling and nearest upsampling between them."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self._fingerprint: str | None = None

    @property
    def stride(self) -> int:
        """Pixels per code on each side."""
        return 8

    @property
    def num_codes(self) -> int:
        """How many codes there are."""
        return self.config.num_codes

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights file that was saved or loaded. ConfigError before either."""
        return known_fingerprint(self._fingerprint)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes, int64 [B, H/8, W/8], of images float [B, 3, H, W] in [0, 1]; of equal scores the lowest code."""
        check_images(images_BCHW, stride=self.stride)
        logits_BKhw: Tensor = self.encoder((1 - 2 * LAPLACE_EPSILON) * images_BCHW + LAPLACE_EPSILON)
        return logits_BKhw.argmax(dim=1)

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Images float [B, 3, h * 8, w * 8] in [0, 1] of int64 codes [B, h, w]."""
        check_codes(codes_Bhw, num_codes=self.num_codes)
        # The first layer is a 1x1 convolution of one-hot codes, so its columns can be looked up.
        weight_NK11, bias_N = self.decoder[0].get_parameter("weight"), self.decoder[0].get_parameter("bias")
        vectors_BhwN = nn.functional.embedding(codes_Bhw, weight_NK11[:, :, 0, 0].T) + bias_N
        features_BCHW: Tensor = self.decoder[1:](vectors_BhwN.permute(0, 3, 1, 2).contiguous())
        likely_BCHW = features_BCHW[:, :3].sigmoid()  # the other three channels are the scales of the distribution
        return ((likely_BCHW - LAPLACE_EPSILON) / (1 - 2 * LAPLACE_EPSILON)).clamp(0, 1)

    def save(self, folder: Path) -> str:
        """Write weights (safetensors) and settings (JSON) into `folder`; returns the fingerprint."""
        self._fingerprint = write_tokenizer(folder, kind=KIND, config=asdict(self.config), tensors=self.state_dict())
        return self._fingerprint

    @classmethod
    def load(cls, folder: Path) -> "DVAETokenizer":
        """Read a tokenizer that `save` wrote. CheckpointError when a file is missing, damaged or of other shapes."""
        tokenizer, fingerprint = load_tokenizer(folder, kind=KIND, config_type=DVAEConfig, parts={}, build=cls)
        tokenizer._fingerprint = fingerprint
        return tokenizer


class ResidualBlock(nn.Module):
    """x + gain * (four convolutions of relu(x)), the inner ones a quarter as wide; names as in the released file."""

    def __init__(self, channels_in: int, channels_out: int, *, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        widths = (channels_in, *[channels_out // 4] * 3, channels_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, kernel in enumerate(kernels):
            layers[f"relu_{index + 1}"] = nn.ReLU()
            layers[f"conv_{index + 1}"] = _conv(widths[index], widths[index + 1], kernel)
        self.gain = gain
        self.id_path = nn.Identity() if channels_in == channels_out else _conv(channels_in, channels_out, 1)
        self.res_path = nn.Sequential(layers)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, H, W]."""
        summed: Tensor = self.id_path(features_BCHW) + self.gain * self.res_path(features_BCHW)
        return summed


def _encoder(config: DVAEConfig) -> nn.Sequential:
    widths = [config.width * 2**group for group in range(NUM_GROUPS)]
    layers = _groups([config.width, *widths], config, kernels=(3, 3, 3, 1), between=("pool", nn.MaxPool2d(2)))
    return nn.Sequential(
        OrderedDict(input=_conv(3, config.width, 7), **layers, output=_output(widths[-1], config.num_codes))
    )


def _decoder(config: DVAEConfig) -> nn.Sequential:
    widths = [config.width * 2**group for group in reversed(range(NUM_GROUPS))]
    between = ("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
    layers = _groups([config.code_channels, *widths], config, kernels=(1, 3, 3, 3), between=between)
    first = _conv(config.num_codes, config.code_channels, 1)
    return nn.Sequential(OrderedDict(input=first, **layers, output=_output(widths[-1], 6)))


def _groups(
    widths: list[int],
    config: DVAEConfig,
    *,
    kernels: tuple[int, int, int, int],
    between: tuple[str, nn.Module],
) -> dict[str, nn.Module]:
    """`group_1` to `group_4`, with a change of resolution at the end of all but the last."""
    gain = 1 / (NUM_GROUPS * config.blocks_per_group) ** 2
    groups: dict[str, nn.Module] = {}
    for group in range(NUM_GROUPS):
        channels_in, channels_out = widths[group], widths[group + 1]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(config.blocks_per_group):
            first = channels_in if block == 0 else channels_out
            layers[f"block_{block + 1}"] = ResidualBlock(first, channels_out, kernels=kernels, gain=gain)
        if group < NUM_GROUPS - 1:
            layers[between[0]] = between[1]
        groups[f"group_{group + 1}"] = nn.Sequential(layers)
    return groups


def _output(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=_conv(channels_in, channels_out, 1)))


def _conv(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
