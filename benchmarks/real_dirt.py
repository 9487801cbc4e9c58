"""Real tables, photos and emoji: every column is found, every row and every picture is accounted for.

Command: make verify NAME=real_dirt
The tables are lists of URLs as people publish them: Parquet, TSV and CSV, with a header or without, and a bare list;
nothing is fetched. The tars are imported by the real job. The data lie beside the checkout, in ../shared/data.
"""

import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.errors import ConfigError
from cogview.records.pair import Unusable
from cogview.records.tables import TableColumns, inspect_table, read_table, require_captions
from cogview.records.tars import IMAGE_SUFFIXES, read_pairs, split_member_name
from cogview.records.urls import normalise_url
from cogview.shards.manifest import read_manifest
from pipelines.import_pairs import JOB, PRESETS
from pipelines.runtime.cluster import shutdown_ray
from pipelines.runtime.display import PlainDisplay
from pipelines.runtime.jobs import run_job

DATA = REPOSITORY.parent / "shared" / "data"
# What a person sees in these files: where the images are, where the captions, and how many rows there are.
TABLES: Mapping[str, tuple[TableColumns, int]] = {
    "conceptual_captions_validation.tsv": (
        TableColumns(image="column_2", captions=("column_1",), is_web=True, has_header=False),
        15_833,
    ),
    "img2dataset_test_1000.parquet": (TableColumns(image="URL", captions=("TEXT",), is_web=True), 1000),
    "img2dataset_test_10000.parquet": (TableColumns(image="URL", captions=("TEXT",), is_web=True), 10_000),
    "img2dataset_test_1000.txt": (
        TableColumns(image="column_1", captions=(), is_web=True, has_header=False),
        1000,
    ),
    "unsplash_lite_manifest.csv": (
        TableColumns(image="column_1", captions=("column_2",), is_web=False, has_header=False),
        328,
    ),
}
BARS = (
    Bar(figure="tables/files", op="==", value=len(TABLES)),
    Bar(figure="tables/with_right_columns", op="==", value=len(TABLES)),
    Bar(figure="tables/rows_missing", op="==", value=0),
    Bar(figure="tables/rows_without_address", op="==", value=0),
    Bar(figure="photos/unaccounted", op="==", value=0),
    Bar(figure="photos/kept", op="==", value=1011),
    Bar(figure="photos/without_licence", op="==", value=0),
    Bar(figure="emoji/unaccounted", op="==", value=0),
    Bar(figure="emoji/kept", op="==", value=7670),
    Bar(figure="emoji/without_licence", op="==", value=0),
)


def measure() -> Figures:
    """Read every table, import every tar."""
    if not DATA.is_dir():
        raise UnmeasuredError(f"{DATA} does not exist; the real tables, photos and emoji belong there")
    figures: dict[str, int] = table_figures()
    with tempfile.TemporaryDirectory(prefix="cogview-real-dirt-") as folder:
        for name in ("photos", "emoji"):
            figures |= {f"{name}/{figure}": count for figure, count in imported(name, Path(folder)).items()}
        shutdown_ray()
    return figures


def table_figures() -> dict[str, int]:
    """What is found in the tables, and what of it no fetcher would ask for."""
    files = sorted(path.name for path in (DATA / "url_lists").iterdir())
    right = missing = without = rows_in_all = uncaptioned = 0
    refused: Counter[str] = Counter()
    for name in files:
        columns = inspect_table(DATA / "url_lists" / name)
        expected, rows_expected = TABLES.get(name, (None, 0))
        right += columns == expected
        rows = list(read_table(DATA / "url_lists" / name, columns))
        say(f"{name}: {columns.image} and {', '.join(columns.captions) or 'no captions'}, {len(rows):,} rows")
        missing += abs(len(rows) - rows_expected)
        without += sum(not row.source for row in rows)
        rows_in_all += len(rows)
        uncaptioned += sum(not row.captions for row in rows)
        if columns.is_web:
            answers = (normalise_url(row.source) for row in rows)
            refused.update(answer.reason for answer in answers if isinstance(answer, Unusable))
        if not columns.captions:
            require_refusal(columns, name)
    return {
        "tables/files": len(files),
        "tables/with_right_columns": right,
        "tables/rows": rows_in_all,
        "tables/rows_missing": missing,
        "tables/rows_without_address": without,
        "tables/rows_without_caption": uncaptioned,
        **{f"tables/{reason}": count for reason, count in sorted(refused.items())},
    }


def require_refusal(columns: TableColumns, name: str) -> None:
    """UnmeasuredError unless a bare list of addresses is refused in words before anything is fetched."""
    try:
        require_captions(columns, path=name)
    except ConfigError:
        return
    raise UnmeasuredError(f"{name} has no captions, and nobody said so")


def imported(name: str, folder: Path) -> dict[str, int]:
    """Import a folder of tars, and compare what came out with the names in the tars, one by one."""
    config = replace(PRESETS["paper"], data=(str(DATA / name),))
    done = run_job(JOB, config, root=folder / name, display=PlainDisplay([JOB.name], stream=sys.stderr))
    manifest = read_manifest(done.output, deep=True)
    pairs = [pair for path in sorted(done.output.glob("*.tar")) for pair in read_pairs(path)]
    rejected = sum(manifest["rejected"].values())
    there = Counter(key for path in sorted((DATA / name).glob("*.tar")) for key in image_keys(path))
    kept = Counter(str(pair.extra["original_key"]) for pair in pairs)
    return {
        "in": manifest["rows_in"],
        "kept": len(pairs),
        "rejected": rejected,
        "captions": sum(len(pair.captions) for pair in pairs),
        "without_licence": sum(not pair.extra.get("license") for pair in pairs),
        "unaccounted": abs((there - kept).total() - rejected) + (kept - there).total(),
    }


def image_keys(path: Path) -> list[str]:
    """The names of the pictures in a tar."""
    with tarfile.open(path) as tar:
        parts = [split_member_name(name) for name in tar.getnames()]
    return [base.rpartition("/")[2] for base, suffix in parts if suffix in IMAGE_SUFFIXES]


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    return verify("real_dirt", measure, bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
