"""One event loop and one open fetcher for all shards that a worker process makes of a run.

So connections stay open from shard to shard, sites are asked for their rules once, and a host's pace and crawl delay
hold where one shard ends and the next begins.
"""

import asyncio
import atexit
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cogview.records.fetch import Fetcher, FetchSettings
from cogview.records.opt_out import read_opt_out
from cogview.records.pair import Failure, TextImagePair

WRITTEN_AT_ONCE = 32  # outcomes between two runs of the event loop

Outcomes = AsyncGenerator[TextImagePair | Failure, None]


@dataclass(frozen=True, kw_only=True)
class WorkerFetcher:
    """An open fetcher, and the loop that it belongs to."""

    run: Path
    settings: FetchSettings
    runner: asyncio.Runner
    fetcher: Fetcher

    def in_step(self, outcomes: Outcomes) -> Iterator[TextImagePair | Failure]:
        """The items of an async generator, for a writer that is not async: the loop runs while the next are awaited."""

        async def step() -> list[TextImagePair | Failure]:
            batch: list[TextImagePair | Failure] = []
            while len(batch) < WRITTEN_AT_ONCE and (outcome := await anext(outcomes, None)) is not None:
                batch.append(outcome)
            return batch

        loop = self.runner.get_loop()  # the runner's own `run` sets signal handlers each time, which takes milliseconds
        while batch := loop.run_until_complete(step()):
            yield from batch

    def close(self) -> None:
        """Close the connections; what is under way is cancelled."""
        self.runner.get_loop().run_until_complete(self.fetcher.__aexit__(None, None, None))
        self.runner.close()


_kept: list[WorkerFetcher] = []  # one at most


@contextmanager
def worker_fetcher(run: Path, settings: FetchSettings, *, opt_out: tuple[str, ...]) -> Iterator[WorkerFetcher]:
    """The fetcher of this process for a run, refreshed; a new one where run or settings are others, or after an error.

    run: the run's folder, which stands for everything that its results depend on; opt_out: addresses of its lists.
    """
    if _kept and (_kept[0].run, _kept[0].settings) != (run, settings):
        _close()
    worker = _kept.pop() if _kept else _open(run, settings, opt_out)
    with ExitStack() as unless_well:
        unless_well.callback(worker.close)
        worker.fetcher.refresh()
        yield worker
        unless_well.pop_all()
        _kept.append(worker)


@atexit.register
def _close() -> None:
    while _kept:
        _kept.pop().close()


def _open(run: Path, settings: FetchSettings, opt_out: tuple[str, ...]) -> WorkerFetcher:
    runner, fetcher = asyncio.Runner(), Fetcher(settings, opt_out=read_opt_out(opt_out))
    runner.get_loop().run_until_complete(fetcher.__aenter__())
    return WorkerFetcher(run=run, settings=settings, runner=runner, fetcher=fetcher)
