"""The paper's pretraining on paper: the 4 B model on 512 GPUs of 32 GB and on 64 of 141 GB.

Command: make verify NAME=paper_plan [ARGS="--share-of-peak 0.4 --gpu-hours-to-failure 50000"]
*Calculated* from the preset and the model's shape, as `--plan` does it: memory of a GPU, operations, bytes of a
checkpoint. *Taken from the command line*, for no such machine has been measured: which share of their peak the GPUs
sustain (the peaks are their makers' figures for dense half precision), gigabytes a second that each GPU and the storage
write, hours of GPU time between two failures (default: about what Meta reports of the training of Llama 3 405B, 419
unexpected interruptions in 54 days of 16,384 GPUs), and minutes until a failed run trains again. The price of an hour
is an example's, in no currency.
From these follow days, price, the best time between two checkpoints (Young 1974: the square root of 2 x writing x mean
time to failure) and what checkpoints, lost work and restarts cost with it and with the preset's.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace

from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.models.gpt import GPTConfig, count_parameters
from cogview.training.loop import LoopConfig
from cogview.training.memory_plan import RESERVE, StepShape, plan_memory
from cogview.training.step_cost import row_cost
from pipelines.pretrain import PAPER

GB = 1e9
CHECKPOINT = 12  # bytes a parameter: fp32 weights and two moments


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """number of GPUs, GB of memory and peak TFLOP/s of each, and what an hour of one may cost."""

    number: int
    memory: float
    peak: float
    price: float
    activation_checkpointing: bool
    micro_batch_size: int


CLUSTERS = {
    "512 x 32 GB": Cluster(
        number=512, memory=32, peak=125, price=1.0, activation_checkpointing=True, micro_batch_size=12
    ),
    "64 x 141 GB": Cluster(
        number=64, memory=141, peak=989, price=3.5, activation_checkpointing=False, micro_batch_size=8
    ),
}
BARS = tuple(Bar(figure=f"{name}/GB of memory to spare", op=">=", value=0) for name in CLUSTERS) + tuple(
    Bar(figure=f"{name}/share of the time that the preset's interval costs", op="<=", value=0.05) for name in CLUSTERS
)


def measure(flags: argparse.Namespace) -> Figures:
    """Both clusters."""
    figures: dict[str, float | int | str] = {
        "parameters": count_parameters(PAPER.model),
        "assumed/share of peak": flags.share_of_peak,
        "assumed/GPU hours to a failure": flags.gpu_hours_to_failure,
        "assumed/minutes to go on": flags.minutes_to_go_on,
    }
    for name, cluster in CLUSTERS.items():
        model = replace(PAPER.model, activation_checkpointing=cluster.activation_checkpointing)
        loop = replace(PAPER.loop, micro_batch_size=cluster.micro_batch_size)
        assumed = {"assumed peak, TFLOP/s": cluster.peak, "assumed price of a GPU hour": cluster.price}
        found = {**assumed, **memory(cluster, model, loop), **course(cluster, model, loop, flags)}
        figures |= {f"{name}/{key}": value for key, value in found.items()}
        say(f"{name}: {found['days with failures']:.1f} days, {found['price']:,.0f}")
    return figures


def memory(cluster: Cluster, model: GPTConfig, loop: LoopConfig) -> dict[str, float]:
    """Of one GPU."""
    share = loop.global_batch_size // cluster.number
    step = StepShape(
        rows=min(loop.micro_batch_size, share),
        length=model.max_positions - 1,
        precision=loop.precision,
        num_workers=cluster.number,
        shards=cluster.number,
    )
    needed = plan_memory(model, step).peak + RESERVE
    return {
        "rows of a GPU": share,
        "rows at once": step.rows,
        "GB of memory": needed / GB,
        "GB of memory to spare": cluster.memory - needed / GB,
    }


def course(cluster: Cluster, model: GPTConfig, loop: LoopConfig, flags: argparse.Namespace) -> dict[str, float]:
    """Time and price, with what failures and checkpoints take."""
    cost = row_cost(model, length=model.max_positions - 1)
    sustained = cluster.number * cluster.peak * 1e12 * flags.share_of_peak
    step = loop.global_batch_size * cost.total / sustained
    size = CHECKPOINT * count_parameters(model)
    writing = size / GB / min(flags.storage_speed, cluster.number * flags.gpu_speed)
    to_failure = flags.gpu_hours_to_failure * 3600 / cluster.number
    best = math.sqrt(2 * writing * to_failure)
    preset = loop.checkpoint_every * step

    def wasted(interval: float) -> float:
        return float(writing / interval + (interval / 2 + 60 * flags.minutes_to_go_on) / to_failure)

    days = loop.num_steps * step / 86_400
    with_failures = days * (1 + wasted(preset))
    return {
        "seconds a step": step,
        "days": days,
        "days with failures": with_failures,
        "price": with_failures * 24 * cluster.number * cluster.price,
        "GB of a checkpoint": size / GB,
        "seconds to write it": writing,
        "hours to a failure": to_failure / 3600,
        "best minutes between checkpoints": best / 60,
        "preset's minutes between checkpoints": preset / 60,
        "share of the time that the best interval costs": wasted(best),
        "share of the time that the preset's interval costs": wasted(preset),
    }


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--share-of-peak", type=float, default=0.4, help="what GPUs sustain (default: 0.4)")
    parser.add_argument("--gpu-hours-to-failure", type=float, default=50_000, help="(default: 50,000)")
    parser.add_argument("--minutes-to-go-on", type=float, default=10, help="after a failure (default: 10)")
    parser.add_argument("--gpu-speed", type=float, default=0.25, help="GB/s that each GPU writes (default: 0.25)")
    parser.add_argument("--storage-speed", type=float, default=5.0, help="GB/s that the storage takes (default: 5)")
    flags = parser.parse_args()
    return verify("paper_plan", lambda: measure(flags), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
