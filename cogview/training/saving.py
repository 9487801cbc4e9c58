"""Who writes what of a checkpoint, in which order, and what a run goes on from.

Every worker writes its random state; the first one writes the rest and, when all is there, the manifest. Sharded
weights are written by all. An asynchronous checkpoint is written by a thread, from a copy in the CPU's memory; the next
one waits for it, and so does the end of the training.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cogview.errors import CheckpointError
from cogview.training.averaging import AveragedWeights
from cogview.training.background import Background, on_cpu
from cogview.training.checkpoints import (
    STATE_NAME,
    Checkpoint,
    discard_pending,
    latest_checkpoint,
    pending_folder,
    publish,
    random_states,
    set_random_states,
    write_part,
)
from cogview.training.loss_scale import LossScale
from cogview.training.precision import MasterWeights
from cogview.training.ranks import Ranks

if TYPE_CHECKING:
    from cogview.training.sharding import ShardedWeights

logger = logging.getLogger(__name__)


class Saver:
    """Writes and reads a training's checkpoints. While it is open they may be on their way; closing waits for them.

    parts: further states that a checkpoint holds, by name; identity: what a checkpoint must agree with; keep: how many
    of the newest stay.
    """

    def __init__(
        self,
        root: Path,
        *,
        weights: "MasterWeights | ShardedWeights",
        parts: Mapping[str, LossScale | AveragedWeights],
        ranks: Ranks,
        identity: Mapping[str, Any],
        keep: int,
        is_async: bool,
    ) -> None:
        self._root, self._weights, self._parts, self._ranks = root, weights, dict(parts), ranks
        self._identity, self._keep, self._is_async = dict(identity), keep, is_async
        self._background = Background()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._background.join()
        if error is None:
            self._background.check()
            self._ranks.wait_for_all()

    def check(self) -> None:
        """Raise what a checkpoint on its way has run into."""
        self._background.check()

    def save(self, done: int, *, counts: Mapping[str, int]) -> None:
        """Write a checkpoint after `done` steps, or begin to. counts: numbers that `restore` gives back."""
        self._background.join()
        self._background.check()
        if self._ranks.is_first:
            discard_pending(self._root, done)
        self._ranks.wait_for_all()
        write_part(self._root, done, f"rank_{self._ranks.rank:04d}.pt", random_states(self._ranks.device))
        self._ranks.wait_for_all()
        if self._is_async:
            self._background.start(self._writing(done, counts))
        else:
            self._writing(done, counts)()
            self._ranks.wait_for_all()

    def restore(self) -> tuple[int, dict[str, int]]:
        """Go on from the newest verified checkpoint: the steps that are done, and the counts; 0 and none without one.

        CheckpointError when it belongs to something else, does not fit the model, or is not the same for all workers.
        """
        self._ranks.wait_for_all()  # one of them may still have closed a checkpoint just now
        checkpoint = latest_checkpoint(self._root, identity=self._identity)
        if not self._ranks.is_same_for_all(checkpoint.step if checkpoint else 0):
            raise CheckpointError(
                f"{self._root}: not all workers see the same checkpoint as the newest (rank {self._ranks.rank}: "
                f"{checkpoint.folder.name if checkpoint else 'none'}); use storage that all machines share"
            )
        if checkpoint is None:
            return 0, {}
        state = checkpoint.load(STATE_NAME)
        self._restore_weights(checkpoint, state)
        own_part = f"rank_{self._ranks.rank:04d}.pt"
        if (checkpoint.folder / own_part).exists():  # with more workers than before, the new ones start from the seed
            set_random_states(checkpoint.load(own_part), device=self._ranks.device)
        logger.info("rank %d goes on from %s", self._ranks.rank, checkpoint.folder)
        counts = {name: value for name, value in state.items() if isinstance(value, int) and name != "step"}
        return checkpoint.step, counts

    def _restore_weights(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        if ("model" in state) != isinstance(self._weights, MasterWeights):
            other = "none" if "model" in state else "full"
            raise CheckpointError(f"{checkpoint.folder} was written with sharding={other!r}; go on with that")
        try:
            if isinstance(self._weights, MasterWeights):
                self._weights.load_state_dict(state)
            else:
                self._weights.read(checkpoint.folder)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint.folder} does not fit the model of this config: {error}") from error

    def _writing(self, done: int, counts: Mapping[str, int]) -> Callable[[], None]:
        """What writes this worker's part of a checkpoint as things are now, and on the first one closes it."""
        write_shares: Callable[[], None] | None = None
        state: dict[str, Any] = {}
        if not isinstance(self._weights, MasterWeights):
            folder = pending_folder(self._root, done)
            write_shares = self._weights.writing(folder) if self._is_async else partial(self._weights.write, folder)
        if self._ranks.is_first:
            state = {"step": done, **counts, **{name: part.state_dict() for name, part in self._parts.items()}}
            if isinstance(self._weights, MasterWeights):
                state |= self._weights.state_dict()
            if self._is_async:
                state = on_cpu(state)

        def write() -> None:
            if write_shares is not None:
                write_shares()  # on the first worker this ends when all have written theirs
            if self._ranks.is_first:
                write_part(self._root, done, STATE_NAME, state)
                publish(self._root, done, identity=self._identity, keep=self._keep)

        return write
