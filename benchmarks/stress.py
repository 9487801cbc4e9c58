"""The paper's stress test on a CPU: of four trainings only the one with Sandwich-LN and PB-relax stays inside fp16.

Command: make verify NAME=stress; with ARGS=--save also docs/stability.png and docs/stability.csv, of the first seed
Figure 4 (b) of CogView, small: 32 layers, hidden size 128, Adam at 0.1, 40 steps, over several seeds. Counted are the
seeds that finish, and those whose model is finite in a last forward with all weights and activations in real fp16.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import REPOSITORY, Bar, Figures, argument_parser, say, verify
from cogview.evaluation.stress_arms import ARMS, ArmTrace
from pipelines.stress_stability import PRESETS, train_arm, write_traces

SEEDS = (1, 2, 3)
SURVIVOR = "both"
BARS = (
    Bar(figure="seconds/total", op="<", value=300),
    *(Bar(figure=f"finished/{arm}", op="==", value=len(SEEDS) * (arm == SURVIVOR)) for arm in ARMS),
    *(Bar(figure=f"finite in fp16/{arm}", op="==", value=len(SEEDS) * (arm == SURVIVOR)) for arm in ARMS),
)
DOCS = REPOSITORY / "docs"


def measure(*, save: bool) -> Figures:
    """Train every arm with every seed."""
    started = time.monotonic()
    traces = {seed: train_seed(seed) for seed in SEEDS}
    if save:
        write_docs(traces[SEEDS[0]])
    by_arm = {arm: [traces[seed][index] for seed in SEEDS] for index, arm in enumerate(ARMS)}
    return {
        "seconds/total": time.monotonic() - started,
        **{f"finished/{arm}": sum(trace.overflow is None for trace in runs) for arm, runs in by_arm.items()},
        **{f"finite in fp16/{arm}": sum(trace.half_is_finite for trace in runs) for arm, runs in by_arm.items()},
        **{f"ends/{arm}": ", ".join(_end(trace) for trace in runs) for arm, runs in by_arm.items()},
        **{f"largest/{point}/{SURVIVOR}": _largest(by_arm[SURVIVOR], point) for point in ("residual", "scores")},
    }


def train_seed(seed: int) -> list[ArmTrace]:
    """The four arms, in the order of ARMS."""
    traces = []
    for arm in ARMS:
        trace = train_arm(replace(PRESETS["smoke"], seed=seed), arm)
        say(f"seed {seed}, {arm}: {trace.verdict}")
        traces.append(trace)
    return traces


def write_docs(traces: Sequence[ArmTrace]) -> None:
    """Keep the plot and the numbers that it shows."""
    with tempfile.TemporaryDirectory() as folder:
        write_traces(traces, folder=Path(folder))
        shutil.copy(Path(folder) / "stability.png", DOCS / "stability.png")
        shutil.copy(Path(folder) / "by_step.csv", DOCS / "stability.csv")


def _end(trace: ArmTrace) -> str:
    return f"{trace.records[-1].step}: {trace.overflow.point}" if trace.overflow else "finished"


def _largest(traces: Sequence[ArmTrace], point: str) -> float:
    return max(record.maxima()[f"max_{point}"] for trace in traces for record in trace.records)


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    return verify("stress", lambda: measure(save=flags.save), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
