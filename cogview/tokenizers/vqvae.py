"""The image tokenizer: the paper's VQ-VAE, 8x smaller on each side (CogView, section 2.2 and appendix A).

In: pixels [B, 3, H, W] in [0, 1], H and W multiples of the stride. Out: codes [B, H/8, W/8], and pixels back from
them. The encoder is three strided convolutions and a 1x1; the decoder mirrors it. At width 512, code dimension 256
and 8192 codes these are the released network's shapes (19.03 M weights and a codebook of 2.10 M numbers).
"""

# B batch, C channels, H height, W width, h w height and width in codes, N vectors, D code dimension

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.tokenizers.code_maps import decode_map, encode_map, quantize
from cogview.tokenizers.codebook import CodebookConfig, build_codebook
from cogview.tokenizers.pixel_range import PixelRange, check_codes, check_images
from cogview.tokenizers.tokenizer_files import FIRST_KIND, known_fingerprint, load_tokenizer, write_tokenizer


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """widths: channels of the hidden layers from full resolution down to the codes; each halves the sides (paper: 3 x
    512).

    commitment_weight: how strongly encoder outputs are pulled to their codes; pixel_mean and pixel_std: the released
    network's normalisation, which stays part of the tokenizer.
    """

    widths: tuple[int, ...] = (512, 512, 512)
    commitment_weight: float = 0.25
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    pixel_mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    pixel_std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"widths={self.widths}: give one channel count of 1 or more for each halving")


@dataclass(frozen=True)
class TokenizerLoss:
    """What a training step looks at.

    l2: mean squared error in normalised pixels; mse: in pixels of [0, 1]; parts: what the codebook's rule reports,
    such as `temperature`, scalars without gradient.
    """

    total: Tensor
    l2: Tensor
    mse: Tensor
    parts: Mapping[str, Tensor]

    @property
    def commitment(self) -> Tensor:
        """Mean squared difference between encoder outputs and their codes."""
        return self.parts["commitment"]


class ImageTokenizer(nn.Module):
    """Encoder, codebook and decoder. `config.codebook.rule` says what trains the codebook."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.codebook.code_dim
        self.encoder = nn.Sequential(*_encoder_layers(config.widths, dim))
        self.codebook = build_codebook(config.codebook, commitment_weight=config.commitment_weight)
        self.decoder = nn.Sequential(*_decoder_layers(config.widths, dim))
        self.apply(_initialise)
        self.pixels = PixelRange(mean=config.pixel_mean, std=config.pixel_std)
        self._fingerprint: str | None = None

    @property
    def stride(self) -> int:
        """Pixels per code on each side: 8 for the paper's three halvings."""
        return int(2 ** len(self.config.widths))

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return self.config.codebook.num_codes

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights file that was saved or loaded. ConfigError before either."""
        return known_fingerprint(self._fingerprint)

    def forward(self, images_BCHW: Tensor) -> TokenizerLoss:
        """The training loss of a batch in [0, 1]: L2 in normalised pixels plus the codebook's term."""
        check_images(images_BCHW, stride=self.stride)
        pixels_BCHW = self.pixels.normalised(images_BCHW.float())
        quantized_BDhw, quantized = quantize(self.encoder(pixels_BCHW.to(self._dtype)), codebook=self.codebook)
        decoded_BCHW = self.decoder(quantized_BDhw).float()
        l2 = nn.functional.mse_loss(decoded_BCHW, pixels_BCHW)
        mse = nn.functional.mse_loss(self.pixels.restored(decoded_BCHW).detach(), images_BCHW)
        return TokenizerLoss(l2 + quantized.loss, l2.detach(), mse, quantized.parts)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes, int64 [B, H/stride, W/stride], of images float [B, 3, H, W] in [0, 1]."""
        check_images(images_BCHW, stride=self.stride)
        pixels_BCHW = self.pixels.normalised(images_BCHW.float())
        return encode_map(self.encoder(pixels_BCHW.to(self._dtype)), codebook=self.codebook)

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Images float [B, 3, h * stride, w * stride] in [0, 1], clamped, of int64 codes [B, h, w]."""
        check_codes(codes_Bhw, num_codes=self.num_codes)
        vectors_BDhw = decode_map(codes_Bhw, codebook=self.codebook).to(self._dtype)
        return self.pixels.restored(self.decoder(vectors_BDhw).float())

    def save(self, folder: Path) -> str:
        """Write weights (safetensors) and settings (JSON) into `folder`; returns the fingerprint."""
        config = asdict(self.config) | {"codebook": self.config.codebook.stored()}
        self._fingerprint = write_tokenizer(folder, kind=FIRST_KIND, config=config, tensors=self.state_dict())
        return self._fingerprint

    @classmethod
    def load(cls, folder: Path) -> "ImageTokenizer":
        """Read a tokenizer that `save` wrote. CheckpointError when a file is missing, damaged or of other shapes."""
        tokenizer, fingerprint = load_tokenizer(
            folder, kind=FIRST_KIND, config_type=VQVAEConfig, parts={"codebook": CodebookConfig}, build=cls
        )
        tokenizer._fingerprint = fingerprint
        return tokenizer

    @property
    def _dtype(self) -> torch.dtype:
        """Of the two networks; pixels and losses are fp32 always."""
        return next(self.encoder.parameters()).dtype


def _encoder_layers(widths: tuple[int, ...], dim: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for channels_in, channels_out in pairwise((3, *widths)):
        layers += [nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1), nn.ReLU()]
    return [*layers, nn.Conv2d(widths[-1], dim, 1)]


def _decoder_layers(widths: tuple[int, ...], dim: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for channels_in, channels_out in pairwise((dim, *reversed(widths))):
        layers += [nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1), nn.ReLU()]
    return [*layers, nn.Conv2d(widths[0], 3, 1)]


def _initialise(module: nn.Module) -> None:
    """He initialisation: a stack this deep without any normalisation would otherwise start with its signal faded."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        taps = module.weight[0, 0].numel() / (module.stride[0] ** 2 if isinstance(module, nn.ConvTranspose2d) else 1)
        nn.init.normal_(module.weight, std=(2 / (module.in_channels * taps)) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
