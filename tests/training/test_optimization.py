"""Adam's groups and the schedule."""

import math

import pytest
import torch
from torch import nn

from cogview.errors import ConfigError
from cogview.training.optimization import OptimizerConfig, build_optimizer, clip_gradients, learning_rate_at


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    decayed, kept = build_optimizer(model, OptimizerConfig()).param_groups
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(5, 4), (3, 4)]
    assert [tuple(parameter.shape) for parameter in kept["params"]] == [(4,), (4,), (3,)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.04, 0.0)


def test_the_rate_rises_for_two_percent_and_falls_to_a_tenth() -> None:
    config = OptimizerConfig()
    rates = [learning_rate_at(step, num_steps=1000, config=config) for step in range(1000)]
    assert rates[0] == pytest.approx(3e-4 / 20)
    assert rates[19] == pytest.approx(3e-4)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(3e-5, rel=1e-3)
    assert rates[510] == pytest.approx(3e-4 * 0.55, rel=1e-2)


def test_the_released_schedule_stops_short_of_the_end_by_the_warm_up() -> None:
    paper, released = OptimizerConfig(warmup_share=0.1), OptimizerConfig(warmup_share=0.1, schedule="released")
    assert learning_rate_at(99, num_steps=1000, config=released) == learning_rate_at(99, num_steps=1000, config=paper)
    assert learning_rate_at(1000, num_steps=1000, config=paper) == pytest.approx(3e-5)
    short = 0.5 * (1 + math.cos(0.9 * math.pi))
    assert learning_rate_at(1000, num_steps=1000, config=released) == pytest.approx(3e-4 * (0.1 + 0.9 * short))


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_told() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
    assert clip_gradients(layer, norm=0).item() == pytest.approx(5.0)
    assert layer.weight.grad.norm().item() == pytest.approx(5.0)
    assert clip_gradients(layer, norm=1.0).item() == pytest.approx(5.0)
    assert layer.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_impossible_settings_name_the_field() -> None:
    with pytest.raises(ConfigError, match="learning_rate=0"):
        OptimizerConfig(learning_rate=0)
    with pytest.raises(ConfigError, match="warmup_share=1"):
        OptimizerConfig(warmup_share=1)
    with pytest.raises(ConfigError, match="schedule='cosine'"):
        OptimizerConfig(schedule="cosine")
