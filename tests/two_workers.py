"""Two processes that train together on this machine, as they would on two."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_S = 280


@contextmanager
def two_workers(work: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Call `work(rank, *arguments)` in two processes; the body runs beside them, and both must end well."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        yield
        for worker in workers:
            worker.join(timeout=PATIENCE_S)
            assert worker.exitcode == 0, f"{worker.name} ended with {worker.exitcode} (None: not in time)"
    finally:
        for worker in workers:
            worker.kill()


def run_two_workers(work: Callable[..., None], *arguments: Any) -> None:
    """The same with nothing beside them."""
    with two_workers(work, *arguments):
        pass


@contextmanager
def process_group(rank: int, folder: Path) -> Iterator[None]:
    """One of the two, on one thread; they meet in a file of this folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()
