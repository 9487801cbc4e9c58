"""A step's batch, made while the step before is computed, or with those of the next steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

BatchT = TypeVar("BatchT")


class Batches(Generic[BatchT]):
    """Batches in the order of their steps.

    make: step -> batch; it must depend on nothing but the step where it is called ahead of its time. end: the step
    behind the last, for which no batch is made. is_ahead: whether the next one is made in a thread as soon as one is
    taken; at_once: how many are made one after another when one is asked for that is not there.
    """

    def __init__(self, make: Callable[[int], BatchT], *, end: int, is_ahead: bool, at_once: int = 1) -> None:
        self._make, self._end, self._at_once = make, end, at_once
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if is_ahead else None
        self._coming: tuple[int, Future[BatchT]] | None = None
        self._made: dict[int, BatchT] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> BatchT:
        """The batch of a step. What making it raises is raised here."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == step:
            self._made[step] = coming[1].result()
        if step not in self._made:
            steps = range(step, min(step + self._at_once, self._end))
            self._made = {step: self._make(step) for step in steps}
        if self._thread is not None and step + 1 < self._end:
            self._coming = (step + 1, self._thread.submit(self._make, step + 1))
        return self._made.pop(step)
