"""The GPT: its size, its switches, and that no token sees what follows it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.errors import CheckpointError, ConfigError
from cogview.models.attention import causal_mask, fused_attention, pb_relax_attention, plain_attention
from cogview.models.gpt import GPT, GPTConfig, KeyValueCache, count_parameters
from cogview.models.norms import LayerNorm
from cogview.models.published import WEIGHTS_NAME, load_model, save_model
from cogview.models.sizes import SIZES

TINY = GPTConfig(vocab_size=60, max_positions=24, num_layers=3, hidden_size=32, num_heads=4, dropout=0.0)


def model(config: GPTConfig = TINY) -> GPT:
    torch.manual_seed(0)
    return GPT(config).eval()


def tokens(batch: int = 2, length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(length).expand(batch, -1)


def test_the_4b_model_has_the_released_number_of_parameters() -> None:
    assert count_parameters(SIZES["4b"]) == 3_928_849_920


def test_weights_have_the_released_names() -> None:
    names = set(GPT(TINY).state_dict())
    assert len(names) == 2 + 3 * 16 + 2
    assert "word_embeddings.weight" in names
    assert "transformer.layers.2.attention.query_key_value.bias" in names
    assert "transformer.layers.0.third_layernorm.weight" in names
    assert "transformer.layers.0.mlp.dense_4h_to_h.weight" in names


@pytest.mark.parametrize("attention", ["fused", "pb_relax", "plain"])
def test_a_later_token_changes_nothing_before_it(attention: str) -> None:
    gpt = model(replace(TINY, attention=attention, ln_prescale=False))  # the prescale looks at the whole tensor
    ids, positions = tokens()
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 60
    before, after = gpt(ids, positions), gpt(changed, positions)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("length", [1, 9, 128, 129])
def test_the_three_forms_of_attention_agree(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, length, 8).unbind(0)
    allowed = causal_mask(length, length, device=q.device)
    reference = plain_attention(q, k, v, allowed=allowed)
    assert torch.allclose(pb_relax_attention(q, k, v, allowed=allowed), reference, atol=1e-6)
    assert torch.allclose(fused_attention(q, k, v, allowed=None), reference, atol=1e-6)
    assert torch.allclose(fused_attention(q, k, v, allowed=allowed), reference, atol=1e-6)


def test_pb_relax_stays_finite_where_plain_scores_overflow_half_precision() -> None:
    q = torch.full((1, 1, 4, 64), 120.0, dtype=torch.float16)
    k, v = q.clone(), torch.ones_like(q)
    allowed = causal_mask(4, 4, device=q.device)
    assert not torch.isfinite(plain_attention(q, k, v, allowed=allowed)).all()  # 120 * 120 * 64 > 65504
    assert torch.equal(pb_relax_attention(q, k, v, allowed=allowed), v)
    assert torch.equal(fused_attention(q, k, v, allowed=None), v)


def test_prescaling_changes_no_norm_and_survives_extremes() -> None:
    scaled, plain = LayerNorm(16, eps=1e-5, prescale=True), LayerNorm(16, eps=1e-5, prescale=False)
    values = torch.randn(3, 5, 16)
    assert torch.allclose(scaled(values), plain(values), atol=1e-4)
    assert torch.allclose(scaled(values * 1e30), plain(values), atol=1e-4)
    assert torch.equal(scaled(torch.zeros(2, 16)), torch.zeros(2, 16))
    huge = (values * 2e4).clamp(-6e4, 6e4).half()
    assert torch.isfinite(scaled.half()(huge)).all()


def test_a_shrunken_embedding_gradient_leaves_the_forward_alone() -> None:
    ids, positions = tokens()
    gradients = []
    for share in (1.0, 0.1):
        gpt = model(replace(TINY, embedding_gradient=share)).train()
        hidden = gpt(ids, positions)
        hidden.sum().backward()
        gradients.append((hidden.detach(), gpt.transformer.position_embeddings.weight.grad))
    assert torch.allclose(gradients[0][0], gradients[1][0], atol=1e-5)
    assert torch.allclose(gradients[1][1], gradients[0][1] * 0.1, atol=1e-6)


def test_switches_remove_the_outer_norms() -> None:
    plain = GPT(replace(TINY, sandwich_ln=False))
    assert not any("third" in name or "fourth" in name for name in plain.state_dict())


def test_the_cache_gives_the_numbers_of_a_full_pass() -> None:
    gpt = model(replace(TINY, ln_prescale=False))
    ids, positions = tokens()
    cache = KeyValueCache(TINY, batch=2, length=20, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        steps = [gpt(ids[:, :7], positions[:, :7], cache=cache)]
        steps += [gpt(ids[:, i : i + 1], positions[:, i : i + 1], cache=cache) for i in range(7, 20)]
        assert torch.allclose(torch.cat(steps, dim=1), gpt(ids, positions), atol=1e-5)
        with pytest.raises(ConfigError, match="holds 20 positions, 21"):
            gpt(ids[:, :1], positions[:, :1], cache=cache)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    ids, positions = tokens()
    found = []
    for is_on in (False, True):
        gpt = model(replace(TINY, activation_checkpointing=is_on)).train()
        gpt(ids, positions).square().sum().backward()
        found.append(gpt.word_embeddings.weight.grad)
    assert torch.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_layers_give_the_same_numbers_and_gradients() -> None:
    ids, positions = tokens()
    weights = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(3))  # a sum of normed squares is constant
    found = []
    for is_on in (False, True):
        gpt = model().train()
        if is_on:
            gpt.compile_layers()
        hidden = gpt(ids, positions)
        (hidden * weights).sum().backward()
        found.append((hidden.detach(), gpt.transformer.layers[0].attention.query_key_value.weight.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)


def test_norms_in_fp32_do_not_depend_on_how_the_divisor_is_applied() -> None:
    norm = LayerNorm(16, eps=1e-5, prescale=True)
    for scale in (1e-30, 1e-3, 1.0, 1e6, 1e30):
        values = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2)) * scale
        divisor = values.abs().max() / 8
        wanted = torch.nn.functional.layer_norm(values / divisor, (16,), norm.weight, norm.bias, norm.eps)
        assert torch.allclose(norm(values), wanted, atol=1e-5)


def test_a_published_model_comes_back_equal_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    gpt = model()
    save_model(gpt, tmp_path, settings={"grid": 4})
    loaded, settings = load_model(tmp_path)
    assert settings["grid"] == 4
    assert all(torch.equal(value, gpt.state_dict()[name]) for name, value in loaded.state_dict().items())
    data = bytearray((tmp_path / WEIGHTS_NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path)


def test_impossible_configs_name_the_field() -> None:
    with pytest.raises(ConfigError, match="num_heads=5"):
        replace(TINY, num_heads=5)
    with pytest.raises(ConfigError, match="attention='local'"):
        replace(TINY, attention="local")
