"""`doctor` tries what it tells of, on this machine."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime import command_line, doctor
from pipelines.runtime.doctor import examine


def test_everything_is_looked_at_and_nothing_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command_line.main(["doctor", "--root", str(tmp_path / "runs")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name, *_ in lines] == [
        *("python", "packages", "cpus", "memory", "shm", "files", "gpus", "compiler"),
        *("runs", "ray", "ports", "cluster", "mlflow"),
    ]
    verdicts = {name: verdict for verdict, name, *_ in lines}
    assert all(verdicts[name] == "ok" for name in ("packages", "ports", "cluster", "mlflow"))
    has_obstacle = "BAD" in verdicts.values()  # a container may well have too little shared memory
    assert code == (command_line.USER_ERROR if has_obstacle else command_line.DONE)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free}")
    command = ["doctor", "--root", str(tmp_path), "--data", str(tmp_path / "absent")]
    assert command_line.main(command) == command_line.USER_ERROR
    shown = capsys.readouterr()
    assert "BAD   cluster" in shown.out
    assert "no Ray answers there" in shown.out
    assert "note  mlflow" in shown.out
    assert "jobs go on and keep what it misses in a journal" in shown.out
    assert "BAD   data" in shown.out
    assert "of these stand in the way: " in shown.err
    assert "cluster, data; see what their lines advise" in shown.err


def test_too_little_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_MEMORY", 2**60)
    monkeypatch.setattr(doctor, "MIN_DISK", 2**60)
    found = {finding.name: finding for finding in examine(tmp_path, data=())}
    for name in ("memory", "runs", "ray"):
        assert found[name].verdict == "bad"
        assert found[name].remedy


def test_data_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    *_, data = examine(tmp_path, data=(str(tmp_path),))
    assert (data.verdict, data.found) == ("ok", f"{tmp_path}: 1 files, 0.00 GiB")


def test_few_open_files_are_an_obstacle(tmp_path: Path) -> None:
    code = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (512, 512)); from pipelines.runtime.doctor import *; "
    command = [sys.executable, "-c", f"{code}print(open_files().line)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "BAD   files      up to 512 open; raise it: ulimit -n 1024\n"
