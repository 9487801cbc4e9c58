"""Studies: what is shown of whom, that it is blind, and what is left out or refused."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.errors import ConfigError, ManifestError
from cogview.evaluation.human_votes import RIGHT
from cogview.records.pair import TextImagePair
from pipelines.judging.entrants import caption_key, read_entrant
from pipelines.judging.study import RECOVERED, Study, prepare, scrambled
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import make_pairs, png, write_pair_folder
from tests.pipelines.studies import (
    NUMBER,
    study_config,
    write_study,
    write_systems,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


def picture_of(study, group, model):
    return Image.open(io.BytesIO(study.picture(group, model)))


def test_a_group_has_everyones_picture_of_its_caption(study):
    assert study.models == ("ours", "named", "listed", RECOVERED)
    assert len(study.groups) == NUMBER
    for group in study.groups.values():
        assert set(group.pictures) == set(study.models)
        assert (
            picture_of(study, group, "ours").convert("RGB").getpixel((0, 0))[1] == 100
        )  # of the candidate ranked first
        assert picture_of(study, group, "listed").size == (60, 40)
        assert picture_of(study, group, RECOVERED).size == (32, 32)


def test_no_file_tells_whose_it_is(study):
    for group in study.groups.values():
        for record in group.pictures.values():
            name = Path(record["file"]).name
            assert name in {f"{place}.png" for place in range(4)}
            assert Image.open(study.folder / record["file"]).info == {}


def test_a_planted_group_has_one_whole_picture(study):
    assert len(study.planted) == 3
    for group in study.planted.values():
        assert sum(name == RIGHT for name in group.pictures) == 1
        assert len(group.pictures) == len(study.models)
        (own,) = [other for other in study.groups.values() if other.caption == group.caption]
        assert study.picture(group, RIGHT) == study.picture(own, RECOVERED)


def test_a_scrambled_picture_has_the_same_pixels_elsewhere():
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    mixed = scrambled(picture, rng=random.Random(0))
    assert sorted(np.asarray(mixed).ravel()) == sorted(np.asarray(picture).ravel())
    assert mixed.tobytes() != picture.tobytes()
    assert scrambled(picture.resize((5, 5)), rng=random.Random(0)).size == (64, 64)


def test_captions_meet_in_every_spelling():
    assert caption_key("A large_red circle, on blue!") == caption_key("a Large red  circle on blue")
    assert caption_key("白色背景，一个圆形") == caption_key("白色背景_一个圆形")
    assert caption_key("ＡＢＣ") == "abc"


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    systems = write_systems(tmp_path)
    broken = sorted(systems.named.glob("*.png"))[0]
    broken.write_bytes(b"<html>no")
    run = open_run(tmp_path / "study")
    prepare(study_config(systems), run)
    content = json.loads((run.output / "study.json").read_text())
    assert len(content["groups"]) == NUMBER - 1
    (left_out,) = content["left_out"]
    assert left_out["reason"] == "named: image_is_html"
    assert caption_key(left_out["caption"]) == caption_key(broken.stem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("ours", "ours", "listed")}, "every model needs a name of its own"),
        ({"names": ("ours", RECOVERED, "x")}, "every model needs a name of its own"),
        (
            {"names": ("ours",), "folders": (Path("a"),), "contents": ("a",), "image_tokenizer": None},
            "nothing to compare",
        ),
        ({"names": ("ours, too", "named", "listed")}, "'ours, too' names a metric as well"),
        ({"image_size": 30}, "image_size=30 is no multiple of 8"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, changes, message):
    systems = write_systems(tmp_path, number=2)
    with pytest.raises(ConfigError, match=message):
        prepare(study_config(systems, **changes), open_run(tmp_path / "study"))


def test_folders_without_pictures_or_captions_in_common_are_refused(tmp_path):
    systems = write_systems(tmp_path, number=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no picture"):
        read_entrant("them", tmp_path / "empty")
    with pytest.raises(ConfigError, match="is no folder"):
        read_entrant("them", tmp_path / "nothing")
    (tmp_path / "empty" / "samples.parquet").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a table of samples"):
        read_entrant("them", tmp_path / "empty")
    (tmp_path / "empty" / "samples.parquet").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "something_else.png")
    config = study_config(systems, names=("ours", "x"), folders=(systems.ours, tmp_path / "empty"), contents=("a", "b"))
    with pytest.raises(ConfigError, match=r"no caption has a picture of everyone .*x: something else"):
        prepare(config, open_run(tmp_path / "study"))


def test_without_a_known_truth_references_are_asked_for_and_used(tmp_path):
    systems = write_systems(tmp_path, number=3)
    names = {"names": ("named", "listed"), "folders": (systems.named, systems.listed), "contents": ("a", "b")}
    with pytest.raises(ConfigError, match="give --references FOLDER"):
        prepare(study_config(systems, **names), open_run(tmp_path / "without"))
    run = open_run(tmp_path / "with")
    prepare(study_config(systems, **names, references=systems.named, image_size=0), run)
    study = Study.open(run.output)
    assert study.models == ("named", "listed", RECOVERED)
    assert picture_of(study, next(iter(study.groups.values())), RECOVERED).size == (32, 32)


def test_references_may_be_the_tars_of_pairs(tmp_path):
    systems = write_systems(tmp_path, number=3)
    pairs = [
        TextImagePair(
            key=f"00000_{row:05d}",
            captions=("something else", caption),
            image_bytes=png("red" if row else "blue"),
            source="https://example.org/",
            extra={"sha256": "0" * 64, "width": 40, "height": 32},
        )
        for row, caption in enumerate(systems.captions[:2])
    ]
    tars = write_pair_folder(tmp_path / "pairs", [pairs])
    run = open_run(tmp_path / "study")
    prepare(study_config(systems, references=tars), run)
    study = Study.open(run.output)
    assert len(study.groups) == 3  # the third has no pair, but a scene
    other = write_pair_folder(tmp_path / "others", [make_pairs(2)])
    with pytest.raises(ConfigError, match="no pair in 1 tars has a caption"):
        prepare(study_config(systems, references=other), open_run(tmp_path / "none"))


def test_a_picture_that_has_changed_is_not_shown(tmp_path):
    study = write_study(tmp_path)
    group = study.groups["group-00000"]
    path = study.folder / group.pictures["ours"]["file"]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match="has changed"):
        study.picture(group, "ours")
    path.unlink()
    with pytest.raises(ManifestError, match="missing or cut"):
        Study.open(study.folder)
