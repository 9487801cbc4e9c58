"""How fast token rows come back, one after the other and in random order, beside WebDataset and Ray Data.

Command: make verify NAME=shard_reading [ARGS="--rows 200000"]
Each row has 1,024 codes and up to 64 text ids, as at the paper's size. All read the same rows from the page cache into
arrays: ours on one core, from shards as tokenize_pairs writes them, in batches of 512 and with its checks of every id;
random order is that of training. Ray Data reads Parquet, for it reads no Arrow files in place, with two cores;
WebDataset reads a tenth of the rows on one core, from tars with one member for each array.
"""

import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from benchmarks.tar_files import add_file
from cogview.shards.manifest import ShardEntry, shard_name, write_manifest
from cogview.shards.order import SampleOrder
from cogview.shards.reader import TokenShards
from cogview.shards.schema import SPLITS, TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from pipelines.runtime.cluster import ensure_ray, shutdown_ray

GRID, MAX_TEXT, NUM_CODES, NUM_PIECES = 32, 64, 8192, 50_000
SHARD_ROWS, BATCH = 10_000, 512
WEBDATASET_SHARE = 10
TURNS = 3  # the best counts: what else the machine does only slows
ORIGIN = TokenOrigin(
    text_tokenizer="0" * 64,
    image_tokenizer="0" * 64,
    vocabulary="0" * 64,
    num_image_codes=NUM_CODES,
    num_text_pieces=NUM_PIECES,
    grid=GRID,
)
BARS = (
    Bar(figure="ours/sequential/records_per_second", op=">=", value=300_000),
    Bar(figure="ours/random/records_per_second", op=">=", value=100_000),
)


def measure(*, rows: int) -> Figures:
    """Write the rows in three forms, then read each."""
    with tempfile.TemporaryDirectory(prefix="cogview-shard-reading-") as name:
        folder = Path(name)
        say(f"writing {rows:,} rows")
        write_shards(folder / "tokens", rows)
        shards = TokenShards.open(folder / "tokens")
        write_tars(folder / "tars", shards, rows=rows // WEBDATASET_SHARE)
        write_parquet(folder / "parquet", shards)
        order = SampleOrder(num_rows=rows, batch_size=BATCH, seed=0)
        steps = rows // BATCH
        figures: dict[str, float | int | str] = {"rows": rows, "bytes_per_row": size_of(folder / "tokens") / rows}
        readers: dict[str, Callable[[], Iterator[int]]] = {
            "ours/sequential": lambda: (read(shards, np.arange(n * BATCH, (n + 1) * BATCH)) for n in range(steps)),
            "ours/random": lambda: (read(shards, order.indices(n)) for n in range(steps)),
            "webdataset/sequential": lambda: read_tars(folder / "tars"),
            "ray_data/sequential": lambda: read_with_ray(folder / "parquet"),
        }
        for reader, records in readers.items():
            say(reader)
            figures[f"{reader}/records_per_second"] = rate(records)
    shutdown_ray()
    return figures


def rate(records: Callable[[], Iterator[int]]) -> float:
    """Records in a second, of the best turn. records: yields how many each batch held."""
    best = 0.0
    for _ in range(TURNS):
        started = time.perf_counter()
        count = sum(records())
        best = max(best, count / (time.perf_counter() - started))
    return best


def read(shards: TokenShards, indices: np.ndarray) -> int:
    """One batch with the project's reader."""
    return len(shards.rows(indices, with_texts=False))


def read_tars(folder: Path) -> Iterator[int]:
    """All samples, as arrays."""
    urls = sorted(str(path) for path in folder.iterdir())
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        codes, ids = np.frombuffer(sample["codes"], np.uint16), np.frombuffer(sample["ids"], np.int32)
        yield int(len(codes) == GRID**2 and len(ids) > 0)


def read_with_ray(folder: Path) -> Iterator[int]:
    """All rows in batches, as arrays."""
    ensure_ray(num_cpus=2)
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for batch in ray.data.read_parquet(str(folder)).iter_batches(batch_size=BATCH, batch_format="numpy"):
        yield len(batch["image_codes"])


def write_shards(folder: Path, rows: int) -> None:
    """Token shards of random rows, closed by a manifest."""
    generator = np.random.default_rng(0)
    entries = []
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        codes = generator.integers(0, NUM_CODES, (count, GRID**2), dtype=np.uint16)
        lengths = generator.integers(1, MAX_TEXT + 1, count)
        ids = generator.integers(0, NUM_PIECES, (count, MAX_TEXT), dtype=np.int32)
        made = [
            TokenRow(
                key=f"{shard:05d}_{row:05d}",
                text="a caption of some length, as captions are",
                text_ids=ids[row, : lengths[row]],
                image_codes=codes[row],
                source="https://example.org/picture.jpg",
            )
            for row in range(count)
        ]
        names = {split: f"{split}/{shard_name(shard, 'arrow')}" for split in SPLITS}
        files = {
            name: write_token_shard(folder / name, made if split == "train" else [], origin=ORIGIN)
            for split, name in names.items()
        }
        entries.append(ShardEntry(shard=shard, rows_in=count, rows_out=count, files=files))
    write_manifest(folder, entries, extra={**ORIGIN.stored, "rows_train": rows, "rows_validation": 0})


def write_tars(folder: Path, shards: TokenShards, *, rows: int) -> None:
    """The first rows as tars of two members for each."""
    folder.mkdir()
    for shard, start in enumerate(range(0, rows, SHARD_ROWS)):
        found = shards.rows(np.arange(start, min(rows, start + SHARD_ROWS)))
        with tarfile.open(folder / shard_name(shard, "tar"), "w") as tar:
            for key, ids, codes in zip(found.keys, found.text_ids, found.image_codes, strict=True):
                for suffix, array in (("codes", codes), ("ids", ids)):
                    add_file(tar, f"{key}.{suffix}", array.tobytes())


def write_parquet(folder: Path, shards: TokenShards) -> None:
    """The token columns of the same shards as Parquet files."""
    folder.mkdir()
    for path in sorted((shards.folder / "train").iterdir()):
        table = pa.ipc.open_file(path).read_all().select(["text_ids", "image_codes"])
        pq.write_table(table, folder / path.with_suffix(".parquet").name)


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="rows to write and read (default: 200000)")
    flags = parser.parse_args()
    return verify("shard_reading", lambda: measure(rows=flags.rows), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
