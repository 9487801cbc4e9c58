"""The GPT on a GPU: its train step beside the matmul peak, what its norms cost, sparse attention, decoding, fp16.

Command: make verify NAME=gpu [ARGS="--only step norms"]     (python -m benchmarks.gpu where there is no make)
*Step*: forward, backward and update of layers of the 4 B model's shape in bf16, compiled; its operations (counted by
`step_cost`, only those of the model) a second beside a large matmul's in the same run. *Norms*: the same step without
Sandwich-LN, pre-scaling and PB-relax. *Sparse*: three-region attention at 4,096 tokens, as in `sparse_attention`.
*Decoding*: one picture from the whole 4 B model in bf16, its steps recorded as CUDA graphs; the bound is the time in
which its weights can be read once a token, at the speed of a large copy in the same run. *Deep*: a deep narrow model
in fp16 with fp32 masters, whose losses must all be finite. On a CPU with `--small` the same code runs at a size that
shows nothing but that it runs.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.sparse_attention import forms, median_seconds, random_tensor
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.pivots import SparseConfig
from cogview.models.sizes import SIZES
from cogview.sampling.autoregressive import generate_codes
from cogview.sampling.choice import SamplingConfig
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.language_model import LanguageModelLoss
from cogview.training.loss_scale import LossScale, LossScaleConfig
from cogview.training.optimization import OptimizerConfig
from cogview.training.precision import MasterWeights
from cogview.training.step_cost import row_cost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BARS = (
    Bar(figure="step/share of the matmul peak", op=">=", value=0.5),
    Bar(figure="norms/time beside plain pre-LN", op="<=", value=1.05),
    Bar(figure="sparse/times faster than materialised", op=">=", value=2.5),
    Bar(figure="decoding/share of the bandwidth bound", op=">=", value=0.5),
    Bar(figure="deep/losses not finite", op="==", value=0),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: a few layers of the 4 B model, all of it, and a deep narrow one."""

    layers: GPTConfig
    whole: GPTConfig
    deep: GPTConfig
    rows: int = 8
    grid: int = 32
    tokens: int = 4096
    matmul: int = 8192
    copied: int = 2**32
    steps: int = 50


LARGE = Sizes(
    layers=replace(SIZES["4b"], num_layers=6, dropout=0.0),
    whole=replace(SIZES["4b"], dropout=0.0),
    deep=replace(SIZES["4b"], num_layers=64, hidden_size=1024, num_heads=16),
)
TINY = replace(SIZES["4b"], num_layers=2, hidden_size=64, num_heads=4, dropout=0.0)
SMALL = Sizes(
    layers=TINY,
    whole=TINY,
    deep=replace(TINY, num_layers=8),
    rows=1,
    grid=4,
    tokens=1088,
    matmul=256,
    copied=2**20,
    steps=3,
)


def step(sizes: Sizes) -> Figures:
    """The train step of a few layers beside a matmul."""
    peak = matmul_rate(sizes.matmul)
    seconds = step_seconds(sizes.layers, sizes)
    length = sizes.layers.max_positions - 1
    rate = sizes.rows * row_cost(sizes.layers, length=length).model / seconds
    return {
        "step/share of the matmul peak": rate / peak,
        "step/TFLOP/s": rate / 1e12,
        "step/matmul TFLOP/s": peak / 1e12,
        "step/seconds": seconds,
        "step/tokens a second": sizes.rows * length / seconds,
    }


def norms(sizes: Sizes) -> Figures:
    """The same layers with CogView's norms and attention, and with plain pre-LN."""
    plain = step_seconds(replace(sizes.layers, sandwich_ln=False, ln_prescale=False), sizes)
    ours = step_seconds(sizes.layers, sizes)
    return {"norms/time beside plain pre-LN": ours / plain, "norms/plain pre-LN, seconds": plain}


def sparse(sizes: Sizes) -> Figures:
    """Forward and backward of attention over long rows."""
    seconds = {}
    for name, form in forms(sizes.tokens).items():
        inputs = [random_tensor(1, sizes.tokens, seed=seed, is_half=True).requires_grad_() for seed in range(3)]
        seconds[name] = median_seconds(form, inputs)
    return {
        "sparse/times faster than materialised": seconds["materialised"] / seconds["sparse"],
        "sparse/times faster than fused": seconds["fused"] / seconds["sparse"],
        "sparse/tokens": sizes.tokens,
        "sparse/keys seen": SparseConfig().num_pivots + SparseConfig().block_size * SparseConfig().window_blocks,
        **{f"sparse/{name}, seconds": value for name, value in seconds.items()},
    }


def decoding(sizes: Sizes) -> Figures:
    """One picture, a token at a time."""
    with torch.device(DEVICE):
        model = GPT(sizes.whole).bfloat16().eval()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    vocabulary = Vocabulary(8192, 50_000)
    commands = {name: vocabulary.command(name) for name in ("ROI1", "BASE", "BOI1")}
    prompt = [commands["ROI1"], *vocabulary.text_ids[:20], commands["BASE"], commands["BOI1"]]

    def draw() -> None:
        generate_codes(model, [prompt], vocabulary=vocabulary, grid=sizes.grid, sampling=SamplingConfig(), seeds=[1])

    draw()
    unrecorded = timed(draw)
    model.record_steps()
    draw()
    seconds = timed(draw)
    bound = sizes.grid**2 * weights / copy_rate(sizes.copied)
    return {
        "decoding/share of the bandwidth bound": bound / seconds,
        "decoding/tokens a second": sizes.grid**2 / seconds,
        "decoding/without recorded steps, tokens a second": sizes.grid**2 / unrecorded,
        "decoding/bound, tokens a second": sizes.grid**2 / bound,
        "decoding/GB of weights": weights / 1e9,
    }


def deep(sizes: Sizes) -> Figures:
    """Steps in fp16; a step whose gradients overflow is skipped, as in training."""
    torch.manual_seed(0)
    module = LanguageModelLoss(GPT(sizes.deep)).to(DEVICE).train()
    weights = MasterWeights(module, config=OptimizerConfig(learning_rate=1e-3), precision="fp16")
    scale = LossScale(LossScaleConfig(initial=2.0**16))
    bad, skipped, losses = 0, 0, []
    for number in range(sizes.steps):
        weights.zero_gradients()
        loss = loss_of(module, rows(sizes.deep, sizes.rows, seed=number))
        (loss * scale.value).backward()  # type: ignore[no-untyped-call]
        weights.take_gradients(loss_scale=scale.value)
        norm = weights.clip_gradients(1.0)
        bad += not bool(loss.isfinite())
        losses.append(loss.item())
        is_sound = bool(norm.isfinite())
        skipped += not is_sound
        if is_sound:
            weights.step(learning_rate=1e-3)
            scale.succeeded()
        else:
            scale.overflowed()
    return {
        "deep/losses not finite": bad,
        "deep/steps": sizes.steps,
        "deep/steps skipped for their gradients": skipped,
        "deep/first loss": losses[0],
        "deep/last loss": losses[-1],
    }


def step_seconds(config: GPTConfig, sizes: Sizes) -> float:
    """Of forward, backward and update in bf16, compiled."""
    torch.manual_seed(0)
    model = GPT(config)
    model.compile_layers()
    module = LanguageModelLoss(model).to(DEVICE).train()
    weights = MasterWeights(module, config=OptimizerConfig(), precision="bf16")
    batch = rows(config, sizes.rows, seed=0)

    def train() -> None:
        weights.zero_gradients()
        loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
        weights.take_gradients(loss_scale=1.0)
        weights.clip_gradients(1.0)
        weights.step(learning_rate=1e-5)

    for _ in range(3):
        train()
    return statistics.median(timed(train) for _ in range(7))


def loss_of(module: LanguageModelLoss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of a batch."""
    loss: torch.Tensor = module(**batch).loss_sum / batch["loss_weights"].sum()
    return loss


def rows(config: GPTConfig, number: int, *, seed: int) -> dict[str, torch.Tensor]:
    """Rows of random ids as long as the model takes them."""
    length = config.max_positions - 1
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (number, length + 1), generator=generator).to(DEVICE)
    positions = torch.arange(length, device=DEVICE).expand(number, -1)
    return {
        "ids": ids[:, :-1],
        "positions": positions,
        "labels": ids[:, 1:],
        "loss_weights": torch.ones(number, length, device=DEVICE),
        "image_part": positions >= 64,
    }


def matmul_rate(size: int) -> float:
    """Operations a second of a large bf16 matmul, the best of several."""
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    left @ right
    return 2 * size**3 / min(timed(lambda: left @ right) for _ in range(10))


def copy_rate(size: int) -> float:
    """Bytes a second that a large copy reads and writes, the best of several."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(timed(lambda: target.copy_(source)) for _ in range(10))


def timed(work: Callable[[], object]) -> float:
    """Seconds until the device has done it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


PARTS: dict[str, Callable[[Sizes], Figures]] = {
    "step": step,
    "norms": norms,
    "sparse": sparse,
    "decoding": decoding,
    "deep": deep,
}


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these parts only")
    parser.add_argument("--small", action="store_true", help="a size for CPUs, which shows that the code runs")
    flags = parser.parse_args()

    def measure() -> Figures:
        if DEVICE == "cpu" and not flags.small:
            raise UnmeasuredError("torch sees no GPU here; --small shows that the code runs")
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        figures: dict[str, float | int | str] = {"device": name}
        for part in flags.only:
            say(f"{part} ...")
            figures.update(PARTS[part](SMALL if flags.small else LARGE))
        return figures

    bars = [bar for bar in BARS if bar.figure.split("/")[0] in flags.only]
    is_whole = set(flags.only) == set(PARTS) and not flags.small
    return verify("gpu", measure, bars=bars, save=flags.save and is_whole)


if __name__ == "__main__":
    sys.exit(main())
