"""Our own figures among Ray's metrics: Prometheus reads them from a cluster's nodes, Grafana draws them.

`ray_cogview_rows_total{job, outcome}`: rows of finished shards, `kept`, or the reason why not;
`ray_cogview_training{job, metric}`: what a training logged last, such as its loss or its tokens per second.
A local Ray collects nothing (`pipelines.runtime.cluster.LOCAL_ENVIRONMENT`), and then nothing is said.
"""

import functools
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cogview.shards.manifest import ShardEntry

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

COLLECTION = "RAY_enable_metrics_collection"
KEPT = "kept"


def count_rows(job: str, entry: ShardEntry) -> None:
    """Add a shard's rows, by what became of them."""
    if _is_collected():
        for outcome, number in {KEPT: entry.rows_out, **entry.rejected}.items():
            if number:
                _rows().inc(number, tags={"job": job, "outcome": outcome})


def show_training(job: str, numbers: Mapping[str, float]) -> None:
    """Set what a training has logged."""
    if _is_collected():
        for metric, value in numbers.items():
            _training().set(value, tags={"job": job, "metric": metric})


def _is_collected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and os.environ.get(COLLECTION) != "0"


@functools.cache
def _rows() -> "Counter":
    from ray.util.metrics import Counter

    return Counter("cogview_rows", description="Rows of finished shards.", tag_keys=("job", "outcome"))


@functools.cache
def _training() -> "Gauge":
    from ray.util.metrics import Gauge

    return Gauge("cogview_training", description="What a training logged last.", tag_keys=("job", "metric"))
