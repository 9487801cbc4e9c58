"""Watching a command with all that it starts: Ray's daemons included, which outlive their parents and change groups.

Every process inherits its parent's environment, so a mark in the environment finds them all, wherever they went.
"""

import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

MARK = "COGVIEW_BENCHMARK_MARK"
LOOK_EVERY_S = 0.2  # at processes and their CPU time; at their memory only every `interval`, for that is dear
# A fresh machine knows where its programs and its package index are, and nothing of ours.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TZ", "PYENV_ROOT")
KEPT_PREFIXES = ("PIP_", "SSL_", "http_", "https_", "no_", "HTTP_", "HTTPS_", "NO_")


class Sampler(ABC):
    """Looks every `interval` seconds, in a thread of its own, while it is entered."""

    def __init__(self, *, interval: float) -> None:
        self._interval = interval
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_over, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    @abstractmethod
    def _look(self) -> None:
        """One look."""

    def _sample_until_over(self) -> None:
        while not self._is_over.is_set():
            self._look()
            self._is_over.wait(self._interval)


class ProcessWatch(Sampler):
    """Samples the marked processes while it is entered.

    environment: what to start the command with; peak_bytes: the largest sum of their proportional memory (shared pages
    are divided among those who share them); names: of every process that was seen; cpu_seconds: of all of them, up to
    the last look at each.
    """

    def __init__(self, environment: Mapping[str, str], *, interval: float = 1.0) -> None:
        self._mark = uuid.uuid4().hex
        self.environment = {**environment, MARK: self._mark}
        self.peak_bytes = 0
        self.names: set[str] = set()
        self._cpu_seconds: dict[tuple[int, float], float] = {}
        self._memory_every, self._memory_due = interval, 0.0
        super().__init__(interval=min(interval, LOOK_EVERY_S))

    @property
    def cpu_seconds(self) -> float:
        """User and system time so far."""
        return sum(self._cpu_seconds.values())

    def running(self) -> list[psutil.Process]:
        """The marked processes that run now."""
        return list(_marked(self._mark))

    def end_all(self) -> None:
        """Kill what still runs."""
        for process in self.running():
            with suppress(psutil.NoSuchProcess):  # it may have ended by itself just now
                process.kill()

    def wait_for_end(self, *, seconds: float) -> list[psutil.Process]:
        """Those that still run after some seconds of grace."""
        deadline = time.monotonic() + seconds
        while (left := self.running()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _look(self) -> None:
        with_memory = time.monotonic() >= self._memory_due
        if with_memory:
            self._memory_due = time.monotonic() + self._memory_every
        total = 0
        for process in _marked(self._mark):
            try:
                self.names.add(process.name())
                spent = process.cpu_times()
                self._cpu_seconds[process.pid, process.create_time()] = spent.user + spent.system
                total += proportional_bytes(process) if with_memory else 0
            except psutil.Error:
                continue  # it ended between two looks
        self.peak_bytes = max(self.peak_bytes, total)


def proportional_bytes(process: psutil.Process) -> int:
    """Its memory, with shared pages divided among those who share them; where a system cannot say, its own pages."""
    memory = process.memory_full_info()
    return int(getattr(memory, "pss", memory.uss))


def fresh_environment(home: Path) -> dict[str, str]:
    """The environment of a machine that has never seen the project: an empty home, no caches, no settings.

    Where the machine's packages come from (pip's index and certificates) belongs to the machine and is kept.
    """
    home.mkdir(parents=True, exist_ok=True)
    kept = {
        name: value for name, value in os.environ.items() if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)
    }
    pip_config = Path.home() / ".config" / "pip" / "pip.conf"
    if pip_config.is_file():
        kept.setdefault("PIP_CONFIG_FILE", str(pip_config))
    return {**kept, "HOME": str(home), "PIP_CACHE_DIR": str(home / "pip-cache")}


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                yield process
        except (psutil.Error, OSError):
            continue  # another user's, or gone


class PeakMemory(Sampler):
    """The largest resident memory that one of our children's processes ever had, by the kernel's own high-water mark.

    title: how their titles start; worst_bytes: of a single process, 0 where the system keeps no mark; processes: seen.
    """

    def __init__(self, title: str, *, interval: float = 0.25) -> None:
        self._title = title
        self._peaks: dict[int, int] = {}
        super().__init__(interval=interval)

    @property
    def worst_bytes(self) -> int:
        return max(self._peaks.values(), default=0)

    @property
    def processes(self) -> int:
        return len(self._peaks)

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if "".join(process.cmdline()[:1]).startswith(self._title):
                    self._peaks[process.pid] = max(self._peaks.get(process.pid, 0), high_water_mark(process.pid))
            except (psutil.Error, OSError):
                continue  # it ended between two looks


def high_water_mark(pid: int | str = "self") -> int:
    """The largest resident memory that a process ever had, in bytes; 0 where the system keeps no mark."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    marks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return marks[0] if marks else 0
