"""Which of the training's workers this process is: the one owner of rank arithmetic."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Which worker this is, of how many, and where it computes."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """This worker's part of a global batch of row indices: contiguous, so that the parts in order are the whole."""
        return np.split(rows, self.world)[self.rank]

    @property
    def is_first(self) -> bool:
        """Whether this worker writes for all."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Return when all workers are here."""
        if self.world > 1:
            dist.barrier()

    def is_same_for_all(self, number: int) -> bool:
        """Whether all workers, who call this together, have the same number."""
        if self.world == 1:
            return True
        highest_and_lowest = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(highest_and_lowest, op=dist.ReduceOp.MAX)
        return bool(highest_and_lowest.sum() == 0)
