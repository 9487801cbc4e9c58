"""Local attention over grids of codes: its numbers beside the dense rule, and memory that grows with the codes.

Command: make verify NAME=local_attention [ARGS="--only agreement memory"]
*Agreement*: outputs and gradients of the form that suits the device against the same rule as a mask over a dense
product in fp64; CogView2's own sizes (20 x 20 to 60 x 60, with and without a caption), causal windows, and grids,
windows and ratios drawn at random. *Memory*: forward and backward of a 9 x 5 window over 32 x 32 to 128 x 128 codes:
the peak above what the process held before, and what is kept for backward; linear memory multiplies by as much as the
codes do. *Cost*: median seconds of forward and backward beside dense attention under the same mask, in the same run.
"""

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fsdp import forget_peak
from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from benchmarks.processes import high_water_mark
from benchmarks.sparse_attention import kept_bytes, median_seconds
from cogview.models.local_attention import local_attention, reference_attention
from cogview.models.local_rules import LocalRule, Window, allowed_mask, square_window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDES = (32, 64, 128)  # 1,024, 4,096 and 16,384 codes
DENSE_SIDES = (32, 64)  # of 16,384 codes one head's scores alone are 1 GiB
NUM_HEADS, HEAD_SIZE = 8, 64
BARS = (
    Bar(figure="agreement/output", op="<=", value=1e-5),
    Bar(figure="agreement/gradient", op="<=", value=1e-5),
    Bar(figure="memory/growth of what is kept, to that of codes", op="<=", value=1.1),
    Bar(figure="memory/growth of the peak, to that of codes", op="<=", value=1.25),
)
CASES: tuple[tuple[LocalRule, int], ...] = (  # and the tokens of a caption
    (LocalRule(height=60, width=60, ratio=3), 0),  # direct super-resolution
    (LocalRule(height=60, width=60), 16),  # iterative
    (LocalRule(height=60, width=60, window=square_window(5, is_causal=True)), 0),
    (LocalRule(height=24, width=42, ratio=6, window=square_window(3, is_causal=True)), 5),
)
NUM_RANDOM = 100


def agreement() -> Figures:
    """The largest differences over all cases between the fp32 form and the rule in fp64."""
    torch.backends.cuda.matmul.allow_tf32 = False
    worst = {"agreement/output": 0.0, "agreement/gradient": 0.0}
    cases = [*CASES, *random_cases(NUM_RANDOM)]
    for number, (rule, num_context) in enumerate(cases):
        gaps = gaps_of(rule, num_context, seed=number)
        if number < len(CASES):
            say(f"{rule.height} x {rule.width}: output {gaps[0]:.1e}, gradients {max(gaps[1:]):.1e}")
        worst["agreement/output"] = max(worst["agreement/output"], gaps[0])
        worst["agreement/gradient"] = max(worst["agreement/gradient"], *gaps[1:])
    return {**worst, "agreement/cases": len(cases)}


def memory() -> Figures:
    """What forward and backward take, and how it grows from the smallest grid to the largest."""
    kept, peaks = {}, {}
    for side in SIDES:
        form = local_form(side)
        inputs = tensors(side**2)
        form(*inputs).sum().backward()  # type: ignore[no-untyped-call]  # masks are made once, and kept
        kept[side] = kept_bytes(form, inputs)
        peaks[side] = peak_of(form, inputs)
        say(f"{side} x {side}: {kept[side] / 2**20:.1f} MiB kept, {peaks[side] / 2**20:.1f} MiB at the peak")
    codes = (SIDES[-1] / SIDES[0]) ** 2
    figures: dict[str, float | int | str] = {
        "memory/growth of what is kept, to that of codes": kept[SIDES[-1]] / kept[SIDES[0]] / codes,
        "memory/growth of the peak, to that of codes": peaks[SIDES[-1]] / peaks[SIDES[0]] / codes,
    }
    for side in SIDES:
        figures[f"memory/{side**2} codes/kept MiB"] = kept[side] / 2**20
        figures[f"memory/{side**2} codes/peak MiB"] = peaks[side] / 2**20
    scores = NUM_HEADS * SIDES[-1] ** 4 * 4
    return {**figures, f"memory/{SIDES[-1] ** 2} codes/scores of dense attention alone, MiB": scores / 2**20}


def cost() -> Figures:
    """Median seconds of forward and backward."""
    figures: dict[str, float | int | str] = {"cost/device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    for side in SIDES:
        forms = {"local": local_form(side)} | ({"dense": dense_form(side)} if side in DENSE_SIDES else {})
        seconds = {name: median_seconds(form, tensors(side**2), repeats=3) for name, form in forms.items()}
        figures |= {f"cost/{side**2} codes/{name}, seconds": value for name, value in seconds.items()}
        if "dense" in seconds:
            figures[f"cost/{side**2} codes/times faster than dense"] = seconds["dense"] / seconds["local"]
        say(f"{side} x {side}: " + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()))
    return figures


def gaps_of(rule: LocalRule, num_context: int, *, seed: int) -> list[float]:
    """The largest difference of the output, and of each gradient."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_context + rule.num_coarse + rule.num_fine
    drawn = [torch.randn(1, 1, length, 32, generator=generator) for length in (rule.num_fine, num_keys, num_keys)]
    weights = torch.randn(drawn[0].shape, generator=generator).to(DEVICE)
    context_BC = (torch.rand(1, num_context, generator=generator) < 0.7).to(DEVICE) if num_context else None
    found = []
    for form, dtype in ((local_attention, torch.float32), (reference_attention, torch.float64)):
        inputs = [value.to(DEVICE, dtype, copy=True).requires_grad_() for value in drawn]
        output = form(*inputs, rule=rule, context_BC=context_BC)
        (output * weights).sum().backward()  # type: ignore[no-untyped-call]
        found.append([output.detach(), *(value.grad for value in inputs if value.grad is not None)])
    return [float((fast - slow).abs().max()) for fast, slow in zip(*found, strict=True)]


def random_cases(number: int) -> list[tuple[LocalRule, int]]:
    """Grids of up to 27 x 27 codes with all kinds of windows and ratios."""
    generator, cases = np.random.default_rng(0), []
    for _ in range(number):
        ratio = int(generator.integers(0, 4))
        height, width = (max(1, ratio) * int(side) for side in generator.integers(1, 10, size=2))
        rows, columns, small_rows, small_columns = (2 * int(reach) + 1 for reach in generator.integers(0, 5, size=4))
        window = Window(height=rows, width=columns, is_causal=bool(generator.integers(2)))
        coarse = Window(height=small_rows, width=small_columns)
        rule = LocalRule(height=height, width=width, window=window, ratio=ratio, coarse_window=coarse)
        cases.append((rule, int(generator.integers(0, 4))))
    return cases


def local_form(side: int) -> Callable[..., Tensor]:
    """The 9 x 5 window over a square grid."""
    rule = LocalRule(height=side, width=side)
    return lambda q, k, v: local_attention(q, k, v, rule=rule)


def dense_form(side: int) -> Callable[..., Tensor]:
    """Torch's kernel under the same rule as a dense mask."""
    allowed = allowed_mask(LocalRule(height=side, width=side)).to(DEVICE)
    scale = 1 / math.sqrt(HEAD_SIZE)
    return lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def tensors(length: int) -> list[Tensor]:
    """Queries, keys and values of so many codes."""
    shape = (1, NUM_HEADS, length, HEAD_SIZE)
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()
        for seed in range(3)
    ]


def peak_of(form: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Bytes above what was held before, at the peak of forward and backward with the gradients of the inputs."""
    for value in inputs:
        value.grad = None
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form(*inputs).sum().backward()  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    held = high_water_mark()
    form(*inputs).sum().backward()  # type: ignore[no-untyped-call]
    return high_water_mark() - held


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parts: dict[str, Callable[[], Figures]] = {"memory": memory, "agreement": agreement, "cost": cost}
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="parts to measure")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # a second one waits for whatever else the machine does
    bars = [bar for bar in BARS if bar.figure.split("/")[0] in flags.only]
    measure = {name: part for name, part in parts.items() if name in flags.only}
    return verify(
        "local_attention",
        lambda: {key: value for part in measure.values() for key, value in part().items()},
        bars=bars,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
