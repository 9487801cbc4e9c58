"""Released GPT weights: every way into the same model, its config from shapes, and what is said of misfits."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpt_import import make_weights, plain_logits, write_parts
from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.published import load_model, save_weights
from cogview.models.released import load_released_gpt, open_released_gpt, save_released_gpt

SHAPE = {"hidden_size": 256, "num_layers": 2, "vocab_size": 512, "max_positions": 20}
CONFIG = GPTConfig(**SHAPE, num_heads=4, embedding_gradient=1.0)
FILE = "mp_rank_{:02d}_model_states.pt"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return make_weights(**SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    return write_parts(weights, tmp_path / "cogview-base", parts=1)


def same(gpt: GPT, weights: dict[str, torch.Tensor]) -> bool:
    found = gpt.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name].float()) for name in weights)


def edit(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a rank's file, or with None take them out; `__` stands for a dot."""
    content = torch.load(file, weights_only=True)
    for name, tensor in changes.items():
        content["module"].pop(name.replace("__", "."), None)
        if tensor is not None:
            content["module"][name.replace("__", ".")] = tensor
    torch.save(content, file)


@torch.no_grad()
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("words", ["word_embeddings.weight", "transformer.word_embeddings.weight"])
def test_parts_are_merged_into_the_model_that_was_cut(weights, parts: int, words: str, tmp_path: Path) -> None:
    gpt = load_released_gpt(write_parts(weights, tmp_path / "x", parts=parts, words=words))
    assert gpt.config == CONFIG
    assert not gpt.training
    assert same(gpt, weights)
    ids, positions = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(1)), torch.arange(20)[None]
    difference = gpt.logits(gpt(ids, positions.expand(2, -1))) - plain_logits(weights, ids, positions)
    assert difference.abs().max() < 1e-4


def test_the_folder_the_iteration_the_file_and_a_plain_copy_are_all_taken(
    weights, folder: Path, tmp_path: Path
) -> None:
    file = folder / "20000" / FILE.format(0)
    assert open_released_gpt(folder).iteration == open_released_gpt(file.parent).iteration == 20000
    (folder / "latest_checkpointed_iteration.txt").rename(folder / "latest")  # DeepSpeed's own name
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "pytorch_model.bin")
    for path in (folder, file.parent, file, tmp_path, tmp_path / "pytorch_model.bin"):
        assert same(load_released_gpt(path), weights)
    assert open_released_gpt(tmp_path).iteration is None


def test_tensors_that_are_views_of_one_buffer_can_be_published(weights, tmp_path: Path) -> None:
    """As optimizers with flat buffers leave them."""
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    views, start = {}, 0
    for name, tensor in weights.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    torch.save({"module": views}, tmp_path / FILE.format(0))
    released = open_released_gpt(tmp_path)
    save_weights(dict(released.tensors()), tmp_path / "own", config=released.config, settings={"grid": 2})
    gpt, settings = load_model(tmp_path / "own")
    assert settings["grid"] == 2
    assert gpt.word_embeddings.weight.dtype == torch.float16
    assert same(gpt.float(), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_model_runs_on_the_cpu_in_each_precision(weights, dtype: torch.dtype, folder: Path) -> None:
    gpt = load_released_gpt(folder, dtype=dtype)
    assert {parameter.dtype for parameter in gpt.parameters()} == {dtype}
    ids, positions = torch.arange(20)[None], torch.arange(20)[None]
    wanted = plain_logits(weights, ids, positions)
    found = gpt.logits(gpt(ids, positions)).float()
    allowed = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.1}[dtype] * wanted.abs().max()
    assert (found - wanted).abs().max() < allowed


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("naming", ["released", "sat"])
def test_what_is_exported_comes_back(num_ranks: int, naming: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    save_released_gpt(gpt, tmp_path, iteration=7, num_ranks=num_ranks, naming=naming)
    assert len(list((tmp_path / "7").iterdir())) == num_ranks
    assert open_released_gpt(tmp_path).iteration == 7
    assert same(load_released_gpt(tmp_path), gpt.state_dict())


def test_an_export_fills_the_vocabulary_up_for_its_ranks(tmp_path: Path) -> None:
    gpt = GPT(GPTConfig(vocab_size=300, max_positions=4, num_layers=1, hidden_size=128, num_heads=2))
    save_released_gpt(gpt, tmp_path, num_ranks=2)
    rows = load_released_gpt(tmp_path).word_embeddings.weight
    assert len(rows) == 512  # 2 x 256
    assert torch.equal(rows[:300], gpt.word_embeddings.weight)
    assert not rows[300:].any()
    with pytest.raises(ConfigError, match="num_ranks=3: choose a divisor of the 2 heads"):
        save_released_gpt(gpt, tmp_path, num_ranks=3)


def test_a_model_without_sandwich_norms_and_with_other_heads_is_recognised(tmp_path: Path) -> None:
    plain = GPTConfig(**SHAPE, num_heads=8, sandwich_ln=False, embedding_gradient=1.0)
    save_released_gpt(GPT(plain), tmp_path)
    assert open_released_gpt(tmp_path, num_heads=8).config == plain


def test_what_cogview2_adds_is_kept_apart(weights, tmp_path: Path) -> None:
    for rank in range(2):
        extras = {
            "mixins.extra_position_embedding.position_embeddings.weight": torch.ones(36, 256),
            "mixins.attention_plus.query_key_value.0.weight": torch.arange(3).repeat_interleave(128)[:, None]
            + rank * 10
            + torch.zeros(384, 256),
            "mixins.attention_plus.dense.0.weight": torch.full((256, 128), float(rank)),
        }
        write_parts(weights, tmp_path / "x", parts=2) if rank == 0 else None
        edit(tmp_path / "x" / "20000" / FILE.format(rank), **extras)
    released = open_released_gpt(tmp_path / "x")
    found = dict(released.extra_tensors())
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "mixins.extra_position_embedding.position_embeddings.weight": (36, 256),
        "mixins.attention_plus.query_key_value.0.weight": (768, 256),
        "mixins.attention_plus.dense.0.weight": (256, 256),
    }
    thirds = found["mixins.attention_plus.query_key_value.0.weight"][::128, 0].tolist()
    assert thirds == [0, 10, 1, 11, 2, 12]  # queries of both ranks, then keys, then values
    assert same(load_released_gpt(tmp_path / "x"), weights)


def test_missing_ranks_are_named(weights, tmp_path: Path) -> None:
    folder = write_parts(weights, tmp_path / "x", parts=4) / "20000"
    (folder / FILE.format(3)).unlink()
    with pytest.raises(CheckpointError, match="one of 4 model-parallel ranks, but 3 are here"):
        open_released_gpt(folder)
    (folder / FILE.format(1)).unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt is missing"):
        open_released_gpt(folder)


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    file = folder / "20000" / FILE.format(0)
    bias = "transformer__layers__1__mlp__dense_4h_to_h__bias"
    edit(file, **{bias: None})
    with pytest.raises(CheckpointError, match=r"missing: transformer\.layers\.1\.mlp\.dense_4h_to_h\.bias"):
        open_released_gpt(folder)
    edit(file, **{bias: torch.ones(255)})
    with pytest.raises(CheckpointError, match=r"dense_4h_to_h\.bias \[255\] instead of \[256\]"):
        open_released_gpt(folder)
    edit(file, **{bias: torch.ones(256), "pooler__weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"unknown: pooler\.weight"):
        open_released_gpt(folder)
    edit(file, pooler__weight=None, transformer__position_embeddings__weight=None)
    with pytest.raises(CheckpointError, match=r"no matrix transformer\.position_embeddings"):
        open_released_gpt(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        open_released_gpt(folder)
    with pytest.raises(CheckpointError, match="holds no released GPT: give a folder"):
        open_released_gpt(tmp_path / "nothing")


def test_a_size_that_heads_of_64_do_not_divide_asks_for_their_number(tmp_path: Path) -> None:
    save_released_gpt(
        GPT(GPTConfig(vocab_size=128, max_positions=4, num_layers=1, hidden_size=32, num_heads=2)), tmp_path
    )
    with pytest.raises(CheckpointError, match="no multiple of 64; give num_heads"):
        open_released_gpt(tmp_path)
    assert load_released_gpt(tmp_path, num_heads=2).config.num_heads == 2
