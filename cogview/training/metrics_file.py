"""A training run's metrics on disk: one JSON line for each logged step, and none twice, whatever was killed when."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class MetricsFile:
    """An append-only file: after a resume, lines behind the checkpoint are dropped, for they will be written again."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= first_step] if first_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; it has at least `step`."""
        with open(self.path, "a") as file:
            file.write(json.dumps(dict(line)) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, none if there is none; a line cut by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            logger.warning("%s: a cut line is left out", path)
    return found
