"""`--plan` of the jobs that work shard by shard: what is done, what is left, and that nothing is begun."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cogview.errors import ConfigError
from cogview.filters.pairs import FilterRules
from pipelines import filter_pairs, import_pairs, scrape_pairs
from pipelines.runtime import command_line
from pipelines.runtime.jobs import plan_job, run_job
from pipelines.runtime.shard_plan import TRIED_ROWS, try_rows
from tests.pipelines.pair_folders import QuietDisplay, make_pairs, write_pair_folder

SMOKE = filter_pairs.PRESETS["smoke"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("pairs"), [make_pairs(5), make_pairs(3, shard=1)])


def test_a_plan_tells_shards_and_an_estimate_and_writes_nothing(pairs: Path, tmp_path: Path) -> None:
    lines = list(filter_pairs.plan(replace(SMOKE, pairs=pairs), root=tmp_path))
    assert lines[0] == "filter_pairs: 8 rows in 2 shards"
    assert lines[1].endswith("(not begun)")
    assert [line.split() for line in lines[2:5]] == [
        ["judged", "0", "done", "2", "pending"],
        ["compared", "0", "done", "1", "pending"],
        ["written", "0", "done", "2", "pending"],
    ]
    assert "of 8 tried here" in lines[5]
    assert lines[6].startswith("disk: about")
    assert list(tmp_path.iterdir()) == []


def test_rules_about_captions_are_steps_of_the_plan(pairs: Path, tmp_path: Path) -> None:
    config = replace(SMOKE, pairs=pairs, rules=FilterRules(min_side=32, max_caption_repeats=2))
    names = [line.split()[0] for line in filter_pairs.plan(config, root=tmp_path)]
    assert names[2:7] == ["judged", "counted", "settled", "compared", "written"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_plan_knows_what_is_done(pairs: Path, run_root: Path) -> None:
    config = replace(SMOKE, pairs=pairs, rules=FilterRules(min_side=32, min_contrast=0.0))
    run_job(filter_pairs.JOB, config, root=run_root, display=QuietDisplay())
    lines = list(filter_pairs.plan(config, root=run_root))
    assert lines[1].endswith("(done)")
    assert lines[2] == "nothing is left to do"
    output = plan_job(filter_pairs.JOB, config, root=run_root).output
    (output / "shard-00001.tar").unlink()
    (output / "complete.json").unlink()
    lines = list(filter_pairs.plan(config, root=run_root))
    assert lines[1].endswith("(begun)")
    assert lines[4].split() == ["written", "1", "done", "1", "pending"]
    assert "for 4 rows" in lines[5]


def test_pictures_of_a_folder_are_counted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(5):
        Image.effect_noise((40, 40), 90).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"noise number {number}")
    config = replace(import_pairs.PRESETS["smoke"], data=(str(data),), shard_size=2)
    lines = list(import_pairs.plan(config, root=tmp_path / "runs"))
    assert lines[0] == "import_pairs: 5 rows"
    assert lines[2] == "shards: 3 of 2 rows, not listed yet"
    assert "of 5 tried here" in "".join(lines)
    assert not (tmp_path / "runs").exists()


def test_real_tars_are_estimated_by_their_size(shared_data: Path, tmp_path: Path) -> None:
    config = replace(import_pairs.PRESETS["smoke"], data=(str(shared_data / "photos"),))
    lines = list(import_pairs.plan(config, root=tmp_path))
    assert lines[0].endswith(" rows in 3 shards")
    assert 800 < int(lines[0].split()[1].replace(",", "")) < 1300  # 1,011


def test_hosts_of_a_real_table_tell_how_long_politeness_takes(shared_data: Path, tmp_path: Path) -> None:
    table = str(shared_data / "url_lists" / "img2dataset_test_10000.parquet")
    lines = list(scrape_pairs.plan(replace(scrape_pairs.PAPER, table=(table,)), root=tmp_path))
    assert lines[0] == "scrape_pairs: 10,000 rows"
    assert lines[1] == "hosts: 4,474; cdn.shopify.com has 641 of the rows, which take 2:40 at 4 a second at least"


def test_a_trial_takes_a_few_rows_once() -> None:
    taken: list[int] = []

    def work(rows: object) -> None:
        taken.extend(rows)  # type: ignore[call-overload]

    trial = try_rows(range(1000), work, bytes_of=lambda row: 2)
    assert trial is not None
    assert (trial.rows, trial.bytes_out) == (TRIED_ROWS, 2 * TRIED_ROWS)
    assert taken == [0, *range(TRIED_ROWS)]  # the first one warms up
    assert try_rows([], work, bytes_of=lambda row: 2) is None


def test_the_command_prints_the_plan_and_refuses_what_it_has_no_use_for(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["filter_pairs", "smoke", "--plan", "--root", str(tmp_path), "--pairs", str(pairs)]
    assert command_line.main(command) == command_line.DONE
    assert "filter_pairs: 8 rows in 2 shards" in capsys.readouterr().out
    assert command_line.main([*command, "--gpu-memory", "3"]) == command_line.USER_ERROR
    assert "--gpu-memory: filter_pairs trains no model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--pairs"):
        list(filter_pairs.plan(SMOKE, root=tmp_path))
