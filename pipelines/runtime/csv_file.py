"""Numbers that people take further: CSV files, written whole or not at all."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cogview.shards.manifest import atomic_file


def write_csv(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows that all have the columns of the first. ValueError for a row with others, or without rows."""
    rows = list(rows)
    if not rows:
        raise ValueError(f"{path}: there is no row to write")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
