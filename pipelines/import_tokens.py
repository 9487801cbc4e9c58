"""Read token rows that CogView's or CogView2's own tools have made into token shards, checked row by row.

Command: python -m pipelines import_tokens cogview --data FILE --text-tokenizer ... --image-tokenizer ...
Reads:   a file or folder of int32 rows (cogview: 64 text ids and 1,024 codes; cogview2: 112 and 400), or an LMDB of
         pickles, of which nothing is run; the output folders of the tokenizers that made the rows (import_weights)
Writes:  train/shard-00000.arrow, validation/shard-00000.arrow, rejected/shard-00000.parquet, manifest.json
Time:    some thousand rows a second on each core
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cogview.config import digest_of, input_field, runtime_field
from cogview.errors import ConfigError
from cogview.records.captions import clean_caption
from cogview.records.pair import Failure
from cogview.shards.integer_rows import GRIDS, RowLayout, map_rows, read_row
from cogview.shards.manifest import MANIFEST_NAME, ShardEntry, atomic_file, shard_name
from cogview.shards.pickled_rows import open_lmdb, read_pickled_row
from cogview.shards.schema import SPLITS, TokenOrigin
from cogview.shards.split import HASH_RANGE, split_of
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry
from pipelines.tasks.origins import origin_of

REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "source", "reason", "detail")])


@dataclass(frozen=True, kw_only=True)
class Config:
    """data: a file, a folder of .bin files, or an LMDB; text_tokenizer, image_tokenizer: what the rows were made with.

    layout: how the rows are stored; grid: codes along one side of a picture (0: 32, of cogview2 20);
    validation_fraction: share of the rows that is held out; shard_size: rows to a shard; workers: shards at a time, 0
    for one on each CPU.
    """

    data: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    layout: Literal["cogview", "cogview2", "lmdb"] = "cogview"
    grid: int = 0
    validation_fraction: float = 0.001
    shard_size: int = 50_000
    workers: int = runtime_field(0)

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1")
        if self.shard_size < 1 or self.grid < 0:
            raise ConfigError(f"shard_size is {self.shard_size} and grid is {self.grid}; give positive numbers")


COGVIEW = Config()
PRESETS: dict[str, Config] = {
    "cogview": COGVIEW,
    "cogview2": replace(COGVIEW, layout="cogview2"),
    "lmdb": replace(COGVIEW, layout="lmdb"),
    "smoke": replace(COGVIEW, grid=8, validation_fraction=0.05),
}


def main(config: Config, run: JobRun) -> None:
    """Plan the shards, read them, close the folder."""
    producers = {"data": "another tool", "text_tokenizer": "import_weights", "image_tokenizer": "import_weights"}
    folders = given_folders(config, producers)
    origin = token_origin(config, text=folders["text_tokenizer"], image=folders["image_tokenizer"])
    work = ImportShard(config=config, origin=origin, text_tokenizer=folders["text_tokenizer"], output=run.output)
    tasks = plan_shards(config, data=folders["data"], origin=origin)
    entries = run_shards(work, tasks, folder=run.output, run=run, workers=config.workers, note="imported")
    rows = {f"rows_{split}": sum(entry.extra[f"rows_{split}"] for entry in entries) for split in SPLITS}
    close_folder(run, entries, extra={**origin.stored, **rows})
    run.scores.update({**rows, "grid": origin.grid})
    run.say(f"{rows['rows_train']:,} rows to train on, {rows['rows_validation']:,} held out")


def token_origin(config: Config, *, text: Path, image: Path) -> TokenOrigin:
    """What the rows were made with, by the word of whoever names the tokenizers."""
    pieces, codes = TextTokenizer.load(text), load_image_tokenizer(image)
    return origin_of(pieces, codes, grid=config.grid or GRIDS.get(config.layout, GRIDS["cogview"]))


def row_layout(config: Config, origin: TokenOrigin) -> RowLayout:
    """The layout of a row of integers; an LMDB's ids are CogView's."""
    return RowLayout(
        layout="cogview" if config.layout == "lmdb" else config.layout,
        grid=origin.grid,
        num_image_codes=origin.num_image_codes,
        num_text_pieces=origin.num_text_pieces,
    )


def plan_shards(config: Config, *, data: Path, origin: TokenOrigin) -> list[ShardTask]:
    """One task for every `shard_size` rows of a file; files follow each other by name."""
    if config.layout == "lmdb":
        with open_lmdb(data) as rows:
            counts = [(data, len(rows))]
    else:
        files = [data] if data.is_file() else sorted(data.glob("*.bin"))
        if not files:
            raise ConfigError(f"data: {data} holds no .bin files; name a file, or give another --layout")
        layout = row_layout(config, origin)
        counts = [(path, len(map_rows(path, layout=layout))) for path in files]
    slices = [
        (path, start, min(count, start + config.shard_size))
        for path, count in counts
        for start in range(0, count, config.shard_size)
    ]
    return [
        ShardTask(
            shard=shard,
            input_digest=digest_of([path.name, start, stop]),
            inputs={"path": str(path), "start": start, "stop": stop},
        )
        for shard, (path, start, stop) in enumerate(slices)
    ]


@dataclass(frozen=True, kw_only=True)
class ImportShard:
    """The work on one shard."""

    config: Config
    origin: TokenOrigin
    text_tokenizer: Path
    output: Path

    def __call__(self, task: ShardTask) -> ShardEntry:
        """On a worker: check the rows of one slice and write those that are sound."""
        threshold = int(self.config.validation_fraction * HASH_RANGE)
        rows: dict[str, list[TokenRow]] = {split: [] for split in SPLITS}
        rejected: list[Failure] = []
        count = 0
        for outcome in self._read(task):
            count += 1
            if isinstance(outcome, Failure):
                rejected.append(outcome)
            else:
                rows[split_of(outcome[0].key, threshold=threshold)].extend(outcome)
        return self._write(task, rows, rejected, count=count)

    def _read(self, task: ShardTask) -> Iterator[list[TokenRow] | Failure]:
        path, numbers = Path(task.inputs["path"]), range(task.inputs["start"], task.inputs["stop"])
        text, layout = TextTokenizer.load(self.text_tokenizer), row_layout(self.config, self.origin)
        if self.config.layout == "lmdb":
            with open_lmdb(path) as values:
                for number in numbers:
                    yield self._row(path, number, unpickled(values[number], text=text, origin=self.origin), text)
            return
        rows = map_rows(path, layout=layout)
        for number in numbers:
            yield self._row(path, number, read_row(rows[number], layout=layout), text)

    def _row(
        self, path: Path, number: int, found: tuple[list[list[int]], npt.NDArray[np.uint16]] | str, text: TextTokenizer
    ) -> list[TokenRow] | Failure:
        key, source = f"{clean_caption(path.stem)[:32]}_{number:09d}", f"{path.name}/{number}"
        if isinstance(found, str):
            return Failure(key=key, source=source, reason=found)
        texts, codes = found
        return [
            TokenRow(
                key=key,
                text=text.decode(pieces),
                text_ids=np.array(pieces, np.int32),
                image_codes=codes,
                source=source,
            )
            for pieces in texts
        ]

    def _write(
        self, task: ShardTask, rows: dict[str, list[TokenRow]], rejected: Sequence[Failure], *, count: int
    ) -> ShardEntry:
        name, rejects = shard_name(task.shard, "arrow"), f"rejected/{shard_name(task.shard, 'parquet')}"
        for split in SPLITS:
            write_token_shard(self.output / split / name, rows[split], origin=self.origin)
        with atomic_file(self.output / rejects) as file:
            table = pa.Table.from_pylist([asdict(failure) for failure in rejected], schema=REJECTED_SCHEMA)
            pq.write_table(table, file, compression="zstd")
        entry = shard_entry(
            self.output,
            task,
            rows_in=count,
            rows_out=count - len(rejected),
            rejected=Counter(failure.reason for failure in rejected),
            files=[*(f"{split}/{name}" for split in SPLITS), rejects],
        )
        return replace(entry, extra={f"rows_{split}": len(rows[split]) for split in SPLITS})


def unpickled(
    value: bytes | None, *, text: TextTokenizer, origin: TokenOrigin
) -> tuple[list[list[int]], npt.NDArray[np.uint16]] | str:
    """The texts and codes of an LMDB's value, or why it has none: row_missing, pickle_refused, pickle_damaged,
    codes_out_of_range, codes_of_another_grid, text_out_of_range, text_missing."""
    if value is None:
        return "row_missing"
    found = read_pickled_row(value)
    if len(found) == 1:
        return found[0]
    words, codes = found
    has_all = codes.size == origin.grid**2
    if not has_all or int(codes.min()) < 0 or int(codes.max()) >= origin.num_image_codes:
        return "codes_out_of_range" if has_all else "codes_of_another_grid"
    if isinstance(words, str):
        pieces = text.encode(clean_caption(words))
    else:
        pieces = [word - origin.num_image_codes for word in words if word != -1]
    if not pieces:
        return "text_missing"
    if min(pieces) < 0 or max(pieces) >= origin.num_text_pieces:
        return "text_out_of_range"
    return [pieces], codes.astype(np.uint16)


JOB = Job(name="import_tokens", version=1, products=(MANIFEST_NAME,), main=main)
