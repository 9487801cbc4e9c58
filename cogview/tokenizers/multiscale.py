"""CogView2's image tokenizer: one encoder and one codebook for three compressions, 4x, 8x and 16x (its section 3.1).

In: pixels [B, 3, H, W] in [0, 1]. Out: codes [B, H/stride, W/stride] at the level that is asked for, and pixels back
from them by that level's own decoder. A trunk leads to the finest level; each coarser one is halved from the one
before it. Trained on L1, MS-SSIM and, if weights are given, the perceptual distance, at all levels at once.
"""

# B batch, C channels, H height, W width, h w height and width in codes, D code dimension

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.tokenizers.adversarial import ObjectiveLoss
from cogview.tokenizers.code_maps import decode_map, empty_codes, encode_map, quantize
from cogview.tokenizers.codebook import CodebookConfig, Quantized, build_codebook
from cogview.tokenizers.perceptual import PerceptualConfig, PerceptualDistance
from cogview.tokenizers.pixel_range import PixelRange, check_codes, check_images
from cogview.tokenizers.residual_blocks import Decoder, Downsample, Encoder, PyramidConfig, ResidualBlock
from cogview.tokenizers.structural_similarity import SCALE_WEIGHTS, ms_ssim, weights_of
from cogview.tokenizers.tokenizer_files import known_fingerprint, load_tokenizer, write_tokenizer

KIND = "multiscale"
PARTS = {"pyramid": PyramidConfig, "codebook": CodebookConfig}


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig:
    """pyramid: the coarsest level's networks; a finer level's have fewer halvings. num_levels: compressions, each
    twice the one before. main_level: the one (from 0, finest first) that is used where none is named.

    The codebook's size and dimension and the normalisation are CogView2's; its widths are not published.
    """

    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    num_levels: int = 3
    main_level: int = 1
    codebook: CodebookConfig = field(default_factory=lambda: CodebookConfig(num_codes=20_000))
    commitment_weight: float = 0.25
    pixel_mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    pixel_std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)

    def __post_init__(self) -> None:
        if not 1 <= self.num_levels < len(self.pyramid.multipliers):
            raise ConfigError(
                f"num_levels={self.num_levels}: {len(self.pyramid.multipliers)} multipliers give at most "
                f"{len(self.pyramid.multipliers) - 1} compressions"
            )
        if self.main_level not in range(self.num_levels):
            raise ConfigError(f"main_level={self.main_level}: the levels are 0 to {self.num_levels - 1}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per code on each side at each level: 4, 8 and 16."""
        return tuple(self.pyramid_of(level).stride for level in range(self.num_levels))

    @property
    def stride(self) -> int:
        """What the sides of training pictures must be multiples of: the coarsest level's stride."""
        return self.strides[-1]

    def pyramid_of(self, level: int) -> PyramidConfig:
        """The networks of one level. ConfigError for a level that there is not."""
        if level not in range(self.num_levels):
            raise ConfigError(f"level={level}: this tokenizer has the levels 0 to {self.num_levels - 1}")
        depth = len(self.pyramid.multipliers) - self.num_levels + 1 + level
        attention = tuple(index for index in self.pyramid.attention_levels if index < depth)
        return replace(self.pyramid, multipliers=self.pyramid.multipliers[:depth], attention_levels=attention)


class MultiScaleTokenizer(nn.Module):
    """A trunk, its halvings, one codebook, and a decoder for each level."""

    def __init__(self, config: MultiScaleConfig) -> None:
        super().__init__()
        self.config = config
        levels = range(config.num_levels)
        latent, dim = config.pyramid.latent_channels, config.codebook.code_dim
        self.encoder = Encoder(config.pyramid_of(0))
        self.halvings = nn.ModuleList(_Halving(config.pyramid) for _ in levels[1:])
        self.quant_conv = nn.ModuleList(nn.Conv2d(latent, dim, 1) for _ in levels)
        self.codebook = build_codebook(config.codebook, commitment_weight=config.commitment_weight)
        self.post_quant_conv = nn.ModuleList(nn.Conv2d(dim, latent, 1) for _ in levels)
        self.decoders = nn.ModuleList(Decoder(config.pyramid_of(level)) for level in levels)
        self.pixels = PixelRange(mean=config.pixel_mean, std=config.pixel_std)
        self._fingerprint: str | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per code on each side at each level."""
        return self.config.strides

    @property
    def stride(self) -> int:
        """Pixels per code on each side at the main level: 8 in CogView2."""
        return self.strides[self.config.main_level]

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return self.config.codebook.num_codes

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights file that was saved or loaded. ConfigError before either."""
        return known_fingerprint(self._fingerprint)

    def forward(self, images_BCHW: Tensor) -> tuple[list[Tensor], Quantized]:
        """Each level's reconstruction (pixels around [0, 1], finest first), and what the codebook has to say."""
        check_images(images_BCHW, stride=self.strides[-1])
        maps = self._vectors(images_BCHW, level=self.config.num_levels - 1)
        # One look into the codebook for all levels: its statistics move once in each step.
        flat_maps = [vectors_BDhw.flatten(2) for vectors_BDhw in maps]
        joined_BD1P = torch.cat(flat_maps, dim=2).unsqueeze(2)
        quantized_BD1P, quantized = quantize(joined_BD1P, codebook=self.codebook)
        pieces = torch.split(quantized_BD1P.squeeze(2), [flat.shape[2] for flat in flat_maps], dim=2)
        decoded = [
            self._decoded(piece_BDP.reshape(vectors_BDhw.shape), level=level)
            for level, (piece_BDP, vectors_BDhw) in enumerate(zip(pieces, maps, strict=True))
        ]
        return decoded, quantized

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor, *, level: int | None = None) -> Tensor:
        """Codes, int64 [B, H/stride, W/stride], of images in [0, 1]. level: 0 is the finest, None the main one."""
        level = self._level(level)
        check_images(images_BCHW, stride=self.strides[level])
        if not len(images_BCHW):
            return empty_codes(images_BCHW, stride=self.strides[level])
        return encode_map(self._vectors(images_BCHW, level=level)[level], codebook=self.codebook)

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor, *, level: int | None = None) -> Tensor:
        """Images float [B, 3, h * stride, w * stride] in [0, 1], clamped, of codes [B, h, w] of that level."""
        level = self._level(level)
        check_codes(codes_Bhw, num_codes=self.num_codes)
        return self._decoded(decode_map(codes_Bhw, codebook=self.codebook), level=level).clamp(0, 1)

    def save(self, folder: Path) -> str:
        """Write weights (safetensors) and settings (JSON) into `folder`; returns the fingerprint."""
        config = asdict(self.config) | {"codebook": self.config.codebook.stored()}
        self._fingerprint = write_tokenizer(folder, kind=KIND, config=config, tensors=self.state_dict())
        return self._fingerprint

    @classmethod
    def load(cls, folder: Path) -> "MultiScaleTokenizer":
        """Read a tokenizer that `save` wrote. CheckpointError when a file is missing, damaged or of other shapes."""
        tokenizer, fingerprint = load_tokenizer(folder, kind=KIND, config_type=MultiScaleConfig, parts=PARTS, build=cls)
        tokenizer._fingerprint = fingerprint
        return tokenizer

    def _level(self, level: int | None) -> int:
        level = self.config.main_level if level is None else level
        self.config.pyramid_of(level)
        return level

    def _vectors(self, images_BCHW: Tensor, *, level: int) -> list[Tensor]:
        """The maps that go to the codebook, of the levels from the finest to `level`."""
        latents = [self.encoder(self.pixels.normalised(images_BCHW))]
        for halving in self.halvings[:level]:
            latents.append(halving(latents[-1]))
        return [project(latent) for project, latent in zip(self.quant_conv, latents, strict=False)]

    def _decoded(self, vectors_BDhw: Tensor, *, level: int) -> Tensor:
        vectors_BDhw = vectors_BDhw.to(self.encoder.conv_in.weight.dtype)
        return self.pixels.unclamped(self.decoders[level](self.post_quant_conv[level](vectors_BDhw)))


class _Halving(nn.Module):
    """From one level's latent map to the next coarser one's."""

    def __init__(self, pyramid: PyramidConfig) -> None:
        super().__init__()
        channels, groups = pyramid.latent_channels, pyramid.norm_groups
        self.downsample = Downsample(channels)
        self.block = nn.ModuleList(
            ResidualBlock(channels, channels, norm_groups=groups) for _ in range(pyramid.num_res_blocks)
        )

    def forward(self, latent_BChw: Tensor) -> Tensor:
        halved_BChw: Tensor = self.downsample(latent_BChw)
        for block in self.block:
            halved_BChw = block(halved_BChw)
        return halved_BChw


@dataclass(frozen=True, kw_only=True)
class MultiScaleTraining:
    """What a training job needs to know: the tokenizer and its losses.

    similarity_weight: of 1 - MS-SSIM beside L1, both in pixels of [0, 1]; num_scales: of MS-SSIM (5 need 161 pixels).
    """

    tokenizer: MultiScaleConfig = field(default_factory=MultiScaleConfig)
    similarity_weight: float = 1.0
    num_scales: int = len(SCALE_WEIGHTS)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.num_scales <= len(SCALE_WEIGHTS):
            raise ConfigError(f"num_scales={self.num_scales}: choose 1 to {len(SCALE_WEIGHTS)}")

    @property
    def stride(self) -> int:
        """What the sides of training pictures must be multiples of."""
        return self.tokenizer.stride


class MultiScaleObjective(nn.Module):
    """The multi-scale tokenizer with its losses, averaged over the levels."""

    def __init__(self, config: MultiScaleTraining) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = MultiScaleTokenizer(config.tokenizer)
        self.perceptual = PerceptualDistance.from_files(config.perceptual) if config.perceptual.weight else None

    def forward(self, images_BCHW: Tensor) -> ObjectiveLoss:
        """The loss of a batch in [0, 1]. ConfigError for pictures too small for the scales of MS-SSIM."""
        decoded, quantized = self.tokenizer(images_BCHW)
        parts = dict(quantized.parts)
        total: Tensor = quantized.loss
        for stride, decoded_BCHW in zip(self.tokenizer.strides, decoded, strict=True):
            level_parts = self._level_parts(decoded_BCHW, images_BCHW)
            total = total + sum(level_parts.values(), total.new_zeros(())) / len(decoded)
            parts |= {f"{name}_{stride}x": part for name, part in level_parts.items()}
        main_BCHW = decoded[self.tokenizer.config.main_level].clamp(0, 1)
        parts["mse"] = (main_BCHW - images_BCHW).square().mean()
        return ObjectiveLoss(total, {name: part.detach() for name, part in parts.items()})

    def _level_parts(self, decoded_BCHW: Tensor, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The weighted terms of one level."""
        parts = {"l1": (decoded_BCHW - images_BCHW).abs().mean()}
        similarity_B = ms_ssim(decoded_BCHW, images_BCHW, scale_weights=weights_of(self.config.num_scales))
        parts["dissimilarity"] = self.config.similarity_weight * (1 - similarity_B.mean())
        if self.perceptual is not None:
            distance_B = self.perceptual(decoded_BCHW * 2 - 1, images_BCHW * 2 - 1)
            parts["perceptual"] = self.config.perceptual.weight * distance_B.mean()
        return parts
