"""The VQGAN (Esser et al. 2021): CogView's image tokenizer for fashion, 16x smaller on
each side (section 3.3 of the paper: 800 pixels are 50 x 50 codes).

In: pixels [B, 3, H, W] in [0, 1], H and W multiples of the stride. Out: codes [B, H/stride, W/stride], and pixels back
from them. The losses that make it a GAN stand in `adversarial.py`.
"""

# B batch, C channels, H height, W width, h w height and width in codes, N vectors, D code dimension

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cogview.tokenizers.code_maps import decode_map, empty_codes, encode_map, quantize
from cogview.tokenizers.codebook import CodebookConfig, Quantized, build_codebook
from cogview.tokenizers.pixel_range import PixelRange, check_codes, check_images
from cogview.tokenizers.residual_blocks import Decoder, Encoder, PyramidConfig
from cogview.tokenizers.tokenizer_files import known_fingerprint, load_tokenizer, write_tokenizer

KIND = "vqgan"
PARTS = {"pyramid": PyramidConfig, "codebook": CodebookConfig}


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """pyramid: the networks; the default is the 16x one of the VQGAN paper.

    commitment_weight: how strongly encoder outputs are pulled to their codes. pixel_mean and pixel_std: what the
    networks see is (pixel - mean) / std; the default maps [0, 1] to [-1, 1].
    """

    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    commitment_weight: float = 0.25
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def stride(self) -> int:
        """Pixels per code on each side."""
        return self.pyramid.stride


@dataclass(frozen=True)
class Autoencoded:
    """A batch and what came back of it, both normalised, [B, 3, H, W], and what the codebook has to say."""

    pixels_BCHW: Tensor
    decoded_BCHW: Tensor
    quantized: Quantized


class VQGANTokenizer(nn.Module):
    """Encoder, codebook and decoder, with a 1x1 projection on each side of the codebook."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        latent, dim = config.pyramid.latent_channels, config.codebook.code_dim
        self.encoder = Encoder(config.pyramid)
        self.quant_conv = nn.Conv2d(latent, dim, 1)
        self.codebook = build_codebook(config.codebook, commitment_weight=config.commitment_weight)
        self.post_quant_conv = nn.Conv2d(dim, latent, 1)
        self.decoder = Decoder(config.pyramid)
        self.pixels = PixelRange(mean=config.pixel_mean, std=config.pixel_std)
        self._fingerprint: str | None = None

    @property
    def stride(self) -> int:
        """Pixels per code on each side: 16 for five levels."""
        return self.config.stride

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return self.config.codebook.num_codes

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights file that was saved or loaded. ConfigError before either."""
        return known_fingerprint(self._fingerprint)

    def forward(self, images_BCHW: Tensor) -> Autoencoded:
        """A batch in [0, 1] through the quantized bottleneck and back; in training the codes move as well."""
        check_images(images_BCHW, stride=self.stride)
        pixels_BCHW = self.pixels.normalised(images_BCHW)
        vectors_BDhw = self.quant_conv(self.encoder(pixels_BCHW))
        quantized_BDhw, quantized = quantize(vectors_BDhw, codebook=self.codebook)
        return Autoencoded(pixels_BCHW, self.decoder(self.post_quant_conv(quantized_BDhw)), quantized)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes, int64 [B, H/stride, W/stride], of images float [B, 3, H, W] in [0, 1]."""
        check_images(images_BCHW, stride=self.stride)
        if not len(images_BCHW):
            return empty_codes(images_BCHW, stride=self.stride)
        return encode_map(self.quant_conv(self.encoder(self.pixels.normalised(images_BCHW))), codebook=self.codebook)

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Images float [B, 3, h * stride, w * stride] in [0, 1], clamped, of int64 codes [B, h, w]."""
        check_codes(codes_Bhw, num_codes=self.num_codes)
        vectors_BDhw = decode_map(codes_Bhw, codebook=self.codebook).to(self.post_quant_conv.weight.dtype)
        return self.pixels.restored(self.decoder(self.post_quant_conv(vectors_BDhw)))

    def save(self, folder: Path) -> str:
        """Write weights (safetensors) and settings (JSON) into `folder`; returns the fingerprint."""
        config = asdict(self.config) | {"codebook": self.config.codebook.stored()}
        self._fingerprint = write_tokenizer(folder, kind=KIND, config=config, tensors=self.state_dict())
        return self._fingerprint

    @classmethod
    def load(cls, folder: Path) -> "VQGANTokenizer":
        """Read a tokenizer that `save` wrote. CheckpointError when a file is missing, damaged or of other shapes."""
        tokenizer, fingerprint = load_tokenizer(folder, kind=KIND, config_type=VQGANConfig, parts=PARTS, build=cls)
        tokenizer._fingerprint = fingerprint
        return tokenizer
