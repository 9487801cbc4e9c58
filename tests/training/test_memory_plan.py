"""The memory plan: arithmetic at the paper's size, what each switch saves, activations against those autograd keeps."""

from dataclasses import replace

import pytest

from benchmarks.memory_plan import kept_bytes
from cogview.models.gpt import GPT, GPTConfig, count_parameters
from cogview.models.lora import LoRAConfig, add_lora, count_adapters
from cogview.models.sizes import SIZES
from cogview.training.memory_plan import RESERVE, StepShape, plan_memory

STEP = StepShape(rows=12, length=1088, precision="fp16")
SMALL = GPTConfig(vocab_size=100, max_positions=64, num_layers=3, hidden_size=64, num_heads=4, dropout=0.0)


def test_the_4b_model_has_16_bytes_of_state_a_parameter() -> None:
    plan = plan_memory(SIZES["4b"], STEP)
    states = plan.weights + plan.states + plan.gradients
    assert plan.parameters == 3_928_849_920
    assert states == 16 * plan.parameters == pytest.approx(62.9e9, rel=1e-3)
    assert plan.peak > states
    assert not plan.fits(32 * 2**30)


def test_each_switch_saves_what_it_is_for() -> None:
    config = SIZES["4b"]
    plain = plan_memory(config, STEP)
    unit = 2 * 12 * 1088 * 2560
    remade = plan_memory(replace(config, activation_checkpointing=True), STEP)
    assert plain.activations > 19 * 48 * unit
    assert 48 * unit < remade.activations < 51 * unit
    written = plan_memory(replace(config, attention="pb_relax", dropout=0.0), STEP)
    assert written.activations - plain.activations > 48 * 2 * 12 * 40 * 1088**2 - 5 * 48 * unit
    whole = plan_memory(config, replace(STEP, logits_bytes=2**40))
    tokens = 12 * 1088
    assert whole.logits == (4 + 2) * tokens * 58_240 + 2 * (58_240 + tokens) * 2560
    assert plain.logits < whole.logits / 3


def test_sharded_states_and_an_average_count_for_what_they_are() -> None:
    number = count_parameters(SMALL)
    alone = plan_memory(SMALL, replace(STEP, precision="fp32"))
    assert alone.states == 8 * number
    assert plan_memory(SMALL, STEP).states == 12 * number
    spread = plan_memory(SMALL, replace(STEP, num_workers=4, shards=4))
    assert spread.weights + spread.states + spread.gradients == 4 * number
    layer = sum(weight.numel() for weight in GPT(SMALL).transformer.layers[0].parameters())
    assert spread.gathered == 2 * (number - 3 * layer + 2 * layer), "two of three layers, and what is in none"
    assert plan_memory(SMALL, replace(STEP, is_averaging=True)).states == 16 * number
    assert plan_memory(SMALL, replace(STEP, num_workers=2)).steady == 16 * number, "with gradients in buckets"


def test_a_gpu_must_hold_the_peak_and_what_cuda_takes() -> None:
    plan = plan_memory(SMALL, STEP)
    assert plan.fits(plan.peak + RESERVE)
    assert not plan.fits(plan.peak + RESERVE - 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"sandwich_ln": False}, {"dropout": 0.1, "attention": "pb_relax"}, {"attention": "plain"}],
    ids=["fused", "without Sandwich-LN", "written out with dropout", "plain"],
)
@pytest.mark.parametrize("is_remade", [False, True], ids=["kept", "remade"])
@pytest.mark.parametrize("length", [48, 160], ids=["short", "long"])
def test_activations_are_those_that_autograd_keeps(changes: dict[str, object], is_remade: bool, length: int) -> None:
    config = replace(SMALL, max_positions=length + 1, activation_checkpointing=is_remade, **changes)
    step = StepShape(rows=3, length=length, is_cuda=False)
    kept = kept_bytes(GPT(config).train(), rows=3, length=length)
    assert plan_memory(config, step).activations == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["lora", "lora with dropout"])
@pytest.mark.parametrize("is_remade", [False, True], ids=["kept", "remade"])
def test_activations_with_adapters_are_those_that_autograd_keeps(dropout: float, is_remade: bool) -> None:
    config = replace(SMALL, num_layers=6, max_positions=161, activation_checkpointing=is_remade)
    lora = LoRAConfig(rank=4, dropout=dropout)
    gpt = GPT(config).train()
    add_lora(gpt, lora, seed=1)
    step = StepShape(rows=3, length=160, is_cuda=False, lora=lora)
    assert plan_memory(config, step).activations == pytest.approx(kept_bytes(gpt, rows=3, length=160), rel=0.02)


def test_adapters_fit_the_4b_model_into_one_gpu() -> None:
    config = replace(SIZES["4b"], activation_checkpointing=True)
    step = StepShape(rows=4, length=1088, precision="bf16", lora=LoRAConfig(rank=16))
    plan, whole = plan_memory(config, step), plan_memory(config, replace(step, lora=LoRAConfig()))
    adapters = count_adapters(config, step.lora)
    assert plan.weights == 2 * (3_928_849_920 + adapters)
    assert plan.states + plan.gradients == (12 + 2) * adapters
    assert plan.fits(16 * 2**30)
    assert not whole.fits(64 * 2**30)
