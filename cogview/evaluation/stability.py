"""How large the numbers inside a GPT are, against what half precision can hold (CogView, section 2.4 and figure 4).

In: a GPT at work. Out: for each tensor that a forward in half precision writes to memory its largest magnitude, layer
by layer in the order of computation, and which of them do not fit into fp16. The same tensors are looked at whatever
the model's switches are:

| point       | tensor                                                                                     |
|-------------|--------------------------------------------------------------------------------------------|
| residual    | the main branch, as it enters each norm in front of a branch, and the last norm            |
| norm        | what each norm gives out                                                                   |
| qkv         | queries, keys and values                                                                   |
| scores      | products of queries and keys that reach the softmax, as the model's form of attention      |
|             | writes them: at full size before / sqrt(D) in "plain", / (32 sqrt(D)) in "pb_relax"         |
| attention   | the attention branch's output, before the norm that Sandwich-LN puts there                 |
| mlp_inside  | the four times wider layer                                                                 |
| mlp         | the MLP branch's output, before the norm that Sandwich-LN puts there                       |
| logits      | what the softmax over the vocabulary is taken of                                           |

The attended values are means of values, and GELU enlarges nothing, so both are covered. `variance`, the mean square
that a norm divides by, is measured too, but overflows nothing here: torch's kernels keep a norm's statistics in fp32.
It is what overflows first where a kernel does not, and what pre-scaled norms keep below 64.
"""

# B batch, L sequence, H heads, D head size, E hidden

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cogview.models.attention import PB_RELAX_ALPHA, causal_mask
from cogview.models.gpt import GPT, Attention, Block
from cogview.models.norms import PRESCALED_RANGE, LayerNorm

HALF_LIMIT = torch.finfo(torch.float16).max  # 65504
MATERIALISED = ("residual", "norm", "qkv", "scores", "attention", "mlp_inside", "mlp", "logits")
STATISTICS = ("variance",)


@dataclass(frozen=True)
class Reading:
    """The largest magnitude of one tensor. `layer` counts from 0; the last norm and the logits come after all."""

    point: str
    layer: int
    value: float

    @property
    def overflows(self) -> bool:
        """Whether the tensor, cast to fp16, is no longer finite."""
        return self.point in MATERIALISED and not fits_half(self.value)


class ScaleProbe:
    """Readings of the forwards since `clear`, in the order of computation."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def clear(self) -> None:
        """Forget all readings."""
        self.readings = []

    def add(self, point: str, layer: int, value: float) -> None:
        """Note a magnitude."""
        self.readings.append(Reading(point, layer, value))

    def record(self, point: str, layer: int, tensor: Tensor) -> None:
        """Read a tensor of any shape."""
        self.add(point, layer, largest_magnitude(tensor))

    @property
    def overflow(self) -> Reading | None:
        """The first tensor that does not fit: where the trouble begins."""
        return next((reading for reading in self.readings if reading.overflows), None)


@contextmanager
def watch_scales(gpt: GPT) -> Iterator[ScaleProbe]:
    """Read every forward of a GPT inside the block. Logits have no module: record them from `gpt.logits` yourself."""
    probe = ScaleProbe()
    hooks = []
    for module, point, layer in _norms(gpt):
        hooks.append(module.register_forward_hook(partial(_read_norm, probe, point, layer)))
    for layer, block in enumerate(_blocks(gpt)):
        read_qkv = partial(_read_qkv, probe, layer, block.attention)
        hooks.append(block.attention.query_key_value.register_forward_hook(read_qkv))
        for module, point in (
            (block.attention.dense, "attention"),
            (block.mlp.dense_h_to_4h, "mlp_inside"),
            (block.mlp.dense_4h_to_h, "mlp"),
        ):
            hooks.append(module.register_forward_hook(partial(_read_output, probe, point, layer)))
    try:
        yield probe
    finally:
        for hook in hooks:
            hook.remove()


def fits_half(value: float) -> bool:
    """Whether a number is finite after a cast to fp16 (up to 65,519, which is rounded to 65,504)."""
    return bool(torch.tensor(value).half().isfinite())


def largest_magnitude(tensor: Tensor) -> float:
    """max |x| in the tensor's own precision; NaN if there is one."""
    lowest, highest = torch.aminmax(tensor.detach())
    return float(torch.maximum(highest, -lowest))


def score_scale(qkv_BLE: Tensor, *, num_heads: int, relaxed: bool) -> Tensor:
    """The largest score that reaches the softmax, per head [H], as it is written: before or after PB-relax's divisor.

    qkv_BLE: output of `query_key_value`, [B, L, 3 E]. Scores behind the causal mask never reach the softmax, and one
    that falls below -65504 is a probability of 0 in any precision, so neither counts.
    """
    batch, length, _ = qkv_BLE.shape
    qkv = qkv_BLE.detach().view(batch, length, 3, num_heads, -1)
    q_BHLD, k_BHLD, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if relaxed:
        q_BHLD = q_BHLD / (PB_RELAX_ALPHA * math.sqrt(q_BHLD.shape[-1]))
    scores_BHLL = q_BHLD @ k_BHLD.transpose(-1, -2)
    hidden_LL = ~causal_mask(length, length, device=qkv.device)
    return scores_BHLL.masked_fill(hidden_LL, -math.inf).amax(dim=(0, 2, 3))


@torch.no_grad()
def is_finite_in_half(gpt: GPT, ids_BL: Tensor, positions_BL: Tensor) -> bool:
    """Whether the logits of a forward with all weights and activations in fp16 are finite: no estimate, the real run.

    Takes a copy of the model at half its size.
    """
    half = copy.deepcopy(gpt).half()
    return bool(half.logits(half(ids_BL, positions_BL)).isfinite().all())


def _blocks(gpt: GPT) -> list[Block]:
    return [layer for layer in gpt.transformer.layers if isinstance(layer, Block)]


def _norms(gpt: GPT) -> Iterator[tuple[nn.Module, str, int]]:
    """Every norm there is, with what enters it ("" if that is read elsewhere) and its layer."""
    blocks = _blocks(gpt)
    for layer, block in enumerate(blocks):
        yield block.input_layernorm, "residual", layer
        yield block.post_attention_layernorm, "residual", layer
        for norm in (block.third_layernorm, block.fourth_layernorm):
            if isinstance(norm, LayerNorm):
                yield norm, "", layer
    yield gpt.transformer.final_layernorm, "residual", len(blocks)


def _read_norm(
    probe: ScaleProbe, point: str, layer: int, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    entering = inputs[0].detach()
    largest = largest_magnitude(entering)
    if point:
        probe.add(point, layer, largest)
    variance = float(entering.float().var(dim=-1, correction=0).max())
    if isinstance(norm, LayerNorm) and norm.prescale and largest > 0:
        variance *= (PRESCALED_RANGE / largest) ** 2
    probe.add("variance", layer, variance)
    probe.record("norm", layer, output)


def _read_qkv(
    probe: ScaleProbe, layer: int, attention: Attention, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    probe.record("qkv", layer, output)
    form, num_heads = attention.config.attention, attention.config.num_heads
    if form in ("plain", "pb_relax"):  # a fused kernel never writes its scores
        probe.record("scores", layer, score_scale(output, num_heads=num_heads, relaxed=form == "pb_relax").clamp_min(0))


def _read_output(
    probe: ScaleProbe, point: str, layer: int, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    probe.record(point, layer, output)
