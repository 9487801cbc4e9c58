"""Adapters: what they train, that they start as nothing, and that merged ones are an ordinary model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.lora import (
    ADAPTER_SETTINGS_NAME,
    ADAPTERS_NAME,
    LoRAConfig,
    add_lora,
    count_adapters,
    merge_adapters,
    save_adapters,
)
from cogview.models.published import load_model, save_model
from cogview.models.sizes import SIZES

TINY = GPTConfig(vocab_size=60, max_positions=24, num_layers=2, hidden_size=32, num_heads=4, dropout=0.0)
LORA = LoRAConfig(rank=3, alpha=6.0)
IDS = torch.randint(60, (2, 20), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(20).expand(2, -1)


def model(config: GPTConfig = TINY, *, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config).eval()


def trained(base: Path, *, dtype: torch.dtype = torch.float32) -> GPT:
    """The model in `base` with adapters that have been moved away from their start."""
    gpt, _ = load_model(base)
    gpt.to(dtype)
    add_lora(gpt, LORA, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return gpt


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(model(), tmp_path / "base", settings={"grid": 4})
    return tmp_path / "base"


def test_new_adapters_change_nothing() -> None:
    gpt = model()
    before = gpt(IDS, POSITIONS)
    add_lora(gpt, LORA, seed=1)
    assert torch.equal(gpt(IDS, POSITIONS), before)


def test_only_the_adapters_of_all_linear_layers_are_trained() -> None:
    gpt = model().train()
    names = set(gpt.state_dict())
    add_lora(gpt, LORA, seed=1)
    assert names <= set(gpt.state_dict()), "the frozen weights keep their names"
    gpt.logits(gpt(IDS, POSITIONS)).square().sum().backward()
    moved = {name for name, parameter in gpt.named_parameters() if parameter.grad is not None}
    linear = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert moved == {
        f"transformer.layers.{layer}.{name}.lora_{side}"
        for layer in range(2)
        for name in linear
        for side in ("down", "up")
    }
    number = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
    assert number == count_adapters(TINY, LORA)


def test_rank_16_trains_less_than_one_percent_of_the_4b_model() -> None:
    assert count_adapters(SIZES["4b"], LoRAConfig(rank=16)) == 31_457_280


def test_merged_adapters_are_a_model_that_computes_the_same(base: Path, tmp_path: Path) -> None:
    _, settings = load_model(base)
    gpt = trained(base)
    save_adapters(gpt, tmp_path / "lora", config=LORA, settings={"grid": 4}, base_sha256=settings["sha256"])
    merge_adapters(base, tmp_path / "lora", tmp_path / "merged")
    merged, merged_settings = load_model(tmp_path / "merged")
    assert merged_settings["grid"] == 4
    assert merged.state_dict().keys() == model().state_dict().keys()
    assert not torch.allclose(merged(IDS, POSITIONS), model()(IDS, POSITIONS), atol=0.1)
    assert torch.allclose(merged(IDS, POSITIONS), gpt(IDS, POSITIONS), atol=1e-5)


def test_only_the_adapters_are_saved(base: Path, tmp_path: Path) -> None:
    _, settings = load_model(base)
    save_adapters(trained(base), tmp_path / "lora", config=LORA, settings={}, base_sha256=settings["sha256"])
    size = (tmp_path / "lora" / ADAPTERS_NAME).stat().st_size
    assert 4 * count_adapters(TINY, LORA) < size < 4 * count_adapters(TINY, LORA) + 4096


def test_a_base_in_fp16_is_merged_in_fp16(tmp_path: Path) -> None:
    save_model(model().half(), tmp_path / "base", settings={})
    gpt = trained(tmp_path / "base")
    _, settings = load_model(tmp_path / "base")
    save_adapters(gpt, tmp_path / "lora", config=LORA, settings={}, base_sha256=settings["sha256"])
    merge_adapters(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.float16}
    assert torch.allclose(merged.float()(IDS, POSITIONS), gpt.float()(IDS, POSITIONS), atol=0.05)


def test_adapters_are_merged_into_their_own_base_alone(base: Path, tmp_path: Path) -> None:
    _, settings = load_model(base)
    save_adapters(trained(base), tmp_path / "lora", config=LORA, settings={}, base_sha256=settings["sha256"])
    save_model(model(seed=5), tmp_path / "other", settings={})
    with pytest.raises(CheckpointError, match="give the model that it was trained from"):
        merge_adapters(tmp_path / "other", tmp_path / "lora", tmp_path / "merged")
    (tmp_path / "lora" / ADAPTERS_NAME).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        merge_adapters(base, tmp_path / "lora", tmp_path / "merged")
    (tmp_path / "lora" / ADAPTER_SETTINGS_NAME).unlink()
    with pytest.raises(CheckpointError, match="holds no adapters"):
        merge_adapters(base, tmp_path / "lora", tmp_path / "merged")


def test_dropout_acts_in_training_alone() -> None:
    gpt = model()
    before = gpt(IDS, POSITIONS)
    add_lora(gpt, replace(LORA, dropout=0.5), seed=1)
    for name, parameter in gpt.named_parameters():
        if name.endswith("lora_up"):
            torch.nn.init.ones_(parameter)
    assert torch.equal(gpt(IDS, POSITIONS), gpt(IDS, POSITIONS))
    assert not torch.equal(gpt(IDS, POSITIONS), before)
    assert not torch.equal(gpt.train()(IDS, POSITIONS), gpt(IDS, POSITIONS))


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"rank": 2, "alpha": 0.0}, {"rank": 2, "dropout": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(wrong))):
        LoRAConfig(**wrong)  # type: ignore[arg-type]


def test_adapters_say_what_they_belong_to(base: Path, tmp_path: Path) -> None:
    _, settings = load_model(base)
    save_adapters(trained(base), tmp_path, config=LORA, settings={"grid": 4}, base_sha256=settings["sha256"])
    document = json.loads((tmp_path / ADAPTER_SETTINGS_NAME).read_text())
    assert document["base_sha256"] == settings["sha256"]
    assert document["lora"] == {"rank": 3, "alpha": 6.0, "dropout": 0.0}
