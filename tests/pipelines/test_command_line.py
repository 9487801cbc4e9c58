"""The command line in real processes: exit codes, suggestions, and plain words instead of tracebacks."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from PIL import Image

from cogview.config import input_field
from cogview.errors import ConfigError, StorageError
from pipelines.runtime.command_line import DEFECT, INTERRUPTED, USER_ERROR, Outcome, resume_command
from pipelines.runtime.failures import find_cause
from pipelines.runtime.flags import check_flags, read_order
from pipelines.runtime.menu import menu
from pipelines.runtime.status import START_PAGE

SECONDS = 300


def pipelines(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "pipelines", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS, cwd=cwd, env=environment
    )


def test_the_menu_names_every_job_with_its_first_line_and_presets_without_heavy_imports(tmp_path: Path) -> None:
    code = (
        "import sys; from pipelines.runtime.command_line import main; code = main([]);"
        "heavy = {'torch', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules); sys.exit(9 if heavy else code)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    for item in menu():
        assert item.title
        assert f"  {item.name}" in answer.stdout
        assert item.title in answer.stdout
        assert "smoke" in item.presets
    assert "status" in answer.stdout
    assert pipelines(cwd=tmp_path).stdout == answer.stdout


def test_the_menu_follows_the_road() -> None:
    names = [item.name for item in menu()]
    assert names.index("scrape_pairs") < names.index("filter_pairs") < names.index("generate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["filter-pair", "smoke"], "unknown job 'filter_pair': did you mean 'filter_pairs'?"),
        (["filter_pairs", "smok"], "unknown preset 'smok': did you mean 'smoke'? filter_pairs has paper, smoke."),
        (["filter_pairs", "smoke", "--worker", "3"], "unknown flag --worker: did you mean --workers?"),
        (["filter_pairs", "smoke", "--min-side", "3"], "unknown flag --min-side: did you mean --rules.min-side?"),
        (["import_pairs", "smoke", "--data", "/nowhere"], "data: /nowhere does not exist; give an existing file"),
        (["import_pairs", "smoke", "--root"], "--root: give a folder"),
        (["status"], "runs has no run yet; run `make pretrain`, or give --root"),
        (["status", "--root", "elsewhere"], "has no chain.json: no chain has run there"),
        (["dashboard", "--root", "runs/mine"], "mlflow.db does not exist: nothing was tracked there yet"),
    ],
)
def test_what_the_user_can_mend_is_said_in_words_and_ends_with_2(
    words: list[str], message: str, tmp_path: Path
) -> None:
    answer = pipelines(*words, cwd=tmp_path)
    assert answer.returncode == USER_ERROR
    assert message in answer.stderr
    assert answer.stderr.startswith("error: ")
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.glob("runs/*/*/*"))


def test_a_value_of_the_wrong_type_ends_with_2_and_names_the_flag(tmp_path: Path) -> None:
    answer = pipelines("filter_pairs", "smoke", "--workers", "many", cwd=tmp_path)
    assert answer.returncode == USER_ERROR
    assert "--workers" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_help_of_a_job_shows_its_docstring_its_flags_and_their_defaults(tmp_path: Path) -> None:
    answer = pipelines("filter_pairs", "smoke", "--help", cwd=tmp_path)
    assert answer.returncode == 0
    for words in ("Keep the pairs", "--pairs", "--rules.min-side", "default: 32", "--root FOLDER", "runs/smoke"):
        assert words in answer.stdout


@dataclass(frozen=True, kw_only=True)
class Inner:
    num_steps: int = 10
    shuffle: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    pairs: Path | None = input_field(default=None)
    columns: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--captions",))] = ()
    pretrain: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "flags",
    [
        ["--pairs", "x"],
        ["--pretrain.num_steps=3"],
        ["--pretrain.no-shuffle"],
        ["--captions", "zh", "en"],
        ["--pairs", "--", "-3"],
    ],
)
def test_flags_that_exist_pass(flags: list[str]) -> None:
    check_flags(flags, Config())


def test_a_flag_without_its_room_suggests_the_whole_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown flag --num-steps: did you mean --pretrain.num-steps\?"):
        check_flags(["--num-steps", "3"], Config())
    with pytest.raises(ConfigError, match=r"unknown flag --zzz\. --help lists"):
        check_flags(["--zzz"], Config())


def test_the_root_is_the_preset_unless_given() -> None:
    assert read_order(["filter_pairs"]).root == Path.cwd() / "runs" / "smoke"
    assert read_order(["filter_pairs", "paper", "--workers", "2"]).root == Path.cwd() / "runs" / "paper"
    order = read_order(["filter_pairs", "smoke", "--root=runs/x/../mine", "--verbose", "--workers", "2"])
    assert order.root == Path.cwd() / "runs" / "mine"
    assert (order.flags, order.is_verbose) == (("--workers", "2"), True)


def ended(error: BaseException) -> tuple[int, str]:
    err = io.StringIO()
    outcome = Outcome(["pretrain", "smoke", "--prompt", "a b"], err=err)
    with outcome:
        raise error
    return outcome.code, err.getvalue()


def test_a_defect_ends_with_1_and_its_traceback() -> None:
    code, words = ended(ZeroDivisionError("division by zero"))
    assert code == DEFECT
    assert "Traceback" in words
    assert "internal error: ZeroDivisionError: division by zero" in words


def test_an_interrupt_ends_with_130_and_the_command_that_goes_on() -> None:
    code, words = ended(KeyboardInterrupt())
    assert code == INTERRUPTED
    assert "-m pipelines pretrain smoke --prompt 'a b'" in words
    assert "python" in resume_command([])


def test_a_full_disk_is_told_apart_from_a_defect() -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        Path("/dev/full").write_text("shard")
    assert raised.value.errno == errno.ENOSPC
    assert isinstance(find_cause(raised.value), StorageError)
    code, words = ended(raised.value)
    assert code == USER_ERROR
    assert "No space left on device; free space" in words


def test_status_reads_the_disk_alone(tmp_path: Path) -> None:
    stage = {"job": "pretrain", "state": "done", "output": "pretrain/abc", "seconds": 61.0, "scores": {"loss": 2.5}}
    chain = {"state": "done", "started": "2026-01-01T00:00:00+00:00", "seconds": 70.0, "stages": [stage]}
    root = tmp_path / "runs" / "smoke"
    root.mkdir(parents=True)
    (root / "chain.json").write_text(json.dumps(chain))
    answer = pipelines("status", cwd=tmp_path)
    assert answer.returncode == 0
    assert answer.stdout.splitlines()[:2] == [
        "runs/smoke: done, started 2026-01-01T00:00:00+00:00, 1:10",
        "  pretrain  done             1:01  loss 2.5",
    ]
    plain = json.loads(pipelines("status", "--json", cwd=tmp_path).stdout)
    assert plain["stages"][0]["output"] == str(root / "pretrain" / "abc")
    assert plain["scores"] == {"loss": 2.5}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen captioned pictures of the user's own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(16):
        Image.new("RGB", (64, 64), (number * 16, 255 - number * 16, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"colour number {number}")
    return folder


@pytest.mark.ray
def test_ctrl_c_ends_with_130_and_the_command_that_it_prints_goes_on_and_ends_well(
    pictures: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "pipelines", "import_pairs", "smoke", "--data", str(pictures)]
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + SECONDS
    while not list(tmp_path.glob("runs/smoke/import_pairs/*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, words = child.communicate(timeout=SECONDS)
    assert child.returncode == INTERRUPTED
    shown = words.strip().splitlines()[-1]
    assert shown.endswith(f"-m pipelines import_pairs smoke --data {pictures}")
    again = pipelines(*shown.split()[3:], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "import_pairs: done in" in again.stdout
    once_more = pipelines(*shown.split()[3:], cwd=tmp_path)
    assert "import_pairs: already done" in once_more.stdout


def test_the_dashboard_serves_the_runs_on_loopback_and_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    (tmp_path / "runs" / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = pipelines("dashboard", "--root", "runs/smoke", "--port", port, cwd=tmp_path)
    assert refused.returncode == USER_ERROR
    assert f"port={port}" in refused.stderr
    command = [sys.executable, "-m", "pipelines", "dashboard", "--root", "runs/smoke", "--port", port]
    server = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == f"MLflow: http://127.0.0.1:{port}{START_PAGE}  (Ctrl-C ends it)\n"
        assert _page(f"http://127.0.0.1:{port}/health") == b"OK"
    finally:
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        words, _ = server.communicate(timeout=SECONDS)
    assert (server.returncode, words.splitlines()[-1]) == (0, "dashboard: ended")
    assert "Traceback" not in words
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(port)))


def _page(address: str) -> bytes:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return bytes(answer.read())
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} never answered")
