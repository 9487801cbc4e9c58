"""Thirty million pairs on paper, from what one costs here; and a million rows through the real job, for the driver.

Command: make verify NAME=ingest_scale; a quick look is `python -m benchmarks.ingest_scale --rows 50000`
First the cost of an item in each stage, alone in this process: a row listed, an image fetched from the loopback
address, decoded and stored, written, filtered, and tokenized by the paper's network on this machine's CPU. Times 30
million that is the table: CPU hours, wall hours on `--cores`, requests, GB received and written, and the memory of what
one process must hold of all items at once (filter compares captions and digests). Other memory does not grow with the
rows: that of the run below is `run/peak_gib`. What a network or a site's politeness takes comes on top: a site's rate
holds however many machines there are.
Then scrape_pairs runs over a hundred thousand and over a million URLs that are refused before any connection, with one
real photo in each shard: all of the machinery and none of the waiting. The driver's own memory is read from its start
to its end; the most that it ever has must not grow with the rows. Photos are those of ../shared/data/photos (0.1
megapixels); larger ones cost more in `fetch` and `store`.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.photo_server import LOOPBACK, photo_server
from benchmarks.processes import ProcessWatch
from cogview.filters.pairs import FilterRules, judge_pair
from cogview.records.candidates import read_candidates, write_candidates
from cogview.records.fetch import Fetched, Fetcher, FetchSettings
from cogview.records.images import ImageSettings
from cogview.records.pair import TextImagePair
from cogview.records.pair_shards import pair_key, store_pair, write_pair_shard
from cogview.records.tables import inspect_table, read_table
from cogview.records.tars import read_pairs
from cogview.records.urls import AddressPolicy
from cogview.shards.manifest import atomic_file
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines.runtime.cluster import usable_cpus

PAIRS = 30_000_000  # of the paper, section 3.1
SITES = 1_000_000  # that they lie on: a guess, which costs three small requests each
SITE_SHARE = 0.01  # of all images, on the largest of them: another guess
PHOTOS = REPOSITORY / "../shared/data/photos"
HOST = "photos.test"
SAMPLE, LISTED, ENCODED = 400, 20_000, 2
IMAGE_SIZE, CODES, TEXT_IDS = 256, 1024, 64
SHARD_SIZE = 10_000  # the job's own
GB, MIB = 1e9, 2**20
LIMIT_S = 3600
GROWTH = "driver/growth_from_a_tenth_of_the_rows_mib"
BARS = (Bar(figure=GROWTH, op="<=", value=32),)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one item costs: CPU seconds, requests, bytes received, bytes on disk, bytes held by one process at once."""

    cpu_s: float
    requests: float = 0.0
    received: float = 0.0
    disk: float = 0.0
    held: float = 0.0


def measure(*, rows: int, cores: int) -> Figures:
    """The stages one by one, the model, and the million rows."""
    if not PHOTOS.is_dir():
        raise UnmeasuredError(f"{PHOTOS} does not exist; put tars of photos there")
    with tempfile.TemporaryDirectory(prefix="cogview-scale-") as name, photo_server(PHOTOS) as port:
        say("the cost of one item in each stage")
        stages = measure_stages(Path(name), port=port)
        runs = []
        for number in (rows // 10, rows):
            say(f"{number:,} rows through scrape_pairs")
            runs.append(simulate(Path(name) / str(number), rows=number, port=port))
    return {**driver_figures(*runs), **runs[-1].figures, **model(stages, cores=cores)}


def model(stages: dict[str, Stage], *, cores: int) -> dict[str, float]:
    """Thirty million items in each stage and in all."""
    figures: dict[str, float] = {"pairs": PAIRS, "cores": cores}
    for name, stage in stages.items():
        figures[f"{name}/cpu_ms_per_item"] = 1000 * stage.cpu_s
        figures[f"{name}/cpu_hours"] = PAIRS * stage.cpu_s / 3600
        figures[f"{name}/wall_hours"] = PAIRS * stage.cpu_s / 3600 / cores
        figures |= {f"{name}/disk_gb": PAIRS * stage.disk / GB} if stage.disk else {}
        figures |= {f"{name}/memory_gb": PAIRS * stage.held / GB} if stage.held else {}
    fetch = stages["fetch"]
    figures["fetch/requests"] = PAIRS * fetch.requests + 3 * SITES
    figures["fetch/received_gb"] = PAIRS * fetch.received / GB
    figures["fetch/hours_at_1_gbit_s"] = PAIRS * fetch.received * 8 / 1e9 / 3600
    figures["fetch/hours_of_the_largest_site"] = PAIRS * SITE_SHARE / FetchSettings().host_rate / 3600
    figures["all/disk_gb"] = sum(PAIRS * stage.disk / GB for stage in stages.values())
    return figures


def measure_stages(folder: Path, *, port: int) -> dict[str, Stage]:
    """Every stage in this process, on one core. Disk: what the stage leaves behind."""
    table = folder / "listed.parquet"
    write_urls(table, [f"http://{HOST}/{number:05d}.jpg" for number in range(LISTED)])
    candidates = folder / "candidates.parquet"
    with cpu_time() as listing, atomic_file(candidates) as file:
        write_candidates(file, read_table(str(table), inspect_table(str(table))), shard_size=SHARD_SIZE)
    rows = read_candidates(candidates, shard=0)[:SAMPLE]
    asyncio.run(fetch_all([row.source for row in rows[:20]], port=port))
    with cpu_time() as fetching:
        bodies = asyncio.run(fetch_all([row.source for row in rows], port=port))
    pairs = [
        TextImagePair(key=pair_key(0, number), captions=row.captions, image_bytes=body, source=row.source)
        for number, (row, body) in enumerate(zip(rows, bodies, strict=True))
    ]
    settings = ImageSettings(image_size=IMAGE_SIZE)
    store_pair(pairs[0], settings)
    with cpu_time() as storing:
        stored = [store_pair(pair, settings) for pair in pairs]
    with cpu_time() as writing:
        counts = write_pair_shard(folder, "shard-00000", stored, open_file=atomic_file)
    compared = pq.read_table(folder / "shard-00000.parquet", columns=["key", "captions", "sha256"])
    on_disk = sum((folder / name).stat().st_size for name in counts.files) / SAMPLE
    with cpu_time() as filtering:
        kept = (judge_pair(pair, FilterRules()).pair for pair in read_pairs(folder / "shard-00000.tar"))
        write_pair_shard(folder, "kept-00000", kept, open_file=atomic_file)
    return {
        "list": Stage(cpu_s=listing() / LISTED, disk=candidates.stat().st_size / LISTED),
        "fetch": Stage(cpu_s=fetching() / SAMPLE, requests=1, received=sum(map(len, bodies)) / SAMPLE),
        "store": Stage(cpu_s=storing() / SAMPLE),
        "write": Stage(cpu_s=writing() / SAMPLE, disk=on_disk),
        "filter": Stage(cpu_s=filtering() / SAMPLE, disk=on_disk, held=compared.nbytes / SAMPLE),
        "tokenize_on_cpu": Stage(cpu_s=encoding_seconds(), disk=2 * CODES + 4 * TEXT_IDS),
    }


@contextmanager
def cpu_time() -> Iterator[Callable[[], float]]:
    """CPU seconds of this process, all its threads, spent in the block."""
    started = time.process_time()
    spent = 0.0
    yield lambda: spent
    spent = time.process_time() - started


async def fetch_all(urls: list[str], *, port: int) -> list[bytes]:
    """The bodies of all URLs. UnmeasuredError if one is refused."""
    policy = AddressPolicy(resolve={f"{HOST}:80": f"{LOOPBACK}:{port}"})
    async with Fetcher(FetchSettings(host_rate=5000.0, host_connections=32, policy=policy)) as fetcher:
        answers = await asyncio.gather(*map(fetcher.fetch, urls))
    bodies = [answer.body for answer in answers if isinstance(answer, Fetched)]
    if len(bodies) < len(urls):
        raise UnmeasuredError(f"{len(urls) - len(bodies)} of {len(urls)} photos could not be fetched")
    return bodies


def encoding_seconds() -> float:
    """CPU seconds for one picture through the paper's tokenizer, after a first one."""
    network = ImageTokenizer(VQVAEConfig()).eval()
    pictures = torch.rand(ENCODED, 3, IMAGE_SIZE, IMAGE_SIZE)
    network.encode(pictures[:1])
    with cpu_time() as encoding:
        network.encode(pictures)
    return encoding() / ENCODED


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A finished run. samples: (shards done, bytes of the driver's own memory), from its start to its end."""

    shards: int
    samples: list[tuple[int, int]]
    figures: dict[str, float]


def simulate(folder: Path, *, rows: int, port: int) -> Simulated:
    """scrape_pairs over rows that cost nothing."""
    folder.mkdir()
    shards = max(10, rows // SHARD_SIZE)
    size = -(-rows // shards)
    refused = "http://host{:07d}.photos.test:9/{:07d}.jpg"  # a port that is never asked
    photo = "http://" + HOST + "/{1:05d}.jpg"
    urls = [(photo if number % size == 0 else refused).format(number // 10, number) for number in range(rows)]
    write_urls(folder / "rows.parquet", urls)
    resolve = (f"{HOST}:80", f"{LOOPBACK}:{port}")
    settings = ("--table", str(folder / "rows.parquet"), "--root", str(folder / "root"), "--shard-size", str(size))
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "scrape_pairs",
        "paper",
        *settings,
        "--fetch.policy.resolve",
        *resolve,
    ]
    log = folder / "log.txt"
    with ProcessWatch(psutil.Process().environ()) as watch, open(log, "wb") as words:
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=watch.environment, stdin=subprocess.DEVNULL, stdout=words, stderr=words
        )
        samples = follow(process, folder / "root" / "scrape_pairs")
        seconds = time.monotonic() - started
    if process.returncode:
        raise UnmeasuredError(f"scrape_pairs ended with {process.returncode}: {log.read_text()[-400:]}")
    manifest = json.loads(next((folder / "root" / "scrape_pairs").glob("*/manifest.json")).read_text())
    if manifest["rows_in"] != rows or manifest["rows_out"] != shards:
        raise UnmeasuredError(
            f"{manifest['rows_out']} of {manifest['rows_in']} rows came out, expected {shards} of {rows}"
        )
    figures = run_figures(watch, rows=rows, shards=shards, seconds=seconds)
    return Simulated(shards=shards, samples=samples, figures=figures)


def run_figures(watch: ProcessWatch, *, rows: int, shards: int, seconds: float) -> dict[str, float]:
    """What the whole run took."""
    return {
        "run/rows": rows,
        "run/shards": shards,
        "run/seconds": seconds,
        "run/rows_per_second": rows / seconds,
        "run/cpu_ms_per_row": 1000 * watch.cpu_seconds / rows,
        "run/peak_gib": watch.peak_bytes / 2**30,
    }


def follow(process: subprocess.Popen[bytes], output: Path) -> list[tuple[int, int]]:
    """(shards done, bytes of the driver's own memory), twice a second until it ends."""
    samples = []
    driver = psutil.Process(process.pid)
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise UnmeasuredError(f"scrape_pairs did not end within {LIMIT_S} s")
        with suppress(psutil.Error):  # it may end between two looks
            samples.append((len(list(output.glob("*/_manifest/*.json"))), int(driver.memory_full_info().uss)))
        time.sleep(0.5)
    return samples


def driver_figures(small: Simulated, large: Simulated) -> dict[str, float]:
    """The most memory of the driver in both runs; of the larger one also phase by phase."""
    peaks = [max(memory for _, memory in run.samples) for run in (small, large)]
    listing = [memory for done, memory in large.samples if done == 0]
    working = [memory for done, memory in large.samples if large.shards / 10 <= done < large.shards]
    closing = [memory for done, memory in large.samples if done >= large.shards]
    if not (listing and working and closing):
        raise UnmeasuredError("the run was over before its memory could be read twice; give more --rows")
    return {
        GROWTH: (peaks[1] - peaks[0]) / MIB,
        "driver/peak_mib_of_a_tenth_of_the_rows": peaks[0] / MIB,
        "driver/peak_mib": peaks[1] / MIB,
        "driver/mib_while_listing": max(listing) / MIB,
        "driver/mib_at_a_tenth_of_the_shards": working[0] / MIB,
        "driver/mib_at_the_last_shard": working[-1] / MIB,
        "driver/mib_while_closing": max(closing) / MIB,
    }


def write_urls(path: Path, urls: list[str]) -> None:
    """A table as a user has it."""
    pq.write_table(pa.table({"url": urls, "caption": [f"a photo, number {n}" for n in range(len(urls))]}), path)


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the simulated run (default: 1000000)")
    parser.add_argument("--cores", type=int, default=usable_cpus(), help="cores of the model (default: this machine's)")
    flags = parser.parse_args()
    return verify("ingest_scale", lambda: measure(rows=flags.rows, cores=flags.cores), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
