"""The benchmarks' own tools: a bar that is missed fails, detached processes are found, sockets are seen."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import Bar, Figures, UnmeasuredError, again, save_result, verify
from benchmarks.processes import ProcessWatch, fresh_environment
from benchmarks.rerun import HOOK, differences, snapshot
from benchmarks.road import chain_figures

FAST = Bar(figure="seconds", op="<", value=10)


@pytest.mark.parametrize(
    ("figures", "code"),
    [({"seconds": 9.5}, 0), ({"seconds": 10.0}, 1), ({"minutes": 1}, 1), ({"seconds": "none"}, 1)],
    ids=["met", "missed", "missing", "no number"],
)
def test_the_exit_code_and_the_last_line_say_whether_the_bars_are_met(
    capsys: pytest.CaptureFixture[str], figures: Figures, code: int
) -> None:
    assert verify("speed", lambda: figures, bars=(FAST,)) == code
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == {
        "name": "speed",
        "figures": dict(figures),
        "bars": [{"figure": "seconds", "op": "<", "value": 10}],
        "pass": code == 0,
    }


def test_what_could_not_be_measured_does_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> Figures:
        raise UnmeasuredError("the data are not here")

    assert verify("speed", measure, bars=()) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["pass"], result["error"]) == (False, "the data are not here")


def test_the_command_of_a_result_has_the_flags_that_it_was_measured_with() -> None:
    assert again("speed", ["--save"]) == "make verify NAME=speed"
    flags = "--root 'runs/my own'"
    assert again("speed", ["--root", "runs/my own", "--save"]) == f'make verify NAME=speed ARGS="{flags}"'


def test_a_saved_result_names_machine_versions_and_date(tmp_path: Path) -> None:
    result = {"name": "speed", "figures": {"seconds": 9.5}, "bars": [asdict(FAST)], "pass": True}
    save_result(result, folder=tmp_path)
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert saved["figures"] == {"seconds": 9.5}
    assert {"date", "machine", "commit"} <= saved.keys()
    assert saved["machine"]["packages"].keys() >= {"torch", "ray"}
    assert "| seconds | 9.5 | < 10 | met |" in (tmp_path / "speed.md").read_text()
    other = {
        "name": "size",
        "figures": {"bytes": 7},
        "bars": [{"figure": "bytes", "op": "<=", "value": 5}],
        "pass": False,
    }
    save_result(other, folder=tmp_path)
    index = (tmp_path / "README.md").read_text().splitlines()
    assert f"| [size](size.md) | {saved['date']} | 0 of 1 | bytes 7, not <= 5 |" in index
    assert f"| [speed](speed.md) | {saved['date']} | 1 of 1 |  |" in index


def test_a_detached_process_counts_until_it_ends(tmp_path: Path) -> None:
    """As Ray's daemons do: a grandchild in a session of its own, whose parent is gone."""
    ballast = "import time; block = b'x' * (64 * 2**20); time.sleep(60)"
    program = (
        "import subprocess, sys\n"
        "quiet = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {ballast!r}], start_new_session=True, **quiet)\n"
        "print(child.pid)\n"
    )
    with ProcessWatch(dict(os.environ), interval=0.05) as watch:
        started = subprocess.run(
            [sys.executable, "-c", program], env=watch.environment, capture_output=True, check=True
        )
        child = psutil.Process(int(started.stdout))
        deadline = time.monotonic() + 30
        while watch.peak_bytes < 64 * 2**20 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [process.pid for process in watch.wait_for_end(seconds=0)] == [child.pid]
        watch.end_all()
        assert watch.wait_for_end(seconds=10) == []
    assert 64 * 2**20 <= watch.peak_bytes < 512 * 2**20


def test_processes_of_others_are_not_counted() -> None:
    watch = ProcessWatch({})
    assert watch.running() == []


def test_a_fresh_environment_has_an_empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    environment = fresh_environment(tmp_path / "home")
    assert list(Path(environment["HOME"]).iterdir()) == []
    assert environment["PATH"] == os.environ["PATH"]
    assert "MLFLOW_TRACKING_URI" not in environment


def test_the_hook_sees_a_server_and_its_visitor(tmp_path: Path) -> None:
    log = tmp_path / "sockets.log"
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(log=str(log)))
    program = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()\n"
        "socket.socketpair()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["socket.bind", "socket.connect"]


def test_a_snapshot_tells_new_changed_touched_and_lost_files(tmp_path: Path) -> None:
    for name in ("same", "changed", "touched", "lost", "log.txt"):
        (tmp_path / name).write_text(name)
    before = snapshot(tmp_path)
    (tmp_path / "changed").write_text("other")
    os.utime(tmp_path / "touched", ns=(1, 1))
    (tmp_path / "lost").unlink()
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "new").write_text("new")
    (tmp_path / "log.txt").write_text("said more")
    assert differences(before, snapshot(tmp_path)) == ["changed", "lost", "stage/new", "touched"]


def test_the_road_s_figures_come_from_the_chain(tmp_path: Path) -> None:
    stages = [
        {"job": "pretrain", "seconds": 100.0, "scores": {"loss": 2.0}},
        {"job": "evaluate", "seconds": 9.0, "scores": {"attributes/mean": 0.93, "source": "reader"}},
    ]
    (tmp_path / "chain.json").write_text(json.dumps({"stages": stages}))
    assert chain_figures(tmp_path / "chain.json") == {
        "seconds/pretrain": 100.0,
        "seconds/evaluate": 9.0,
        "attributes/mean": 0.93,
    }
