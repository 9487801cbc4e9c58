"""`--plan`: what a training run will take, as text, before anything is started.

In: the model, the loop, the number of workers. Out: memory by part for every size, tokens and steps for the one that
was chosen; and a ConfigError if that one does not fit the GPUs there are.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from cogview.errors import ConfigError
from cogview.models.gpt import GPTConfig
from cogview.models.lora import LoRAConfig, count_adapters
from cogview.models.sizes import SIZES
from cogview.training.loop import LoopConfig
from cogview.training.memory_plan import RESERVE, StepShape, plan_memory
from cogview.training.step_cost import RowCost, row_cost
from pipelines.runtime.gpus import GPUs

SHARDS = (8, 64, 512)
COLUMNS = ("weights", "states", "gradients", "activations", "or kept", "logits", "peak", "or kept")
GIB = 2**30
ALL_WEIGHTS = LoRAConfig()
NOTES = (
    "states: Adam's moments and, in half precision, fp32 weights; the parts are not all there at the peak",
    "activations and peak: with every layer's activations made again; `or kept`: with all of them kept",
    "over 8, 64, 512: the peak with everything spread over so many workers (--loop.sharding full)",
)


def plan_lines(
    model: GPTConfig,
    *,
    loop: LoopConfig,
    length: int,
    num_workers: int,
    gpus: GPUs,
    lora: LoRAConfig = ALL_WEIGHTS,
) -> Iterator[str]:
    """The plan. length: tokens of a row after the shift; gpus: one for each worker.

    lora: with a rank, only adapters are trained.

    Raises ConfigError, once everything is told, if the model does not fit.
    """
    share = math.ceil(loop.global_batch_size / num_workers)
    step = StepShape(
        rows=min(loop.micro_batch_size or share, share),
        length=length,
        precision=loop.precision,
        num_workers=num_workers,
        shards=num_workers if loop.sharding == "full" else 0,
        is_averaging=loop.ema_decay > 0,
        lora=lora,
    )
    yield from _memory_table({**SIZES, "this run": model}, step)
    yield from NOTES
    if lora.rank:
        trained = count_adapters(model, lora)
        yield f"adapters: rank {lora.rank}, {trained:,} parameters of this run are trained, the others are frozen"
    tokens = loop.global_batch_size * length
    yield f"steps: {loop.num_steps:,} of {loop.global_batch_size:,} rows x {length:,} tokens = {tokens:,}"
    yield f"tokens: {loop.num_steps * tokens:,}, padding among them"
    plan = plan_memory(model, step)
    reserve = f"about {RESERVE / GIB:.1f} GiB for CUDA itself"
    yield f"memory: {plan.peak / GIB:.1f} GiB on each of {num_workers} workers, and {reserve}"
    yield from _time_and_price(row_cost(model, length=length, lora=lora), loop=loop, num_workers=num_workers, gpus=gpus)
    if gpus.memory is not None and not plan.fits(round(gpus.memory * GIB)):
        raise ConfigError(
            f"--gpu-memory {gpus.memory:g}: a worker needs {(plan.peak + RESERVE) / GIB:.1f} GiB; choose "
            "--loop.sharding full, more workers, --loop.precision bf16, --model.activation-checkpointing, a smaller "
            "--loop.micro-batch-size, --lora.rank 16 where a finetune has it, or a smaller model"
        )


def _time_and_price(cost: RowCost, *, loop: LoopConfig, num_workers: int, gpus: GPUs) -> Iterator[str]:
    rows = loop.num_steps * loop.global_batch_size
    again = f", {cost.remade / cost.total:.0%} of it forward passes that are done again" if cost.remade else ""
    yield f"work: {rows * cost.total:.3g} floating-point operations{again}"
    if gpus.tflops is None:
        yield "time: give --gpu-tflops, what one GPU sustains in training, for days, and --gpu-price for their price"
        return
    seconds = rows * cost.total / (num_workers * gpus.tflops * 1e12)
    step, days = seconds / loop.num_steps, seconds / 86_400
    yield f"time: {step:.3g} s a step, {days:,.1f} days on {num_workers} GPUs of {gpus.tflops:g} TFLOP/s each"
    if gpus.price is not None:
        hours = seconds / 3600 * num_workers
        yield f"price: {hours:,.0f} GPU hours at {gpus.price:g} are {hours * gpus.price:,.0f}"


def _memory_table(models: Mapping[str, GPTConfig], step: StepShape) -> Iterator[str]:
    yield f"GiB on one worker: {step.rows:,} rows at once, {step.precision}"
    heads = "".join(f"{name:>12}" for name in COLUMNS)
    yield f"{'size':<10}{'parameters':>15}{heads}" + "".join(f"{f'over {shards}':>10}" for shards in SHARDS)
    for name, model in models.items():
        length = step.length if name == "this run" else model.max_positions - 1
        yield f"{name:<10}" + _memory_row(model, replace(step, length=length))


def _memory_row(model: GPTConfig, step: StepShape) -> str:
    kept, remade = (
        plan_memory(replace(model, activation_checkpointing=is_remade), step) for is_remade in (False, True)
    )
    gradients = remade.gradients + remade.master_gradients
    parts = (remade.weights, remade.states, gradients, remade.activations, kept.activations)
    sizes = [part / GIB for part in (*parts, remade.logits, remade.peak, kept.peak)]
    remaking = replace(model, activation_checkpointing=True)
    sharded = [plan_memory(remaking, replace(step, shards=shards)).peak / GIB for shards in SHARDS]
    return f"{kept.parameters:>15,}" + "".join(f"{x:>12.2f}" for x in sizes) + "".join(f"{x:>10.2f}" for x in sharded)
