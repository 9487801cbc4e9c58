"""A cluster of two nodes on loopback that asks for a token: a job that has both trains one worker on each."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from cogview.models.published import load_model
from tests.pipelines.trained_folders import write_trained_folders

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).parents[2]
SETTINGS = (
    *("--max-text", "40", "--num-samples", "0", "--num-workers", "2"),
    *("--model.num-layers", "1", "--model.hidden-size", "32", "--model.num-heads", "2"),
    *("--loop.num-steps", "6", "--loop.global-batch-size", "4", "--loop.validate-every", "6", "--loop.log-every", "1"),
    *("--loop.sharding", "full"),
)


def test_workers_on_two_nodes_train_one_model(tmp_path: Path) -> None:
    folders = write_trained_folders(tmp_path / "made")
    port = free_port()
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with (
        node("--head", f"--port={port}", "--include-dashboard=false", environment=environment),
        node(f"--address=127.0.0.1:{port}", environment=environment),
    ):
        command = [sys.executable, "-m", "pipelines", "pretrain", "smoke", "--root", str(tmp_path / "run"), *SETTINGS]
        for name in ("tokens", "text_tokenizer", "image_tokenizer"):
            command += [f"--{name.replace('_', '-')}", str(getattr(folders, name))]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "2 nodes" in done.stdout + done.stderr
    (output,) = (tmp_path / "run" / "pretrain").iterdir()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert load_model(output)[0].config.num_layers == 1


@contextmanager
def node(*flags: str, environment: dict[str, str]) -> Iterator[None]:
    """A Ray node with one CPU, so that two workers need two nodes."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", *flags]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        wait_for_start(process)
        yield
    finally:
        daemons = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        _, alive = psutil.wait_procs(daemons, timeout=20)
        for left in alive:
            with suppress(psutil.NoSuchProcess):  # it may have ended by itself just now
                left.kill()
        process.wait(timeout=20)


def wait_for_start(process: subprocess.Popen[str]) -> None:
    """Until the node says that it runs."""
    assert process.stdout is not None
    said, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        said += line
        if "Ray runtime started" in line:
            return
        assert line or process.poll() is None, said
    pytest.fail(f"no Ray node within two minutes: {said}")


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
