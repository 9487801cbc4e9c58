"""What the benchmark of Table 1 takes for the same, and for another, output."""

import json
from pathlib import Path

import numpy as np

from benchmarks.table1 import compared, done_share, table_figures


def write_output(folder: Path, *, value: float) -> Path:
    row = {"side": "drawn", "score": "FD[x]-0", "value": value}
    (folder / "drawn/shard-00000.features").mkdir(parents=True)
    np.save(folder / "drawn/shard-00000.features/blur-0.npy", np.full((2, 2), value, np.float32))
    (folder / "scores.json").write_text(json.dumps({"scores": [row]}))
    return folder


def test_equal_outputs_differ_in_nothing(tmp_path: Path) -> None:
    first, second = (write_output(tmp_path / name, value=1.0) for name in ("first", "second"))
    assert compared(first, second) == {
        "scores that differ after kills": 0,
        "files that differ after kills": 0,
        "scores": 1,
        "files": 2,
    }


def test_another_value_or_a_missing_file_is_found(tmp_path: Path) -> None:
    first = write_output(tmp_path / "first", value=1.0)
    second = write_output(tmp_path / "second", value=1.0 + 1e-6)
    assert compared(first, second)["scores that differ after kills"] == 1
    assert compared(first, second)["files that differ after kills"] == 2
    (second / "drawn/shard-00000.features/blur-0.npy").unlink()
    assert compared(first, second)["files that differ after kills"] == 2


def test_the_table_counts_the_blurs_at_which_recovered_pictures_are_nearer() -> None:
    values = {"drawn": (3.0, 2.0), "recovered": (1.0, 2.5)}
    rows = [
        {"side": side, "score": f"FD[x]-{radius}", "value": value}
        for side, pair in values.items()
        for radius, value in zip((0, 1), pair, strict=True)
    ]
    assert table_figures(rows)["blurs at which recovered pictures are nearer than drawn ones"] == 1


def test_nothing_is_done_before_there_is_a_plan(tmp_path: Path) -> None:
    assert done_share(tmp_path) == 0.0
