"""Super-resolution models: what they compute, written out densely; what is trained; what is published."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.local_rules import Window, allowed_mask
from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig, Stage
from cogview.models.published import WEIGHTS_NAME, read_settings, save_model
from cogview.models.published_stage import STAGE_SETTINGS_NAME, STAGE_WEIGHTS_NAME, load_stage, save_stage

BACKBONE = GPTConfig(vocab_size=60, max_positions=30, num_layers=2, hidden_size=32, num_heads=2, dropout=0.0)
DIRECT = LocalSuperResolutionConfig(stage="direct", grid=6, ratio=2)
ITERATIVE = replace(DIRECT, stage="iterative", window=Window(height=3, width=3))
NUM_TEXT = 4


def model_of(config: LocalSuperResolutionConfig, *, seed: int = 0, **changes: object) -> LocalSuperResolution:
    torch.manual_seed(seed)
    gpt = GPT(replace(BACKBONE, init_std=0.2, **changes))
    model = LocalSuperResolution(gpt, config)
    for parameter in model.mixins.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs_of(config: LocalSuperResolutionConfig, *, batch: int = 2) -> dict[str, Tensor]:
    """A caption of which the second row has one token less, then the small picture."""
    generator = torch.Generator().manual_seed(3)
    length = NUM_TEXT + (config.small_grid**2 if config.is_direct else 0)
    seen_BC = torch.zeros(batch, length, dtype=torch.bool)
    seen_BC[:, :NUM_TEXT] = True
    seen_BC[1:, 0] = False
    allowed_BCC = torch.ones(batch, length, length, dtype=torch.bool)
    allowed_BCC[:, :NUM_TEXT, NUM_TEXT:] = False
    allowed_BCC[1:, :, 0] = False
    return {
        "context_ids_BC": torch.randint(60, (batch, length), generator=generator),
        "context_positions_BC": torch.arange(length).expand(batch, -1),
        "context_allowed_BCC": allowed_BCC | torch.eye(length, dtype=torch.bool),
        "context_seen_BC": seen_BC,
        "grid_ids_BN": torch.randint(60, (batch, config.grid**2), generator=generator),
    }


def written_out(model: LocalSuperResolution, inputs: dict[str, Tensor]) -> Tensor:
    """The same, one row after the other, under one dense mask over all tokens, each with its own weights."""
    gpt, config, rows = model.gpt, model.config, []
    for row in range(len(inputs["grid_ids_BN"])):
        ids, seen = inputs["context_ids_BC"][row], inputs["context_seen_BC"][row]
        num_context, num_fine = len(ids), config.grid**2
        allowed = torch.zeros(num_context + num_fine, num_context + num_fine, dtype=torch.bool)
        allowed[:num_context, :num_context] = inputs["context_allowed_BCC"][row]
        local = allowed_mask(config.rule)
        allowed[num_context:, -local.shape[1] :] = local
        if not config.is_direct:
            allowed[num_context:, :num_context] = seen
        hidden = torch.cat(
            [
                gpt.word_embeddings(ids) + gpt.transformer.position_embeddings(inputs["context_positions_BC"][row]),
                gpt.word_embeddings(inputs["grid_ids_BN"][row]) + model.extra_positions.weight,
            ]
        )
        for number, block in enumerate(gpt.transformer.layers):
            normed = block.input_layernorm(hidden)
            plus = model.mixins["attention_plus"] if config.is_direct else None
            own_qkv = plus.query_key_value[number] if plus else block.attention.query_key_value
            own_dense = plus.dense[number] if plus else block.attention.dense
            qkv = torch.cat([block.attention.query_key_value(normed[:num_context]), own_qkv(normed[num_context:])])
            heads = []
            for head in range(2):
                q, k, v = (part[:, 16 * head : 16 * head + 16] for part in qkv.chunk(3, dim=1))
                heads.append((q @ k.T / 4).masked_fill(~allowed, -torch.inf).softmax(dim=1) @ v)
            joined = torch.cat(heads, dim=1)
            merged = torch.cat([block.attention.dense(joined[:num_context]), own_dense(joined[num_context:])])
            hidden = hidden + block.third_layernorm(merged)
            hidden = hidden + block.fourth_layernorm(block.mlp(block.post_attention_layernorm(hidden)))
        rows.append(gpt.transformer.final_layernorm(hidden)[num_context:])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config", [DIRECT, ITERATIVE, replace(DIRECT, ratio=3)], ids=["direct", "iterative", "ratio 3"]
)
def test_a_forward_is_the_one_written_out(config: LocalSuperResolutionConfig) -> None:
    model, inputs = model_of(config), inputs_of(config)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), written_out(model, inputs), atol=1e-5, rtol=1e-5)


def changed_codes(model: LocalSuperResolution, inputs: dict[str, Tensor], name: str, place: int) -> Tensor:
    """bool [N], which codes of the first row a token of the inputs has an influence on."""
    other = {key: value.clone() for key, value in inputs.items()}
    other[name][0, place] = (other[name][0, place] + 1) % 60
    with torch.no_grad():
        return (model(**inputs)[0] - model(**other)[0]).abs().amax(dim=1) > 1e-6


def test_one_layer_looks_as_far_as_its_windows() -> None:
    config = replace(DIRECT, grid=24, window=Window(height=5, width=3), small_window=Window(height=3, width=1))
    model, inputs = model_of(config, num_layers=1, max_positions=160), inputs_of(config)
    changed = changed_codes(model, inputs, "grid_ids_BN", 24 * 10 + 10).view(24, 24)
    expected = torch.zeros(24, 24, dtype=torch.bool)
    expected[8:13, 9:12] = True
    assert torch.equal(changed, expected)
    changed = changed_codes(model, inputs, "context_ids_BC", NUM_TEXT + 12 * 5 + 6).view(24, 24)
    expected = torch.zeros(24, 24, dtype=torch.bool)
    expected[8:14, 12:14] = True
    assert torch.equal(changed, expected)
    assert not changed_codes(model, inputs, "context_ids_BC", 1).any()  # the caption is seen by the small picture alone


def test_the_iterative_stage_sees_the_whole_caption() -> None:
    model, inputs = model_of(ITERATIVE), inputs_of(ITERATIVE)
    assert changed_codes(model, inputs, "context_ids_BC", 1).all()
    inputs["context_seen_BC"] = torch.zeros_like(inputs["context_seen_BC"])
    assert not changed_codes(model, inputs, "context_ids_BC", 1).any()


def test_only_what_the_backbone_has_not_is_trained_directly() -> None:
    model = model_of(DIRECT).train()
    model(**inputs_of(DIRECT)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(model.mixin_tensors())
    assert all(parameter.requires_grad for parameter in model_of(ITERATIVE).parameters())


@pytest.mark.parametrize("stage", ["direct", "iterative"])
def test_recomputed_activations_give_the_same_gradients(stage: Stage) -> None:
    config, found = replace(DIRECT, stage=stage), []
    for is_recomputed in (False, True):
        model = model_of(config, activation_checkpointing=is_recomputed).train()
        model(**inputs_of(config)).square().sum().backward()
        found.append(model.extra_positions.weight.grad)
    torch.testing.assert_close(*found)


def test_a_new_model_starts_from_its_backbone() -> None:
    model = model_of(DIRECT)
    model.start_from_backbone(first_position=5)
    own, block = model.mixins["attention_plus"], model.gpt.transformer.layers[1]
    assert torch.equal(own.query_key_value[1].weight, block.attention.query_key_value.weight)
    assert torch.equal(own.dense[1].bias, block.attention.dense.bias)
    table = model.gpt.transformer.position_embeddings.weight
    for row in range(6):
        for column in range(6):
            expected = table[5 + 3 * (row % 3) + column % 3]
            assert torch.equal(model.extra_positions.weight[6 * row + column], expected)
    with pytest.raises(
        ConfigError, match="has 30 positions, but a picture of 3 x 3 codes from position 22 on needs 31"
    ):
        model.start_from_backbone(first_position=22)


def test_names_are_those_of_the_release() -> None:
    model = model_of(DIRECT)
    layers = [
        f"mixins.attention_plus.{part}.{n}.{kind}"
        for part in ("query_key_value", "dense")
        for n in (0, 1)
        for kind in ("weight", "bias")
    ]
    positions = "mixins.extra_position_embedding.position_embeddings.weight"
    assert set(model.mixin_tensors()) == {positions, *layers}
    assert set(model_of(ITERATIVE).mixin_tensors()) == {positions}
    assert model.mixin_tensors()[positions].shape == (36, 32)


def published(folder: Path, config: LocalSuperResolutionConfig, *, seed: int = 0) -> LocalSuperResolution:
    model = model_of(config, seed=seed)
    save_model(model.gpt, folder, settings={"fingerprints": {}})
    save_stage(model, folder, settings={"form": {"max_text": 4}})
    return model


@pytest.mark.parametrize("config", [DIRECT, ITERATIVE], ids=["direct", "iterative"])
def test_a_published_stage_comes_back(tmp_path: Path, config: LocalSuperResolutionConfig) -> None:
    model, inputs = published(tmp_path, config), inputs_of(config)
    loaded, settings = load_stage(tmp_path)
    assert (loaded.config, settings["form"], loaded.training) == (config, {"max_text": 4}, False)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), model(**inputs))
    assert LocalSuperResolutionConfig.from_stored(asdict(config)) == config


def test_stages_share_a_backbone_that_is_the_same(tmp_path: Path) -> None:
    published(tmp_path / "one", DIRECT)
    published(tmp_path / "two", replace(DIRECT, grid=9, ratio=3))
    published(tmp_path / "other", ITERATIVE, seed=1)
    first, settings = load_stage(tmp_path / "one")
    backbones = {settings["backbone"]: first.gpt}
    second, _ = load_stage(tmp_path / "two", backbones=backbones)
    other, _ = load_stage(tmp_path / "other", backbones=backbones)
    assert second.gpt is first.gpt
    assert other.gpt is not first.gpt


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no super-resolution model of CogView2"):
        load_stage(tmp_path)
    model = published(tmp_path, DIRECT)
    tensors = {name: value.clone() for name, value in model.mixin_tensors().items()}
    save_file({**tensors, "mixins.more": torch.zeros(1)}, tmp_path / STAGE_WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_stage(tmp_path)
    settings_path = tmp_path / STAGE_SETTINGS_NAME
    from cogview.models.published import file_sha256

    before = settings_path.read_text()
    digest = read_settings(tmp_path, STAGE_SETTINGS_NAME)["sha256"]
    settings_path.write_text(before.replace(digest, file_sha256(tmp_path / STAGE_WEIGHTS_NAME)))
    with pytest.raises(
        CheckpointError, match=r"mixins.more is \(1,\), and should be absent in a direct model of 6 x 6"
    ):
        load_stage(tmp_path)
    save_model(model_of(DIRECT, seed=2).gpt, tmp_path, settings={"fingerprints": {}})
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME} is .* was trained on"):
        load_stage(tmp_path)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="stage='indirect'"):
        LocalSuperResolutionConfig(stage="indirect")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="grid=10, ratio=3"):
        LocalSuperResolutionConfig(grid=10)
