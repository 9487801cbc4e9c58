import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from cogview.errors import ConfigError, StorageError
from cogview.shards.manifest import ShardEntry
from pipelines.runtime.shard_jobs import ShardFailedError, ShardTask, close_folder, run_shards, shard_entry
from tests.pipelines.job_runs import open_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def work_that(fails: Callable[[], None], *, folder: Path, shard: int) -> Callable[[ShardTask], ShardEntry]:
    """Work that writes its shard, counts its attempts, and fails on one shard."""

    def work(task: ShardTask) -> ShardEntry:
        with open(folder / f"attempts-{task.shard}", "a") as file:
            file.write("x")
        if task.shard == shard:
            fails()
        name = f"{task.shard}.txt"
        (folder / name).write_text(task.inputs["word"])
        return shard_entry(folder, task, rows_in=3, rows_out=1, rejected={"bad": 2}, files=[name])

    return work


def plan(count: int, *, digest: str = "d") -> list[ShardTask]:
    return [ShardTask(shard=shard, input_digest=digest, inputs={"word": "w" * shard}) for shard in range(count)]


def attempts(folder: Path) -> list[int]:
    return [len(path.read_text()) for path in sorted(folder.glob("attempts-*"))]


def test_every_shard_is_made_once_and_not_again(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    work = work_that(lambda: None, folder=tmp_path, shard=-1)
    entries = run_shards(work, plan(5), folder=tmp_path, run=run)
    assert [entry.shard for entry in entries] == [0, 1, 2, 3, 4]
    assert run.notes[-1][:2] == (5, 5)
    assert run_shards(work, plan(5), folder=tmp_path, run=run) == entries
    assert attempts(tmp_path) == [1] * 5
    (tmp_path / "2.txt").write_text("cut")
    (tmp_path / "3.txt").unlink()
    assert run_shards(work, plan(5), folder=tmp_path, run=run) == entries
    assert attempts(tmp_path) == [1, 1, 2, 2, 1]
    run_shards(work, plan(5, digest="another input"), folder=tmp_path, run=run)
    assert attempts(tmp_path) == [2, 2, 3, 3, 2]


def test_our_errors_come_through_as_they_are_and_others_as_defects(tmp_path: Path) -> None:
    def full_disk() -> None:
        raise StorageError("the disk is full")

    def defect() -> None:
        raise KeyError("a defect")

    run = open_run(tmp_path)
    with pytest.raises(StorageError, match=r"^the disk is full$"):
        run_shards(work_that(full_disk, folder=tmp_path, shard=1), plan(3), folder=tmp_path, run=run)
    with pytest.raises(RayTaskError) as raised:
        run_shards(work_that(defect, folder=tmp_path, shard=1), plan(3), folder=tmp_path, run=run)
    assert "KeyError: 'a defect" in str(raised.value)  # Ray adds its own advice before the closing quote
    assert 'raise KeyError("a defect")' in str(raised.value)  # the worker's own line, for whoever mends it


@pytest.mark.parametrize("as_actors", [False, True])
def test_a_process_that_dies_is_tried_a_bounded_number_of_times(tmp_path: Path, as_actors: bool) -> None:
    run = open_run(tmp_path)
    deadly, sound = (work_that(fails, folder=tmp_path, shard=1) for fails in (lambda: os._exit(1), lambda: None))
    with pytest.raises(ShardFailedError, match="shard 1: its process died 3 times"):
        run_shards(deadly, plan(2), folder=tmp_path, run=run, as_actors=as_actors)
    assert attempts(tmp_path)[1] == 3
    assert list(tmp_path.rglob("*.attempts")) == []
    entries = run_shards(sound, plan(2), folder=tmp_path, run=run, as_actors=as_actors)
    assert len(entries) == 2
    assert attempts(tmp_path)[0] == 1


def test_a_closed_folder_shows_its_reasons(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    work = work_that(lambda: None, folder=tmp_path, shard=-1)
    close_folder(run, run_shards(work, plan(2), folder=tmp_path, run=run), extra={})
    assert run.scores == {"rows_in": 6, "rows_out": 2, "rejected": 4, "rejected_bad": 4}
    assert run.lines == ["2 of 6 pairs kept, 4 not", "          4  bad"]
    assert (tmp_path / "manifest.json").exists()


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    entry = ShardEntry(shard=0, rows_in=2, rows_out=0, rejected={"bad": 2})
    with pytest.raises(ConfigError, match=r"none of 2 candidates became a pair.*bad"):
        close_folder(open_run(tmp_path), [entry], extra={})


def test_rows_that_are_not_accounted_for_are_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="every row"):
        shard_entry(tmp_path, plan(1)[0], rows_in=3, rows_out=1, rejected={"bad": 1}, files=[])
