"""Our figures at the address that Prometheus reads, of a Ray that collects them; nothing where none are collected."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime.ray_metrics import COLLECTION

NEEDED = ("opencensus", "prometheus_client", "aiohttp_cors", "colorful")  # of Ray's agent on each node
SECONDS = 120
SCRIPT = """
import json, sys, time, urllib.request
from pathlib import Path
import ray
from cogview.shards.manifest import ShardEntry
from pipelines.runtime.ray_metrics import count_rows, show_training
from pipelines.runtime.shard_jobs import ShardTask, run_shards, shard_entry
from tests.pipelines.pair_folders import QuietDisplay
from types import SimpleNamespace

def work(task):
    counts = {"rows_in": 7, "rows_out": 4, "rejected": {"too_small": 3}}
    return ShardEntry(shard=task.shard, **counts, input_digest=task.input_digest)

ray.init(address="local", num_cpus=1, include_dashboard=True, log_to_driver=False, dashboard_port=0)
folder = Path(sys.argv[1]) / "filter_pairs" / "0123"
folder.mkdir(parents=True)
run = SimpleNamespace(progress=lambda *words: None)
run_shards(work, [ShardTask(shard=n, input_digest=str(n)) for n in range(2)], folder=folder, run=run)
show_training("pretrain", {"loss": 1.5})
address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
found, end = [], time.monotonic() + 60
while len(found) < 3 and time.monotonic() < end:
    time.sleep(1)
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    found = [line for line in text.splitlines() if line.startswith("ray_cogview_")]
print(json.dumps(found))
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="Ray's agent for Prometheus is not installed: pip install 'cogview[cluster]'",
)
@pytest.mark.ray
def test_prometheus_reads_rows_and_losses(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, COLLECTION: "1", "RAY_enable_open_telemetry": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout.splitlines()[-1])
    for name, tags, value in (
        ("rows_total", ('job="filter_pairs"', 'outcome="kept"'), 8.0),
        ("rows_total", ('job="filter_pairs"', 'outcome="too_small"'), 6.0),
        ("training", ('job="pretrain"', 'metric="loss"'), 1.5),
    ):
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f"ray_cogview_{name}") and all(tag in line for tag in tags)
        ]
        assert sum(values) == value, lines


@pytest.mark.ray
def test_a_local_ray_is_told_to_collect_nothing() -> None:
    script = (
        "import os\n"
        "from pipelines.runtime.cluster import ensure_ray\n"
        "from pipelines.runtime.ray_metrics import COLLECTION, _is_collected\n"
        "ensure_ray(num_cpus=2)\n"
        "print(os.environ[COLLECTION], _is_collected())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in (COLLECTION, "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["0", "False"]
