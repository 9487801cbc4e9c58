"""What shrinking the embedding gradient does to gradients and to the loss scale (CogView, section 2.4).

Command: make verify NAME=gradient_shrink [ARGS="--steps 300"]
The paper: e = 0.1 e + 0.9 stop(e) leaves the forward as it is and a tenth of the gradient to the embeddings, which is
by far the largest, so that the loss scale can rise. The same small GPT is trained on the same rows with shares 1 and
0.1, in fp32, while a dynamic loss scale is kept as an fp16 run would keep it: it falls when a gradient times the scale,
cast to fp16, is not finite. Looked at are the gradients of all weights, and those of the main branch in front of every
layer. Reported are where the scale settles, how high it could have been, and which gradients are the largest: the
embeddings are tied to the output matrix, whose part of the gradient no share changes. There is no bar: whether the
lookup's part is the one that counts depends on the vocabulary, and this one is small.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from benchmarks.harness import Figures, UnmeasuredError, argument_parser, say, verify
from cogview.evaluation.stability import HALF_LIMIT, fits_half, largest_magnitude
from cogview.models.gpt import GPT
from cogview.sequences.batch import SequenceBatch
from cogview.training.loss_scale import LossScale, LossScaleConfig
from cogview.training.optimization import OptimizerConfig, build_optimizer, clip_gradients
from pipelines.stress_stability import PRESETS, Config, arm_model, scene_batches

SHARES = (1.0, 0.1)
WINDOW = 10  # the release's 400 for 144,000 steps; here the scale must find its place within some dozen
PARTS = ("lookup", "output matrix", "positions", "other weights", "main branch")


@dataclass(frozen=True, kw_only=True)
class Course:
    """One training, step by step: log2 of the scale, the loss, and the largest gradient of each part."""

    log_scales: list[float]
    losses: list[float]
    largest: list[dict[str, float]]

    def figures(self, share: float) -> dict[str, float]:
        """Means over the second half; `room` is log2 of the highest scale that no gradient of a step overflows with."""
        half = slice(len(self.losses) // 2, None)
        room = [math.log2(HALF_LIMIT / max(parts.values())) for parts in self.largest[half]]
        return {
            f"log2 loss scale/{share:g}": fmean(self.log_scales[half]),
            f"log2 room/{share:g}": fmean(room),
            **{f"gradient/{part}/{share:g}": fmean(parts[part] for parts in self.largest[half]) for part in PARTS},
            f"loss/{share:g}": fmean(self.losses[half]),
        }


def measure(*, steps: int) -> Figures:
    """Train with each share and compare."""
    smoke = PRESETS["smoke"]
    model = replace(smoke.model, num_layers=12)
    config = replace(smoke, model=model, num_steps=steps, optimizer=OptimizerConfig(learning_rate=1e-3))
    figures: dict[str, float] = {}
    for share in SHARES:
        figures |= train(config, share=share).figures(share)
        say(f"share {share:g}: log2 of the scale settles at {figures[f'log2 loss scale/{share:g}']:.2f}")
    whole, shrunk = (f"{share:g}" for share in SHARES)
    gained = {
        f"doublings gained/{name}": figures[f"log2 {name}/{shrunk}"] - figures[f"log2 {name}/{whole}"]
        for name in ("loss scale", "room")
    }
    return {**gained, **figures}


def train(config: Config, *, share: float) -> Course:
    """Train as many steps as the config says, with the loss scale beside it."""
    torch.manual_seed(config.seed)
    gpt = GPT(replace(arm_model(config, "both"), embedding_gradient=share)).train()
    optimizer = build_optimizer(gpt, config.optimizer)
    scale = LossScale(LossScaleConfig(window=WINDOW, hysteresis=1, minimum=2.0**-20))
    course = Course(log_scales=[], losses=[], largest=[])
    for batch in scene_batches(config):
        optimizer.zero_grad(set_to_none=True)
        loss, largest = backward(gpt, batch)
        if fits_half(max(largest.values()) * scale.value):
            scale.succeeded()
            clip_gradients(gpt, norm=config.optimizer.clip_norm)
            optimizer.step()
        else:
            scale.overflowed()
        course.log_scales.append(math.log2(scale.value))
        course.losses.append(loss)
        course.largest.append(largest)
    return course


def backward(gpt: GPT, batch: SequenceBatch) -> tuple[float, dict[str, float]]:
    """The loss of a batch, and the largest magnitude in the gradients of each of PARTS."""
    with kept_inputs(gpt) as kept:
        loss = batch_loss(gpt, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    embeddings_BLE, *branch = kept
    weight_VE = gpt.word_embeddings.weight
    if weight_VE.grad is None or embeddings_BLE.grad is None:
        raise UnmeasuredError("the embeddings got no gradient")
    lookup_VE = torch.zeros_like(weight_VE).index_add_(0, batch.ids.flatten(), embeddings_BLE.grad.flatten(0, 1))
    sizes = {name: largest_magnitude(weight.grad) for name, weight in gpt.named_parameters() if weight.grad is not None}
    del sizes["word_embeddings.weight"]
    return loss.item(), {
        "lookup": largest_magnitude(lookup_VE),
        "output matrix": largest_magnitude(weight_VE.grad - lookup_VE),
        "positions": sizes.pop("transformer.position_embeddings.weight"),
        "other weights": max(sizes.values()),
        "main branch": max(largest_magnitude(hidden.grad) for hidden in branch if hidden.grad is not None),
    }


def batch_loss(gpt: GPT, batch: SequenceBatch) -> Tensor:
    """Mean cross-entropy of a batch's tokens."""
    counted_BL = batch.loss_weights > 0
    logits_NV = gpt.logits(gpt(batch.ids, batch.positions)[counted_BL])
    return nn.functional.cross_entropy(logits_NV, batch.labels[counted_BL])


@contextmanager
def kept_inputs(gpt: GPT) -> Iterator[list[Tensor]]:
    """The looked-up embeddings, then what enters each layer, of the forward inside the block; they keep gradients."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        tensor.retain_grad()
        kept.append(tensor)

    hooks = [gpt.word_embeddings.register_forward_hook(lambda _module, _inputs, output: keep(output))]
    hooks += [
        layer.register_forward_pre_hook(lambda _module, inputs: keep(inputs[0])) for layer in gpt.transformer.layers
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of each training (default: 200)")
    flags = parser.parse_args()
    return verify("gradient_shrink", lambda: measure(steps=flags.steps), bars=(), save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
