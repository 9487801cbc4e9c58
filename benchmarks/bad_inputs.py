"""Everything bad that the web, an archive or a caption may hold: each gets its reason, and no process dies of it.

Command: make verify NAME=bad_inputs
A misbehaving site is scraped by the real job's own work on Ray, in shards of ten rows. A hook inside every Python
process writes down each address that the fetcher's sockets connect to, so that what is counted are connections and not
URLs; memory is the peak of each worker process, as the kernel knows it.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.hostile.cases import Case, Verdict, wrong
from benchmarks.hostile.files import file_verdicts
from benchmarks.hostile.texts import text_verdicts
from benchmarks.hostile.web import INSIDE, LYING_RESOLVER, HostileSite, Site, web_cases
from benchmarks.processes import PeakMemory
from cogview.records.candidates import Candidate, write_candidates
from cogview.records.fetch import FetchSettings
from cogview.records.images import ImageSettings
from cogview.records.urls import AddressPolicy
from cogview.shards.manifest import ShardEntry, atomic_file
from pipelines.runtime.cluster import shutdown_ray
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import Job, JobRun, run_job
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards
from pipelines.scrape_pairs import CANDIDATES_NAME, Config, plan_shards, scrape_shard

BARS = (
    Bar(figure="cases/wrong", op="==", value=0),
    Bar(figure="cases/total", op=">=", value=90),
    Bar(figure="workers_died", op="==", value=0),
    Bar(figure="addresses/spellings", op=">=", value=40),
    Bar(figure="addresses/connections_inside", op="==", value=0),
    Bar(figure="addresses/connections_to_the_site", op=">=", value=100),
    Bar(figure="memory/worst_worker_mib", op="<", value=600),
)
SHARD_ROWS = 10
WORKERS = 2

# Python imports `sitecustomize` when it starts. A connection is the fetcher's if aiohttp is among its callers.
HOOK = """
import os, sys
{resolver}
_log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def _record(event, args):
    if event != "socket.connect" or int(args[0].family) not in (2, 10, 30):
        return
    frame = sys._getframe()
    while frame is not None and "aiohttp" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None:
        os.write(_log, f"{{args[1][0]}} {{args[1][1]}}\\n".encode())

sys.addaudithook(_record)
"""


@dataclass(frozen=True, kw_only=True)
class CountedWork:
    """Leaves a mark at each start: a shard that is begun twice has lost its process once."""

    work: partial[ShardEntry]
    marks: Path

    def __call__(self, task: ShardTask) -> ShardEntry:
        """Mark the start, then work."""
        (self.marks / f"{task.shard}-{os.getpid()}-{time.monotonic_ns()}").touch()
        return self.work(task)


def measure() -> Figures:
    """Meet every bad input, and count."""
    with tempfile.TemporaryDirectory(prefix="cogview-bad-inputs-") as name:
        folder = Path(name)
        verdicts = [*file_verdicts(made(folder / "files")), *text_verdicts(made(folder / "texts"))]
        say(f"{len(verdicts)} files and captions read; now the web")
        with HostileSite(folder) as site:
            figures = scrape(folder, site, verdicts)
    for sentence in wrong(verdicts):
        say(f"wrong: {sentence}")
    topics = Counter(verdict.case.topic for verdict in verdicts)
    return {
        "cases/total": len(verdicts),
        "cases/wrong": len(wrong(verdicts)),
        **figures,
        **{f"cases/{topic}": count for topic, count in sorted(topics.items())},
    }


def scrape(folder: Path, site: Site, verdicts: list[Verdict]) -> Figures:
    """Scrape the site on Ray; verdicts are added to."""
    cases, marks = web_cases(), made(folder / "marks")
    config = Config(shard_size=SHARD_ROWS, image=ImageSettings(image_size=256), fetch=fetch_settings(site))
    main = partial(scrape_cases, cases=cases, marks=marks)
    job = Job(name="bad_inputs", version=1, products=("manifest.json",), main=main)
    with hooked(folder) as connections, PeakMemory("ray::") as memory:
        done = run_job(job, config, root=folder / "runs", display=PlainDisplay([job.name], stream=sys.stderr))
        shutdown_ray()
    statuses = [row for path in sorted(done.output.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]
    if len(statuses) != len(cases):
        raise UnmeasuredError(f"{len(cases)} URLs became {len(statuses)} rows")
    for case, status in zip(cases, statuses, strict=True):
        verdicts.append(Verdict(case=case, found=status["reason"] or status["status"]))
    shards = -(-len(cases) // SHARD_ROWS)
    to_site = set(site.resolve.values())
    connected = [line.replace(" ", ":") for line in connections.read_text().splitlines()]
    inside = [address for address in connected if address not in to_site and not address.startswith("192.88.98.1:")]
    for address in sorted(set(inside)):
        say(f"connected to {address}")
    return {
        "workers_died": len(list(marks.iterdir())) - shards,
        "addresses/spellings": len(INSIDE),
        "addresses/connections_inside": len(inside),
        "addresses/connections_to_the_site": len(connected) - len(inside),
        "memory/worst_worker_mib": memory.worst_bytes / 2**20,
        "workers": memory.processes,
        "rows": len(statuses),
        "shards": shards,
    }


def scrape_cases(config: Config, run: JobRun, *, cases: Sequence[Case], marks: Path) -> None:
    """The job `scrape_pairs` from its list of candidates on."""
    with atomic_file(run.output / CANDIDATES_NAME) as file:
        rows = [Candidate(source=case.given, captions=("a caption",)) for case in cases]
        write_candidates(file, rows, shard_size=config.shard_size)
    fetch = replace(config.fetch, sharers=WORKERS)
    work = CountedWork(work=partial(scrape_shard, output=run.output, config=config, fetch=fetch), marks=marks)
    entries = run_shards(work, plan_shards(run.output / CANDIDATES_NAME), folder=run.output, run=run, workers=WORKERS)
    close_folder(run, entries, extra={})


def fetch_settings(site: Site) -> FetchSettings:
    """Quick, for nobody's server is asked but our own; the site under test is known by its names alone."""
    return FetchSettings(
        host_rate=1000.0,
        host_connections=16,
        total_s=6.0,
        read_s=2.0,
        max_attempts=2,
        max_wait_s=0.2,
        policy=AddressPolicy(resolve=site.resolve, ports=(80, 443)),
    )


@contextmanager
def hooked(folder: Path) -> Iterator[Path]:
    """Processes started meanwhile write their fetchers' connections to a file, and have a resolver that lies."""
    log, hooks = folder / "connections.log", made(folder / "hooks")
    log.touch()
    (hooks / "sitecustomize.py").write_text(HOOK.format(log=str(log), resolver=LYING_RESOLVER))
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(hooks), before)))
    try:
        yield log
    finally:
        os.environ["PYTHONPATH"] = before


def made(folder: Path) -> Path:
    """The folder, which is there now."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    return verify("bad_inputs", measure, bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
