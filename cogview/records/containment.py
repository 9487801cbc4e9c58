"""Decoding that kills its process or never ends, kept from taking anything else along.

Image readers are C code that is fed with bytes from anywhere; some day one of them crashes or hangs on a picture. Work
on a shard runs inside `contained()`:

* At first pictures are decoded in the worker itself, at no cost but an alarm clock of the operating system (about two
  microseconds). A picture that takes longer than the limit ends the worker, even where C code keeps Python's lock.
* A worker that died is started again by whoever runs it, now with `apart`: each picture is decoded in a child process.
  One that kills its child twice is refused as `decoder_died`, one that outlasts the limit as `decoder_hung`, and the
  shard goes on. So a picture has three tries at most, and only shards that killed a worker pay for the child.

The pixels are the same either way. Outside `contained()` pictures are decoded in this process, without a limit.
"""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Protocol

from PIL import Image

from cogview.errors import CogViewError
from cogview.records.pair import Unusable

LIMIT_S = 60.0  # of one picture; 40 megapixels take about a second
CHILD_TRIES = 2  # and one in the worker, which is how we know that there is something to contain
CHILD_MEMORY = 4 * 2**30  # beyond what it takes to start
DIED, HUNG = "decoder_died", "decoder_hung"

_REQUEST = struct.Struct(">dQQQ")  # limit in seconds, max_pixels, short_side, bytes that follow
_READY = b"ready\n"
_MAX_HEADER = 1 << 16
_current: "list[_Place]" = []

Decode = Callable[..., Image.Image | Unusable]


class _Place(Protocol):
    """Where pictures are decoded now."""

    def decode(self, decode: Decode, data: bytes, *, max_pixels: int, short_side: int) -> Image.Image | Unusable: ...

    def close(self) -> None: ...


@contextmanager
def contained(*, apart: bool = False) -> Iterator[None]:
    """Decode with a time limit for each picture, in all threads of this process; `apart`: in a child process."""
    place: _Place = _Child(LIMIT_S) if apart else _Watch(LIMIT_S)
    _current.append(place)
    try:
        yield
    finally:
        _current.remove(place)
        place.close()


def decode_contained(decode: Decode, data: bytes, *, max_pixels: int, short_side: int) -> Image.Image | Unusable:
    """What `decode` (that of `cogview.records.images`) answers; within `contained(apart=True)` also decoder_died and
    decoder_hung."""
    if not _current:
        return decode(data, max_pixels=max_pixels, short_side=short_side)
    return _current[-1].decode(decode, data, max_pixels=max_pixels, short_side=short_side)


def is_apart() -> bool:
    """Whether pictures are decoded in a child process now, so that one may take as long as the limit."""
    return bool(_current) and isinstance(_current[-1], _Child)


class _Watch:
    """Decoding here, with the process's alarm set. Any picture that is done sets it anew for those still under way."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._under_way = 0

    def decode(self, decode: Decode, data: bytes, *, max_pixels: int, short_side: int) -> Image.Image | Unusable:
        self._count(1)
        try:
            return decode(data, max_pixels=max_pixels, short_side=short_side)
        finally:
            self._count(-1)

    def close(self) -> None:
        """Nothing is held."""

    def _count(self, change: int) -> None:
        with self._lock:
            self._under_way += change
            signal.setitimer(signal.ITIMER_REAL, self._limit_s if self._under_way else 0.0)


class _Child:
    """Decoding in a child process, one picture at a time. It is started when first needed, and again after its end."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, decode: Decode, data: bytes, *, max_pixels: int, short_side: int) -> Image.Image | Unusable:
        request = _REQUEST.pack(self._limit_s, max_pixels, short_side, len(data)) + data
        with self._lock:
            for _ in range(CHILD_TRIES):
                answer = self._ask(request)
                if answer is not None:
                    return answer
                how = self._end()
                if how == -signal.SIGALRM:
                    return Unusable(HUNG, f"{self._limit_s:g} s")
        return Unusable(DIED, signal.Signals(-how).name if how < 0 else f"exit code {how}")

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> Image.Image | Unusable | None:
        """The child's answer; None if it gave none that can be understood."""
        process = self._process = self._process or _start_child()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        try:
            header = json.loads(process.stdout.readline(_MAX_HEADER))
            if "reason" in header:
                return Unusable(str(header["reason"]), str(header["detail"]))
            width, height = (int(side) for side in header["size"])
            return Image.frombytes("RGB", (width, height), process.stdout.read(3 * width * height))
        except (ValueError, LookupError, TypeError):
            return None

    def _end(self) -> int:
        """Wait until the child is gone; its exit code. One that still lives has nothing to say, and is ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with suppress(BrokenPipeError):
            process.communicate()  # closing its input ends it
        return process.returncode


def _start_child() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cogview.records.containment"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    if process.stdout.readline() != _READY:  # else every picture would seem to kill it
        process.kill()
        raise CogViewError(f"the process for decoding does not start (exit code {process.wait()}); free memory")
    return process


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The child: decode what comes, until nothing does. The alarm ends it, whoever still waits for an answer."""
    from cogview.records.images import decode_here

    _limit_memory()
    answers.write(_READY)
    answers.flush()
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        limit_s, max_pixels, short_side, length = _REQUEST.unpack(head)
        data = requests.read(length)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        image = decode_here(data, max_pixels=max_pixels, short_side=short_side)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if isinstance(image, Unusable):
            answers.write(_line({"reason": image.reason, "detail": image.detail}))
        else:
            answers.write(_line({"size": image.size}) + image.tobytes())
        answers.flush()


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _limit_memory() -> None:
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else open(os.devnull) as file:
        pages = int((file.read().split() or ["0"])[0])
    limit = pages * resource.getpagesize() + CHILD_MEMORY
    with suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)  # what a library prints is no answer
        _serve(sys.stdin.buffer, stdout)
