"""Feature extractors: pictures in, numbers out, and what has to be said about whoever made them.

Three kinds: the Inception network of a weight file that the user gives; the project's own image tokenizer; and random
filters of a fixed seed. Only a distance between features of the published Inception weights is called FID; of any other
extractor it is FD[its name]. Numbers of different extractors, or of different resizing, cannot be compared.
"""

# B batch, C channels, H height, W width, D features, K classes, S side

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cogview.errors import ConfigError
from cogview.evaluation import inception_network, seeded_network
from cogview.evaluation.inception_network import load_inception
from cogview.evaluation.seeded_network import SeededNetwork
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.weight_files import require_sha256

PUBLISHED_INCEPTION = "6726825d"  # the start of its sha256, which its file name tells
Resize = Literal["bilinear", "bilinear_tensorflow", "bicubic"]
# The tools with the same weights differ in how they come to 299 pixels, and slightly in the range of values.
RESIZES: dict[Resize, str] = {
    "bilinear": "bilinear to 299, not antialiased (pytorch-fid)",
    "bilinear_tensorflow": "TensorFlow 1's bilinear to 299 (torch-fidelity)",
    "bicubic": "antialiased bicubic to 299 (clean-fid)",
}


@dataclass(frozen=True, kw_only=True)
class ExtractorFacts:
    """What travels with every number.

    name: of the extractor; sha256: of its weights; dim: features of a picture; resize: in words; num_classes: of its
    classifier, 0 if it has none; is_published: whether a distance between its features is an FID.
    """

    name: str
    sha256: str
    dim: int
    resize: str
    num_classes: int = 0
    is_published: bool = False

    def score_name(self, published: str, *, other: str) -> str:
        """`FID` with the published network, `FD[seeded-conv-1]` with another extractor."""
        return published if self.is_published else f"{other}[{self.name}]"


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Float32 [B, D], and [B, K] if there is a classifier."""

    features_BD: npt.NDArray[np.float32]
    logits_BK: npt.NDArray[np.float32] | None


class FeatureExtractor(Protocol):
    """Pictures uint8 [B, 3, H, W] to features."""

    facts: ExtractorFacts

    def __call__(self, pixels_BCHW: Tensor) -> Extracted: ...


class InceptionExtractor:
    """Features and classes of an Inception weight file."""

    def __init__(self, path: Path, *, sha256: str = "", resize: Resize = "bilinear", device: str = "cpu") -> None:
        """CheckpointError for a file with another sha256 than the given one, or of another layout."""
        if resize not in RESIZES:
            raise ConfigError(f"resize={resize!r}: choose one of {', '.join(RESIZES)}")
        found = require_sha256(path, sha256)
        self._network = load_inception(path).to(device)
        self._resize, self._device = resize, device
        is_published = found.startswith(PUBLISHED_INCEPTION)
        self.facts = ExtractorFacts(
            name="inception-v3-2015-12-05" if is_published else f"inception-v3-{found[:8]}",
            sha256=found,
            dim=inception_network.NUM_FEATURES,
            resize=RESIZES[resize],
            num_classes=inception_network.NUM_CLASSES,
            is_published=is_published,
        )

    @torch.inference_mode()
    def __call__(self, pixels_BCHW: Tensor) -> Extracted:
        """See FeatureExtractor."""
        resized_BCSS = for_inception(pixels_BCHW.to(self._device), resize=self._resize)
        features_BD, logits_BK = self._network(resized_BCSS)
        return Extracted(features_BD=features_BD.cpu().numpy(), logits_BK=logits_BK.cpu().numpy())


class TokenizerExtractor:
    """Means and deviations of an image tokenizer's encoder output over the picture.

    It was trained for what our own pictures are decoded with, so it flatters them beside those of other systems.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """CheckpointError for a folder without a sound tokenizer, ConfigError for one without a single encoder."""
        tokenizer = load_image_tokenizer(folder).to(device).eval()
        encoder, pixels = getattr(tokenizer, "encoder", None), getattr(tokenizer, "pixels", None)
        if encoder is None or pixels is None:
            raise ConfigError(
                f"image_tokenizer={folder} has no encoder whose output can be taken; choose the extractor "
                "seeded, or give --inception"
            )
        self._encode: Callable[[Tensor], Tensor] = encoder
        self._normalise: Callable[[Tensor], Tensor] = pixels.normalised
        self._device = device
        probe = self(torch.zeros(1, 3, 2 * tokenizer.stride, 2 * tokenizer.stride, dtype=torch.uint8), probing=True)
        self.facts = ExtractorFacts(
            name=f"tokenizer-{tokenizer.fingerprint[:8]}",
            sha256=tokenizer.fingerprint,
            dim=probe.features_BD.shape[1],
            resize="none",
        )

    @torch.inference_mode()
    def __call__(self, pixels_BCHW: Tensor, *, probing: bool = False) -> Extracted:
        """See FeatureExtractor; the sides of pictures are multiples of the tokenizer's stride."""
        images_BCHW = pixels_BCHW.to(self._device).float() / 255
        hidden_BDhw = self._encode(self._normalise(images_BCHW)).float()
        pooled = [hidden_BDhw.mean(dim=(2, 3)), hidden_BDhw.std(dim=(2, 3), correction=0)]
        return Extracted(features_BD=torch.cat(pooled, dim=1).cpu().numpy(), logits_BK=None)


class SeededExtractor:
    """Features of random filters, see `seeded_network`."""

    def __init__(self, *, device: str = "cpu") -> None:
        """Draws the filters; nothing is read."""
        network = SeededNetwork()
        self.facts = ExtractorFacts(
            name=seeded_network.NAME, sha256=network.sha256, dim=seeded_network.DIM, resize="none"
        )
        self._network, self._device = network.to(device), device

    @torch.inference_mode()
    def __call__(self, pixels_BCHW: Tensor) -> Extracted:
        """See FeatureExtractor. ConfigError for pictures with sides below 40."""
        if min(pixels_BCHW.shape[2:]) < seeded_network.LEAST_SIDE:
            raise ConfigError(
                f"image_size={min(pixels_BCHW.shape[2:])}: the extractor {seeded_network.NAME} needs "
                f"{seeded_network.LEAST_SIDE} pixels or more"
            )
        features_BD = self._network(pixels_BCHW.to(self._device).float() / 255)
        return Extracted(features_BD=features_BD.cpu().numpy(), logits_BK=None)


def for_inception(pixels_BCHW: Tensor, *, resize: Resize) -> Tensor:
    """Pictures uint8 of any size as the network takes them: [B, 3, 299, 299], about -1 to 1."""
    size = (inception_network.IMAGE_SIDE, inception_network.IMAGE_SIDE)
    values_BCHW = pixels_BCHW.float()
    if resize == "bilinear":
        return 2 * interpolate(values_BCHW / 255, size=size, mode="bilinear", align_corners=False) - 1
    if resize == "bicubic":
        return (interpolate(values_BCHW, size=size, mode="bicubic", align_corners=False, antialias=True) - 128) / 128
    rows_SH, columns_SW = (_corner_weights(length, device=values_BCHW.device) for length in values_BCHW.shape[2:])
    return (rows_SH @ values_BCHW @ columns_SW.T - 128) / 128


def _corner_weights(length: int, *, device: torch.device) -> Tensor:
    """[S, length]: TensorFlow 1 lays both grids at the corner of the first pixel, not over its centre."""
    weights_SL = torch.zeros(inception_network.IMAGE_SIDE, length)
    for place in range(inception_network.IMAGE_SIDE):
        share, whole = math.modf(place * length / inception_network.IMAGE_SIDE)
        below, above = int(whole), min(int(whole) + 1, length - 1)
        weights_SL[place, below] += 1 - share
        weights_SL[place, above] += share
    return weights_SL.to(device)
