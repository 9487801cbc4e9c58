"""The protocol of Table 1 with a small real model: what is drawn, what the numbers are of, and what is refused."""

import csv
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks.tiny_clip import write_clip
from cogview.errors import ConfigError
from cogview.evaluation.blur import pixels_of
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.clip_network import ClipScorer
from cogview.evaluation.feature_rows import FeatureRows
from cogview.evaluation.features import TokenizerExtractor
from cogview.evaluation.frechet import frechet_distance, moments_of
from cogview.evaluation.grids import from_pictures, to_pictures
from cogview.models.published import load_model, save_model
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.scenes.scene import corpus, draw_scene
from pipelines.machine_evaluation import JOB, PRESETS, Config, resolve
from pipelines.runtime.jobs import COMPLETE_NAME, run_job
from pipelines.tasks.caption_choice import choose_captions, read_captioned
from pipelines.tasks.evaluation_page import PAPER_ROWS
from pipelines.tasks.evaluation_scores import ScoreConfig
from pipelines.tasks.picture_measures import candidate_seed
from tests.pipelines.pair_folders import QuietDisplay, make_pairs, write_pair_folder
from tests.pipelines.trained_folders import GRID, LENGTH, write_trained_folders

SIDE = 8 * GRID
PICTURES, CAPTIONS, CANDIDATES = 30, 26, 3
DAMAGED = 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    trained = asdict(write_trained_folders(root))
    model, settings = load_model(trained["checkpoint"])
    save_model(model, root / "captioner", settings={**settings, "task": "captioning", "length": LENGTH})
    return {**{name: path for name, path in trained.items() if name != "tokens"}, "captioner": root / "captioner"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO's files as they are: a captions JSON, and a folder of pictures, wider than high; one of them is damaged."""
    root = tmp_path_factory.mktemp("coco")
    (root / "val").mkdir()
    document = {"images": [], "annotations": [], "licenses": [{"id": 4, "name": "CC", "url": "https://example.org"}]}
    for number, scene in enumerate(corpus(5, PICTURES)):
        name = f"COCO_val2014_{number:012d}.jpg"
        wide = Image.new("RGB", (SIDE + 20, SIDE), "white")
        wide.paste(draw_scene(scene.scene, image_size=SIDE), (10, 0))
        wide.save(root / "val" / name, quality=95)
        url = f"http://images.example.org/{name}"
        document["images"].append({"id": number, "file_name": name, "coco_url": url, "license": 4})
        for text in (f"{scene.english} ({number})", f"again {scene.english} ({number})"):
            document["annotations"].append({"image_id": number, "caption": text})
    (root / "captions_val2014.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def other_system(coco, tmp_path_factory):
    """Pictures of another system, which are the real ones cut, named as they are."""
    folder = tmp_path_factory.mktemp("images") / "other-gan"
    folder.mkdir()
    for path in sorted((coco / "val").iterdir()):
        Image.open(path).crop((10, 0, 10 + SIDE, SIDE)).save(folder / f"{path.stem}.png")
    return folder


@pytest.fixture(scope="module")
def config(folders, coco, other_system):
    return Config(
        **folders,
        reference=(str(coco / "captions_val2014.json"),),
        reference_pictures=coco / "val",
        images=(str(other_system),),
        num_captions=CAPTIONS,
        num_cap_loss=10,
        candidates=CANDIDATES,
        sampling=SamplingConfig(top_k=12),
        radii=(0, 2),
        image_size=SIDE,
        extractor="tokenizer",
        shard_size=10,
        batch_size=7,
        scores=ScoreConfig(distance_resamples=3, subsets=4, subset_size=12),
        threads=1,
        workers=1,
    )


@pytest.fixture(scope="module")
def evaluated(config, runs_folder):
    return run_job(JOB, config, root=runs_folder / "machine", display=QuietDisplay()).output


def read_scores(output):
    rows = json.loads((output / "scores.json").read_text())["scores"]
    return {(row["side"], row["score"]): row for row in rows}


def read_tables(output, side):
    tables = [pq.read_table(path).to_pylist() for path in sorted((output / side).glob("*/rows.parquet"))]
    return [row for table in tables for row in table]


def distance_name(config, radius):
    return f"FD[{TokenizerExtractor(config.image_tokenizer).facts.name}]-{radius}"


def test_every_side_has_its_scores_and_every_score_its_provenance(config, evaluated):
    scores = read_scores(evaluated)
    facts = TokenizerExtractor(config.image_tokenizer).facts
    for side in ("drawn", "recovered", "other-gan"):
        names = {name for owner, name in scores if owner == side}
        plain = {name.replace(f"[{facts.name}]", "") for name in names}
        assert plain == {"FD-0", "FD-2", "KD", "precision", "recall", "CapLoss"}
    row = scores["drawn", distance_name(config, 2)]
    assert (row["n"], row["n_reference"], row["blur_radius"], row["contrast"]) == (CAPTIONS, CAPTIONS, 2, 1.5)
    assert (row["extractor_sha256"], row["resize"]) == (facts.sha256, "none")
    assert (row["formats"], row["reference_formats"]) == (f"PNG {CAPTIONS}", f"JPEG {CAPTIONS}")
    assert row["prepared"] == f"centre square, Lanczos, {SIDE} px"
    assert row["low"] <= row["value"] <= row["high"]
    assert len(row["captions_digest"]) == 64
    assert scores["drawn", "CapLoss"]["n"] == 10
    assert scores["other-gan", "CapLoss"]["contrast"] == 1.0
    assert "IS" not in {name[:2] for _, name in scores}, "an extractor without classes has no Inception Score"
    assert not any(name.startswith("FID") for _, name in scores)


def test_a_distance_is_that_of_the_pictures_on_disk(config, evaluated, coco):
    """Computed anew from the PNGs of the drawn pictures and COCO's own files."""
    extractor = TokenizerExtractor(config.image_tokenizer)
    drawn = [Image.open(path) for path in sorted((evaluated / "drawn/pictures").glob("*.png"))]
    keys = [row["key"] for row in read_tables(evaluated, "reference")]
    real = [Image.open(coco / "val" / f"{key}.jpg").convert("RGB").crop((10, 0, 10 + SIDE, SIDE)) for key in keys]
    sets = [extractor(pixels_of(drawn, contrast=1.5, radius=2)), extractor(pixels_of(real, radius=2))]
    expected = frechet_distance(*(moments_of(FeatureRows([side.features_BD])) for side in sets))
    assert read_scores(evaluated)["drawn", distance_name(config, 2)]["value"] == pytest.approx(expected, rel=1e-4)


def test_the_candidate_with_the_lowest_cap_loss_is_taken(config, evaluated):
    names = {name: getattr(config, name) for name in ("text_tokenizer", "image_tokenizer")}
    painter = TextToImage.load(config.checkpoint, **names)
    captioner = Captioner.load(config.captioner, **names)
    row = read_tables(evaluated, "drawn")[12]
    chosen = pq.read_table(evaluated / "captions.parquet").to_pylist()[12]
    seeds = [candidate_seed(config.seed, 12, candidate) for candidate in range(CANDIDATES)]
    with torch.inference_mode():
        codes = painter.codes([chosen["prompt"]] * CANDIDATES, seeds=seeds, sampling=config.sampling)
        losses = [score.cap_loss for score in score_pairs(captioner, [chosen["prompt"]] * CANDIDATES, codes)]
        best = int(np.argmin(losses))
        picture = to_pictures(painter.decode(codes[best][None]))[0]
    assert row["seed"] == seeds[best]
    assert row["cap_loss_of_codes"] == pytest.approx(losses[best], abs=1e-4)
    kept = Image.open(evaluated / "drawn/pictures/000012.png")
    assert np.abs(np.asarray(kept).astype(int) - np.asarray(picture).astype(int)).max() <= 1
    assert len(set(losses)) > 1


def test_cap_loss_is_of_the_pictures_as_they_are(config, evaluated):
    names = {name: getattr(config, name) for name in ("text_tokenizer", "image_tokenizer")}
    captioner = Captioner.load(config.captioner, **names)
    rows = [row for row in read_tables(evaluated, "drawn") if row["cap_loss"] is not None]
    prompts = {row["index"]: row["prompt"] for row in pq.read_table(evaluated / "captions.parquet").to_pylist()}
    assert len(rows) == 10
    row = rows[3]
    picture = Image.open(evaluated / f"drawn/pictures/{row['index']:06d}.png")
    codes = captioner.image_tokenizer.encode(from_pictures([picture]))
    assert row["cap_loss"] == pytest.approx(
        score_pairs(captioner, [prompts[row["index"]]], codes)[0].cap_loss, abs=1e-4
    )


def test_the_real_pictures_themselves_are_at_no_distance(config, evaluated):
    scores = read_scores(evaluated)
    same, drawn = (scores[side, distance_name(config, 0)]["value"] for side in ("other-gan", "drawn"))
    assert same < 1e-6 < drawn
    facts = TokenizerExtractor(config.image_tokenizer).facts
    assert scores["other-gan", f"precision[{facts.name}]"]["value"] == 1


def test_too_few_pictures_for_a_covariance_are_warned_of(config, evaluated, run_root):
    assert read_scores(evaluated)["drawn", distance_name(config, 0)]["warnings"] == []
    few = replace(config, draws=False, recovered=False, captioner=None, num_captions=12, radii=(0,))
    output = run_job(
        JOB, replace(few, scores=ScoreConfig(subset_size=50)), root=run_root, display=QuietDisplay()
    ).output
    warnings = [text for row in read_scores(output).values() for text in row["warnings"]]
    assert any("12 pictures for 16 features" in text for text in warnings)
    assert "12 pictures for 16 features" in (output / "report.html").read_text()


def test_the_report_prints_the_paper_as_the_papers(evaluated):
    report = (evaluated / "report.html").read_text()
    for name in PAPER_ROWS:
        assert f"{name} (paper)" in report
    for expected in ("27.1", "2.43", "cannot be compared with ours", "other-gan", "not 30,000", "recovered"):
        assert expected in report
    assert "<script" not in report
    assert report.count('src="data:image/png;base64,') == 2
    with open(evaluated / "scores.csv") as file:
        assert {row["side"] for row in csv.DictReader(file)} == {"reference", "drawn", "recovered", "other-gan"}


def test_captions_are_written_for_other_systems(evaluated, coco):
    lines = [line.split("\t") for line in (evaluated / "captions.tsv").read_text().splitlines()]
    assert [int(number) for number, _, _ in lines] == list(range(CAPTIONS))
    assert len({key for _, key, _ in lines}) == CAPTIONS
    assert all((coco / "val" / f"{key}.jpg").is_file() for _, key, _ in lines)


def test_what_was_lost_is_made_again_and_the_rest_is_not(config, evaluated, run_root):
    """As after a kill: a shard, its entry, a score and the end are missing."""
    output = run_root / JOB.name / evaluated.name
    shutil.copytree(evaluated, output)
    before = read_scores(output)
    (output / "_manifest/shard-00001.json").unlink()
    shutil.rmtree(output / "reference/shard-00001.features")
    (output / "drawn/pictures/000003.png").write_bytes(b"cut")
    shutil.rmtree(output / "scores/drawn")
    (output / COMPLETE_NAME).unlink()
    kept = output / "reference/shard-00000.features/blur-0.npy"
    written = kept.stat().st_mtime_ns
    done = run_job(JOB, config, root=run_root, display=QuietDisplay())
    assert done.output == output
    assert read_scores(output) == before
    assert kept.stat().st_mtime_ns == written
    assert Image.open(output / "drawn/pictures/000003.png").size == (SIDE, SIDE)


@pytest.mark.ray
def test_ray_comes_to_the_same_numbers(config, evaluated, ray_session, run_root):
    output = run_job(JOB, replace(config, workers=2), root=run_root, display=QuietDisplay()).output
    before, after = read_scores(evaluated), read_scores(output)
    assert before.keys() == after.keys()
    for name, row in after.items():
        assert row["value"] == pytest.approx(before[name]["value"], rel=1e-5, abs=1e-9), name
        assert row["captions_digest"] == before[name]["captions_digest"]


def test_a_damaged_picture_costs_its_row_and_is_counted(config, coco, tmp_path, run_root):
    shutil.copytree(coco, tmp_path / "coco")
    for path in sorted((tmp_path / "coco/val").iterdir())[:4]:
        path.write_bytes(b"<html>")
    damaged = replace(
        config,
        reference=(str(tmp_path / "coco/captions_val2014.json"),),
        reference_pictures=tmp_path / "coco/val",
        images=(),
        recovered=False,
        num_captions=PICTURES,
        candidates=1,
        radii=(0,),
    )
    output = run_job(JOB, damaged, root=run_root, display=QuietDisplay()).output
    row = read_scores(output)["drawn", distance_name(config, 0)]
    assert (row["n"], row["n_reference"]) == (PICTURES - 4, PICTURES - 4)
    assert "image_is_html" in (output / "report.html").read_text()


def test_pictures_of_a_folder_may_be_named_by_number(config, evaluated, tmp_path, run_root):
    folder = tmp_path / "numbered"
    shutil.copytree(evaluated / "drawn/pictures", folder)
    clip = write_clip(tmp_path / "tiny-clip")
    alone = replace(config, draws=False, recovered=False, images=(str(folder),), radii=(0,), clip=clip)
    output = run_job(JOB, alone, root=run_root, display=QuietDisplay()).output
    scores, before = read_scores(output), read_scores(evaluated)
    row = scores["numbered", "CLIP[tiny-clip]"]
    captions = [line.split("\t")[2] for line in (output / "captions.tsv").read_text().splitlines()]
    own = ClipScorer(clip)([Image.open(path) for path in sorted(folder.iterdir())], captions)
    assert row["value"] == pytest.approx(np.mean(own), abs=1e-4)
    assert (row["n"], row["extractor"], len(row["extractor_sha256"])) == (CAPTIONS, "tiny-clip", 64)
    assert ("drawn", "CapLoss") not in scores
    assert scores["numbered", "CapLoss"]["value"] == pytest.approx(before["drawn", "CapLoss"]["value"], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_captions": 31}, "has 30 pictures"),
        ({"rule": "captions", "num_captions": 61}, "has 60 captions"),
        ({"captioner": None}, "finetune-captioning"),
        ({"checkpoint": None}, "--no-draws"),
        ({"extractor": "inception"}, "--inception FILE"),
        ({"reference_pictures": None}, "--reference-pictures"),
        ({"reference": ()}, "--reference"),
        ({"draws": False, "images": ()}, "nothing to score"),
        ({"language": "zh"}, "language 'zh'"),
        ({"image_size": 2 * SIDE}, f"--image-size {SIDE}"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(config, change, expected, runs_folder):
    with pytest.raises(ConfigError, match=expected):
        run_job(JOB, replace(config, **change), root=runs_folder / "machine", display=QuietDisplay())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"radii": (1, 2)}, "with 0 among them"),
        ({"radii": (0, 0)}, "different ones"),
        ({"contrast": 0.0}, "above 0"),
        ({"extractor": "vgg"}, "seeded"),
        ({"candidates": 0}, "1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, expected):
    with pytest.raises(ConfigError, match=expected):
        replace(PRESETS["smoke"], **change)


def test_a_folder_without_a_known_name_is_refused(config, tmp_path, run_root):
    Image.new("RGB", (8, 8)).save(tmp_path / "nobody.png")
    with pytest.raises(ConfigError, match=r"COCO_val2014_\d+\.png"):
        run_job(JOB, replace(config, images=(str(tmp_path),)), root=run_root, display=QuietDisplay())


def test_the_papers_settings_are_the_papers():
    paper = PRESETS["paper"]
    assert (paper.num_captions, paper.num_cap_loss, paper.candidates, paper.contrast) == (30_000, 5_000, 60, 1.5)
    assert (paper.radii, paper.image_size, paper.extractor) == ((0, 1, 2, 4, 8), 256, "inception")


def test_captions_are_drawn_by_the_seed_in_the_order_of_the_data(coco):
    captioned = read_captioned((str(coco / "captions_val2014.json"),), pictures=coco / "val")
    options = {"number": 12, "number_of_cap_losses": 5, "rule": "pictures"}
    rows = choose_captions(captioned, **options, seed=0)
    assert rows == choose_captions(captioned, **options, seed=0) != choose_captions(captioned, **options, seed=1)
    keys = [row.key for row in rows]
    assert keys == sorted(set(keys))
    assert {row.caption.startswith("again") for row in rows} == {True, False}
    assert sum(row.has_cap_loss for row in rows) == 5
    every = choose_captions(captioned, number=60, number_of_cap_losses=5, rule="captions", seed=0)
    assert len({row.caption for row in every}) == 60
    assert len({row.key for row in every}) == 30


def test_prompts_are_translations_where_they_are_given(coco):
    captioned = read_captioned((str(coco / "captions_val2014.json"),), pictures=coco / "val")
    words = {caption: f"译{caption}" for item in captioned for caption in item.captions}
    options = {"number": 3, "number_of_cap_losses": 3, "rule": "pictures", "seed": 0}
    assert all(row.prompt == f"译{row.caption}" for row in choose_captions(captioned, **options, translations=words))
    with pytest.raises(ConfigError, match="translate every line"):
        choose_captions(captioned, **options, translations={})


def test_pairs_in_tars_are_read_by_key_and_language(tmp_path):
    pairs = write_pair_folder(tmp_path / "pairs", [make_pairs(5), make_pairs(5, shard=1)])
    chinese = read_captioned((str(pairs),), language="zh", keys={"00000_00001", "00001_00004"})
    assert [item.key for item in chinese] == ["00000_00001", "00001_00004"]
    assert [len(item.captions) for item in chinese] == [1, 1]
    with pytest.raises(ConfigError, match="held out of training"):
        read_captioned((str(pairs),), keys={"other"})


def test_a_run_without_a_chain_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="make pretrain"):
        resolve(PRESETS["smoke"], root=tmp_path)
