"""A job runs once for each config and input content, and damage or a crash only costs what was lost."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError, ManifestError
from cogview.shards.manifest import ShardEntry, file_record, read_entry, write_entry, write_manifest
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import COMPLETE_NAME, MODEL_NAME, Finished, Job, JobRun, digest_input, run_job
from pipelines.runtime.locks import folder_lock, is_locked


@dataclass(frozen=True, kw_only=True)
class Config:
    """Counts the words of every text file, one shard for each."""

    texts: Path | None = input_field(default=None)
    min_length: int = 1
    workers: int = runtime_field(1)


def count_words(config: Config, run: JobRun) -> None:
    assert config.texts is not None
    entries = []
    for shard, path in enumerate(sorted(config.texts.glob("*.txt"))):
        entry = read_entry(run.output, shard)
        if entry is None:
            words = [word for word in path.read_text().split() if len(word) >= config.min_length]
            name = f"shard-{shard:05d}.json"
            (run.output / name).write_text(json.dumps(sorted(words)))
            files = {name: file_record(run.output / name)}
            entry = ShardEntry(shard=shard, rows_in=1, rows_out=1, files=files)
            write_entry(run.output, entry)
            run.say(f"counted {path.name}")
        entries.append(entry)
        run.progress(shard + 1, 2, path.name)
    run.scores["shards"] = len(entries)
    write_manifest(run.output, entries, extra={})


JOB = Job(name="count_words", version=1, products=("manifest.json",), main=count_words)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a red circle")
    (folder / "b.txt").write_text("two blue squares")
    return folder


def run(config: Config, root: Path, display: PlainDisplay) -> Finished:
    return run_job(JOB, config, root=root, display=display)


def counted(display: PlainDisplay) -> int:
    return display.stream.getvalue().count("counted")


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and modification time."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_a_rerun_is_a_no_op_that_changes_no_file(texts: Path, run_root: Path, quiet_display: PlainDisplay) -> None:
    first = run(Config(texts=texts), run_root, quiet_display)
    before = snapshot(run_root.parent)
    second = run(Config(texts=texts), run_root, quiet_display)
    assert not first.was_done
    assert second == replace(first, was_done=True)
    assert first.scores == {"shards": 2}
    assert counted(quiet_display) == 2
    assert snapshot(run_root.parent) == before


def test_a_changed_setting_makes_another_folder_and_going_back_costs_nothing(
    texts: Path, run_root: Path, quiet_display: PlainDisplay
) -> None:
    first = run(Config(texts=texts), run_root, quiet_display)
    other = run(Config(texts=texts, min_length=4), run_root, quiet_display)
    back = run(Config(texts=texts), run_root, quiet_display)
    assert other.output != first.output
    assert other.digest != first.digest
    assert (back.output, back.was_done) == (first.output, True)


def test_a_runtime_setting_and_another_spelling_of_the_path_change_nothing(
    texts: Path, run_root: Path, quiet_display: PlainDisplay
) -> None:
    first = run(Config(texts=texts), run_root, quiet_display)
    again = run(Config(texts=texts / ".." / "texts", workers=7), run_root, quiet_display)
    assert (again.output, again.was_done) == (first.output, True)


def test_changed_input_content_runs_again(texts: Path, run_root: Path, quiet_display: PlainDisplay) -> None:
    first = run(Config(texts=texts), run_root, quiet_display)
    (texts / "b.txt").write_text("three green stars")
    second = run(Config(texts=texts), run_root, quiet_display)
    assert not second.was_done
    assert second.output != first.output
    assert second.digest != first.digest


def test_a_new_version_of_the_job_runs_again(texts: Path, run_root: Path, quiet_display: PlainDisplay) -> None:
    first = run(Config(texts=texts), run_root, quiet_display)
    newer = run_job(replace(JOB, version=2), Config(texts=texts), root=run_root, display=quiet_display)
    assert newer.output != first.output
    assert newer.digest == first.digest  # the same bytes, so later jobs have nothing to do


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_shard_is_found_and_it_alone_is_made_again(
    texts: Path, run_root: Path, quiet_display: PlainDisplay, damage: object
) -> None:
    assert callable(damage)
    first = run(Config(texts=texts), run_root, quiet_display)
    damage(first.output / "shard-00001.json")
    again = run(Config(texts=texts), run_root, quiet_display)
    assert not again.was_done
    assert again.digest == first.digest
    assert counted(quiet_display) == 3
    assert run(Config(texts=texts), run_root, quiet_display).was_done


@pytest.mark.parametrize("name", ["manifest.json", COMPLETE_NAME])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_manifest_is_made_again_from_the_shards_that_are_there(
    texts: Path, run_root: Path, quiet_display: PlainDisplay, name: str, damage: object
) -> None:
    assert callable(damage)
    first = run(Config(texts=texts), run_root, quiet_display)
    damage(first.output / name)
    again = run(Config(texts=texts), run_root, quiet_display)
    assert not again.was_done
    assert again.digest == first.digest
    assert counted(quiet_display) == 2


def test_an_interrupted_job_goes_on_in_its_own_folder(texts: Path, run_root: Path, quiet_display: PlainDisplay) -> None:
    (texts / "b.txt").chmod(0o644)

    def stop_after_first(config: Config, run: JobRun) -> None:
        only_first = texts.parent / "first"
        only_first.mkdir()
        (only_first / "a.txt").write_text((texts / "a.txt").read_text())
        count_words(replace(config, texts=only_first), run)
        (run.output / "manifest.json").unlink()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(replace(JOB, main=stop_after_first), Config(texts=texts), root=run_root, display=quiet_display)
    done = run(Config(texts=texts), run_root, quiet_display)
    assert not done.was_done
    assert counted(quiet_display) == 2
    assert list((run_root / "count_words").iterdir()) == [done.output]


def test_an_output_that_was_altered_is_refused_as_an_input(
    texts: Path, run_root: Path, quiet_display: PlainDisplay
) -> None:
    first = run(Config(texts=texts), run_root, quiet_display)
    assert digest_input(first.output, field_name="pairs") == first.digest
    flip_a_bit(first.output / "shard-00000.json")
    with pytest.raises(
        ManifestError, match=r"pairs: .*shard-00000.json is missing or altered; run the job count_words"
    ):
        digest_input(first.output, field_name="pairs")


def test_inputs_that_are_not_there_or_empty_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"texts: .*nowhere does not exist"):
        digest_input(tmp_path / "nowhere", field_name="texts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"texts: .*empty is an empty folder"):
        digest_input(tmp_path / "empty", field_name="texts")


def test_a_job_that_forgets_a_product_is_called_defective(
    texts: Path, run_root: Path, quiet_display: PlainDisplay
) -> None:
    with pytest.raises(ManifestError, match=r"without writing \['words.txt'\]"):
        run_job(
            replace(JOB, products=("manifest.json", "words.txt")),
            Config(texts=texts),
            root=run_root,
            display=quiet_display,
        )


HOLDER = """
import sys, time
from pathlib import Path
from pipelines.runtime.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_held_by_another_process_is_refused_by_its_number_and_free_when_that_dies(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is being written by process {holder.pid}"), folder_lock(tmp_path):
        pass
    assert is_locked(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not is_locked(tmp_path)


def test_the_seconds_of_a_job_are_those_of_its_work(texts: Path, run_root: Path, quiet_display: PlainDisplay) -> None:
    def slow(config: Config, run: JobRun) -> None:
        time.sleep(0.3)
        count_words(config, run)

    done = run_job(replace(JOB, main=slow), Config(texts=texts), root=run_root, display=quiet_display)
    assert 0.3 <= done.seconds < 30


def test_a_model_is_known_by_the_name_that_its_room_gives_it() -> None:
    from cogview.models.published import WEIGHTS_NAME

    assert MODEL_NAME == WEIGHTS_NAME
