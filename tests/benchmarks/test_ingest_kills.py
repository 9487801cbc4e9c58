"""A few kills of the benchmark's fifty, on one of its jobs."""

import pytest

from benchmarks.harness import Bar
from benchmarks.ingest_kills import bars, measure


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_doubled_or_altered_by_kills() -> None:
    figures = measure(kills=2, seeds=1, minutes=10, jobs=("import_pairs",))
    wanted: list[Bar] = [bar for bar in bars(2) if bar.figure != "kills/writer"]
    assert [bar.figure for bar in wanted if not bar.is_met(figures)] == []
    assert figures["files"] > 12
