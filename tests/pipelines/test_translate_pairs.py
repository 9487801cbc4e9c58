from dataclasses import replace
from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.filters.translation import TranslationSettings
from cogview.records.pair import TextImagePair
from cogview.records.tars import read_pairs
from cogview.shards.manifest import read_manifest
from pipelines.translate_pairs import PRESETS, main, plan
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import make_pairs, write_pair_folder

pytest.importorskip("ctranslate2")
from tests.filters.translation_model import write_translation_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

SMOKE = replace(PRESETS["smoke"], translation=TranslationSettings(beam_size=1, max_pieces=8))
CAPTIONS = [("a red dog", "black cat"), ("a dog", "一只狗"), ("a zebra",), ("кошка",), ("dog in 北京",)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_translation_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [[pair for pair in make_pairs(5, shard=shard) if isinstance(pair, TextImagePair)] for shard in (0, 1)]
    given = [[replace(pair, captions=own) for pair, own in zip(shard, CAPTIONS, strict=True)] for shard in shards]
    return write_pair_folder(tmp_path_factory.mktemp("pairs"), given)


def test_pairs_get_the_captions_that_they_lack(pairs: Path, model: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path)
    main(replace(SMOKE, pairs=pairs, model=model), run)
    found = list(read_pairs(tmp_path / "shard-00001.tar"))
    assert [pair.captions for pair in found] == [
        ("一只红色的狗", "黑色的猫", "a red dog", "black cat"),
        ("a dog", "一只狗"),
        ("a zebra",),
        ("кошка",),
        ("dog in 北京",),
    ]
    assert [pair.extra.get("machine_translated") for pair in found] == [2, None, None, None, None]
    manifest = read_manifest(tmp_path, deep=True)
    assert (manifest["rows_in"], manifest["rows_out"], manifest["rejected"]) == (10, 10, {})
    assert run.scores["translated"] == 2
    assert run.scores["untranslated"] == 4


def test_translations_alone_are_kept_if_asked(pairs: Path, model: Path, tmp_path: Path) -> None:
    main(replace(SMOKE, pairs=pairs, model=model, keep="translation"), open_run(tmp_path))
    found = list(read_pairs(tmp_path / "shard-00000.tar"))
    assert [pair.captions for pair in found] == [("一只红色的狗", "黑色的猫"), ("a dog", "一只狗"), ("dog in 北京",)]
    assert read_manifest(tmp_path)["rejected"] == {"caption_untranslated": 4}


def test_the_model_is_asked_for_and_planned_with(pairs: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model"):
        main(replace(SMOKE, pairs=pairs), open_run(tmp_path / "out"))
    lines = list(plan(replace(SMOKE, pairs=pairs, model=model), root=tmp_path / "runs"))
    assert lines[0] == "translate_pairs: 10 rows in 2 shards"
    assert "of 10 tried here" in lines[3]
