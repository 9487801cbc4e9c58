"""One piece of work that goes on beside the training, such as writing a checkpoint."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Background:
    """At most one piece of work at a time, in a thread. What it raises is raised by `check`, once."""

    def __init__(self) -> None:
        self._work: Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Let the work begin; the one before has been joined and checked."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work = executor.submit(work)
        executor.shutdown(wait=False)

    def join(self) -> None:
        """Wait until no work goes on."""
        if self._work is not None:
            wait([self._work])

    def check(self) -> None:
        """Raise what the work has raised, if it has ended so."""
        if self._work is not None and self._work.done():
            work, self._work = self._work, None
            work.result()


def on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested tensors and numbers that training does not change any more; shares stay shares."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # slow to import

    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    try:
        copied = stager.stage(state)
    finally:
        stager.close()
    return copied  # type: ignore[return-value]  # a future only with use_async_staging
