"""The finished road again: nothing is fetched, nothing is changed, and it takes seconds.

Command: make verify NAME=rerun
Uses the run in runs/smoke, which is finished first if need be. Files are compared by content and time of modification;
every network socket that the rerun binds or connects is written down by a hook inside its Python processes.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.processes import ProcessWatch
from cogview.shards.manifest import file_record, read_json

BARS = (
    Bar(figure="seconds/total", op="<", value=30),
    Bar(figure="http_requests", op="==", value=0),
    Bar(figure="sockets_bound", op="==", value=0),
    Bar(figure="ray_processes", op="==", value=0),
    Bar(figure="files_changed", op="==", value=0),
    Bar(figure="stages_run", op="==", value=0),
)
COMMAND = ("make", "pretrain")
ROOT = REPOSITORY / "runs" / "smoke"
LOG_NAME = "log.txt"  # what the process said; it grows with every run
RAY_PROCESSES = ("raylet", "gcs_server")

# Python imports `sitecustomize` when it starts. Address families 2 and 10 are IPv4 and IPv6: the others are local.
HOOK = """
import os, sys

_log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def _record(event, args):
    if event in ("socket.bind", "socket.connect") and int(args[0].family) in (2, 10, 30):
        os.write(_log, f"{{event}} {{args[1]}}\\n".encode())

sys.addaudithook(_record)
"""


def measure() -> Figures:
    """Finish the run, then run it again under watch."""
    say("making sure that runs/smoke is finished")
    if subprocess.run(COMMAND, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode:
        raise UnmeasuredError("make pretrain failed, so there is no finished run to run again")
    before = snapshot(ROOT)
    with tempfile.TemporaryDirectory(prefix="cogview-rerun-") as folder:
        sockets = Path(folder) / "sockets.log"
        (Path(folder) / "sitecustomize.py").write_text(HOOK.format(log=str(sockets)))
        environment = {**psutil.Process().environ(), "PYTHONPATH": folder}
        started = time.monotonic()
        with ProcessWatch(environment, interval=0.2) as watch:
            done = subprocess.run(
                COMMAND,
                cwd=REPOSITORY,
                env=watch.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        seconds = time.monotonic() - started
        if not sockets.exists():
            raise UnmeasuredError("the hook did not run, so nothing is known of the network")
        events = sockets.read_text().splitlines()
    say(done.stdout)
    if done.returncode:
        raise UnmeasuredError(f"the rerun ended with {done.returncode}")
    changed = differences(before, snapshot(ROOT))
    for name in changed:
        say(f"changed: {name}")
    stages = len(read_json(ROOT / "chain.json")["stages"])
    return {
        "seconds/total": seconds,
        "http_requests": sum(event.startswith("socket.connect") for event in events),
        "sockets_bound": sum(event.startswith("socket.bind") for event in events),
        "ray_processes": len(watch.names & set(RAY_PROCESSES)),
        "files_changed": len(changed),
        "files": len(before),
        "stages": stages,
        "stages_run": stages - sum(": reused" in line for line in done.stdout.splitlines()),
        "memory/peak_gib": watch.peak_bytes / 2**30,
    }


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Relative name -> (sha256, time of modification) of every file below a root but the log."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path != root / LOG_NAME)
    return {path.relative_to(root).as_posix(): (file_record(path)["sha256"], path.stat().st_mtime_ns) for path in files}


def differences(before: dict[str, tuple[str, int]], after: dict[str, tuple[str, int]]) -> list[str]:
    """Names of files that came, went or changed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    return verify("rerun", measure, bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
