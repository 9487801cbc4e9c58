"""Half precision: fp32 masters, exact resume, skipped steps that all workers agree on, losses close to fp32's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cogview.errors import ConfigError, DivergedError
from cogview.training.loop import LoopConfig, train
from cogview.training.loss_scale import LossScaleConfig
from cogview.training.optimization import OptimizerConfig, learning_rate_at
from cogview.training.precision import DTYPES, MasterWeights, Precision
from cogview.training.ranks import Ranks
from tests.training.small_gpt import LOOP, GPTTask, lines, run
from tests.two_workers import process_group, run_two_workers

HALVES: tuple[Precision, ...] = ("bf16", "fp16")
BOTH_HALVES = pytest.mark.parametrize("precision", HALVES)


class Apart(nn.Module):
    """A part that computes in fp32, and a buffer, as in a codebook."""

    keeps_fp32 = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("counts", torch.ones(2))


@BOTH_HALVES
def test_the_model_is_half_and_the_optimizer_is_not(precision: Precision) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    weights = MasterWeights(module, config=OptimizerConfig(learning_rate=0.1), precision=precision)
    module(torch.randn(4, 3).to(DTYPES[precision])).float().square().sum().backward()
    weights.take_gradients(loss_scale=1.0)
    weights.step(learning_rate=0.1)
    states = [value for state in weights.optimizer.state.values() for value in state.values()]
    assert {parameter.dtype for parameter in module.parameters()} == {DTYPES[precision]}
    assert {tensor.dtype for tensor in (*weights.named().values(), *states)} == {torch.float32}
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, weights.named()[name].to(DTYPES[precision]))
        assert parameter.grad is None


def test_what_keeps_fp32_and_buffers_are_left_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 2), Apart())
    weights = MasterWeights(module, config=OptimizerConfig(), precision="bf16")
    assert (module[0].weight.dtype, module[1].weight.dtype) == (torch.bfloat16, torch.float32)
    assert module[1].counts.dtype == torch.float32
    assert weights.named()["1.weight"] is module[1].weight


def test_updates_too_small_for_bf16_add_up_in_the_masters() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    weights = MasterWeights(module, config=OptimizerConfig(weight_decay=0.0), precision="bf16")
    for _ in range(10):
        module.weight.grad = torch.ones_like(module.weight)
        weights.take_gradients(loss_scale=1.0)
        weights.step(learning_rate=5e-4)  # below half of 2^-8, the step between bf16 numbers under 1
    assert module.weight.item() == pytest.approx(1 - 10 * 5e-4, abs=2**-8)
    assert module.weight.item() < 1


def test_norms_and_biases_do_not_decay_in_the_masters_either() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = MasterWeights(module, config=OptimizerConfig(), precision="bf16").optimizer.param_groups
    assert [[tuple(weight.shape) for weight in group["params"]] for group in groups] == [[(2, 3)], [(2,), (2,), (2,)]]


@BOTH_HALVES
def test_a_stopped_run_goes_on_exactly(tmp_path: Path, precision: Precision) -> None:
    """With skipped steps, a moving loss scale and averaged weights on both sides of the interruption."""
    settings = {"precision": precision, "ema_decay": 0.9, "loss_scale": LossScaleConfig(initial=2.0**30, window=2)}
    whole = run(tmp_path / "whole", GPTTask(poison=range(4, 6)), **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", GPTTask(poison=range(4, 6), stop_before=8), **settings)
    resumed = run(tmp_path / "stopped", GPTTask(poison=range(4, 6)), **settings)
    clockless = {"rows_per_second": 0, "tokens_per_second": 0, "memory_gib": 0, "data_wait": 0}
    timeless = [[{**line, **clockless} for line in found.values()] for found in (whole, resumed)]
    assert str(timeless[0]) == str(timeless[1])  # as text: a NaN is equal to itself
    published = [torch.load(tmp_path / name / "published.pt", weights_only=True) for name in ("whole", "stopped")]
    assert all(torch.equal(published[0][name], tensor) for name, tensor in published[1].items())
    assert {tensor.dtype for tensor in published[0].values()} == {torch.float32}


@BOTH_HALVES
def test_the_losses_stay_close_to_those_of_fp32(tmp_path: Path, precision: Precision) -> None:
    full, half = (run(tmp_path / kind, GPTTask(dropout=0.0), precision=kind) for kind in ("fp32", precision))
    assert full[10]["loss"] < 0.95 * full[1]["loss"]
    assert [half[step]["loss"] for step in half] == pytest.approx([full[step]["loss"] for step in half], rel=0.02)


def test_overflows_lower_the_scale_and_hold_the_schedule(tmp_path: Path) -> None:
    scale = LossScaleConfig(initial=2.0**40, window=100, hysteresis=1)
    optimizer = replace(LOOP.optimizer, warmup_share=0.5)
    task = GPTTask()
    found = run(tmp_path, task, precision="fp16", loss_scale=scale, num_steps=40, optimizer=optimizer, max_bad_steps=1)
    skipped = [0, *(found[step]["skipped_steps"] for step in sorted(found))]
    assert skipped[1] == 1, "the first gradient does not fit"
    assert skipped[40] - skipped[30] <= 2, "the scale has been found"
    assert found[40]["loss_scale"] == 2.0 ** (40 - skipped[-1])
    for step, line in found.items():
        position = step - 1 - skipped[step - 1]
        assert line["learning_rate"] == learning_rate_at(position, num_steps=40, config=optimizer)


def test_losses_that_are_not_finite_end_the_run_and_leave_the_scale(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite for 3 steps"):
        run(tmp_path, GPTTask(poison=range(2, 10)), precision="fp16", max_bad_steps=3)
    assert [line["loss_scale"] for line in lines(tmp_path).values()] == [2.0**10] * 4


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision='fp8'"):
        LoopConfig(num_steps=1, global_batch_size=1, precision="fp8")


def test_two_workers_agree_and_follow_one(tmp_path: Path) -> None:
    """The second worker alone has bad losses at two steps: both skip them."""
    run_two_workers(_one_of_two, tmp_path)
    for precision in HALVES:
        alone = run(tmp_path / "alone" / precision, _task(), precision=precision)
        together = lines(tmp_path / precision)
        assert together[10]["skipped_steps"] == alone[10]["skipped_steps"] == 2
        for step in alone:
            assert together[step]["learning_rate"] == alone[step]["learning_rate"]
            assert together[step]["loss"] == pytest.approx(alone[step]["loss"], rel=5e-3, nan_ok=True)
        first, second = (torch.load(tmp_path / f"{precision}_{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def _task() -> GPTTask:
    return GPTTask(poison=range(4, 6), dropout=0.0)


def _one_of_two(rank: int, folder: Path) -> None:
    with process_group(rank, folder):
        for precision in HALVES:
            task = _task()
            config = replace(LOOP, precision=precision)
            train(task, config=config, output=folder / precision, identity={}, ranks=Ranks(rank, 2))
            torch.save(_rounded(task.gpt.state_dict(), DTYPES[precision]), folder / f"{precision}_{rank}.pt")


def _rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Rank 0 has published in fp32, the other has not."""
    return {name: tensor.to(dtype) for name, tensor in state.items()}
