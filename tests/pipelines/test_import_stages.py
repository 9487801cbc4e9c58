"""CogView2's super-resolution stages in the released layout: random files in, the same codes out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.models.gpt import GPT, GPTConfig
from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig
from cogview.models.published_stage import load_stage, stage_config
from cogview.models.released import THIRDS, _part
from cogview.sampling.hierarchical_magnifier import HierarchicalMagnifier, HierarchicalSampling
from cogview.scenes.scene import corpus
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import MODEL_NAME, TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines.import_weights import PRESETS, Config, main
from tests.pipelines.job_runs import open_run

NUM_CODES, GRID, RATIO, NUM_RANKS = 32, 4, 3, 2
CAPTIONS = ["a large red circle on a blue background", "白色背景上的一个大红色圆形"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("icetk")
    captions = [caption for scene in corpus(0, 60) for caption in (scene.english, scene.chinese)]
    bilingual = TextTokenizerConfig(num_pieces=200, exact=False, is_bilingual=True)
    train_text_tokenizer(captions, config=bilingual, output=root / "text")
    torch.manual_seed(0)
    codebook = CodebookConfig(num_codes=NUM_CODES, code_dim=8)
    ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=codebook)).eval().save(root / "image")
    return replace(
        PRESETS["coglm"], image_tokenizer=root / "image", text_tokenizer=root / "text" / MODEL_NAME, grid=GRID
    )


def write_released(root: Path, config: Config, *, stage: str) -> LocalSuperResolution:
    """A stage cut over two model-parallel ranks, in SwissArmyTransformer's naming."""
    ranges = TextTokenizer.load(config.text_tokenizer.parent).ranges
    rows = -(-BilingualVocabulary(num_image_codes=NUM_CODES, text=ranges).num_ids // 256) * 256
    torch.manual_seed(len(stage))
    shape = GPTConfig(
        vocab_size=rows, max_positions=1024, num_layers=2, hidden_size=128, num_heads=2, init_std=0.2, dropout=0.0
    )
    model = LocalSuperResolution(
        GPT(shape), LocalSuperResolutionConfig(stage=stage, grid=RATIO * GRID, ratio=RATIO)
    ).eval()
    for parameter in model.mixins.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {**model.gpt.state_dict(), **model.mixin_tensors()}
    folder = root / stage / "20000"
    folder.mkdir(parents=True)
    for rank in range(NUM_RANKS):
        parts = {name: _part(name, value, rank, NUM_RANKS) for name, value in state.items()}
        parts["transformer.word_embeddings.weight"] = parts.pop("word_embeddings.weight")
        torch.save({"module": parts}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    (root / stage / "latest").write_text("20000")
    return model


def test_stages_come_in_as_they_were(config: Config, tmp_path: Path) -> None:
    models = {stage: write_released(tmp_path, config, stage=stage) for stage in ("direct", "iterative")}
    for stage, model in models.items():
        run = open_run(tmp_path / "out" / stage)
        main(replace(config, gpt=tmp_path / stage), run)
        assert any(f"they are CogView2's {stage} super-resolution" in line for line in run.lines)
        found, settings = load_stage(run.output / "gpt")
        assert found.config == model.config
        assert (settings["form"]["max_text"], settings["form"]["image_position"]) == (
            96 if stage == "direct" else 16,
            513,
        )
        assert not settings["form"]["is_causal"]
        for name, tensor in model.mixin_tensors().items():
            assert torch.equal(found.mixin_tensors()[name], tensor), name
    assert THIRDS.search("mixins.attention_plus.query_key_value.0.weight")
    out = tmp_path / "out"
    magnifier = HierarchicalMagnifier.load(
        out / "direct" / "gpt",
        out / "iterative" / "gpt",
        text_tokenizer=out / "direct" / "text_tokenizer",
        image_tokenizer=out / "direct" / "image_tokenizer",
    )
    small = torch.randint(NUM_CODES, (2, GRID, GRID), generator=torch.Generator().manual_seed(1))
    sampling = HierarchicalSampling(by_clusters=False)
    drawn = magnifier.magnify(CAPTIONS, small, seeds=[1, 2], sampling=sampling)
    assert magnifier.iterative is not None
    original = replace(
        magnifier,
        direct=replace(magnifier.direct, model=models["direct"]),
        iterative=replace(magnifier.iterative, model=models["iterative"]),
    )
    assert torch.equal(drawn, original.magnify(CAPTIONS, small, seeds=[1, 2], sampling=sampling))


def test_tensors_of_something_else_are_no_stage() -> None:
    name = "mixins.extra_position_embedding.position_embeddings.weight"
    assert stage_config({}, small_grid=20) is None
    for rows in (9, 3599, 3721):
        assert stage_config({name: torch.zeros(rows, 4)}, small_grid=20) is None
    whole = stage_config({name: torch.zeros(3600, 4)}, small_grid=20)
    assert whole == LocalSuperResolutionConfig(stage="iterative")
    second = {name: torch.zeros(3600, 4), "mixins.attention_plus.dense.0.bias": torch.zeros(4)}
    assert stage_config(second, small_grid=20) == LocalSuperResolutionConfig(stage="direct")
