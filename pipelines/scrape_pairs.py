"""Fetch images and their captions from web pages, tables of URLs or image search into tars of pairs.

Command: python -m pipelines scrape_pairs paper --pages https://example.org/ --fetch.user-agent "ExampleBot/1 (contact)"
         python -m pipelines scrape_pairs paper --table urls.parquet
         python -m pipelines scrape_pairs paper --table "s3://bucket/laion/part-*.parquet" captions.tsv
         python -m pipelines scrape_pairs paper --queries entities.tsv --providers openverse wikimedia
         python -m pipelines scrape_pairs paper --retry runs/paper/scrape_pairs/0123456789ab
Reads:   the web, politely; the smoke preset reads a demo site that it serves itself on the loopback address
Writes:  candidates.parquet, pages.parquet or queries.parquet, shard-00000.tar + .parquet + _stats.json, manifest.json
Time:    the demo's 10,000 images take about 30 s on two cores; the web is as fast as its politeness allows
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.config import digest_of, input_field, runtime_field
from cogview.errors import ConfigError
from cogview.filters.funnel import host_of
from cogview.records.candidates import Candidate, count_candidates, read_candidates, write_candidates
from cogview.records.crawl import NO_LIMIT, Crawl, crawl
from cogview.records.fetch import Fetcher, FetchSettings
from cogview.records.images import ImageSettings
from cogview.records.opt_out import read_opt_out
from cogview.records.pages import DEFAULT_WORDS, Words
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import MAX_SHARD_ROWS, write_pair_shard
from cogview.records.providers import PROVIDERS
from cogview.records.queries import Search, read_queries, search
from cogview.records.retrying import RETRYABLE_REASONS, merge_outcomes, read_statuses, rows_to_retry
from cogview.records.scraping import scrape_pairs
from cogview.records.sources import find_tables
from cogview.records.tables import inspect_table, read_table, require_captions
from cogview.records.tars import read_pairs
from cogview.scenes.site import DemoSite, SiteConfig
from cogview.shards.manifest import ShardEntry, atomic_file, file_record, read_manifest
from pipelines.runtime.cluster import usable_cpus
from pipelines.runtime.display import duration
from pipelines.runtime.jobs import Job, JobRun, plan_job
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry
from pipelines.runtime.shard_plan import ShardStep, shard_plan_lines
from pipelines.tasks.worker_fetcher import worker_fetcher

CANDIDATES_NAME = "candidates.parquet"
PAGES_NAME, QUERIES_NAME = "pages.parquet", "queries.parquet"
CPU_SECONDS = 0.006  # of an image of 0.2 megapixels, measured; a plan's estimate
# A name that cannot exist (RFC 6761), so the pairs of the demo have the same sources whatever port serves them.
DEMO_HOST = "demo.cogview.test"
DEMO_RATE, DEMO_CONNECTIONS = 5000.0, 16  # nobody's server but our own


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to scrape (one of demo, pages, table, queries, retry) and how.

    pages: addresses of pages or sitemaps to start from, whose sites are walked for at most `max_pages` pages and
    `max_depth` links (`sitemaps`: begin with those that robots.txt names, too; `words`: where captions may come from);
    table: image URLs and captions, as files, folders, patterns or remote addresses (`image_column` and `caption_fields`
    if they have unusual names, `extra_columns` to keep besides those about author and licence);
    queries: lists of category<TAB>entity; each of the `providers` is asked for the first `per_query` images of each
    (`endpoints`: other addresses than the public ones);
    retry: the output of an earlier scrape, whose rows that failed for one of `retry_reasons` are asked for again, and
    whose other rows are taken over;
    opt_out: lists of URLs, domains and sha256 of images to leave alone; shard_size: candidates to a shard; image: how
    pictures are stored; fetch: pace and limits; workers: shards at a time, 0 for one on each CPU.
    """

    demo: SiteConfig | None = None
    pages: tuple[str, ...] = ()
    table: tuple[str, ...] = input_field(default=())
    image_column: str = ""
    caption_fields: tuple[str, ...] = ()
    extra_columns: tuple[str, ...] = ()
    max_pages: int = 10_000
    max_depth: int = NO_LIMIT
    sitemaps: bool = False
    words: tuple[Words, ...] = DEFAULT_WORDS
    queries: tuple[str, ...] = input_field(default=())
    providers: tuple[str, ...] = tuple(PROVIDERS)
    per_query: int = 100
    endpoints: Mapping[str, str] = runtime_field(default=MISSING, default_factory=dict)
    retry: Path | None = input_field(default=None)
    retry_reasons: tuple[str, ...] = RETRYABLE_REASONS
    opt_out: tuple[str, ...] = input_field(default=())
    shard_size: int = 10_000
    image: ImageSettings = field(default_factory=ImageSettings)
    fetch: FetchSettings = field(default_factory=FetchSettings)
    workers: int = runtime_field(0)

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size <= MAX_SHARD_ROWS:
            raise ConfigError(f"shard_size={self.shard_size} must lie between 1 and {MAX_SHARD_ROWS}")
        for name in ("max_pages", "per_query"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} reads nothing; use 1 or more")


PAPER = Config(image=ImageSettings(image_size=256))  # the released model's pictures are 256 px
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        # Two shapes teach twice as much as one, and which colour goes with which shape.
        demo=SiteConfig(num_scenes=8000, two_shape_share=0.4),
        shard_size=1000,
        image=ImageSettings(image_size=64),
    ),
}


def main(config: Config, run: JobRun) -> None:
    """List the candidates, fetch them shard by shard, and count what became of each."""
    check_source(config)
    read_opt_out(config.opt_out)  # a list that cannot be read is better known before the first request
    candidates = run.output / CANDIDATES_NAME
    with open_source(config) as fetch:
        if not candidates.exists():
            list_candidates(config, fetch=fetch, run=run)
        workers = config.workers or usable_cpus()  # never left to Ray: the limits of a host are divided by it
        scrape = scrape_shard if config.retry is None else retry_shard
        work = partial(scrape, output=run.output, config=config, fetch=replace(fetch, sharers=workers))
        tasks = plan_shards(candidates)
        imports = () if config.demo else ("torch",)  # scales pictures down; the demo's are small
        entries = run_shards(work, tasks, folder=run.output, run=run, workers=workers, imports=imports)
    if config.retry is not None:
        retried, recovered = (sum(entry.extra[name] for entry in entries) for name in ("retried", "recovered"))
        run.scores.update({"retried": retried, "recovered": recovered})
        run.say(f"{recovered:,} of {retried:,} rows that had failed are pairs now")
    close_folder(run, entries, extra={"image_size": config.image.image_size, "stage": "scrape_pairs"})


def plan(config: Config, *, root: Path) -> Iterator[str]:
    """What `--plan` tells: candidates and shards as far as they are known, and how long politeness makes it take."""
    check_source(config)
    planned = plan_job(JOB, config, root=root)
    listed = planned.output / CANDIDATES_NAME
    listed = config.retry / CANDIDATES_NAME if config.retry and not listed.exists() else listed
    notes, rows, steps = [], 0, list[ShardStep]()
    if listed.exists():
        (rows, shards), tasks = count_candidates(listed), plan_shards(listed)
        hosts = Counter(host_of(row.source) for shard in range(shards) for row in read_candidates(listed, shard=shard))
        steps = [ShardStep(name="scraped", tasks=tasks)]
    else:
        hosts = Counter(host_of(row.source) for row in (read_url_tables(config) if config.table else ()))
        rows = hosts.total() or (config.demo.num_scenes if config.demo else 0)
    if config.pages and not rows:
        notes.append(f"pages: at most {config.max_pages:,} from {', '.join(config.pages)}; images are known after them")
    if hosts and config.demo is None:
        host, most = hosts.most_common(1)[0]
        pace = f"{duration(most / config.fetch.host_rate)} at {config.fetch.host_rate:g} a second"
        notes.append(f"hosts: {len(hosts):,}; {host} has {most:,} of the rows, which take {pace} at least")
    if rows:
        seconds = rows * CPU_SECONDS / (config.workers or usable_cpus())
        notes.append(f"time: about {duration(seconds)} for fetching and decoding; waiting for hosts comes on top")
    return shard_plan_lines(planned, rows=rows, steps=steps, trial=None, workers=config.workers, notes=notes)


def check_source(config: Config) -> None:
    """ConfigError unless exactly one of demo, pages, table, queries and retry is given, and the retry fits."""
    given = [name for name in ("demo", "pages", "table", "queries", "retry") if getattr(config, name)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ConfigError(f"give one of --pages, --table, --queries, --retry and the demo; {found} of them is given")
    if config.retry is not None:
        before = read_manifest(config.retry)["extra"].get("image_size")
        if before != config.image.image_size:
            raise ConfigError(
                f"image.image_size is {config.image.image_size}, but {config.retry} has {before}; give "
                f"--image.image-size {before}, so that old and new pictures have one size"
            )


@contextmanager
def open_source(config: Config) -> Iterator[FetchSettings]:
    """The fetch settings to use; the demo site runs meanwhile, allowed by its name alone."""
    if config.demo is None:
        yield config.fetch
        return
    with DemoSite(config.demo) as site:
        address = site.url.removeprefix("http://")
        policy = replace(config.fetch.policy, resolve={f"{DEMO_HOST}:80": address})
        yield replace(config.fetch, policy=policy, host_rate=DEMO_RATE, host_connections=DEMO_CONNECTIONS)


def list_candidates(config: Config, *, fetch: FetchSettings, run: JobRun) -> None:
    """Write `candidates.parquet`: from the tables, by walking the pages, or as they were."""
    if config.retry is not None:
        with atomic_file(run.output / CANDIDATES_NAME) as copy, open(config.retry / CANDIDATES_NAME, "rb") as file:
            shutil.copyfileobj(file, copy)
        return
    if config.table:
        candidates = read_url_tables(config)
    elif config.queries:
        searched = asyncio.run(ask(config, fetch=fetch, run=run))
        write_queries(searched, run.output / QUERIES_NAME)
        failed = sum(bool(status.reason) for status in searched.statuses)
        run.say(f"{len(searched.statuses):,} searches, {failed} failed, {len(searched.candidates):,} images")
        candidates = iter(searched.candidates)
    else:
        found = asyncio.run(walk(config, fetch=fetch, run=run))
        write_pages(found, run.output / PAGES_NAME)
        refused = Counter(page.reason for page in found.pages if page.reason)
        notes = "".join(f", {count} {reason}" for reason, count in sorted(refused.items()))
        run.say(f"{len(found.pages):,} pages, {len(found.candidates):,} images{notes}")
        candidates = iter(found.candidates)
    with atomic_file(run.output / CANDIDATES_NAME) as file:
        total = write_candidates(file, candidates, shard_size=config.shard_size)
        if total == 0:
            raise ConfigError("no image was found to scrape; check the start pages, robots.txt and the table")


def read_url_tables(config: Config) -> Iterator[Candidate]:
    """The rows of all tables of URLs. ConfigError if one lists local files, or has no captions."""
    for table in find_tables(config.table):
        columns = inspect_table(
            table.address,
            image_column=config.image_column,
            caption_fields=config.caption_fields,
            extra_columns=config.extra_columns,
        )
        if not columns.is_web:
            raise ConfigError(
                f"table: {table.address} lists files in column {columns.image}, no URLs; import_pairs --data reads it"
            )
        yield from read_table(table.address, require_captions(columns, path=table.address))


async def walk(config: Config, *, fetch: FetchSettings, run: JobRun) -> Crawl:
    """Crawl from the start pages, showing how many pages are read."""
    start = (f"http://{DEMO_HOST}/",) if config.demo is not None else config.pages
    async with Fetcher(fetch, opt_out=read_opt_out(config.opt_out)) as fetcher:
        return await crawl(
            fetcher,
            start,
            max_pages=config.max_pages,
            max_depth=config.max_depth,
            words=config.words,
            sitemaps=config.sitemaps,
            on_page=lambda done, known: run.progress(done, known, "pages"),
        )


async def ask(config: Config, *, fetch: FetchSettings, run: JobRun) -> Search:
    """Search for every query, showing how many are answered."""
    async with Fetcher(fetch) as fetcher:
        return await search(
            fetcher,
            read_queries(config.queries),
            providers=config.providers,
            per_query=config.per_query,
            endpoints=config.endpoints,
            on_query=lambda done, total: run.progress(done, total, "searches"),
        )


def write_queries(found: Search, path: Path) -> None:
    """What became of every query: provider, category, query, images, reason."""
    rows = [{**vars(status), **vars(status.query), "query": status.query.text} for status in found.statuses]
    names = ("provider", "category", "query", "reason")
    schema = pa.schema([*((name, pa.string()) for name in names), ("images", pa.int32())])
    with atomic_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")


def write_pages(found: Crawl, path: Path) -> None:
    """What became of every page: url, images, reason."""
    rows = [{"url": page.url, "images": page.images, "reason": page.reason} for page in found.pages]
    schema = pa.schema([("url", pa.string()), ("images", pa.int32()), ("reason", pa.string())])
    with atomic_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")


def plan_shards(candidates: Path) -> list[ShardTask]:
    """One task for each row group of the candidates."""
    digest = file_record(candidates)["sha256"]
    _, shards = count_candidates(candidates)
    return [ShardTask(shard=shard, input_digest=digest_of([digest, shard])) for shard in range(shards)]


def scrape_shard(task: ShardTask, *, output: Path, config: Config, fetch: FetchSettings) -> ShardEntry:
    """On a worker: fetch one shard's candidates and write its files."""
    candidates = read_candidates(output / CANDIDATES_NAME, shard=task.shard)
    with worker_fetcher(output, fetch, opt_out=config.opt_out) as worker:
        pairs = scrape_pairs(enumerate(candidates), shard=task.shard, fetcher=worker.fetcher, settings=config.image)
        counts = write_pair_shard(output, f"shard-{task.shard:05d}", worker.in_step(pairs), open_file=atomic_file)
    return shard_entry(
        output, task, rows_in=len(candidates), rows_out=counts.ok, rejected=counts.failed, files=counts.files
    )


def retry_shard(task: ShardTask, *, output: Path, config: Config, fetch: FetchSettings) -> ShardEntry:
    """On a worker: fetch the failed rows of one shard that are worth it, and write all of its rows anew."""
    assert config.retry is not None
    stem = f"shard-{task.shard:05d}"
    statuses = read_statuses(config.retry / f"{stem}.parquet")
    rows = rows_to_retry(statuses, reasons=config.retry_reasons)
    candidates = read_candidates(output / CANDIDATES_NAME, shard=task.shard)
    recovered = 0

    def counted(outcomes: Iterable[TextImagePair | Failure]) -> Iterator[TextImagePair | Failure]:
        nonlocal recovered
        for outcome in outcomes:
            recovered += isinstance(outcome, TextImagePair)
            yield outcome

    with worker_fetcher(output, fetch, opt_out=config.opt_out) as worker:
        again = ((row, candidates[row]) for row in rows)
        pairs = scrape_pairs(again, shard=task.shard, fetcher=worker.fetcher, settings=config.image)
        outcomes = merge_outcomes(
            statuses,
            pairs=read_pairs(config.retry / f"{stem}.tar"),
            retried=dict.fromkeys(rows),
            fetched=counted(worker.in_step(pairs)),
            opt_out=worker.fetcher.opt_out,
        )
        counts = write_pair_shard(output, stem, outcomes, open_file=atomic_file)
    entry = shard_entry(
        output, task, rows_in=len(statuses), rows_out=counts.ok, rejected=counts.failed, files=counts.files
    )
    return replace(entry, extra={"retried": len(rows), "recovered": recovered})


JOB = Job(name="scrape_pairs", version=4, products=("manifest.json", CANDIDATES_NAME), main=main)
