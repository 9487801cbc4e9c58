import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogview.errors import ConfigError
from cogview.records.tars import read_pairs
from cogview.shards.manifest import read_manifest
from pipelines.import_pairs import PRESETS, main
from tests.pipelines.job_runs import ShownRun, open_run
from tests.records.test_images import RED_TO_BLUE
from tests.records.test_tars import write_tar
from tests.records.web_site import encode

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SMOKE = PRESETS["smoke"]
PNG = encode(RED_TO_BLUE)


def sample(key: str, **fields: Any) -> list[tuple[str, bytes | str | dict[str, Any]]]:
    return [(f"{key}.png", PNG), (f"{key}.json", {"caption": f"picture {key}", **fields})]


def imported(data: Path, output: Path, **changes: Any) -> ShownRun:
    run = open_run(output)
    main(replace(SMOKE, data=data, **changes), run)
    return run


def pairs_of(run: ShownRun) -> list[Any]:
    return [pair for tar in sorted(run.output.glob("*.tar")) for pair in read_pairs(tar)]


def test_tars_keep_their_numbers_and_account_for_every_sample(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "000.tar", [*sample("a", license="MIT"), *sample("b"), ("c.png", b"<html>"), ("c.txt", "x")])
    write_tar(data / "003.tar", [*sample("a"), ("../../evil.png", PNG), ("../../evil.txt", "x"), *sample("z")])
    cut = write_tar(data / "007.tar", [*sample("a"), *sample("b")])
    cut.write_bytes(cut.read_bytes()[:2500])
    run = imported(data, tmp_path / "out")
    manifest = read_manifest(run.output, deep=True)
    assert [(entry["rows_in"], entry["rows_out"]) for entry in manifest["shards"]] == [(3, 2), (3, 2), (2, 1)]
    assert manifest["rejected"] == {"image_is_html": 1, "key_refused": 1, "tar_damaged": 1}
    pairs = pairs_of(run)
    assert [pair.key for pair in pairs] == ["00000_00000", "00000_00001", "00001_00000", "00001_00002", "00002_00000"]
    assert pairs[0].source == "000.tar/a"
    assert pairs[0].captions == ("picture a",)
    original = hashlib.sha256(PNG).hexdigest()
    assert {**pairs[0].extra, "sha256": ""} == {
        "license": "MIT",
        "original_key": "a",
        "width": 96,
        "height": 64,
        "sha256": "",
        "original_sha256": original,
    }


def test_a_folder_of_pictures_is_cut_into_shards(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(7):
        (data / f"{number}.png").write_bytes(PNG if number != 3 else PNG[:-60])
        (data / f"{number}.txt").write_text(f"picture {number}\n第{number}张\n")
    (data / "6.txt").unlink()
    run = imported(data, tmp_path / "out", shard_size=3)
    assert [entry["rows_in"] for entry in read_manifest(run.output)["shards"]] == [3, 3, 1]
    assert run.scores == {
        "rows_in": 7,
        "rows_out": 5,
        "rejected": 2,
        "rejected_caption_missing": 1,
        "rejected_image_truncated": 1,
    }
    assert pairs_of(run)[0].captions == ("picture 0", "第0张")


def test_a_table_of_files_is_read_beside_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    rows = [
        {"file": "images/a.png", "caption_zh": "红", "caption_en": "red"},
        {"file": str(tmp_path / "images" / "a.png"), "caption_en": "absolute"},
        {"file": "images/none.png", "caption_en": "x"},
        {"file": "/dev/zero", "caption_en": "x"},
        {"file": None, "caption_en": "x"},
        {"file": "images/a.png", "caption_en": " "},
    ]
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    run = imported(table, tmp_path / "out")
    assert [pair.captions for pair in pairs_of(run)] == [("red", "红"), ("absolute",)]
    assert read_manifest(run.output)["rejected"] == {"caption_missing": 1, "file_missing": 2, "image_missing": 1}


def test_pictures_are_scaled_down_at_import(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jpg").write_bytes(encode(RED_TO_BLUE.resize((960, 640)), "JPEG"))
    (data / "a.txt").write_text("x")
    (pair,) = pairs_of(imported(data, tmp_path / "out"))
    assert (pair.extra["width"], pair.extra["height"]) == (96, 64)


def test_an_interrupted_import_goes_on_where_it_stopped(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        write_tar(data / f"{number}.tar", sample(f"k{number}"))
    whole = imported(data, tmp_path / "whole")
    output = shutil.copytree(whole.output, tmp_path / "cut")
    (output / "manifest.json").unlink()
    (output / "shard-00002.tar").unlink()
    kept = (output / "shard-00000.tar").stat().st_mtime_ns
    run = imported(data, output)
    assert run.notes[0][:2] == (2, 3)
    assert (output / "shard-00000.tar").stat().st_mtime_ns == kept
    for path in whole.output.glob("shard*"):
        assert path.read_bytes() == (output / path.name).read_bytes()
    assert (output / "manifest.json").read_bytes() == (whole.output / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "changes", "words"),
    [
        ("t.csv", "url,width\nhttp://a.org/x.png,3\n", {}, "no caption column; its columns are url, width"),
        ("t.csv", "url,caption\nhttp://a.org/x.png,x\n", {}, "scrape_pairs --table"),
        ("t.csv", "path,caption\nx.png,x\n", {}, "none of 1 candidates became a pair.*file_missing"),
        ("t.doc", "words", {}, "neither a .tar nor a table"),
        ("t.tar", "", {}, "none of 1 candidates became a pair.*tar_damaged"),
        ("t.csv", "path,caption\nx.png,x\n", {"caption_fields": ("title",)}, "no column title"),
    ],
)
def test_data_that_cannot_work_says_why(
    tmp_path: Path, name: str, content: str, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        imported(tmp_path / name, tmp_path / "out", **changes)


def test_tars_without_captions_list_their_fields(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", [("a.png", PNG), ("a.json", {"titel": "x"})])
    with pytest.raises(ConfigError, match="its JSON has titel"):
        imported(tar, tmp_path / "out")
    run = imported(tar, tmp_path / "out2", caption_fields=("titel",))
    assert pairs_of(run)[0].captions == ("x",)


def test_no_data_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        main(SMOKE, open_run(tmp_path))


def test_real_emoji_are_imported_with_both_languages(shared_data: Path, tmp_path: Path) -> None:
    run = imported(shared_data / "emoji" / "000017.tar", tmp_path / "out")
    pairs = pairs_of(run)
    assert run.scores["rows_in"] == len(pairs) == 159
    assert all(len(pair.captions) == 2 for pair in pairs)
    assert all(pair.extra["license"] and min(pair.extra["width"], pair.extra["height"]) == 64 for pair in pairs)


def test_real_photos_have_all_their_captions_and_no_remarks(shared_data: Path, tmp_path: Path) -> None:
    run = imported(shared_data / "photos" / "000002.tar", tmp_path / "out")
    captions = {caption for pair in pairs_of(run) for caption in pair.captions}
    assert run.scores["rejected"] == 0
    assert not captions & {"class_label", "translated by corpus helper", "human"}
