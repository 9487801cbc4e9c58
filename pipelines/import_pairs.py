"""Read your own images and captions into tars of pairs.

Command: python -m pipelines import_pairs smoke --data /folder
         python -m pipelines import_pairs paper --data "s3://bucket/corpus/*.tar"
Reads:   WebDataset tars (image + .txt or .json), a folder of pictures with same-named .txt files, or tables (Parquet,
         CSV, TSV, JSON, JSON lines, COCO captions) of image paths and captions; one path or several, folders, patterns
         and addresses of remote file systems
Writes:  shard-00000.tar + .parquet + _stats.json (tars keep their numbers), manifest.json
Time:    69 s for 7,670 pictures of 256 px on two busy cores, start of Ray's workers included
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from cogview.config import digest_of, input_field, runtime_field
from cogview.errors import ConfigError
from cogview.locations import DataFile, addresses_of, beside, is_remote
from cogview.records.candidates import Candidate, count_candidates, read_candidates, write_candidates
from cogview.records.folders import list_images, read_captions, read_image_file
from cogview.records.images import ImageSettings
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.records.pair_shards import MAX_SHARD_ROWS, pair_key, store_pair, write_pair_shard
from cogview.records.sources import Source, detect_source
from cogview.records.tables import inspect_table, read_table, require_captions
from cogview.records.tars import check_caption_fields, read_foreign_tar
from cogview.shards.manifest import ShardEntry, atomic_file, file_record
from pipelines.runtime.jobs import Job, JobRun, plan_job
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry
from pipelines.runtime.shard_plan import TAR_HEADERS, TRIED_ROWS, ShardStep, shard_plan_lines, try_rows

CANDIDATES_NAME = "candidates.parquet"
PLANNED_TARS = 8  # that a plan looks into
HAS_TEXT_FILE, TABLE = "has_text_file", "table"  # what a candidate remembers until its picture is opened


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to import and how.

    data: folders, files, patterns, remote addresses; caption_fields: JSON fields or columns with captions, found by
    their usual names if none are given; image_column: of a table; extra_columns: of a table, to keep besides those
    about author and licence; shard_size: pairs to a shard (tars keep theirs); image: how pictures are stored;
    workers: shards at a time, 0 for one on each CPU.
    """

    data: tuple[str, ...] = input_field(default=())
    caption_fields: tuple[str, ...] = ()
    image_column: str = ""
    extra_columns: tuple[str, ...] = ()
    shard_size: int = 10_000
    image: ImageSettings = field(default_factory=ImageSettings)
    workers: int = runtime_field(0)

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size <= MAX_SHARD_ROWS:
            raise ConfigError(f"shard_size={self.shard_size} must lie between 1 and {MAX_SHARD_ROWS}")


PAPER = Config(image=ImageSettings(image_size=256))  # the released model's pictures are 256 px
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, shard_size=1000, image=ImageSettings(image_size=64)),
}


def main(config: Config, run: JobRun) -> None:
    """Find out what the data is, read it shard by shard, and count what became of each candidate."""
    if not config.data:
        raise ConfigError("data is not given; name a folder of tars or pictures, or a table, with --data")
    source = detect_source(config.data)
    if source.kind == "tars":
        check_caption_fields([file.address for file in source.files], config.caption_fields)
        tasks = plan_tars(source.files)
        work = partial(import_tar, output=run.output, config=config)
    else:
        tasks = plan_rows(list_candidates(config, source, output=run.output))
        root = f"{source.folder}/" if source.kind == "images" else source.files[0].address
        work = partial(import_rows, output=run.output, config=config, root=root)
    run.say(f"{', '.join(addresses_of(config.data))}: {source.kind}, {len(tasks)} shards")
    entries = run_shards(work, tasks, folder=run.output, run=run, workers=config.workers)
    close_folder(run, entries, extra={"image_size": config.image.image_size, "stage": "import_pairs"})


def plan(config: Config, *, root: Path) -> Iterator[str]:
    """What `--plan` tells: the shards, and an estimate from the first pictures; of tars the rows are one, too."""
    if not config.data:
        raise ConfigError("data is not given; name a folder of tars or pictures, or a table, with --data")
    source, planned = detect_source(config.data), plan_job(JOB, config, root=root)
    notes = [f"from {', '.join(addresses_of(config.data))}: {source.kind}"]
    listed = planned.output / CANDIDATES_NAME
    if source.kind == "tars":
        tars = source.files[:: max(1, len(source.files) // PLANNED_TARS)]
        each = TRIED_ROWS // len(tars[:TRIED_ROWS]) + 1
        samples = [
            sample
            for tar in tars[:TRIED_ROWS]
            for sample in islice(read_foreign_tar(tar.address, caption_fields=config.caption_fields), each)
        ]
        outcomes = (partial(_adopt, sample, key=pair_key(0, 0), config=config) for sample in samples)
        taken = sum(len(sample.image_bytes) + TAR_HEADERS for sample in samples if isinstance(sample, TextImagePair))
        rows = round(sum(tar.size for tar in source.files) * len(samples) / max(1, taken))
        notes.append("rows: about so many, by the size of some")
        steps = [ShardStep(name="imported", tasks=plan_tars(source.files))]
    else:
        candidates = _table_rows(config, source.files) if source.kind == "table" else _folder_rows(source.folder)
        above = f"{source.folder}/" if source.kind == "images" else source.files[0].address
        tried = list(islice(candidates, TRIED_ROWS))
        outcomes = (partial(_open, row, key=pair_key(0, 0), root=above, config=config) for row in tried)
        rows = len(tried) + sum(1 for _ in candidates)
        steps = [ShardStep(name="imported", tasks=plan_rows(listed))] if listed.exists() else []
        if not steps:
            notes.append(f"shards: {-(-rows // config.shard_size):,} of {config.shard_size:,} rows, not listed yet")
    trial = try_rows(outcomes, lambda tried: [outcome() for outcome in tried], bytes_of=lambda one: _bytes_of(one()))
    return shard_plan_lines(planned, rows=rows, steps=steps, trial=trial, workers=config.workers, notes=notes)


def plan_tars(tars: Sequence[DataFile]) -> list[ShardTask]:
    """One task for each tar, in order. A tar may be large, so its name, size and time of change stand for it."""
    return [
        ShardTask(shard=shard, input_digest=digest_of([tar.name, tar.size, tar.modified]), inputs={"path": tar.address})
        for shard, tar in enumerate(tars)
    ]


def list_candidates(config: Config, source: Source, *, output: Path) -> Path:
    """Write `candidates.parquet` from the rows of tables or a folder's pictures; its path."""
    path = output / CANDIDATES_NAME
    if path.exists():
        return path
    candidates = _table_rows(config, source.files) if source.kind == "table" else _folder_rows(source.folder)
    with atomic_file(path) as file:
        write_candidates(file, candidates, shard_size=config.shard_size)
    return path


def plan_rows(candidates: Path) -> list[ShardTask]:
    """One task for each row group of the candidates."""
    digest = file_record(candidates)["sha256"]
    _, shards = count_candidates(candidates)
    return [ShardTask(shard=shard, input_digest=digest_of([digest, shard])) for shard in range(shards)]


def import_tar(task: ShardTask, *, output: Path, config: Config) -> ShardEntry:
    """On a worker: one foreign tar becomes one shard."""
    samples = read_foreign_tar(task.inputs["path"], caption_fields=config.caption_fields)
    outcomes = (_adopt(sample, key=pair_key(task.shard, row), config=config) for row, sample in enumerate(samples))
    return _write(task, outcomes, output=output)


def import_rows(task: ShardTask, *, output: Path, config: Config, root: str) -> ShardEntry:
    """On a worker: the pictures of one slice of a table or folder become one shard."""
    candidates = read_candidates(output / CANDIDATES_NAME, shard=task.shard)
    outcomes = (
        _open(candidate, key=pair_key(task.shard, row), root=root, config=config)
        for row, candidate in enumerate(candidates)
    )
    return _write(task, outcomes, output=output)


def _write(task: ShardTask, outcomes: Iterator[TextImagePair | Failure], *, output: Path) -> ShardEntry:
    counts = write_pair_shard(output, f"shard-{task.shard:05d}", outcomes, open_file=atomic_file)
    return shard_entry(
        output, task, rows_in=counts.rows, rows_out=counts.ok, rejected=counts.failed, files=counts.files
    )


def _adopt(sample: TextImagePair | Failure, *, key: str, config: Config) -> TextImagePair | Failure:
    """A foreign sample under a key of ours; its own key stays in `extra`."""
    if isinstance(sample, Failure):
        return replace(sample, key=key)
    return store_pair(replace(sample, key=key, extra={**sample.extra, "original_key": sample.key}), config.image)


def _bytes_of(outcome: TextImagePair | Failure) -> int:
    return len(outcome.image_bytes) + TAR_HEADERS if isinstance(outcome, TextImagePair) else 0


def _open(candidate: Candidate, *, key: str, root: str, config: Config) -> TextImagePair | Failure:
    def failure(reason: str, detail: str = "") -> Failure:
        return Failure(key=key, source=candidate.source, reason=reason, detail=detail)

    extra = dict(candidate.extra)
    has_text_file, table = extra.pop(HAS_TEXT_FILE, False), extra.pop(TABLE, root)
    if not candidate.source:
        return failure("image_missing")
    if is_remote(candidate.source):
        return failure("scheme_refused", "an address among paths")
    captions = read_captions(Path(root), candidate.source) if has_text_file else candidate.captions
    if isinstance(captions, Unusable):
        return failure(captions.reason, captions.detail)
    if not captions:
        return failure("caption_missing")
    is_absolute = candidate.source.startswith("/")
    data = read_image_file(candidate.source if is_absolute else beside(table, candidate.source))
    if isinstance(data, Unusable):
        return failure(data.reason, data.detail)
    pair = TextImagePair(key=key, captions=captions, image_bytes=data, source=candidate.source, extra=extra)
    return store_pair(pair, config.image)


def _table_rows(config: Config, tables: Sequence[DataFile]) -> Iterator[Candidate]:
    """The rows of all tables; those of tables after the first remember theirs, for paths are relative to it."""
    for table in tables:
        columns = inspect_table(
            table.address,
            image_column=config.image_column,
            caption_fields=config.caption_fields,
            extra_columns=config.extra_columns,
        )
        if columns.is_web:
            raise ConfigError(
                f"data: {table.address} lists URLs in column {columns.image}; scrape_pairs --table fetches them, and "
                "--image-column names another column"
            )
        rows = read_table(table.address, require_captions(columns, path=table.address))
        known = {} if table is tables[0] else {TABLE: table.address}
        yield from (replace(row, extra={**row.extra, **known}) for row in rows)


def _folder_rows(folder: Path) -> Iterator[Candidate]:
    return (Candidate(source=name, captions=(), extra={HAS_TEXT_FILE: True}) for name in list_images(folder))


JOB = Job(name="import_pairs", version=4, products=("manifest.json",), main=main)
