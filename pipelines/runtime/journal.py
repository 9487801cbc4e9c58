"""The journal of a job's run: everything that was logged, as JSON lines beside the output, whole without MLflow."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

JOURNAL_NAME = "tracking.jsonl"


class Point(NamedTuple):
    """One value of a metric; `milliseconds` is the time since the epoch."""

    key: str
    value: float
    step: int
    milliseconds: int


class Journal:
    """An append-only file of JSON lines that knows the last step of every metric. A torn last line is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: list[Point] = []  # of earlier attempts
        self.last_step: dict[str, int] = {}
        for record in read_journal(path):
            if record["kind"] == "metrics":
                self._remember(record)
        self._file: IO[str] = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (held until close)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")

    def write(self, kind: str, **values: Any) -> None:
        """Append one record. The journal is not synced: it is a log, and no later work reads it."""
        self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}, default=str) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _remember(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        for key, value in record["metrics"].items():
            self.points.append(Point(key, float(value), step, int(record["time"] * 1000)))
            self.last_step[key] = max(step, self.last_step.get(key, step))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a journal, in order; an absent file is an empty journal."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that a killed process was writing
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records
