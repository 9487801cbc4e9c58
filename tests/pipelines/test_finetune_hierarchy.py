"""Both super-resolution stages of CogView2 are finetuned: what they read, what they leave alone, what they publish."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.errors import ConfigError
from cogview.models.local_super_resolution import LocalSuperResolutionConfig
from cogview.models.published import WEIGHTS_NAME, file_sha256, load_model, read_settings
from cogview.models.published_stage import STAGE_SETTINGS_NAME, load_stage
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.completion import Completer, CompletionConfig
from cogview.sampling.hierarchical_magnifier import HierarchicalMagnifier, HierarchicalSampling
from cogview.sampling.masks import Box
from cogview.scenes.scene import corpus, draw_scene
from cogview.shards.reader import TokenShards
from cogview.tokenizers.pixels import pixel_batch
from cogview.tokenizers.vqvae import ImageTokenizer
from cogview.training.loop import LoopConfig, train
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines import finetune_direct_sr, finetune_iterative_sr
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import run_job
from pipelines.tasks.hierarchy import StageFinetuning, StageTask, mask_of
from pipelines.tasks.scene_pictures import ScenePictures, scenes_or_tokens
from tests.pipelines.job_runs import open_run
from tests.pipelines.trained_folders import GRID, write_trained_folders
from tests.sampling.small_coglm import GRID as COGLM_GRID
from tests.sampling.small_coglm import write_small_coglm

RATIO = 2
LARGE = RATIO * GRID
SCENES = ScenePictures(num_scenes=12, image_size=8 * GRID, validation_share=0.25)
LOOP = LoopConfig(
    num_steps=12,
    global_batch_size=4,
    log_every=4,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_share=0.0),
)


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> finetune_direct_sr.Config:
    folders = write_trained_folders(tmp_path_factory.mktemp("trained"))
    return finetune_direct_sr.Config(
        checkpoint=folders.checkpoint,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        model=LocalSuperResolutionConfig(grid=LARGE, ratio=RATIO),
        scenes=SCENES,
        dropout=0.0,
        loop=LOOP,
        num_workers=1,
        num_validation_rows=6,
    )


@pytest.fixture(scope="module")
def iterative(direct: finetune_direct_sr.Config) -> finetune_iterative_sr.Config:
    shared = ("checkpoint", "text_tokenizer", "image_tokenizer", "scenes", "dropout", "loop", "num_validation_rows")
    return finetune_iterative_sr.Config(
        model=replace(direct.model, stage="iterative"), **{name: getattr(direct, name) for name in shared}
    )


@pytest.fixture(scope="module")
def tokens(direct: finetune_direct_sr.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = {"text_tokenizer": direct.text_tokenizer, "image_tokenizer": direct.image_tokenizer}
    return scenes_or_tokens(direct, folders=folders, ratio=RATIO, run=open_run(tmp_path_factory.mktemp("run")))


def test_a_row_is_one_scene_at_both_sizes(direct: finetune_direct_sr.Config, tokens: Path) -> None:
    image = ImageTokenizer.load(direct.image_tokenizer)
    shards = TokenShards.open(tokens, deep=True)
    assert (shards.grid, shards.other_grids, len(shards)) == (GRID, (LARGE,), 9 * 2)
    rows = shards.rows(np.arange(len(shards)), other_grids=(LARGE,))
    for number, scene in enumerate(list(corpus(SCENES.seed, SCENES.num_scenes))[:9]):
        large = draw_scene(scene.scene, image_size=8 * LARGE)
        small = large.resize((8 * GRID, 8 * GRID), Image.Resampling.LANCZOS)
        expected = [image.encode(pixel_batch([np.asarray(picture)])).ravel().tolist() for picture in (small, large)]
        for row, caption in ((2 * number, scene.english), (2 * number + 1, scene.chinese)):
            assert [rows.image_codes[row].tolist(), rows.other_codes[LARGE][row].tolist()] == expected
            assert rows.texts[row] == caption


def trained(settings: StageFinetuning, output: Path) -> tuple[StageTask, dict[str, float], dict[str, float]]:
    """The task after its training, with its scores before and behind."""
    task = StageTask(settings, ranks=Ranks())
    with torch.no_grad():
        before = task.validate(0)
    train(task, config=settings.loop, output=output, identity={}, ranks=Ranks())
    with torch.no_grad():
        return task, before, task.validate(12)


def test_the_direct_stage_learns_and_leaves_its_backbone_alone(direct, tokens: Path, tmp_path: Path) -> None:
    settings = finetune_direct_sr.settings_of(direct, tokens=tokens, output=tmp_path)
    task, before, after = trained(settings, tmp_path)
    assert after["validation_loss"] < before["validation_loss"]
    assert 0 <= after["validation_codes_right"] <= 1
    assert Image.open(tmp_path / "samples" / "step_00000012.png").width > 3 * 160
    assert file_sha256(tmp_path / WEIGHTS_NAME) == file_sha256(direct.checkpoint / WEIGHTS_NAME)
    model, published = load_stage(tmp_path)
    assert published["form"]["max_text"] == task.form.max_text == 44
    batch = task.batch(0, Ranks()).tensors
    assert batch["is_masked"].all()
    assert batch["context_ids"].shape[1] >= GRID**2
    assert torch.equal(model.extra_positions.weight, task.model.extra_positions.weight)


def test_the_iterative_stage_learns_with_shares_of_the_codes_masked(iterative, tokens: Path, tmp_path: Path) -> None:
    settings = finetune_iterative_sr.settings_of(iterative, tokens=tokens, output=tmp_path)
    task, before, after = trained(settings, tmp_path)
    assert after["validation_loss"] < before["validation_loss"]
    counts = {int(row.sum()) for step in range(8) for row in task.batch(step, Ranks()).tensors["is_masked"]}
    assert counts <= {round(share * LARGE**2) for share in (0.2, 0.4, 0.6, 0.8, 0.9)}
    assert len(counts) > 2
    assert task.batch(0, Ranks()).tensors["context_ids"].shape[1] <= 17  # ROI1 and 16 pieces: no picture
    model, published = load_stage(tmp_path)
    gpt, stored = load_model(tmp_path)
    assert (published["task"], stored["task"]) == ("iterative_super_resolution", "iterative_super_resolution")
    assert stored["started_from"] == read_settings(iterative.checkpoint)["sha256"]
    old, _ = load_model(iterative.checkpoint)
    assert not torch.equal(gpt.word_embeddings.weight, old.word_embeddings.weight)
    assert model.config.stage == "iterative"


@pytest.mark.parametrize("stage", ["direct", "iterative"])
def test_half_precision_trains_what_is_not_frozen(direct, iterative, tokens: Path, tmp_path: Path, stage: str) -> None:
    job, config = {"direct": (finetune_direct_sr, direct), "iterative": (finetune_iterative_sr, iterative)}[stage]
    loop = replace(LOOP, num_steps=2, precision="bf16", micro_batch_size=2)
    settings = job.settings_of(
        replace(config, loop=loop, activation_checkpointing=True), tokens=tokens, output=tmp_path
    )
    train(StageTask(settings, ranks=Ranks()), config=loop, output=tmp_path, identity={}, ranks=Ranks())
    model, _ = load_stage(tmp_path)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_a_step_is_the_same_however_many_workers_share_it(iterative, tokens: Path, tmp_path: Path) -> None:
    task = StageTask(finetune_iterative_sr.settings_of(iterative, tokens=tokens, output=tmp_path), ranks=Ranks())
    whole = task.batch(3, Ranks()).tensors
    parts = [task.batch(3, Ranks(rank=rank, world=2)).tensors for rank in range(2)]
    for name in ("codes", "is_masked"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize("share", [0.2, 0.9, 1.0, 1e-9])
def test_a_mask_has_its_share(share: float) -> None:
    mask = mask_of(50, shares=(share,), seed=(1, 2))
    assert mask.sum() == max(1, round(50 * share))
    assert np.array_equal(mask, mask_of(50, shares=(share,), seed=(1, 2)))
    if share < 1:
        assert not np.array_equal(mask, mask_of(50, shares=(share,), seed=(1, 3)))


def test_what_does_not_fit_is_refused(direct, iterative, tokens: Path, tmp_path: Path) -> None:
    def start(config: finetune_direct_sr.Config, tokens: Path = tokens) -> None:
        finetune_direct_sr.settings_of(config, tokens=tokens, output=tmp_path).start()

    with pytest.raises(ConfigError, match="small pictures have 2 x 2 codes, but the checkpoint draws 4 x 4"):
        start(replace(direct, model=LocalSuperResolutionConfig(grid=LARGE, ratio=4)))
    with pytest.raises(ConfigError, match=r"pictures of \[4, 8\] codes along a side, and 12 are needed too"):
        start(replace(direct, model=LocalSuperResolutionConfig(grid=12, ratio=3)))
    with pytest.raises(ConfigError, match=r"loop\.sharding='full'"):
        start(replace(direct, loop=replace(LOOP, sharding="full")))
    with pytest.raises(ConfigError, match="max_text=99: the backbone reads 44"):
        finetune_iterative_sr.settings_of(replace(iterative, max_text=99), tokens=tokens, output=tmp_path).start()
    with pytest.raises(ConfigError, match="this job trains the direct one"):
        replace(direct, model=iterative.model)
    with pytest.raises(ConfigError, match="this job trains the iterative one"):
        replace(iterative, model=direct.model)
    with pytest.raises(ConfigError, match="mask_shares"):
        replace(iterative, mask_shares=(0.0,))
    with pytest.raises(ConfigError, match="tokens is not given; give --tokens FOLDER"):
        scenes_or_tokens(replace(direct, scenes=None), folders={}, ratio=2, run=open_run(tmp_path))


def test_a_coglm_made_last_is_taken_before_the_model_of_the_chain(direct, tmp_path: Path) -> None:
    open_config = replace(direct, checkpoint=None)
    with pytest.raises(ConfigError, match="no chain"):
        finetune_direct_sr.resolve(open_config, root=tmp_path)
    newest = tmp_path / "pretrain_coglm" / "abc"
    newest.mkdir(parents=True)
    (newest / "complete.json").write_text("{}")
    assert finetune_direct_sr.resolve(open_config, root=tmp_path).checkpoint == newest
    assert finetune_direct_sr.resolve(direct, root=tmp_path) == direct


def test_a_coglm_is_a_backbone_too(direct, iterative, tmp_path: Path) -> None:
    write_small_coglm(tmp_path)
    folders = {"text_tokenizer": tmp_path / "text", "image_tokenizer": tmp_path / "image"}
    scenes = replace(SCENES, image_size=4 * COGLM_GRID)  # 4 pixels to a code
    shape = LocalSuperResolutionConfig(grid=3 * COGLM_GRID, ratio=3)
    for config, job in ((direct, finetune_direct_sr), (iterative, finetune_iterative_sr)):
        model = replace(shape, stage=config.model.stage)
        config = replace(config, checkpoint=tmp_path / "checkpoint", model=model, scenes=scenes, **folders)  # noqa: PLW2901
        run = open_run(tmp_path / model.stage)
        tokens = scenes_or_tokens(config, folders=folders, ratio=3, run=run)
        settings = job.settings_of(config, tokens=tokens, output=run.output)
        train(StageTask(settings, ranks=Ranks()), config=LOOP, output=run.output, identity={}, ranks=Ranks())
    magnifier = HierarchicalMagnifier.load(tmp_path / "direct", tmp_path / "iterative", **folders)
    assert not magnifier.direct.form.is_causal
    coglm = CogLM.load(tmp_path / "checkpoint", **folders)
    assert torch.equal(coglm.model.word_embeddings.weight, magnifier.direct.model.gpt.word_embeddings.weight)
    fill = partial(coglm.fill, sampling=CogLMSampling(by_clusters=False))
    completer = Completer(fill=fill, image_tokenizer=coglm.image_tokenizer, grid=COGLM_GRID, magnifier=magnifier)
    pixels, box = torch.zeros(3, 64, 64, dtype=torch.uint8), Box(top=0.1, left=0.1, bottom=0.9, right=0.9)
    drawn = completer.complete(
        pixels,
        box.mask(64, 64),
        caption="a red dot",
        seeds=[1],
        config=CompletionConfig(),
        sampling=HierarchicalSampling(by_clusters=False),
    )
    assert bool(drawn.pictures_BCHW[0, :, 20:40, 20:40].any())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_job_trains_on_ray(direct, run_root: Path, quiet_display: PlainDisplay) -> None:
    done = run_job(finetune_direct_sr.JOB, direct, root=run_root, display=quiet_display)
    assert load_stage(done.output)[0].config == direct.model
    assert read_settings(done.output, STAGE_SETTINGS_NAME)["task"] == "direct_super_resolution"
    assert 0 < done.scores["trained_parameters"] < done.scores["parameters"]
    assert run_job(finetune_direct_sr.JOB, direct, root=run_root, display=quiet_display).was_done
