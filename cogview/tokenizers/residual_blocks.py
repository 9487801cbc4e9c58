"""The convolutional encoder and decoder of the VQGAN (Esser et al. 2021, after Ho et al. 2020).

In: maps of pixels or of codes' vectors. Out: the other. Residual blocks with group normalisation and swish,
self-attention where the map is small, one halving or doubling between two levels. The modules have the names that
taming-transformers gave them, so that its checkpoints map onto them one to one.
"""

# B batch, C channels, H height, W width, P positions (H x W), h w height and width in codes

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError

NORM_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """Levels of an encoder, or of its mirror image, the decoder.

    channels x multipliers[i]: the width of level i, full resolution first; each level but the last halves the sides.
    num_res_blocks: residual blocks of each level in the encoder, one more in the decoder. attention_levels:
    those whose blocks are each followed by self-attention; between the two halves it always stands. latent_channels:
    width of the map that goes to the codebook's projection. norm_groups: groups of the normalisation.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    latent_channels: int = 256
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.multipliers) < 1:
            raise ConfigError(f"multipliers={self.multipliers}: give one number of 1 or more for each level")
        if self.channels < 1 or self.latent_channels < 1 or self.num_res_blocks < 1:
            raise ConfigError(
                f"channels={self.channels}, latent_channels={self.latent_channels}, "
                f"num_res_blocks={self.num_res_blocks}: choose 1 or more of each"
            )
        if self.norm_groups < 1 or self.channels % self.norm_groups:
            raise ConfigError(
                f"channels={self.channels} cannot be normalised in norm_groups={self.norm_groups}; choose a divisor"
            )
        strange = [level for level in self.attention_levels if level not in range(len(self.multipliers))]
        if strange:
            raise ConfigError(
                f"attention_levels={self.attention_levels}: the levels are 0 to {len(self.multipliers) - 1}"
            )

    @property
    def stride(self) -> int:
        """Pixels per code on each side: 16 for five levels."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)


class ResidualBlock(nn.Module):
    """Twice norm, swish, 3x3 convolution, added to the input (through a 1x1 where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in, norm_groups=norm_groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out, norm_groups=norm_groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map of any size to one of the same size."""
        hidden_BCHW = self.conv1(swish(self.norm1(map_BCHW)))
        hidden_BCHW = self.conv2(swish(self.norm2(hidden_BCHW)))
        shortcut = self.nin_shortcut(map_BCHW) if hasattr(self, "nin_shortcut") else map_BCHW
        result: Tensor = shortcut + hidden_BCHW
        return result


class SpatialAttention(nn.Module):
    """One-headed self-attention over all positions of a map, added to it."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups=norm_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Memory grows with the positions, not their square, where torch has a fused kernel."""
        normed_BCHW = self.norm(map_BCHW)
        query, key, value = (
            project(normed_BCHW).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v)
        )
        mixed_BPC = nn.functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        projected: Tensor = self.proj_out(mixed_BPC.transpose(1, 2).reshape(map_BCHW.shape))
        return map_BCHW + projected


class Downsample(nn.Module):
    """Halves the sides by a strided convolution, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H / 2, W / 2]."""
        halved: Tensor = self.conv(nn.functional.pad(map_BCHW, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Doubles the sides by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2 H, 2 W]."""
        doubled: Tensor = self.conv(nn.functional.interpolate(map_BCHW, scale_factor=2.0, mode="nearest"))
        return doubled


class Middle(nn.Module):
    """What both networks have at their lowest resolution: block, attention, block."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm_groups=norm_groups)
        self.attn_1 = SpatialAttention(channels, norm_groups=norm_groups)
        self.block_2 = ResidualBlock(channels, channels, norm_groups=norm_groups)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map of any size to one of the same size."""
        result: Tensor = self.block_2(self.attn_1(self.block_1(map_BCHW)))
        return result


class Level(nn.Module):
    """The blocks of one resolution: `widths` are the channels from its entry through all its blocks.

    downsample, upsample: the way to the next level, where there is one.
    """

    downsample: Downsample
    upsample: Upsample

    def __init__(self, widths: Iterable[int], *, has_attention: bool, norm_groups: int) -> None:
        super().__init__()
        channels = list(widths)
        self.block = nn.ModuleList(
            ResidualBlock(channels_in, channels_out, norm_groups=norm_groups)
            for channels_in, channels_out in pairwise(channels)
        )
        attending = channels[1:] if has_attention else []
        self.attn = nn.ModuleList(SpatialAttention(width, norm_groups=norm_groups) for width in attending)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """Map of any size to one of the size that the next level takes."""
        for index, block in enumerate(self.block):
            map_BCHW = block(map_BCHW)
            if self.attn:
                map_BCHW = self.attn[index](map_BCHW)
        if hasattr(self, "downsample"):
            map_BCHW = self.downsample(map_BCHW)
        return self.upsample(map_BCHW) if hasattr(self, "upsample") else map_BCHW


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to a map [B, latent_channels, H / stride, W / stride]."""

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        groups, widths = config.norm_groups, config.widths
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        entry = config.channels
        for index, width in enumerate(widths):
            level = Level(
                [entry, *[width] * config.num_res_blocks],
                has_attention=index in config.attention_levels,
                norm_groups=groups,
            )
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            entry = width
        self.mid = Middle(entry, norm_groups=groups)
        self.norm_out = group_norm(entry, norm_groups=groups)
        self.conv_out = nn.Conv2d(entry, config.latent_channels, 3, padding=1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Sides must be multiples of the stride."""
        map_BCHW = self.conv_in(pixels_BCHW.to(self.conv_in.weight.dtype))
        for level in self.down:
            map_BCHW = level(map_BCHW)
        latent_BChw: Tensor = self.conv_out(swish(self.norm_out(self.mid(map_BCHW))))
        return latent_BChw


class Decoder(nn.Module):
    """A map [B, latent_channels, h, w] to pixels [B, 3, h * stride, w * stride].

    more_blocks: of each level than the encoder has.
    """

    def __init__(self, config: PyramidConfig, *, more_blocks: int = 1) -> None:
        super().__init__()
        groups, widths = config.norm_groups, config.widths
        entry = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, entry, 3, padding=1)
        self.mid = Middle(entry, norm_groups=groups)
        levels: list[Level] = []
        for index, width in reversed(list(enumerate(widths))):
            level = Level(
                [entry, *[width] * (config.num_res_blocks + more_blocks)],
                has_attention=index in config.attention_levels,
                norm_groups=groups,
            )
            if index:
                level.upsample = Upsample(width)
            levels.append(level)
            entry = width
        self.up = nn.ModuleList(reversed(levels))  # up.0 is full resolution, as down.0 is
        self.norm_out = group_norm(entry, norm_groups=groups)
        self.conv_out = nn.Conv2d(entry, 3, 3, padding=1)

    def forward(self, latent_BChw: Tensor) -> Tensor:
        """Sides of any length."""
        map_BCHW = self.mid(self.conv_in(latent_BChw))
        for level in reversed(self.up):
            map_BCHW = level(map_BCHW)
        pixels_BCHW: Tensor = self.conv_out(swish(self.norm_out(map_BCHW))).float()
        return pixels_BCHW


def group_norm(channels: int, *, norm_groups: int) -> nn.GroupNorm:
    """Normalisation over groups of channels: the same for a picture alone and in any batch."""
    return nn.GroupNorm(norm_groups, channels, eps=NORM_EPSILON)


def swish(map_BCHW: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return torch.nn.functional.silu(map_BCHW)
