"""A step's batch, made while the step before is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

BatchT = TypeVar("BatchT")


class Batches(Generic[BatchT]):
    """Batches in the order of their steps.

    make: step -> batch; ahead of its time it is called in a thread, and must depend on nothing but the step.
    end: the step behind the last, for which no batch is made. is_ahead: whether any is made before it is asked for.
    """

    def __init__(self, make: Callable[[int], BatchT], *, end: int, is_ahead: bool) -> None:
        self._make, self._end = make, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if is_ahead else None
        self._coming: tuple[int, Future[BatchT]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> BatchT:
        """The batch of a step; the next one begins to be made. What making it raises is raised here."""
        coming, self._coming = self._coming, None
        batch = coming[1].result() if coming is not None and coming[0] == step else self._make(step)
        if self._thread is not None and step + 1 < self._end:
            self._coming = (step + 1, self._thread.submit(self._make, step + 1))
        return batch
