"""Completion as a job: what is asked for in which form, what is written, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor

from cogview.errors import ConfigError
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import GUTTER, MARGIN, STRIP_GAP, TITLE_SIZE
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.coglm_captioning import CogLMCaptioner
from cogview.sampling.hierarchical_magnifier import HierarchicalSampling
from pipelines.complete import JOB, Config, complete, completer_of, main, read_requests, resolve
from pipelines.runtime.jobs import run_job
from tests.pipelines.job_runs import ShownRun, open_run
from tests.pipelines.pair_folders import QuietDisplay
from tests.sampling.small_coglm import write_small_coglm

PLAIN = CogLMSampling(by_clusters=False, tokens=SamplingConfig(top_k=0))
BOX = (0.25, 0.25, 0.75, 0.5)
PICTURE_SIDE = 160  # on a sheet


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A small untrained CogLM: what it draws is noise, but every file is real."""
    root = tmp_path_factory.mktemp("coglm")
    write_small_coglm(root)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(root / "picture.png")
    return Config(
        checkpoint=root / "checkpoint",
        text_tokenizer=root / "text",
        image_tokenizer=root / "image",
        image=root / "picture.png",
        box=BOX,
        prompt="a red dot",
        candidates=2,
        filling=PLAIN,
        threads=1,
    )


def completed(config: Config, output: Path) -> tuple[ShownRun, list[dict[str, object]]]:
    run = open_run(output)
    run.inputs = {"checkpoint": "c" * 64}
    main(config, run)
    return run, pq.read_table(output / "samples.parquet").to_pylist()


def test_a_picture_is_completed_in_its_box(config: Config, run_root: Path) -> None:
    done = run_job(JOB, config, root=run_root, display=QuietDisplay())
    rows = pq.read_table(done.output / "samples.parquet").to_pylist()
    before = np.asarray(Image.open(config.image))
    assert [(row["prompt"], row["source"], row["top"], row["right"]) for row in rows] == [
        ("a red dot", "picture.png", 0.25, 0.5)
    ] * 2
    assert rows[0]["seed"] != rows[1]["seed"]
    after = [np.asarray(Image.open(done.output / row["path"])) for row in rows]
    for picture in after:
        changed = (picture != before).any(axis=2)
        assert changed[15:45, 20:40].any()
        changed[15 - 6 : 45 + 6, 20 - 6 : 40 + 6] = False
        assert not changed.any()
    assert not np.array_equal(*after)
    assert Image.open(done.output / "sheet.png").width > 3 * 160
    assert run_job(JOB, config, root=run_root, display=QuietDisplay()).was_done


def test_candidates_are_in_the_order_in_which_their_caption_is_likely(config: Config, tmp_path: Path) -> None:
    _, rows = completed(replace(config, candidates=4), tmp_path)
    assert len({row["cap_loss"] for row in rows}) == 4
    ranked = sorted(rows, key=lambda row: float(str(row["cap_loss"])))
    assert [row["rank"] for row in ranked] == [0, 1, 2, 3]
    sheet = Image.open(tmp_path / "sheet.png")
    for place, row in enumerate(ranked, start=1):
        left, top = MARGIN + place * (PICTURE_SIDE + STRIP_GAP), MARGIN + TITLE_SIZE + GUTTER
        shown = sheet.crop((left, top, left + PICTURE_SIDE, top + PICTURE_SIDE * 60 // 80))
        picture = Image.open(tmp_path / str(row["path"])).resize(shown.size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(shown), np.asarray(picture))


def test_the_same_weights_judge_the_codes_that_were_drawn(config: Config) -> None:
    completer, drawn = completer_of(config), []

    def fill(*given: object, **named: object) -> Tensor:
        drawn.append(completer.fill(*given, **named))  # type: ignore[arg-type]
        return drawn[-1]

    [request], seeds = read_requests(config), [3, 4, 5]
    _, losses = complete(request, replace(completer, fill=fill), seeds=seeds, config=config)
    assert config.checkpoint is not None
    assert config.text_tokenizer is not None
    assert config.image_tokenizer is not None
    coglm = CogLM.load(config.checkpoint, text_tokenizer=config.text_tokenizer, image_tokenizer=config.image_tokenizer)
    scores = score_pairs(CogLMCaptioner.of(coglm), ["a red dot"] * 3, drawn[0])
    assert losses == pytest.approx([score.cap_loss for score in scores])


def requests_in(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    Image.new("RGB", (30, 20), "blue").save(folder / "blue.png")
    (folder / "requests.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_requests_are_lines_of_a_file(config: Config, tmp_path: Path) -> None:
    folder = requests_in(
        tmp_path / "asked", "a red dot\tblue.png\t0\t0\t0.5\t0.5", "", "红色圆点\tblue.png\t0.9\t0.9\t1\t1"
    )
    _, rows = completed(replace(config, image=None, prompt="", requests=folder), tmp_path / "output")
    found = [(row["prompt"], row["top"]) for row in rows]
    assert found == [*[("a red dot", 0)] * 2, *[("红色圆点", 0.9)] * 2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a dot\tblue.png\t0\t0\t1", "line 1 has 5 columns; give caption, picture"),
        ("a dot\tblue.png\t0\t0\t1\tfar", "line 1: could not convert .* numbers from 0 to 1"),
        ("a dot\tblue.png\t0.5\t0\t0.5\t1", "give shares of the picture from 0 to 1"),
        ("a dot\tred.png\t0\t0\t1\t1", "line 1: .*red.png is no picture"),
        ("a dot\t../blue.png\t0\t0\t1\t1", "line 1: ../blue.png lies outside of"),
        (" \tblue.png\t0\t0\t1\t1", "line 1 has no caption"),
        ("", "requests.tsv has no lines"),
    ],
)
def test_a_request_that_cannot_be_read_is_named(config: Config, tmp_path: Path, line: str, said: str) -> None:
    folder = requests_in(tmp_path / "asked", line)
    with pytest.raises(ConfigError, match=said):
        completed(replace(config, image=None, prompt="", requests=folder), tmp_path / "output")


def test_what_is_missing_is_named(config: Config, tmp_path: Path) -> None:
    nothing = replace(config, image=None, prompt="")
    with pytest.raises(ConfigError, match="nothing to complete; give --image FILE"):
        completed(nothing, tmp_path / "output")
    with pytest.raises(ConfigError, match=r"no requests\.tsv in UTF-8"):
        completed(replace(nothing, requests=tmp_path), tmp_path / "output")
    with pytest.raises(ConfigError, match="image and prompt belong together"):
        replace(config, prompt=" ")
    with pytest.raises(ConfigError, match="both given"):
        replace(config, requests=tmp_path)
    with pytest.raises(ConfigError, match="candidates=0"):
        replace(config, candidates=0)
    with pytest.raises(ConfigError, match="run `make pretrain-coglm` first, or give --checkpoint"):
        resolve(replace(config, checkpoint=None), root=tmp_path)


def test_stages_made_last_are_taken_if_there_are_any(config: Config, tmp_path: Path) -> None:
    config = replace(config, hierarchical=HierarchicalSampling(by_clusters=False))
    assert resolve(config, root=tmp_path) == config
    with pytest.raises(ConfigError, match="run `make cluster-codes` first, or give --clusters"):
        resolve(replace(config, hierarchical=HierarchicalSampling()), root=tmp_path)
    newest = tmp_path / "finetune_direct_sr" / "abc"
    newest.mkdir(parents=True)
    (newest / "complete.json").write_text("{}")
    assert resolve(config, root=tmp_path).direct == newest
    assert resolve(config, root=tmp_path).iterative is None
    assert resolve(replace(config, magnifies=False), root=tmp_path).direct is None
    assert completer_of(config).magnifier is None
