"""The comparison of image tokenizers on a few small pictures: arms, curves, tables, nested runs, and going on."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.errors import ConfigError, DivergedError
from cogview.evaluation.tokenizer_arms import Arm, ArmTrace
from cogview.records.pair import TextImagePair
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.structural_similarity import ssim
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from cogview.training.loop import LoopConfig
from cogview.training.optimization import OptimizerConfig
from pipelines.compare_image_tokenizers import JOB, PRESETS, SMOKE, Config, draw_arms, draw_curves, score_held_out
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import Finished, run_job
from pipelines.runtime.journal import read_journal
from tests.pipelines.pair_folders import make_pairs, png, write_pair_folder

STEPS = 12
SMALL = replace(
    SMOKE,
    image_size=16,
    num_held_out=4,
    model=VQVAEConfig(widths=(4, 8), codebook=CodebookConfig(num_codes=8, code_dim=4, start_after=2)),
    loop=LoopConfig(num_steps=STEPS, global_batch_size=4, log_every=2, validate_every=4, checkpoint_every=4),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of noise, so that there is something to tell apart."""
    generator = np.random.default_rng(0)
    pairs = []
    for number, pair in enumerate(make_pairs(40)):
        assert isinstance(pair, TextImagePair)
        colour = "#{:02x}{:02x}{:02x}".format(*generator.integers(0, 256, 3))
        pairs.append(replace(pair, image_bytes=png(colour, size=(24 + number % 5, 32))))
    return write_pair_folder(tmp_path_factory.mktemp("pairs"), [pairs])


@pytest.fixture(scope="module")
def finished(pairs: Path, runs_folder: Path, ray_session: None) -> Finished:
    display = PlainDisplay([], stream=open("/dev/null", "w"))  # noqa: SIM115 (of this module)
    return run_job(JOB, replace(SMALL, pairs=pairs), root=runs_folder / "compare", display=display)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_four_rules_share_all_but_the_rule() -> None:
    arms = SMOKE.arms()
    assert [arm.name for arm in arms] == ["straight_through", "gumbel", "moving_average", "fixed"]
    books = [replace(arm.model.codebook, rule="fixed") for arm in arms]
    assert books == [books[0]] * 4
    assert [replace(arm.model, codebook=books[0]) for arm in arms] == [arms[3].model] * 4


def test_a_sweep_is_every_combination_and_names_say_what_varies() -> None:
    config = replace(SMALL, rules=("fixed", "gumbel"), num_codes=(8, 16), code_dims=(4,), width_factors=(1.0, 1.5))
    arms = {arm.name: arm.model for arm in config.arms()}
    assert list(arms)[:3] == ["fixed_codes-8_width-1", "fixed_codes-8_width-1.5", "fixed_codes-16_width-1"]
    assert len(arms) == 8
    last = arms["gumbel_codes-16_width-1.5"]
    assert (last.codebook.rule, last.codebook.num_codes, last.widths) == ("gumbel", 16, (6, 12))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rules": ("fixed", "fixed")}, "the arm fixed is asked for twice"),
        ({"num_codes": (1, 8)}, "num_codes=1"),
        ({"image_size": 18}, "stride, 4"),
        ({"image_size": 8}, "SSIM needs pictures of 11 pixels"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_impossible_comparisons_are_refused_before_anything_starts(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **change)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_compares_the_four_rules(preset: str) -> None:
    assert isinstance(PRESETS[preset], Config)
    assert len(PRESETS[preset].arms()) == 4


def test_held_out_scores_are_those_of_the_decoded_pictures() -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(SMALL.model)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    scores = score_held_out(tokenizer, pixels)
    images_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    codes = tokenizer.encode(images_BCHW)
    decoded_BCHW = tokenizer.decode(codes)
    std = torch.tensor(SMALL.model.pixel_std).view(1, 3, 1, 1)
    assert scores["ssim"] == pytest.approx(float(ssim(decoded_BCHW, images_BCHW).mean()), abs=1e-5)
    assert scores["l2"] == pytest.approx(float(((decoded_BCHW - images_BCHW) / std).square().mean()), rel=1e-5)
    assert scores["codes_used"] == len(codes.unique()) / 8
    assert 1 <= scores["perplexity"] <= len(codes.unique())


def test_the_final_l2_is_the_mean_of_the_last_tenth() -> None:
    training = tuple((step, 1.0 if step <= 90 else 0.1 * (step - 90)) for step in range(10, 101, 2))
    trace = ArmTrace(arm=SMALL.arms()[0], training=training, held_out=((100, 0.5),), steps_per_second=1.0)
    assert trace.final_l2 == pytest.approx((0.2 + 0.4 + 0.6 + 0.8 + 1.0) / 5)


def test_a_line_for_each_arm_and_other_styles_within_a_rule() -> None:
    points = ((5, 0.4), (10, 0.2))
    held_out_points = ((2, 0.9), (10, 0.2))  # at step 2 the codebook is still random
    arms = [Arm(name=name, model=SMALL.model) for name in ("first", "second")]
    traces = [ArmTrace(arm=arm, training=points, held_out=held_out_points, steps_per_second=1.0) for arm in arms]
    training, held_out = draw_curves(traces).axes
    assert [line.get_linestyle() for line in training.lines] == ["-", "--"]
    assert training.lines[0].get_xydata().tolist() == [[5, 0.4], [10, 0.2]]
    assert held_out.lines[1].get_xydata().tolist() == [[10, 0.2]]


def test_the_sheet_has_a_column_for_the_original_and_each_arm() -> None:
    pixels = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    one, two = ({name: ImageTokenizer(SMALL.model) for name in names} for names in ("a", "ab"))
    assert draw_arms(two, pixels).width - draw_arms(one, pixels).width == 2 * (112 + 4)


@pytest.mark.ray
def test_curves_tables_and_page_are_written(finished: Finished) -> None:
    names = [arm.name for arm in SMALL.arms()]
    curves = rows_of(finished.output / "curves.csv")
    assert {(row["arm"], row["pictures"]) for row in curves} == {
        (n, p) for n in names for p in ("training", "held_out")
    }
    steps = [int(row["step"]) for row in curves if (row["arm"], row["pictures"]) == ("gumbel", "training")]
    assert steps == list(range(2, STEPS + 1, 2))
    assert [int(row["step"]) for row in curves if row["pictures"] == "held_out"] == [4, 8, 12] * 4
    scores = rows_of(finished.output / "scores.csv")
    assert [row["arm"] for row in scores] == names
    assert all(float(row["psnr"]) == finished.scores[f"{row['arm']}/psnr"] for row in scores)
    learned = [float(row["l2"]) for row in scores if row["arm"] != "fixed"]
    assert finished.scores["l2_spread"] == pytest.approx(max(learned) / min(learned) - 1)
    assert min(Image.open(finished.output / "curves.png").size) > 300
    page = (finished.output / "report.html").read_text()
    assert "Image tokenizers compared" in page
    assert "straight through" in page
    assert not (finished.output / "pixels.npy").exists()


@pytest.mark.ray
def test_arms_start_alike_and_each_is_a_tokenizer_of_its_own(finished: Finished) -> None:
    first = {}
    for arm in SMALL.arms():
        tokenizer = load_image_tokenizer(finished.output / arm.name)
        assert isinstance(tokenizer, ImageTokenizer)
        assert tokenizer.config == arm.model
        lines = (finished.output / arm.name / "metrics.jsonl").read_text().splitlines()
        first[arm.name] = json.loads(lines[0])["l2"]  # of the steps before there are codes
    assert list(first.values()) == pytest.approx([first["fixed"]] * 4, rel=1e-3)


@pytest.mark.ray
def test_each_arm_is_a_run_below_the_jobs_run(finished: Finished) -> None:
    parent = (finished.output / "mlflow_run.txt").read_text().strip()
    for arm in SMALL.arms():
        records = read_journal(finished.output / arm.name / "tracking.jsonl")
        tags = {name: value for record in records if record["kind"] == "tags" for name, value in record["tags"].items()}
        assert tags["mlflow.parentRunId"] == parent
        metrics = {name for record in records if record["kind"] == "metrics" for name in record["metrics"]}
        assert {"l2", "validation_l2", "validation_ssim", "score/psnr"} <= metrics


@pytest.mark.ray
def test_an_interrupted_comparison_goes_on_from_the_checkpoints(
    finished: Finished, pairs: Path, runs_folder: Path, quiet_display: PlainDisplay
) -> None:
    before = (finished.output / "curves.csv").read_bytes()
    (finished.output / "complete.json").unlink()
    (finished.output / "gumbel" / "checkpoints" / "step_00000012").rename(runs_folder / "away")
    again = run_job(JOB, replace(SMALL, pairs=pairs), root=runs_folder / "compare", display=quiet_display)
    assert not again.was_done
    assert (again.output / "curves.csv").read_bytes() == before
    lines = (again.output / "fixed" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS // 2 + STEPS // 4


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_an_arm_that_diverges_ends_the_comparison_with_its_reason(
    pairs: Path, run_root: Path, quiet_display: PlainDisplay
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e30, clip_norm=0, warmup_share=0)
    hopeless = replace(SMALL, pairs=pairs, loop=replace(SMALL.loop, optimizer=optimizer, max_bad_steps=2))
    with pytest.raises(DivergedError, match="lower the learning rate"):
        run_job(JOB, hopeless, root=run_root, display=quiet_display)
