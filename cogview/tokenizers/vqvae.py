"""The image tokenizer: the paper's VQ-VAE, 8x smaller on each side (CogView, section 2.2 and appendix A).

In: pixels [B, 3, H, W] in [0, 1], H and W multiples of the stride. Out: codes [B, H/8, W/8], and pixels back from
them. The encoder is three strided convolutions and a 1x1; the decoder mirrors it. At width 512, code dimension 256
and 8192 codes these are the released network's shapes (19.03 M weights and a codebook of 2.10 M numbers).
"""

# B batch, C channels, H height, W width, h w height and width in codes, N vectors, D code dimension

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.tokenizers.codebook import CodebookConfig, MovingAverageCodebook, nearest_codes

WEIGHTS_NAME = "image_tokenizer.safetensors"
SETTINGS_NAME = "image_tokenizer.json"


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
    """What a training step looks at. `l2`: mean squared error in normalised pixels; `mse`: in pixels of [0, 1]."""

    total: Tensor
    l2: Tensor
    mse: Tensor
    commitment: Tensor


class ImageTokenizer(nn.Module):
    """Encoder, moving-average codebook and decoder."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.codebook.code_dim
        self.encoder = nn.Sequential(*_encoder_layers(config.widths, dim))
        self.codebook = MovingAverageCodebook(config.codebook)
        self.decoder = nn.Sequential(*_decoder_layers(config.widths, dim))
        self.apply(_initialise)
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)
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
        """sha256 of the settings and weights file that was saved or loaded. ConfigError before either."""
        if self._fingerprint is None:
            raise ConfigError("a tokenizer has a fingerprint once it is saved or loaded")
        return self._fingerprint

    def forward(self, images_BCHW: Tensor) -> TokenizerLoss:
        """The training loss of a batch in [0, 1]: L2 in normalised pixels plus the commitment term."""
        pixels_BCHW = self._normalised(images_BCHW)
        vectors_BDhw = self.encoder(pixels_BCHW)
        quantized_ND, _, commitment = self.codebook(_as_vectors(vectors_BDhw))
        decoded_BCHW = self.decoder(_as_map(quantized_ND, like_BDhw=vectors_BDhw))
        l2 = nn.functional.mse_loss(decoded_BCHW, pixels_BCHW)
        mse = nn.functional.mse_loss(self._to_pixels(decoded_BCHW).detach(), images_BCHW)
        total = l2 + self.config.commitment_weight * commitment
        return TokenizerLoss(total, l2.detach(), mse, commitment.detach())

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes, int64 [B, H/stride, W/stride], of images float [B, 3, H, W] in [0, 1]."""
        vectors_BDhw = self.encoder(self._normalised(images_BCHW)).float()
        batch, _, height, width = vectors_BDhw.shape
        return nearest_codes(_as_vectors(vectors_BDhw), self.codebook.codebook_KD).view(batch, height, width)

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Images float [B, 3, h * stride, w * stride] in [0, 1] of int64 codes [B, h, w].

        Pixels are clamped, not stretched: a per-image stretch would change every picture's contrast.
        """
        if codes_Bhw.dim() != 3:
            raise ConfigError(f"codes of shape {tuple(codes_Bhw.shape)}: give [batch, height, width]")
        if codes_Bhw.numel() and (int(codes_Bhw.min()) < 0 or int(codes_Bhw.max()) >= self.num_codes):
            raise VocabularyError(
                f"codes from {int(codes_Bhw.min())} to {int(codes_Bhw.max())} for a codebook of {self.num_codes}; "
                "they come from another tokenizer, or their vocabulary offset was not removed"
            )
        vectors_BDhw = self.codebook.lookup(codes_Bhw).permute(0, 3, 1, 2).to(self.pixel_mean.dtype)
        return self._to_pixels(self.decoder(vectors_BDhw.contiguous()))

    def save(self, folder: Path) -> str:
        """Write weights (safetensors) and settings (JSON) into `folder`; returns the fingerprint."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_NAME)
        digest = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
        settings = {"config": asdict(self.config), "sha256": digest}
        (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        self._fingerprint = digest
        return digest

    @classmethod
    def load(cls, folder: Path) -> "ImageTokenizer":
        """Read a tokenizer that `save` wrote. CheckpointError when a file is missing, damaged or of other shapes."""
        try:
            settings = json.loads((folder / SETTINGS_NAME).read_text())
            weights = (folder / WEIGHTS_NAME).read_bytes()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} holds no image tokenizer ({error}); train one or give its folder"
            ) from error
        digest = hashlib.sha256(weights).hexdigest()
        if digest != settings["sha256"]:
            raise CheckpointError(
                f"{folder / WEIGHTS_NAME} is damaged: sha256 {digest[:12]}, not {settings['sha256'][:12]}"
            )
        config = dict(settings["config"])
        codebook = CodebookConfig(**config.pop("codebook"))
        mean, std = tuple(config.pop("pixel_mean")), tuple(config.pop("pixel_std"))
        widths = tuple(config.pop("widths"))
        tokenizer = cls(VQVAEConfig(widths=widths, codebook=codebook, pixel_mean=mean, pixel_std=std, **config))
        try:
            tokenizer.load_state_dict(load_file(folder / WEIGHTS_NAME))
        except (RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder / WEIGHTS_NAME} does not fit its settings: {error}") from error
        tokenizer._fingerprint = digest
        return tokenizer.eval()

    def _normalised(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.dim() != 4 or images_BCHW.shape[1] != 3:
            raise ConfigError(f"images of shape {tuple(images_BCHW.shape)}: give [batch, 3, height, width]")
        height, width = images_BCHW.shape[2:]
        if height % self.stride or width % self.stride or not height or not width:
            raise ConfigError(f"images of {width} x {height} pixels: both sides must be multiples of {self.stride}")
        if not torch.isfinite(images_BCHW).all():
            raise ConfigError("images hold NaN or infinite pixels; decode them again")
        return (images_BCHW - self.pixel_mean) / self.pixel_std

    def _to_pixels(self, normalised_BCHW: Tensor) -> Tensor:
        return (normalised_BCHW * self.pixel_std + self.pixel_mean).clamp(0, 1)


def _as_vectors(map_BDhw: Tensor) -> Tensor:
    return map_BDhw.permute(0, 2, 3, 1).reshape(-1, map_BDhw.shape[1])


def _as_map(vectors_ND: Tensor, *, like_BDhw: Tensor) -> Tensor:
    batch, dim, height, width = like_BDhw.shape
    return vectors_ND.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()


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
