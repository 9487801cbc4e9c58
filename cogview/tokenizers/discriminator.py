"""The patch discriminator (Isola et al. 2017): is this neighbourhood of a picture a photograph, or drawn by a decoder?

In: normalised pixels [B, 3, H, W]. Out: logits [B, 1, h, w], one for each overlapping patch, high where it looks real.
"""

# B batch, C channels, H height, W width, h w patches

from dataclasses import dataclass

from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.tokenizers.residual_blocks import group_norm

SLOPE = 0.2
MAX_WIDENING = 8
INITIAL_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """channels: width of the first layer, doubled with each halving up to 8x; num_halvings: strided layers (3: each
    logit sees 70 x 70 pixels); norm_groups: groups of the normalisation.
    """

    channels: int = 64
    num_halvings: int = 3
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if self.channels < 1 or self.num_halvings < 1:
            raise ConfigError(f"channels={self.channels}, num_halvings={self.num_halvings}: choose 1 or more of each")
        if self.norm_groups < 1 or self.channels % self.norm_groups:
            raise ConfigError(
                f"channels={self.channels} cannot be normalised in norm_groups={self.norm_groups}; choose a divisor"
            )


class PatchDiscriminator(nn.Module):
    """4x4 convolutions with leaky ReLUs. The norm is over groups of channels, where the original's was over the batch:
    so a picture's logits do not depend on its neighbours, and two workers compute what one would.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = config.channels
        self.conv_in = nn.Conv2d(3, width, 4, stride=2, padding=1)
        layers: list[nn.Module] = [nn.LeakyReLU(SLOPE)]
        for index in range(1, config.num_halvings + 1):
            wider = config.channels * min(2**index, MAX_WIDENING)
            stride = 2 if index < config.num_halvings else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                group_norm(wider, norm_groups=config.norm_groups),
                nn.LeakyReLU(SLOPE),
            ]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.min_side = 3 * 2**config.num_halvings  # below, the last two layers would have no pixel left
        self.apply(_initialise)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits of each patch. ConfigError for pictures too small to hold one."""
        if min(pixels_BCHW.shape[2:]) < self.min_side:
            height, width = pixels_BCHW.shape[2:]
            raise ConfigError(
                f"images of {width} x {height} pixels: this discriminator needs {self.min_side}; lower num_halvings"
            )
        hidden_BCHW = self.conv_in(pixels_BCHW.to(self.conv_in.weight.dtype))
        logits_B1hw: Tensor = self.layers(hidden_BCHW).float()
        return logits_B1hw


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=INITIAL_SPREAD)
