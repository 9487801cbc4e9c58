"""The only `ray.init`: a small local Ray that keeps to itself, or the cluster that RAY_ADDRESS names.

A local Ray is made for a laptop: as many CPUs as this process may use (two at least, for two training workers), an
object store of 256 MiB, no dashboard, no autoscaler, no usage statistics, no worker that idles between stages. What
daemons and workers print lies in the session folder (`ray_logs()`), not on the screen.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cogview.errors import CogViewError, ConfigError
from pipelines.runtime.failures import Isolated, first_line
from pipelines.runtime.ray_metrics import COLLECTION

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 2**20
MIN_CPUS = 2
LOCAL = "local"
START_ATTEMPTS = 3  # Ray gives itself 30 s, which a busy machine with a cold disk may exceed once
CONNECT_SECONDS = 5.0

# Ray reads these when it is first imported; its daemons and workers inherit them. Values that are set already win.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; setting it silences the warning about it
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_RAISE_ORIGINAL_MAP_EXCEPTION": "1",  # else an error of ours is lost on its way from a worker
    "RAY_DEDUP_LOGS": "0",
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_LOG_TO_DRIVER_EVENT_LEVEL": "ERROR",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 would starve the workers beside any other program of a laptop
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_num_workers_soft_limit": "0",  # idle workers give their memory back,
    "RAY_idle_worker_killing_time_threshold_ms": "10000",  # but not between two steps of one stage
}

# A machine of one's own is not called back by a cloud, and has no Prometheus: no processes for that on its two cores.
LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    COLLECTION: "0",
    "RAY_enable_open_telemetry": "0",
}

_session: dict[str, Path] = {}


class ClusterError(CogViewError):
    """Ray does not start here."""


def ensure_ray(*, address: str | None = None, num_cpus: int | None = None) -> None:
    """Start or join Ray, unless this process has done so already.

    address: of a running cluster (default: RAY_ADDRESS; without either a local Ray starts); num_cpus: of a local Ray.
    Raises ConfigError when no cluster answers there, ClusterError when Ray does not start.
    """
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    for name, value in (ENVIRONMENT | (LOCAL_ENVIRONMENT if address == LOCAL else {})).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address == LOCAL:
        options |= {
            "num_cpus": max(MIN_CPUS, num_cpus or usable_cpus()),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        check_answers(address)
    for attempt in range(START_ATTEMPTS):
        with Isolated() as start, _own_sigterm(), _no_orphans():
            context = ray.init(address=address, **options)
            _session["folder"] = Path(context.address_info["session_dir"])
        if start.error is None:
            if address == LOCAL:
                _end_autoscaler()
            return
        reason = first_line(start.error)
        logger.warning("attempt %d to start Ray failed: %s", attempt + 1, reason)
        ray.shutdown()
    where = "the newest session in /tmp/ray/session_latest/logs" if address == LOCAL else "its logs"
    raise ClusterError(f"Ray ({address}) does not start: {reason}; free memory or CPUs, or look into {where}")


def shutdown_ray() -> None:
    """Stop the local Ray, or leave the cluster. Where Ray never started nothing happens; it is not even imported."""
    _session.clear()
    if "ray" not in sys.modules:
        return
    import ray

    if ray.is_initialized():
        ray.shutdown()


def ray_logs() -> Path | None:
    """The folder with the logs of Ray's daemons and workers; None while Ray is down."""
    return _session["folder"] / "logs" if _session else None


def cluster_words() -> str:
    """The running Ray in a few words: `2 nodes with 32 CPUs and 16 GPUs`."""
    import ray

    nodes, found = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
    gpus = f"{found['GPU']:g} GPUs" if found.get("GPU") else "no GPU"
    return f"{nodes} node{'s' if nodes > 1 else ''} with {found.get('CPU', 0):g} CPUs and {gpus}"


def usable_cpus() -> int:
    """The CPUs that this process may use, which in a container or a batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_answers(address: str) -> None:
    """ConfigError when nothing listens there: Ray itself would end the whole process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # such as `auto`
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray answers there ({error}); start it, or unset it") from error


def _end_autoscaler() -> None:
    """A machine of one's own takes on no nodes and gives none away; Ray would wait a second for this process to end."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any("autoscaler" in word and word.endswith("monitor.py") for word in child.cmdline()):
                child.kill()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Give SIGTERM back to whoever had it: Ray's handler would end the process without a word or a clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _no_orphans() -> Iterator[None]:
    """End the daemons of a start that failed; Ray forgets them."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    has_started = False
    try:
        yield
        has_started = True
    finally:
        daemons = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        for daemon in [] if has_started else daemons:
            with suppress(psutil.NoSuchProcess):
                daemon.kill()
