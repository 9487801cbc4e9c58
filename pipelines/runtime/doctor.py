"""`doctor`: whether this machine, and the cluster and tracker that the environment names, can do what jobs ask for.

Each check tries what it tells of: it writes a file and syncs it, binds a port, asks a server. It says what it found
and, where that is too little, what to do. Nothing is changed, and Ray does not start.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import psutil
from packaging.requirements import Requirement

from cogview.errors import CogViewError, ConfigError
from cogview.locations import find_files
from pipelines.runtime.cluster import MIN_CPUS, OBJECT_STORE_BYTES, check_answers, usable_cpus
from pipelines.runtime.mlflow_run import SQLITE, tracking_uri

Verdict = Literal["ok", "note", "bad"]
GIB = 2**30
MIN_MEMORY, MIN_DISK = 4 * GIB, 3 * GIB
MIN_FILES = 1024
TRIAL_BYTES = 16 * 2**20
ANSWER_SECONDS = 5.0
PYTHON = ((3, 11), (3, 13))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. verdict: `note` is no obstacle, `bad` is one; remedy: what to do about either."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """For people."""
        mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[self.verdict]
        return f"{mark}  {self.name:<10} {self.found}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to look at.

    data: files, folders, patterns and remote addresses (s3://bucket/folder) that must be there; root: where runs will
    be written.
    """

    data: tuple[str, ...] = ()
    root: Path = Path("runs")


def show_findings(config: DoctorConfig, *, out: TextIO) -> None:
    """A line for each finding as it comes. UnfitError when one of them is an obstacle."""
    bad = []
    for finding in examine(config.root.absolute(), data=config.data):
        out.write(f"{finding.line}\n")
        out.flush()
        bad += [finding.name] if finding.verdict == "bad" else []
    if bad:
        raise UnfitError(f"{len(bad)} of these stand in the way: {', '.join(bad)}; see what their lines advise")


class UnfitError(CogViewError):
    """Something that jobs need is missing."""


def examine(root: Path, *, data: Sequence[str]) -> Iterator[Finding]:
    """All findings, one after the other. root: where runs will be written; it need not exist."""
    for look in (python, packages, cpus, memory, shared_memory, open_files, gpus, compiler):
        yield look()
    yield from storage(root)
    for ask in (port, ray_cluster):
        yield ask()
    yield tracker(root)
    for address in data:
        yield reachable(address)


def python() -> Finding:
    """The interpreter and the system."""
    version, (first, last) = sys.version_info[:2], PYTHON
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if first <= version <= last:
        return Finding(name="python", verdict="ok", found=found)
    wanted = " to ".join(".".join(map(str, bound)) for bound in PYTHON)
    return Finding(name="python", verdict="note", found=found, remedy=f"tested with {wanted}")


def packages() -> Finding:
    """Whether what the project asks for is installed."""
    required = [Requirement(text) for text in importlib.metadata.requires("cogview") or []]
    wrong, versions = [], []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in ("torch", "ray", "mlflow", "pyarrow"):
            versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted is {requirement.specifier}")
    if wrong:
        return Finding(name="packages", verdict="bad", found=", ".join(wrong), remedy="run `make clean setup`")
    return Finding(name="packages", verdict="ok", found=", ".join(sorted(versions)))


def cpus() -> Finding:
    """Processors that this process may use."""
    number, whole = usable_cpus(), os.cpu_count() or 1
    found = f"{number} of {whole} usable" if number < whole else f"{number}"
    remedy = "" if number >= MIN_CPUS else "two training workers share one; give --num-workers 1"
    return Finding(name="cpus", verdict="ok" if number >= MIN_CPUS else "note", found=found, remedy=remedy)


def memory() -> Finding:
    """Free memory."""
    free = psutil.virtual_memory()
    return _enough(
        "memory", free.available, of=free.total, least=MIN_MEMORY, remedy="the smoke run takes 3 GiB; close programs"
    )


def shared_memory() -> Finding:
    """Where Ray keeps its objects."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(name="shm", verdict="note", found="no /dev/shm", remedy="Ray keeps its objects on disk, slowly")
    usage = shutil.disk_usage(folder)
    remedy = "Ray's objects need it; in a container give --shm-size=1g"
    return _enough("shm", usage.free, of=usage.total, least=OBJECT_STORE_BYTES, remedy=remedy)


def open_files() -> Finding:
    """The limit of open files, of which Ray's daemons and connections take many."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_good = soft >= MIN_FILES or soft == resource.RLIM_INFINITY
    remedy = "" if is_good else f"raise it: ulimit -n {MIN_FILES}"
    return Finding(name="files", verdict="ok" if is_good else "bad", found=f"up to {soft} open", remedy=remedy)


def gpus() -> Finding:
    """What torch sees, and a GPU that is there but not seen."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = [f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices]
        return Finding(name="gpus", verdict="ok", found=f"{len(names)}: {', '.join(names)}")
    if shutil.which("nvidia-smi"):
        cpu_only = "torch is built for CPUs; run `make clean setup TORCH=cuda`"
        remedy = "check its driver with nvidia-smi" if torch.version.cuda else cpu_only
        return Finding(name="gpus", verdict="note", found="one is here that torch cannot use", remedy=remedy)
    return Finding(name="gpus", verdict="ok", found="none; everything runs on the CPU")


def compiler() -> Finding:
    """For compiled layers."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return Finding(name="compiler", verdict="note", found="none", remedy="--is-compiled needs one, such as g++")
    return Finding(name="compiler", verdict="ok", found=found)


def storage(root: Path) -> Iterator[Finding]:
    """Room where runs and Ray's logs are written, and how fast a synced file is there."""
    for name, folder in (("runs", root), ("ray", Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())))):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        usage = shutil.disk_usage(there)
        remedy = f"free space, or choose another {'--root' if name == 'runs' else 'folder with RAY_TMPDIR'}"
        finding = _enough(name, usage.free, of=usage.total, least=MIN_DISK, remedy=remedy)
        try:
            speed = write_speed(there)
        except OSError as error:
            yield Finding(name=name, verdict="bad", found=f"{there} cannot be written: {error.strerror}", remedy=remedy)
            continue
        found = f"{there}: {finding.found}, {speed / 2**20:.0f} MiB/s with a sync"
        yield Finding(name=name, verdict=finding.verdict, found=found, remedy=finding.remedy)


def write_speed(folder: Path) -> float:
    """Bytes a second of a file that is written, synced and removed again."""
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".cogview-doctor-") as file:
        file.write(os.urandom(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())
    return TRIAL_BYTES / (time.perf_counter() - started)


def port() -> Finding:
    """Whether a server may listen on the loopback address."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            found = f"127.0.0.1:{server.getsockname()[1]} could be listened on"
    except OSError as error:
        remedy = "a local Ray needs that; check the firewall or the sandbox"
        return Finding(name="ports", verdict="bad", found=f"127.0.0.1 refuses: {error.strerror}", remedy=remedy)
    return Finding(name="ports", verdict="ok", found=found)


def ray_cluster() -> Finding:
    """The cluster that RAY_ADDRESS names, if it names one."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding(name="cluster", verdict="ok", found="none named; jobs start a Ray of their own")
    try:
        check_answers(address)
    except ConfigError as error:
        return Finding(name="cluster", verdict="bad", found=str(error))
    return Finding(name="cluster", verdict="ok", found=f"{address} answers")


def tracker(root: Path) -> Finding:
    """Where MLflow writes."""
    uri = tracking_uri(root)
    if uri.startswith(SQLITE):
        return Finding(name="mlflow", verdict="ok", found=f"{uri}, a file beside the runs")
    if not uri.startswith(("http://", "https://")):
        return Finding(name="mlflow", verdict="ok", found=uri)
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS):
            return Finding(name="mlflow", verdict="ok", found=f"{uri} answers")
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        remedy = "jobs go on and keep what it misses in a journal; start it, or unset MLFLOW_TRACKING_URI"
        return Finding(name="mlflow", verdict="note", found=f"{uri} does not answer ({reason})", remedy=remedy)


def reachable(address: str) -> Finding:
    """Data, here or in a store of objects."""
    try:
        files = find_files([address], suffixes=(), setting="data")
    except ConfigError as error:
        return Finding(name="data", verdict="bad", found=str(error))
    size = sum(max(0, file.size) for file in files)
    return Finding(name="data", verdict="ok", found=f"{address}: {len(files):,} files, {size / GIB:.2f} GiB")


def _enough(name: str, free: int, *, of: int, least: int, remedy: str) -> Finding:
    found = f"{free / GIB:.1f} of {of / GIB:.1f} GiB free"
    is_good = free >= least
    return Finding(name=name, verdict="ok" if is_good else "bad", found=found, remedy="" if is_good else remedy)
