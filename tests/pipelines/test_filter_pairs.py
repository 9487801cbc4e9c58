import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogview.errors import ConfigError, ManifestError
from cogview.filters import corpus
from cogview.filters.pairs import FilterRules
from cogview.records.images import ImageSettings
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import pair_key, store_pair
from cogview.records.tars import read_foreign_tar, read_pairs
from cogview.shards.manifest import read_manifest
from pipelines.filter_pairs import PRESETS, main
from tests.pipelines.job_runs import ShownRun, open_run
from tests.pipelines.pair_folders import write_pair_folder
from tests.records.web_site import encode

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SMOKE = PRESETS["smoke"]


def noise(seed: int, *, size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels))


def stored(shard: int, row: int, image: bytes, captions: Sequence[str]) -> TextImagePair | Failure:
    pair = TextImagePair(
        key=pair_key(shard, row), captions=tuple(captions), image_bytes=image, source=f"s{shard}/{row}"
    )
    return store_pair(pair, ImageSettings())


SHARDS: list[list[tuple[bytes, Sequence[str]]]] = [
    [
        (noise(0), ["IMG_1234.jpg"]),  # rejected, so the same image in the next shard is no repetition
        (noise(1), ["a dog", "IMG_0001.jpg", "一只狗"]),
        (noise(2), ["often"]),
        (noise(3, size=(20, 64)), ["thin"]),
    ],
    [
        (noise(0), ["a cat"]),
        (noise(1), ["the dog again"]),
        (noise(4), ["often"]),
        (encode(Image.new("RGB", (64, 64))), ["blank"]),
    ],
    [(noise(1), ["and again"]), (noise(5), ["often", "rare"]), (b"<html>", ["failed before"])],
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        [stored(shard, row, *pair) for row, pair in enumerate(shard_rows)] for shard, shard_rows in enumerate(SHARDS)
    ]
    return write_pair_folder(tmp_path_factory.mktemp("pairs"), rows)


def filtered(pairs: Path, output: Path, **changes: Any) -> ShownRun:
    run = open_run(output)
    main(replace(SMOKE, pairs=pairs, **changes), run)
    return run


def captions_by_key(folder: Path) -> dict[str, tuple[str, ...]]:
    return {pair.key: pair.captions for tar in sorted(folder.glob("*.tar")) for pair in read_pairs(tar)}


def rejects(folder: Path) -> set[tuple[str, str, str, str]]:
    rows = [row for path in sorted((folder / "rejected").iterdir()) for row in pq.read_table(path).to_pylist()]
    return {(row["key"], row["rule"], row["reason"], row["detail"]) for row in rows}


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.suffix in (".tar", ".parquet", ".json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def test_pairs_are_kept_or_rejected_with_a_reason(pairs: Path, tmp_path: Path) -> None:
    run = filtered(pairs, tmp_path)
    assert captions_by_key(tmp_path) == {
        "00000_00001": ("a dog", "一只狗"),
        "00000_00002": ("often",),
        "00001_00000": ("a cat",),
        "00001_00002": ("often",),
        "00002_00001": ("often", "rare"),
    }
    manifest = read_manifest(tmp_path, deep=True)
    assert (manifest["rows_in"], manifest["rows_out"]) == (10, 5)
    assert manifest["rejected"] == {
        "caption_is_file_name": 1,
        "image_too_small": 1,
        "image_duplicate": 2,
        "image_blank": 1,
    }
    assert manifest["extra"]["captions_dropped"] == {"caption_is_file_name": 2}
    assert run.scores["rows_out"] == 5
    assert not (tmp_path / "_work").exists()


def test_rejected_pairs_are_written_with_rule_and_reason(pairs: Path, tmp_path: Path) -> None:
    filtered(pairs, tmp_path)
    assert {row[:3] for row in rejects(tmp_path)} == {
        ("00000_00000", "is_no_file_name", "caption_is_file_name"),
        ("00000_00003", "min_side", "image_too_small"),
        ("00001_00001", "same_images", "image_duplicate"),
        ("00001_00003", "min_contrast", "image_blank"),
        ("00002_00000", "same_images", "image_duplicate"),
    }


def test_workers_and_order_change_nothing(pairs: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        filtered(pairs, tmp_path / str(workers), workers=workers)
    one, two = (bytes_of(tmp_path / str(workers)) for workers in (1, 2))
    one.pop("tracking/reasons.json", None)
    two.pop("tracking/reasons.json", None)
    assert one == two


def test_frequent_captions_are_dropped_everywhere(pairs: Path, tmp_path: Path) -> None:
    run = filtered(pairs, tmp_path, rules=FilterRules(min_side=32, max_caption_repeats=2))
    assert captions_by_key(tmp_path) == {
        "00000_00001": ("a dog", "一只狗"),
        "00001_00000": ("a cat",),
        "00002_00001": ("rare",),
    }
    assert run.scores["rejected_caption_too_frequent"] == 2


def textured(seed: int, *, size: tuple[int, int] = (96, 96), quality: int = 0) -> bytes:
    """Soft blots, as in a photo; with a quality as JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return encode(image, "JPEG", quality=quality) if quality else encode(image)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that look the same in other shards: another quality, another size; and a placeholder."""
    shop = "Free shipping: leather phone case for the model number {} with card holder, stand and magnetic closure"
    shards = [
        [(textured(0), ["the first"]), (textured(1, size=(144, 144)), ["a large one"]), (textured(9), ["gone (1)"])],
        [(textured(0, quality=80), ["the first again"]), (textured(9), ["gone (2)"]), (textured(2), [shop.format(1)])],
        [(textured(9), ["gone (3)"]), (textured(1), ["a small one"]), (textured(3), [shop.format(2), "a phone"])],
        [(textured(4), [shop.format(3)]), (textured(5), [shop.format(4)]), (textured(6), ["a case"])],
    ]
    rows = [[stored(shard, row, *pair) for row, pair in enumerate(own)] for shard, own in enumerate(shards)]
    return write_pair_folder(tmp_path_factory.mktemp("copies"), rows)


def test_pictures_that_look_the_same_are_found_across_shards(copies: Path, tmp_path: Path) -> None:
    filtered(copies, tmp_path)
    assert rejects(tmp_path) == {
        ("00001_00000", "near_images", "image_near_duplicate", "as 00000_00000"),
        ("00001_00001", "same_images", "image_duplicate", "as 00000_00002"),
        ("00002_00000", "same_images", "image_duplicate", "as 00000_00002"),
        ("00002_00001", "near_images", "image_near_duplicate", "as 00000_00001"),
    }
    filtered(copies, tmp_path / "off", rules=FilterRules(min_side=32, near_levels=-1))
    assert {row[2] for row in rejects(tmp_path / "off")} == {"image_duplicate"}


def test_placeholders_and_templates_go_everywhere(copies: Path, tmp_path: Path) -> None:
    rules = FilterRules(min_side=32, max_image_copies=2, max_near_caption_repeats=2)
    run = filtered(copies, tmp_path, rules=rules)
    reasons = read_manifest(tmp_path, deep=True)["rejected"]
    assert reasons == {"image_placeholder": 3, "image_near_duplicate": 2, "caption_template": 3}
    assert captions_by_key(tmp_path)["00002_00002"] == ("a phone",)
    assert run.scores["captions_dropped"] == 4


def test_the_number_of_buckets_changes_nothing(copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = FilterRules(min_side=32, max_caption_repeats=2, max_near_caption_repeats=2)
    assert (0, 1, "compared") in filtered(copies, tmp_path / "one", rules=rules).notes
    monkeypatch.setattr(corpus, "BUCKET_ROWS", 3)
    assert (0, 4, "compared") in filtered(copies, tmp_path / "four", rules=rules).notes
    one, four = (bytes_of(tmp_path / name) for name in ("one", "four"))
    assert {name for name in one if one[name] != four[name]} <= {"tracking/reasons.json"}


def test_the_report_shows_what_was_rejected_and_escapes_captions(tmp_path: Path) -> None:
    caption = "a dog</figcaption><script>alert(1)</script> & 一只狗"
    shards = [[stored(0, 0, noise(1), [caption]), stored(0, 1, noise(2, size=(20, 64)), ["<b onclick=x>thin"])]]
    run = filtered(write_pair_folder(tmp_path / "in", shards), tmp_path / "out")
    page = (run.output / "report.html").read_text()
    assert page.count("data:image/") == 2
    assert "image_too_small" in page
    assert "<script" not in page
    assert "onclick=x>thin" not in page
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    table = json.loads((run.output / "tracking" / "funnel.json").read_text())
    assert table["data"][0][:3] == ["min_side", "image_too_small", 1]


def test_real_photos_and_emoji_stay(shared_data: Path, tmp_path: Path) -> None:
    """A shard of each: nothing goes but pictures that are there twice."""
    tars = [shared_data / "photos" / "000001.tar", shared_data / "emoji" / "000000.tar"]
    shards = [
        [
            store_pair(replace(pair, key=pair_key(shard, row)), ImageSettings(image_size=64))
            for row, pair in enumerate(pairs)
        ]
        for shard, pairs in enumerate(islice(read_foreign_tar(tar), 150) for tar in tars)
    ]
    filtered(write_pair_folder(tmp_path / "in", shards), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", deep=True)
    assert manifest["rows_in"] == 300
    assert set(manifest["rejected"]) <= {"image_duplicate", "image_near_duplicate"}
    assert manifest["rows_out"] >= 295
    assert manifest["extra"]["captions_dropped"] == {}


def test_an_interrupted_filter_goes_on_where_it_stopped(pairs: Path, tmp_path: Path) -> None:
    whole = filtered(pairs, tmp_path / "whole")
    output = shutil.copytree(whole.output, tmp_path / "cut")
    (output / "manifest.json").unlink()
    (output / "shard-00001.tar").write_bytes(b"")
    filtered(pairs, output)
    assert bytes_of(output) == bytes_of(whole.output)


def test_a_damaged_input_stops_the_run(pairs: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(pairs, tmp_path / "damaged")
    tar = damaged / "shard-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    with pytest.raises(ManifestError, match=r"shard-00001\.tar does not match"):
        filtered(damaged, tmp_path / "out")


def test_rules_that_keep_nothing_say_so(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of 10 candidates became a pair.*image_too_small"):
        filtered(pairs, tmp_path, rules=FilterRules(min_side=1000))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"min_caption": 0}, "min_caption=0"),
        ({"min_caption": 9, "max_caption": 3}, "min_caption=9"),
        ({"max_aspect": 0.5}, "max_aspect=0.5"),
        ({"max_caption_repeats": -1}, "max_caption_repeats=-1"),
        ({"max_image_copies": -1}, "max_image_copies=-1"),
        ({"scripts": ("latin", "elvish")}, "elvish is no script"),
        ({"min_script_share": 1.5}, "min_script_share=1.5"),
        ({"near_levels": 300}, "near_levels=300"),
        ({"limits": ("punsafe is low",)}, "punsafe is low"),
    ],
)
def test_thresholds_that_cannot_work_are_refused(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FilterRules(**rules)


def test_no_pairs_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--pairs"):
        main(SMOKE, open_run(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="manifest"):
        main(replace(SMOKE, pairs=tmp_path / "empty"), open_run(tmp_path))
