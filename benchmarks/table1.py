"""The paper's Table 1 from end to end, small; killed again and again, it ends in the same numbers.

Command: make verify NAME=table1 [ARGS="--captions 200 --candidates 4 --kills 3"]; unknown flags go to
finetune_captioning, which is run first where no captioner is there yet
The models of a finished chain draw candidates for held-out captions on Ray, its captioner takes the best, and all sides
are scored at five blurs: once in peace, and once killed (the driver, or a worker and then the driver, by SIGKILL) and
started again by the same command. Then every score, every picture and every feature must be the same to the bit.
The few captions of the default are for that; scores to be believed take more.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.captioner import finetuned
from benchmarks.chains import MODELS, add_root, folders_by_field
from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.processes import ProcessWatch
from cogview.evaluation.blur import RADII
from cogview.shards.manifest import file_record, read_json
from pipelines.runtime.jobs import COMPLETE_NAME

BARS = (
    Bar(figure="scores that differ after kills", op="==", value=0),
    Bar(figure="files that differ after kills", op="==", value=0),
    Bar(figure="kills", op=">=", value=3),
    Bar(figure="processes left", op="==", value=0),
    Bar(figure="blurs at which recovered pictures are nearer than drawn ones", op="==", value=5),
)
JOB = "machine_evaluation"
CORPUS = {"reference": "filter_pairs", "tokens": "tokenize_pairs"}
COMPARED = ("*/*.features/*", "*/pictures/*.png", "scores/*/*.json", "scores.json", "captions.tsv")
PATIENCE_S = 900.0
FIRST_KILL, LAST_KILL = 0.1, 0.8  # of all shards and scores


def measure(*, root: Path, captions: int, candidates: int, kills: int, seed: int, flags: Sequence[str]) -> Figures:
    """Evaluate in peace, evaluate under kills, compare."""
    folders = {**folders_by_field(root, {**MODELS, **CORPUS}), "captioner": finetuned(root, flags)}
    settings = [f"--{name.replace('_', '-')}={folder}" for name, folder in folders.items()]
    settings += [f"--num-captions={captions}", f"--candidates={candidates}", "--shard-size=10", "--workers=2"]
    with tempfile.TemporaryDirectory(prefix="cogview-table1-") as name, ProcessWatch(dict(os.environ)) as watch:
        runs = Runs(settings=settings, environment=watch.environment, generator=random.Random(seed))
        started = time.monotonic()
        runs.run(Path(name) / "quiet", kills=0)
        quiet = time.monotonic() - started
        say(f"in peace: {quiet:.0f} s")
        runs.run(Path(name) / "killed", kills=kills)
        orphans = watch.wait_for_end(seconds=60)
        watch.end_all()
        first, second = (output_of(Path(name) / one) for one in ("quiet", "killed"))
        return {
            **compared(first, second),
            "kills": len(runs.kills),
            "kills of a worker": runs.kills.count("worker"),
            "starts": runs.starts,
            "processes left": len(orphans),
            "captions": captions,
            "candidates": candidates,
            "seconds in peace": quiet,
            **table_figures(read_json(first / "scores.json")["scores"]),
        }


@dataclass(kw_only=True)
class Runs:
    """Runs of one command. kills: what was killed, in order; starts: of the command."""

    settings: Sequence[str]
    environment: Mapping[str, str]
    generator: random.Random
    kills: list[str] = field(default_factory=list)
    starts: int = 0

    def run(self, root: Path, *, kills: int) -> None:
        """Run to the end, with so many kills on the way, each after more was done. UnmeasuredError if it fails."""
        for number in range(kills + 1):
            driver = self._start(root)
            if number < kills and self._wait_for_work(driver, root, share=kill_share(number, kills=kills)):
                self._kill(driver, kind="worker" if number % 2 else "driver")
            code = driver.wait(timeout=PATIENCE_S)
            if code == 0:
                return
            if number == kills or code != -signal.SIGKILL:
                raise UnmeasuredError(f"{JOB} ended with {code}: {log_of(root).read_text()[-2000:]}")

    def _start(self, root: Path) -> subprocess.Popen[bytes]:
        self.starts += 1
        root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pipelines", JOB, "smoke", "--root", str(root), *self.settings]
        with open(log_of(root), "ab") as log:
            return subprocess.Popen(
                command, cwd=REPOSITORY, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait_for_work(self, driver: subprocess.Popen[bytes], root: Path, *, share: float) -> bool:
        """Wait until this share of shards and scores is done, and a moment longer; False if the run ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while done_share(root) < share:
            if driver.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        time.sleep(self.generator.uniform(0, 0.3))
        return driver.poll() is None

    def _kill(self, driver: subprocess.Popen[bytes], *, kind: str) -> None:
        """Kill a worker amid its shard, if there is one, and a moment later the driver."""
        if kind == "worker":
            for process in psutil.Process(driver.pid).children(recursive=True):
                try:
                    if "Map" in "".join(process.cmdline()[:1]):
                        process.kill()
                        self.kills.append("worker")
                        time.sleep(self.generator.uniform(0, 1))
                        break
                except psutil.Error:
                    continue
        if driver.poll() is None:
            driver.kill()
            self.kills.append("driver")
            say(f"killed: {self.kills}")


def kill_share(number: int, *, kills: int) -> float:
    """When to kill: the first time amid the first shards, the last time amid the scores."""
    return FIRST_KILL + (LAST_KILL - FIRST_KILL) * number / max(1, kills - 1)


def done_share(root: Path) -> float:
    """How much of a run's shards and scores there is, of what its plan says; about, for people and for kills."""
    outputs = list((root / JOB).glob("*"))
    plans = [output / "_manifest/plan.json" for output in outputs]
    if not outputs or not plans[0].is_file():
        return 0.0
    shards = len(read_json(plans[0])["shards"])
    scores = 1 + 2 * len((*RADII, "KD", "precision and recall", "CapLoss"))  # of the real pictures CapLoss alone
    done = len(list(outputs[0].glob("_manifest/shard-*.json"))) + len(list(outputs[0].glob("scores/*/*.json")))
    return done / (shards + scores)


def output_of(root: Path) -> Path:
    """The one finished output under a root. UnmeasuredError if there is none."""
    found = [path.parent for path in (root / JOB).glob(f"*/{COMPLETE_NAME}")]
    if len(found) != 1:
        raise UnmeasuredError(f"{root} has {len(found)} finished outputs of {JOB}; one was expected")
    return found[0]


def compared(first: Path, second: Path) -> dict[str, int]:
    """What differs between two outputs."""
    sides = [
        {(row["side"], row["score"]): row for row in read_json(one / "scores.json")["scores"]}
        for one in (first, second)
    ]
    scores = [name for name in sides[0].keys() | sides[1].keys() if sides[0].get(name) != sides[1].get(name)]
    files = [contents(one) for one in (first, second)]
    different = [name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name)]
    for name in sorted(different):
        say(f"differs: {name}")
    return {
        "scores that differ after kills": len(scores),
        "files that differ after kills": len(different),
        "scores": len(sides[0]),
        "files": len(files[0]),
    }


def contents(output: Path) -> dict[str, str]:
    """Relative name -> sha256 of what the shards and the scores left."""
    paths = {path for pattern in COMPARED for path in output.glob(pattern) if path.is_file()}
    return {path.relative_to(output).as_posix(): file_record(path)["sha256"] for path in sorted(paths)}


def table_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Our Table 1, and in how many of its columns drawn pictures are further from the real ones than recovered ones."""
    values = {(row["side"], row["score"]): float(row["value"]) for row in rows}
    distances = [name for side, name in values if side == "drawn" and name.startswith("F")]
    nearer = sum(values["recovered", name] < values["drawn", name] for name in distances)
    table = {f"{side}/{name}": value for (side, name), value in values.items()}
    return {"blurs at which recovered pictures are nearer than drawn ones": nearer, **table}


def log_of(root: Path) -> Path:
    """Where the runs under a root print."""
    return root.with_suffix(".log")


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    add_root(parser)
    parser.add_argument("--captions", type=int, default=40, help="to draw (default: 40)")
    parser.add_argument("--candidates", type=int, default=2, help="pictures of each (default: 2)")
    parser.add_argument("--kills", type=int, default=3, help="runs that are killed (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    flags, others = parser.parse_known_args()
    return verify(
        "table1",
        lambda: measure(
            root=flags.root,
            captions=flags.captions,
            candidates=flags.candidates,
            kills=flags.kills,
            seed=flags.seed,
            flags=others,
        ),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
