"""The losses of the VQGAN (Esser et al. 2021, equations 5 to 7) as one number, for a loop that goes back once.

In: images in [0, 1]. Out: what to minimise, and its parts. The generator's loss goes through the discriminator with
constant weights, and the discriminator's loss sees constant reconstructions. So their sum has the gradients of the
two backward passes that are usually alternated, each taken at the same weights.
"""

# B batch, C channels, H height, W width

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cogview.errors import ConfigError
from cogview.tokenizers.code_placement import sum_over_workers, world_and_rank
from cogview.tokenizers.discriminator import DiscriminatorConfig, PatchDiscriminator
from cogview.tokenizers.perceptual import PerceptualConfig, PerceptualDistance
from cogview.tokenizers.vqgan import VQGANConfig, VQGANTokenizer

MAX_ADAPTIVE_WEIGHT = 1e4
NORM_EPSILON = 1e-4
GRADIENT_SCALE = 1024.0  # the gradient of a mean over a million pixels would vanish in fp16
ADVERSARIAL_PARTS = ("generator", "adaptive_weight", "discriminator", "discriminator_margin")


@dataclass(frozen=True, kw_only=True)
class AdversarialLossConfig:
    """reconstruction: mean absolute (l1) or squared (l2) error of normalised pixels; perceptual: LPIPS on top of it.

    adversarial_weight: of the generator's loss, on top of the adaptive one; 0 trains without a discriminator.
    start_after: training batches before the discriminator joins in, when there is something to tell apart.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial_weight: float = 0.8
    start_after: int = 10_000
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if self.reconstruction not in ("l1", "l2"):
            raise ConfigError(f"reconstruction={self.reconstruction!r}: choose l1 or l2")
        if self.adversarial_weight < 0 or self.start_after < 0:
            raise ConfigError(
                f"adversarial_weight={self.adversarial_weight}, start_after={self.start_after}: choose 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class VQGANTraining:
    """What a training job needs to know: the tokenizer and its losses."""

    tokenizer: VQGANConfig = field(default_factory=VQGANConfig)
    loss: AdversarialLossConfig = field(default_factory=AdversarialLossConfig)

    @property
    def stride(self) -> int:
        """Pixels per code on each side."""
        return self.tokenizer.stride


@dataclass(frozen=True)
class ObjectiveLoss:
    """A batch's mean loss, to go back through, and its parts by name, to report; all scalars."""

    total: Tensor
    parts: Mapping[str, Tensor]


class VQGANObjective(nn.Module):
    """A VQGAN with its discriminator. Every weight of both is in each step's loss, as data parallelism asks."""

    num_batches: Tensor

    def __init__(self, config: VQGANTraining) -> None:
        super().__init__()
        self.config = config.loss
        self.tokenizer = VQGANTokenizer(config.tokenizer)
        perceptual = config.loss.perceptual
        self.perceptual = PerceptualDistance.from_files(perceptual) if perceptual.weight else None
        self.discriminator = PatchDiscriminator(config.loss.discriminator) if config.loss.adversarial_weight else None
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, images_BCHW: Tensor) -> ObjectiveLoss:
        """The loss of a batch in [0, 1]. In training the batches are counted, for the discriminator's start."""
        result = self.tokenizer(images_BCHW)
        pixels_BCHW, decoded_BCHW = result.pixels_BCHW, result.decoded_BCHW
        difference_BCHW = decoded_BCHW - pixels_BCHW
        norm = difference_BCHW.abs() if self.config.reconstruction == "l1" else difference_BCHW.square()
        parts = {"reconstruction": norm.mean(), **result.quantized.parts}
        faithfulness = parts["reconstruction"]
        if self.perceptual is not None:
            range_ = self.tokenizer.pixels
            ours, theirs = (range_.unclamped(pixels) * 2 - 1 for pixels in (decoded_BCHW, pixels_BCHW))
            parts["perceptual"] = self.perceptual(ours, theirs).mean()
            faithfulness = faithfulness + self.config.perceptual.weight * parts["perceptual"]
        total = faithfulness + result.quantized.loss
        if self.discriminator is not None:
            adversarial = self._adversarial(pixels_BCHW, decoded_BCHW, faithfulness=faithfulness)
            parts |= adversarial.parts
            total = total + adversarial.total
        parts["mse"] = (self.tokenizer.pixels.restored(decoded_BCHW) - images_BCHW).square().mean()
        return ObjectiveLoss(total, {name: part.detach() for name, part in parts.items()})

    def _adversarial(self, pixels_BCHW: Tensor, decoded_BCHW: Tensor, *, faithfulness: Tensor) -> ObjectiveLoss:
        """The generator's and the discriminator's losses; before the start zero, but with the discriminator in it."""
        assert self.discriminator is not None
        if self.training:
            self.num_batches.add_(1)
        if int(self.num_batches) <= self.config.start_after:
            sums = [weight.sum() * 0.0 for weight in self.discriminator.parameters()]
            nothing = torch.stack(sums).sum().float()
            return ObjectiveLoss(nothing, dict.fromkeys(ADVERSARIAL_PARTS, nothing))
        constant = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        generator = -functional_call(self.discriminator, constant, (decoded_BCHW,)).mean()
        adaptive = adaptive_weight(faithfulness, generator, last_weight=self.tokenizer.decoder.conv_out.weight)
        real_B1hw, drawn_B1hw = self.discriminator(pixels_BCHW.detach()), self.discriminator(decoded_BCHW.detach())
        discriminator = hinge_loss(real_B1hw, drawn_B1hw)
        total = self.config.adversarial_weight * adaptive * generator + discriminator
        margin = real_B1hw.mean() - drawn_B1hw.mean()
        values = (generator, adaptive, discriminator, margin)
        return ObjectiveLoss(total, dict(zip(ADVERSARIAL_PARTS, values, strict=True)))


def hinge_loss(real_B1hw: Tensor, drawn_B1hw: Tensor) -> Tensor:
    """What the discriminator minimises: logits above 1 for real patches, below -1 for drawn ones."""
    relu = nn.functional.relu
    return (relu(1 - real_B1hw).mean() + relu(1 + drawn_B1hw).mean()) / 2


def adaptive_weight(faithfulness: Tensor, generator: Tensor, *, last_weight: Tensor) -> Tensor:
    """How much the generator's loss may count so that it pulls as strongly at the last layer as faithfulness does.

    The ratio of the two gradients' norms, a constant, at most 1e4; over all workers' batches. 0 without gradients.
    """
    if not torch.is_grad_enabled():
        return faithfulness.new_zeros(())
    gradients = torch.stack(
        [
            torch.autograd.grad(loss * GRADIENT_SCALE, last_weight, retain_graph=True)[0].float() / GRADIENT_SCALE
            for loss in (faithfulness, generator)
        ]
    )
    wanted, found = (sum_over_workers(gradients) / world_and_rank()[0]).flatten(1).norm(dim=1)
    weight: Tensor = (wanted / (found + NORM_EPSILON)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()
    return weight
