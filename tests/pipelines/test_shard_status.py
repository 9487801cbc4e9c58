"""How far the ingestion is can be told from the disk alone: amid a run, after a kill, of a run that is done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cogview.shards.manifest import ENTRY_FOLDER, PLAN_NAME, ShardEntry, file_record, write_entry, write_plan
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry
from pipelines.runtime.shard_status import shard_lines, shard_progress
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import make_pairs, write_pair_folder

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pipelines.runtime.command_line import main
code = main({!r})
assert "ray" not in sys.modules
sys.exit(code)
"""


def made(folder: Path, shard: int) -> None:
    (folder / f"{shard}.txt").write_text("x")
    record = {f"{shard}.txt": file_record(folder / f"{shard}.txt")}
    write_entry(
        folder, ShardEntry(shard=shard, rows_in=10, rows_out=9, rejected={"bad": 1}, files=record, input_digest="d")
    )


def status(*words: str) -> subprocess.CompletedProcess[str]:
    """The command, which must not even import Ray."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(["status", *words])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_done_and_pending_shards_are_told_without_ray_and_without_a_chain(tmp_path: Path) -> None:
    folder = tmp_path / "scrape_pairs" / "abc"
    folder.mkdir(parents=True)
    write_plan(folder, dict.fromkeys(range(9), "d"), note="shards")
    for shard in (0, 1, 4):
        made(folder, shard)
    (folder / "1.txt").write_text("altered")
    (folder / ENTRY_FOLDER / ".shard-00002.attempts").write_text("run 1")
    answer = status(str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[1:] == [
        "shards:",
        "  scrape_pairs/abc  2 of 9 shards, 18 of 20 rows kept; pending: 1, 2, 3, 5, 6 and 2 more (1 begun)",
    ]
    plain = json.loads(status("--root", str(tmp_path), "--json").stdout)
    assert plain["shards"][0]["pending"] == [1, 2, 3, 5, 6, 7, 8]
    assert plain["shards"][0]["done"] == 2


def test_a_shard_of_other_input_is_pending(tmp_path: Path) -> None:
    folder = tmp_path / "filter_pairs" / "abc"
    folder.mkdir(parents=True)
    made(folder, 0)
    write_plan(folder, {0: "another"}, note="judged")
    assert [item.pending for item in shard_progress(tmp_path)] == [(0,)]


def test_runs_from_before_there_were_plans_are_read_by_their_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "import_pairs" / "abc"
    write_pair_folder(folder, [make_pairs(3), make_pairs(2, shard=1)])
    assert shard_progress(tmp_path) == []  # no entries beside the manifest: nothing was made by shard
    (folder / ENTRY_FOLDER).mkdir()
    assert shard_lines(shard_progress(tmp_path)) == [
        "  import_pairs/abc  0 of 2 shards, 0 of 0 rows kept; pending: 0, 1 (0 begun)"
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_finished_job_has_no_shard_pending(tmp_path: Path) -> None:
    output = tmp_path / "a_job" / "abc"
    run = open_run(output)

    def work(task: ShardTask) -> ShardEntry:
        (output / f"{task.shard}.txt").write_text("x")
        return shard_entry(output, task, rows_in=2, rows_out=2, rejected={}, files=[f"{task.shard}.txt"])

    tasks = [ShardTask(shard=shard, input_digest="d") for shard in range(3)]
    close_folder(run, run_shards(work, tasks, folder=output, run=run, note="made"), extra={})
    assert shard_lines(shard_progress(tmp_path)) == ["  a_job/abc  3 of 3 made, 6 of 6 rows kept"]
    written = (output / ENTRY_FOLDER / PLAN_NAME).stat().st_mtime_ns
    run_shards(work, tasks, folder=output, run=run, note="made")
    assert (output / ENTRY_FOLDER / PLAN_NAME).stat().st_mtime_ns == written
