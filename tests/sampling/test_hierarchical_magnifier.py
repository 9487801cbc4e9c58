"""Both stages with their tokenizers, from published folders: pictures, parts of pictures, and one memory for two."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.models.gpt import GPT
from cogview.models.published import read_settings
from cogview.models.shared_backbone import SharedBackbone
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import ClusterSampling
from cogview.sampling.coglm import TASK
from cogview.sampling.hierarchical_magnifier import COGLM_TASK, HierarchicalMagnifier, HierarchicalSampling, form_of
from cogview.sampling.hierarchy import LoPARConfig
from cogview.sampling.lopar import rank_grid
from cogview.sequences.coglm import RowMaker
from cogview.sequences.picture_context import build_context
from cogview.tokenizers.code_clusters import CodeClusters
from tests.pipelines.trained_folders import GRID, TrainedFolders, write_trained_folders
from tests.sampling.small_coglm import small_coglm, some_codes
from tests.sampling.small_stages import LARGE, publish_stage

CAPTIONS = ["a red circle", "蓝色背景上的一个大红色圆形"]
SAMPLING = HierarchicalSampling(by_clusters=False, tokens=SamplingConfig(top_k=12), lopar=LoPARConfig(top_k=(12,)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def stages(folders: TrainedFolders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stages")
    return {stage: publish_stage(root / stage, folders, stage=stage) for stage in ("direct", "iterative")}


def load(stages: dict[str, Path], folders: TrainedFolders, **more: Path) -> HierarchicalMagnifier:
    tokenizers = {"text_tokenizer": folders.text_tokenizer, "image_tokenizer": folders.image_tokenizer}
    return HierarchicalMagnifier.load(stages["direct"], stages.get("iterative"), **tokenizers, **more)


def small(batch: int = 2) -> Tensor:
    return torch.randint(32, (batch, GRID, GRID), generator=torch.Generator().manual_seed(1))


def test_a_picture_takes_seven_calls(stages: dict[str, Path], folders: TrainedFolders) -> None:
    magnifier, seen = load(stages, folders), []
    assert (magnifier.side, magnifier.scale) == (GRID, 3)
    drawn = magnifier.magnify(
        CAPTIONS, small(), seeds=[1, 2], sampling=SAMPLING, progress=lambda done, all: seen.append((done, all))
    )
    assert seen == [(number, 7) for number in range(1, 8)]
    assert magnifier.decode(drawn).shape == (2, 3, 8 * LARGE, 8 * LARGE)
    first = load({"direct": stages["direct"]}, folders).magnify(CAPTIONS, small(), seeds=[1, 2], sampling=SAMPLING)
    kept = rank_grid(LARGE, LARGE) <= 0
    assert torch.equal(drawn[:, kept], first[:, kept])
    assert not torch.equal(drawn, first)
    alone = magnifier.magnify(CAPTIONS[1:], small()[1:], seeds=[2], sampling=SAMPLING)
    assert torch.equal(alone[0], drawn[1])


def test_a_part_is_drawn_between_known_codes(stages: dict[str, Path], folders: TrainedFolders) -> None:
    known = torch.randint(32, (2, LARGE, LARGE), generator=torch.Generator().manual_seed(2))
    inside = torch.zeros(2, LARGE, LARGE, dtype=torch.bool)
    inside[:, 3:9, 2:7] = True
    drawn = load(stages, folders).magnify(
        CAPTIONS, small(), seeds=[1, 2], sampling=SAMPLING, known_BGG=known, inside_BGG=inside
    )
    assert torch.equal(drawn[~inside], known[~inside])
    assert not torch.equal(drawn[inside], known[inside])


def test_direct_codes_are_drawn_by_their_clusters(
    stages: dict[str, Path], folders: TrainedFolders, tmp_path: Path
) -> None:
    labels = torch.arange(32) % 5
    CodeClusters(labels_K=labels).save(tmp_path)
    direct = {"direct": stages["direct"]}
    sampling = HierarchicalSampling(clusters=ClusterSampling(temperature=0, temperature_inside=0))
    magnifier = load(direct, folders, clusters=tmp_path)
    assert magnifier.magnify(CAPTIONS, small(), seeds=[1, 2], sampling=sampling).shape == (2, LARGE, LARGE)
    with pytest.raises(ConfigError, match="cluster sampling needs clusters"):
        load(direct, folders).magnify(CAPTIONS, small(), seeds=[1, 2], sampling=sampling)
    release = HierarchicalSampling().clusters
    assert release == ClusterSampling(temperature=1.0, top_clusters=100, temperature_inside=0.89)


def test_stages_take_turns_in_one_memory(stages: dict[str, Path], folders: TrainedFolders) -> None:
    apart = load(stages, folders)
    assert apart.backbone is None
    together = load(stages, folders)
    assert together.iterative is not None
    own = {
        name: dict(stage.model.gpt.state_dict())
        for name, stage in (("direct", together.direct), ("iterative", together.iterative))
    }
    gpt = GPT(together.direct.model.gpt.config).eval()
    gpt.load_state_dict(own["direct"])
    together.direct.model.gpt = together.iterative.model.gpt = gpt
    together = replace(together, backbone=SharedBackbone(gpt, own, holds="direct"))
    for _ in range(2):  # and back again
        found = [one.magnify(CAPTIONS, small(), seeds=[1, 2], sampling=SAMPLING) for one in (apart, together)]
        assert torch.equal(*found)
        assert together.backbone is not None
        assert together.backbone.holds == "iterative"
    other = GPT(replace(gpt.config, max_positions=9))
    with pytest.raises(ConfigError, match="the backbone of the one stage has another shape"):
        SharedBackbone(gpt, {"one": other.state_dict()}, holds="one")


def test_a_coglm_reads_the_beginning_of_its_rows(tmp_path: Path) -> None:
    coglm = small_coglm(tmp_path)
    coglm.image_tokenizer.save(tmp_path / "image")
    text, layout, vocabulary = coglm.text_tokenizer, coglm.layout, coglm.vocabulary
    settings = {"task": TASK, "layout": asdict(layout)}
    form, found = form_of(settings, text=text, image=coglm.image_tokenizer)
    assert found["vocabulary"] == vocabulary.fingerprint
    pieces = text.encode(CAPTIONS[0])[: layout.max_text]
    codes = some_codes(1)[0].flatten().numpy().astype("uint16")
    row = RowMaker(vocabulary=vocabulary, layout=layout).drawing(pieces, codes)
    context = build_context([pieces], codes[None], form=form)
    places = [place for place in range(len(row.ids)) if row.ids[place] != vocabulary.start_of_image]
    length = len(pieces) + layout.grid**2
    assert context.ids[0, : length - 1].tolist() == row.ids[places].tolist()  # the last code is no input of a row
    assert context.positions[0, : length - 1].tolist() == row.positions[places].tolist()
    assert context.allowed[0, :, : len(pieces)].all()
    assert context.allowed[0, len(pieces) :].all()
    assert not context.allowed[0, : len(pieces), len(pieces) :].any()
    assert (form.mask_id, COGLM_TASK) == (vocabulary.start_of_image, TASK)


def test_what_does_not_belong_together_is_refused(
    stages: dict[str, Path], folders: TrainedFolders, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is of the iterative stage; give the output of finetune_direct_sr"):
        load({"direct": stages["iterative"]}, folders)
    larger = publish_stage(tmp_path / "larger", folders, stage="iterative", grid=4 * GRID)
    with pytest.raises(CheckpointError, match=r"draws 16 codes along a side, .* 12; give stages"):
        load({**stages, "iterative": larger}, folders)
    others = write_trained_folders(tmp_path / "others", seed=5)
    with pytest.raises(VocabularyError, match="was trained with"):
        load(stages, others)
    with pytest.raises(CheckpointError, match="holds no super-resolution model"):
        load({"direct": folders.checkpoint}, folders)
    assert read_settings(folders.checkpoint)["grid"] == GRID
