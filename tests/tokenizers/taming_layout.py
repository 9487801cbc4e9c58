"""Random weights under the names that taming-transformers' trainer gives them."""

import torch
from torch import Tensor

CHANNELS, MULTIPLIERS, LATENT, DIM, CODES = 32, (1, 2), 48, 16, 64
WIDTHS = [CHANNELS * multiplier for multiplier in MULTIPLIERS]
COARSEST = ATTENTION_LEVEL = len(MULTIPLIERS) - 1
Weights = dict[str, Tensor]


class Layout:
    """Random weights under the names that taming's trainer gives them."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.weights: Weights = {}

    def conv(self, name: str, channels_in: int, channels_out: int, size: int) -> None:
        scale = (2 / (channels_in * size * size)) ** 0.5
        shape = (channels_out, channels_in, size, size)
        self.weights[f"{name}.weight"] = torch.randn(shape, generator=self.generator) * scale
        self.weights[f"{name}.bias"] = torch.randn(channels_out, generator=self.generator) * 0.1

    def norm(self, name: str, channels: int) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=self.generator)
        self.weights[f"{name}.bias"] = 0.2 * torch.randn(channels, generator=self.generator)

    def block(self, name: str, channels_in: int, channels_out: int) -> None:
        self.norm(f"{name}.norm1", channels_in)
        self.conv(f"{name}.conv1", channels_in, channels_out, 3)
        self.norm(f"{name}.norm2", channels_out)
        self.conv(f"{name}.conv2", channels_out, channels_out, 3)
        if channels_in != channels_out:
            self.conv(f"{name}.nin_shortcut", channels_in, channels_out, 1)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def middle(self, name: str, channels: int) -> None:
        self.block(f"{name}.block_1", channels, channels)
        self.attention(f"{name}.attn_1", channels)
        self.block(f"{name}.block_2", channels, channels)


def make_weights() -> Weights:
    layout, last = Layout(), WIDTHS[-1]
    layout.conv("encoder.conv_in", 3, CHANNELS, 3)
    for level, (entry, width) in enumerate(zip([CHANNELS, *WIDTHS], WIDTHS, strict=False)):
        layout.block(f"encoder.down.{level}.block.0", entry, width)
        layout.block(f"encoder.down.{level}.block.1", width, width)
        if level == ATTENTION_LEVEL:
            layout.attention(f"encoder.down.{level}.attn.0", width)
            layout.attention(f"encoder.down.{level}.attn.1", width)
        if level < COARSEST:
            layout.conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    layout.middle("encoder.mid", last)
    layout.norm("encoder.norm_out", last)
    layout.conv("encoder.conv_out", last, LATENT, 3)
    layout.conv("quant_conv", LATENT, DIM, 1)
    layout.weights["quantize.embedding.weight"] = torch.randn(CODES, DIM, generator=layout.generator)
    layout.conv("post_quant_conv", DIM, LATENT, 1)
    layout.conv("decoder.conv_in", LATENT, last, 3)
    layout.middle("decoder.mid", last)
    entry = last
    for level in reversed(range(len(WIDTHS))):
        for index in range(3):
            layout.block(f"decoder.up.{level}.block.{index}", entry, WIDTHS[level])
            entry = WIDTHS[level]
            if level == ATTENTION_LEVEL:
                layout.attention(f"decoder.up.{level}.attn.{index}", entry)
        if level:
            layout.conv(f"decoder.up.{level}.upsample.conv", entry, entry, 3)
    layout.norm("decoder.norm_out", entry)
    layout.conv("decoder.conv_out", entry, 3, 3)
    layout.weights["loss.discriminator.main.0.weight"] = torch.zeros(4, 3, 4, 4)
    return layout.weights
