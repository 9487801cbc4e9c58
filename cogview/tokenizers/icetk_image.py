"""icetk's own image tokenizer: one encoder, one codebook of 20,000, and a decoder for each of three compressions.

In: the weights of `ice_image.pt`, which its owner has fetched. Out: codes at 4, 8 or 16 pixels a side, and pixels
back. It is built as our multi-scale tokenizer is (`multiscale.py`), but for what the file decides: a coarser level is
the mean of four neighbours plus a strided convolution of them, all levels share one projection to the codebook, and the
decoders take code vectors as they are, the coarsest level's first in the file. It is read, not trained. icetk computes
in half precision; in fp32, as here, a vector between two codes may fall to the other one.
"""

# B batch, C channels, D code dimension, H height, W width, h w height and width in codes

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview.errors import CheckpointError, ConfigError
from cogview.tokenizers.code_maps import decode_map, empty_codes, encode_map
from cogview.tokenizers.codebook import CodebookConfig, build_codebook
from cogview.tokenizers.pixel_range import PixelRange, check_codes, check_images
from cogview.tokenizers.residual_blocks import Decoder, Downsample, Encoder, PyramidConfig
from cogview.tokenizers.tokenizer_files import known_fingerprint, load_tokenizer, write_tokenizer

KIND = "icetk"
CODEBOOK_NAME = "quantize.embed.weight"
OUR_NAMES = {"quantize.proj.": "quant_conv."}
LEFT_BEHIND = ("quantize.cluster_size", "quantize.embed_avg")
PIXEL_MEAN, PIXEL_STD = (0.79093, 0.76271, 0.75340), (0.30379, 0.32279, 0.32800)


@dataclass(frozen=True, kw_only=True)
class IcetkConfig:
    """The released sizes. multipliers: of the encoder; each coarser level's decoder has one level of width 1 more.

    attention_stride: decoders attend where a position stands for so many pixels a side. main_level: 8 pixels a side.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    num_levels: int = 3
    main_level: int = 1
    attention_stride: int = 16
    latent_channels: int = 256
    norm_groups: int = 32
    num_codes: int = 20_000

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per code on each side at each level: 4, 8 and 16."""
        return tuple(2 ** (len(self.multipliers) - 1 + level) for level in range(self.num_levels))

    def pyramid(self, *, level: int, num_res_blocks: int) -> PyramidConfig:
        """The networks of one level. ConfigError for a level that there is not."""
        if level not in range(self.num_levels):
            raise ConfigError(f"level={level}: this tokenizer has the levels 0 to {self.num_levels - 1}")
        multipliers = (1,) * level + self.multipliers
        attending = round(math.log2(self.attention_stride))
        return PyramidConfig(
            channels=self.channels,
            multipliers=multipliers,
            num_res_blocks=num_res_blocks,
            attention_levels=(attending,) if attending < len(multipliers) else (),
            latent_channels=self.latent_channels,
            norm_groups=self.norm_groups,
        )


class IcetkImageTokenizer(nn.Module):
    """The modules have the names of the file, but for the codebook and the projection to it."""

    def __init__(self, config: IcetkConfig) -> None:
        super().__init__()
        self.config = config
        levels, latent = range(config.num_levels), config.latent_channels
        self.enc = Encoder(config.pyramid(level=0, num_res_blocks=config.num_res_blocks))
        self.down_samplers = nn.ModuleList(_ResidualHalving(latent) for _ in levels[1:])
        self.quant_conv = nn.Conv2d(latent, latent, 1)
        codebook = CodebookConfig(num_codes=config.num_codes, code_dim=latent, start_after=None)
        self.codebook = build_codebook(codebook, commitment_weight=1.0)
        pyramids = [config.pyramid(level=level, num_res_blocks=1) for level in reversed(levels)]
        self.decs = nn.ModuleList(Decoder(pyramid, more_blocks=0) for pyramid in pyramids)
        self.pixels = PixelRange(mean=PIXEL_MEAN, std=PIXEL_STD)
        self._fingerprint: str | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per code on each side at each level."""
        return self.config.strides

    @property
    def stride(self) -> int:
        """Pixels per code on each side at the main level: 8."""
        return self.strides[self.config.main_level]

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return self.config.num_codes

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights file that was saved or loaded. ConfigError before either."""
        return known_fingerprint(self._fingerprint)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor, *, level: int | None = None) -> Tensor:
        """Codes, int64 [B, H/stride, W/stride], of images in [0, 1]. level: 0 is the finest, None the main one."""
        level = self._level(level)
        check_images(images_BCHW, stride=self.strides[level])
        if not len(images_BCHW):
            return empty_codes(images_BCHW, stride=self.strides[level])
        latent_BChw = self.enc(self.pixels.normalised(images_BCHW))
        for halving in self.down_samplers[:level]:
            latent_BChw = halving(latent_BChw)
        return encode_map(self.quant_conv(latent_BChw), codebook=self.codebook)

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor, *, level: int | None = None) -> Tensor:
        """Images float [B, 3, h * stride, w * stride] in [0, 1], clamped, of codes [B, h, w] of that level."""
        level = self._level(level)
        check_codes(codes_Bhw, num_codes=self.num_codes)
        vectors_BDhw = decode_map(codes_Bhw, codebook=self.codebook).to(self.enc.conv_in.weight.dtype)
        return self.pixels.restored(self.decs[self.config.num_levels - 1 - level](vectors_BDhw))

    def save(self, folder: Path) -> str:
        """Write weights (safetensors) and settings (JSON) into `folder`; returns the fingerprint."""
        self._fingerprint = write_tokenizer(folder, kind=KIND, config=asdict(self.config), tensors=self.state_dict())
        return self._fingerprint

    @classmethod
    def load(cls, folder: Path) -> "IcetkImageTokenizer":
        """Read a tokenizer that `save` wrote. CheckpointError when a file is missing, damaged or of other shapes."""
        tokenizer, fingerprint = load_tokenizer(folder, kind=KIND, config_type=IcetkConfig, parts={}, build=cls)
        tokenizer._fingerprint = fingerprint
        return tokenizer

    def _level(self, level: int | None) -> int:
        level = self.config.main_level if level is None else level
        self.config.pyramid(level=level, num_res_blocks=1)
        return level


class _ResidualHalving(nn.Module):
    """The mean of each four neighbours, plus a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_down_sampler = Downsample(channels)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        halved_BChw: Tensor = self.conv_down_sampler(latent_BChw)
        return nn.functional.avg_pool2d(latent_BChw, 2) + halved_BChw


def is_icetk(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of icetk's image tokenizer."""
    return CODEBOOK_NAME in weights and any(name.startswith("down_samplers.") for name in weights)


def from_icetk(weights: Mapping[str, Tensor], *, path: Path) -> IcetkImageTokenizer:
    """The tokenizer of a state dict with icetk's names, of any sizes. CheckpointError where something does not fit."""
    try:
        config = _config_of(weights)
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} holds no image tokenizer of icetk ({error}); give its ice_image.pt") from error
    tokenizer = IcetkImageTokenizer(config)
    state = {
        next((new + name.removeprefix(old) for old, new in OUR_NAMES.items() if name.startswith(old)), name): tensor
        for name, tensor in weights.items()
        if name != CODEBOOK_NAME and not name.startswith(LEFT_BEHIND)
    }
    codebook_KD = weights[CODEBOOK_NAME].float()
    state |= tokenizer.codebook.state_dict(prefix="codebook.")
    state |= {"codebook.codebook_KD": codebook_KD, "codebook.sums_KD": codebook_KD.clone()}
    try:
        tokenizer.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit an image tokenizer of icetk: {error}") from error
    return tokenizer.float().eval()


def _config_of(weights: Mapping[str, Tensor]) -> IcetkConfig:
    """Sizes from names and shapes; KeyError for a tensor that is missing."""
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("enc.down."))
    channels = weights["enc.conv_in.weight"].shape[0]
    widths = [weights[f"enc.down.{level}.block.0.conv1.weight"].shape[0] for level in range(depth)]
    num_codes, latent = weights[CODEBOOK_NAME].shape
    return IcetkConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        num_res_blocks=len([name for name in weights if name.endswith(".norm1.weight") and "enc.down.0." in name]),
        num_levels=1 + len({name.split(".")[1] for name in weights if name.startswith("down_samplers.")}),
        latent_channels=latent,
        num_codes=num_codes,
    )
