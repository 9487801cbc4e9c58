"""Ingestion under kill -9: scrape, import, filter and tokenize, killed at random until they are done.

Command: make verify NAME=ingest_kills [ARGS="--kills 50 --seeds 3 --minutes 12"]
Kills are of three kinds: the driver; a worker amid a shard; and whoever holds a half-written file open at that moment,
stopped first, so that it is certain. Whatever is killed, the same command is given again. Then every file of every
shard must have the sha256 that a run without kills gave it, every row must be there once, and nothing may lie about.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.processes import ProcessWatch
from cogview.records.images import ImageSettings
from cogview.scenes.site import SiteConfig
from cogview.shards.manifest import TEMPORARY, file_record, read_manifest
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines.runtime.jobs import Job

KINDS = ("driver", "worker", "writer")
WEIGHTS = (1, 2, 2)  # a driver takes the longest to come back
JOBS = ("scrape_pairs", "import_pairs", "filter_pairs", "tokenize_pairs")
NUM_PICTURES, NUM_SCENES, SHARD_SIZE, IMAGE_SIZE = 240, 240, 20, 32
SHARD_FILES = ("*.tar", "*.parquet", "*.arrow", "*_stats.json", "manifest.json", "_manifest/*.json")
LEFTOVERS = (f".*{TEMPORARY}", ".*.attempts")
GAVE_UP = 2  # exit code of a job that one shard has killed too often; it says itself that it should be run again
PATIENCE_S = 300.0  # without an opportunity to kill, or without an end


def measure(*, kills: int, seeds: int, minutes: float, jobs: Sequence[str] = JOBS) -> Figures:
    """Run the jobs once in peace, then for each seed until its share of the kills is done, and compare."""
    started = time.monotonic()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="cogview-ingest-kills-") as name:
        folder = Path(name)
        make_inputs(folder / "inputs")
        with ProcessWatch(dict(os.environ), interval=600.0) as watch:
            chaos = Chaos(inputs=folder / "inputs", environment=watch.environment, jobs=jobs)
            chaos.run_killed(folder / "quiet", kills=0, generator=random.Random(0))
            wanted = shard_files(folder / "quiet")
            say(f"{len(wanted)} files in {time.monotonic() - started:.0f} s without kills")
            totals["lost"], totals["doubled"] = lost_and_doubled(folder / "quiet", folder / "inputs", jobs=jobs)
            for seed in range(seeds):
                goal = kills * (seed + 1) // seeds
                generator = random.Random(seed)
                while sum(chaos.kills.values()) < goal and time.monotonic() - started < 60 * minutes:
                    root = folder / f"round-{totals['rounds']}"
                    chaos.run_killed(root, kills=goal - sum(chaos.kills.values()), generator=generator)
                    totals.update(differences(root, folder / "inputs", wanted=wanted, jobs=jobs))
                    say(f"seed {seed}: {dict(chaos.kills)}, {dict(totals)}, {time.monotonic() - started:.0f} s")
                    shutil.rmtree(root)
            orphans = watch.wait_for_end(seconds=30)
            watch.end_all()
    return {
        "kills": sum(chaos.kills.values()),
        **{f"kills/{kind}": chaos.kills[kind] for kind in KINDS},
        **{name: totals[name] for name in ("lost", "doubled", "files_different", "leftovers", "rounds")},
        "orphans": len(orphans),
        "files": len(wanted),
        "drivers_started": chaos.started,
        "seeds": seeds,
        "seconds/total": time.monotonic() - started,
    }


@dataclass(kw_only=True)
class Chaos:
    """Starts the ingestion as often as it takes and kills parts of it."""

    inputs: Path
    environment: Mapping[str, str]
    jobs: Sequence[str]
    kills: Counter[str] = field(default_factory=Counter)
    started: int = 0

    def run_killed(self, root: Path, *, kills: int, generator: random.Random) -> None:
        """Bring the jobs to their end under `root`, with at most so many kills. UnmeasuredError if they fail."""
        left = kills
        while True:
            driver = self._start(root)
            left -= self._kill_parts(driver, root, kills=left, generator=generator)
            code = self._wait(driver)
            if code == 0:
                return
            if code not in (-signal.SIGKILL, GAVE_UP):
                raise UnmeasuredError(f"the jobs ended with {code}: {log_of(root).read_text()[-2000:]}")

    def _start(self, root: Path) -> subprocess.Popen[bytes]:
        self.started += 1
        root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.ingest_kills", "--drive", str(self.inputs), "--root", str(root)]
        command += ["--jobs", *self.jobs]
        with open(log_of(root), "ab") as log:
            return subprocess.Popen(
                command, cwd=REPOSITORY, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _kill_parts(self, driver: subprocess.Popen[bytes], root: Path, *, kills: int, generator: random.Random) -> int:
        """Kill until the driver is dead or done, or `kills` are done; how many were."""
        done = 0
        kind = generator.choices(KINDS, weights=WEIGHTS)[0]
        while done < kills and driver.poll() is None:
            time.sleep(generator.uniform(0.0, 0.6))
            if not wait_until(partial(is_at_work, root), while_running=driver):
                break
            if self._kill(kind, driver, root, generator):
                done += 1
                self.kills[kind] += 1
                if kind == "driver":
                    break
                kind = generator.choices(KINDS, weights=WEIGHTS)[0]
        return done

    def _kill(self, kind: str, driver: subprocess.Popen[bytes], root: Path, generator: random.Random) -> bool:
        """Kill one part; False if there was none of this kind just now."""
        if kind == "driver":
            driver.kill()
            return True
        workers = list(busy_workers(driver.pid))
        if kind == "worker":
            return bool(workers) and killed(generator.choice(workers))
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and driver.poll() is None:
            for worker in busy_workers(driver.pid):
                if is_writing(worker, root) and killed(worker, only_if=partial(is_writing, worker, root)):
                    return True
        return False

    def _wait(self, driver: subprocess.Popen[bytes]) -> int:
        try:
            return driver.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            raise UnmeasuredError(f"the jobs did not end within {PATIENCE_S:.0f} s of their last kill") from None


def wait_until(condition: Callable[[], bool], *, while_running: subprocess.Popen[bytes]) -> bool:
    """Wait for a condition; False if the process ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if while_running.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def is_at_work(root: Path) -> bool:
    """Whether a shard is being made."""
    return any(root.rglob(".*.attempts"))


def busy_workers(driver: int) -> Iterator[psutil.Process]:
    """The processes below the driver that Ray has given a shard."""
    with suppress(psutil.Error):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error, IndexError):
                title = process.cmdline()[0]
                if title.startswith("ray::") and "Map" in title:
                    yield process


def is_writing(process: psutil.Process, root: Path) -> bool:
    """Whether it holds an unfinished file below the root open."""
    with suppress(OSError):
        targets = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process.pid}/fd")]
        return any(target.startswith(str(root)) and target.endswith(TEMPORARY) for target in targets)
    return False


def killed(process: psutil.Process, *, only_if: Callable[[], bool] = lambda: True) -> bool:
    """Stop a process, look once more, and kill it or let it go on."""
    try:
        process.suspend()
        if only_if():
            process.kill()
            return True
        process.resume()
    except psutil.Error:
        return False
    return False


def differences(root: Path, inputs: Path, *, wanted: Mapping[str, str], jobs: Sequence[str]) -> dict[str, int]:
    """What a finished round has that it should not, or lacks."""
    found = shard_files(root)
    different = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    for name in different:
        say(f"differs: {name}")
    lost, doubled = lost_and_doubled(root, inputs, jobs=jobs)
    leftovers = [path for pattern in LEFTOVERS for path in root.rglob(pattern)]
    return {
        "lost": lost,
        "doubled": doubled,
        "files_different": len(different),
        "leftovers": len(leftovers),
        "rounds": 1,
    }


def shard_files(root: Path) -> dict[str, str]:
    """Relative name -> sha256 of everything that the jobs write into shards and manifests."""
    paths = {path for job in JOBS for pattern in SHARD_FILES for path in (root / job).glob(f"*/**/{pattern}")}
    return {path.relative_to(root).as_posix(): file_record(path)["sha256"] for path in sorted(paths)}


def lost_and_doubled(root: Path, inputs: Path, *, jobs: Sequence[str]) -> tuple[int, int]:
    """Rows that are missing, and rows too many, over all jobs: each by the names of what it was given."""
    lost = doubled = 0
    for job in jobs:
        expected, found = Counter(given(root, inputs, job)), Counter(accounted_for(root, job))
        lost += (expected - found).total()
        doubled += (found - expected).total()
    return lost, doubled


def given(root: Path, inputs: Path, job: str) -> Iterator[str]:
    """The names of all rows that a job was given."""
    if job == "scrape_pairs":
        yield from pq.read_table(output_of(root, job) / "candidates.parquet")["source"].to_pylist()
    elif job == "import_pairs":
        yield from (path.name for path in (inputs / "pictures").glob("*.png"))
    else:
        yield from kept(root, "filter_pairs" if job == "tokenize_pairs" else "scrape_pairs")


def accounted_for(root: Path, job: str) -> Iterator[str]:
    """The names of all rows that a job has kept or rejected."""
    if job == "tokenize_pairs":
        return tokenized_keys(root)
    return statuses(root, job, "key" if job == "filter_pairs" else "source")


def statuses(root: Path, job: str, column: str) -> Iterator[str]:
    """A column of what became of every candidate of a job."""
    for path in sorted(output_of(root, job).glob("shard-*.parquet")):
        yield from pq.read_table(path)[column].to_pylist()


def kept(root: Path, job: str) -> Iterator[str]:
    """The keys of the pairs that a job has kept."""
    for path in sorted(output_of(root, job).glob("shard-*.parquet")):
        yield from pq.read_table(path, filters=[("status", "=", "ok")])["key"].to_pylist()


def tokenized_keys(root: Path) -> Iterator[str]:
    """The keys of all rows, each once for its captions, and of all rejects."""
    folder = output_of(root, "tokenize_pairs")
    rows = [row for path in folder.glob("*/shard-*.arrow") for row in pa.ipc.open_file(path).read_all().to_pylist()]
    texts = Counter((row["key"], row["text"]) for row in rows)
    yield from {key for key, _ in texts}
    yield from (key for (key, _), count in texts.items() for _ in range(count - 1))
    for path in folder.glob("rejected/*.parquet"):
        yield from pq.read_table(path)["key"].to_pylist()


def output_of(root: Path, job: str) -> Path:
    """A job's one folder, every file of which has the sha256 of its manifest."""
    (folder,) = (root / job).iterdir()
    read_manifest(folder, deep=True)
    return folder


def log_of(root: Path) -> Path:
    """Where the drivers of a round print."""
    return root.with_suffix(".log")


def make_inputs(folder: Path) -> None:
    """Pictures with captions, one in twenty of them damaged, and two small tokenizers."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    generator = np.random.default_rng(0)
    captions = []
    for number in range(NUM_PICTURES):
        path = pictures / f"{number:04d}.png"
        Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
        if number % 20 == 7:
            path.write_bytes(path.read_bytes()[:200])
        captions.append(f"picture number {number} of a small red circle")
        path.with_suffix(".txt").write_text(captions[-1])
    train_text_tokenizer(captions, config=TextTokenizerConfig(num_pieces=60, exact=False), output=folder / "text")
    torch.manual_seed(0)
    ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=64, code_dim=8))).save(
        folder / "image"
    )


def drive(inputs: Path, root: Path, *, jobs: Sequence[str]) -> int:
    """The driver that is killed: the jobs, one after the other, as the command line runs them."""
    from pipelines import filter_pairs, import_pairs, scrape_pairs, tokenize_pairs
    from pipelines.runtime.command_line import Outcome
    from pipelines.runtime.display import PlainDisplay
    from pipelines.runtime.jobs import run_job

    image = ImageSettings(image_size=IMAGE_SIZE)
    site = SiteConfig(num_scenes=NUM_SCENES, images_per_page=40)
    configs: dict[str, Callable[[], tuple[Job, Any]]] = {
        "scrape_pairs": lambda: (
            scrape_pairs.JOB,
            scrape_pairs.Config(demo=site, shard_size=SHARD_SIZE, image=image),
        ),
        "import_pairs": lambda: (
            import_pairs.JOB,
            import_pairs.Config(data=(str(inputs / "pictures"),), shard_size=SHARD_SIZE, image=image),
        ),
        "filter_pairs": lambda: (
            filter_pairs.JOB,
            replace(filter_pairs.PRESETS["smoke"], pairs=output_of(root, "scrape_pairs")),
        ),
        "tokenize_pairs": lambda: (
            tokenize_pairs.JOB,
            tokenize_pairs.Config(
                pairs=output_of(root, "filter_pairs"),
                text_tokenizer=inputs / "text",
                image_tokenizer=inputs / "image",
                image_size=IMAGE_SIZE,
                validation_fraction=0.1,
            ),
        ),
    }
    outcome = Outcome([], err=sys.stderr)
    with outcome:
        for name in jobs:
            job, config = configs[name]()
            run_job(job, config, root=root, display=PlainDisplay([], stream=sys.stderr))
    return outcome.code


def bars(kills: int) -> tuple[Bar, ...]:
    """What must come out of so many kills."""
    return (
        Bar(figure="kills", op=">=", value=kills),
        Bar(figure="kills/writer", op=">=", value=kills // 5),
        *(
            Bar(figure=name, op="==", value=0)
            for name in ("lost", "doubled", "files_different", "leftovers", "orphans")
        ),
    )


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="how many in all (default: 50)")
    parser.add_argument("--seeds", type=int, default=3, help="over so many seeds (default: 3)")
    parser.add_argument("--minutes", type=float, default=12.0, help="begin no round after so many (default: 12)")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", nargs="*", default=JOBS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.drive:
        return drive(flags.drive, flags.root, jobs=flags.jobs)
    run = partial(measure, kills=flags.kills, seeds=flags.seeds, minutes=flags.minutes)
    return verify("ingest_kills", run, bars=bars(flags.kills), save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
