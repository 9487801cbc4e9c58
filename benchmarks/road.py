"""The whole road on a fresh machine: clone, `make pretrain`, nothing else.

Command: make verify NAME=road
Measures the time to set up and to run, the peak memory of everything that was started, and the attributes that the
drawn pictures get right for captions that the training never saw. Two cores, whatever the machine has. On a virtual
machine the cores may be given to others meanwhile: `cpu/withheld` is the share of their time that this one did not get.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, commit, say, verify
from benchmarks.processes import ProcessWatch, fresh_environment
from cogview.shards.manifest import read_json

BARS = (
    Bar(figure="seconds/total", op="<", value=600),
    Bar(figure="memory/peak_gib", op="<", value=4),
    Bar(figure="attributes/mean", op=">=", value=0.90),
    Bar(figure="processes_left", op="==", value=0),
)
CHAIN = Path("runs/smoke/chain.json")
GRACE_SECONDS = 10.0


def measure(*, cores: int, keep: Path | None) -> Figures:
    """Run the road in a clone of the last commit. UnmeasuredError when it fails; the clone is then kept."""
    take_cores(cores)
    folder = Path(tempfile.mkdtemp(prefix="cogview-road-"))
    checkout = folder / "checkout"
    clone(checkout)
    watch = ProcessWatch(
        fresh_environment(folder / "home"), interval=3.0
    )  # a look at all processes takes time from them
    began, started, before = time.time(), time.monotonic(), psutil.cpu_times()
    with watch:
        # The road's words go to our standard error: standard output is kept for the result.
        done = subprocess.run(
            ["make", "pretrain"],
            cwd=checkout,
            env=watch.environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            check=False,
        )
    total, after = time.monotonic() - started, psutil.cpu_times()
    if done.returncode:
        raise UnmeasuredError(f"make pretrain ended with {done.returncode}; its checkout is {checkout}")
    left = [process.name() for process in watch.wait_for_end(seconds=GRACE_SECONDS)]
    setup = (checkout / ".venv" / ".ready").stat().st_mtime - began
    figures: Figures = {
        "seconds/total": total,
        "seconds/setup": setup,
        "seconds/job": total - setup,
        "cpu/withheld": withheld_share(before, after),
        "memory/peak_gib": watch.peak_bytes / 2**30,
        "processes_left": len(left),
        "cores": cores,
        **chain_figures(checkout / CHAIN),
    }
    if keep is not None:
        shutil.copytree(checkout / "runs", keep, dirs_exist_ok=True)
        say(f"the runs are in {keep}")
    shutil.rmtree(folder, ignore_errors=True)
    return figures


def clone(checkout: Path) -> None:
    """Clone the last commit. UnmeasuredError outside a checkout."""
    state = commit()
    if state.endswith("-dirty"):
        say("changes that are not committed are not measured")
    command = ["git", "clone", "--quiet", "--no-hardlinks", str(REPOSITORY), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (checkout / "Makefile").is_file():
        reason = done.stderr.strip() or "its last commit has no Makefile"
        raise UnmeasuredError(f"{REPOSITORY} cannot be cloned: {reason}; commit it first")


def withheld_share(before: Any, after: Any) -> float:
    """Of the time in which a core had something to do, the share in which it stood still: two readings of psutil."""
    names = ("user", "nice", "system", "irq", "softirq", "steal")  # Linux alone has the last ones
    spent = {name: getattr(after, name, 0.0) - getattr(before, name, 0.0) for name in names}
    return float(spent["steal"] / sum(spent.values())) if any(spent.values()) else 0.0


def chain_figures(path: Path) -> dict[str, float]:
    """The seconds of each stage, and what the evaluation scored."""
    stages = read_json(path)["stages"]
    figures = {f"seconds/{stage['job']}": stage["seconds"] for stage in stages}
    for stage in stages:
        if stage["job"] == "evaluate":
            figures.update({name: value for name, value in stage["scores"].items() if isinstance(value, (int, float))})
    return figures


def take_cores(count: int) -> None:
    """Leave this process, and all that it starts, so many cores. UnmeasuredError if the machine has fewer."""
    if not hasattr(os, "sched_setaffinity"):
        say(f"this system cannot confine a process to {count} cores")
        return
    there = sorted(os.sched_getaffinity(0))
    if len(there) < count:
        raise UnmeasuredError(f"the machine has {len(there)} cores, not {count}; give --cores {len(there)}")
    os.sched_setaffinity(0, there[:count])


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--cores", type=int, default=2, help="cores to run on (default: 2)")
    parser.add_argument("--keep", type=Path, help="a folder to copy the finished runs to")
    flags = parser.parse_args()
    return verify("road", lambda: measure(cores=flags.cores, keep=flags.keep), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
