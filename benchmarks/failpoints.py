"""Writes, syncs and renames of checkpoints and shards fail, one at a time, in three ways: nothing is silently lost.

Command: make verify NAME=failpoints [ARGS="--writes 6"]     (about a quarter of an hour)
A process goes on with a small training from its checkpoint and writes the next ones; another adds a shard of pairs, one
of tokens and the manifest to folders where a shard is done. Each counts what it asks of the file system below its
folder. Then it is repeated for every sync, every rename, and of writes in a row, of which a checkpoint has hundreds,
for the first, the last and some between them; and at that operation

* *exit*: the process ends at once, half of a write done;
* *full*: the operation fails as on a full disk (ENOSPC), half of a write done;
* *corrupt*: it lies. A write changes one byte; a rename does nothing; a file that was synced lacks its second half once
  the process has ended, as after a power cut.

After each, what was done before must be whole, and what looks done must be right to the byte; then the same work runs
again without a fault, and must end with the bytes of a run that never failed. A training ends with its newest
checkpoint: an older one that a power cut tore is not made again, but must be known to be damaged.
"""

import builtins
import errno
import io
import itertools
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from benchmarks.bit_flips import MODEL, pair_entry, token_entry
from benchmarks.counting import Counting
from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.errors import CheckpointError, CogViewError, ManifestError
from cogview.shards.manifest import MANIFEST_NAME, read_entry, read_manifest, write_entry, write_manifest
from cogview.training.checkpoints import latest_checkpoint, read_checkpoint
from cogview.training.loop import CHECKPOINTS_NAME, LoopConfig, WeightedBatch, train
from cogview.training.ranks import Ranks

Fault = Literal["exit", "full", "corrupt"]
Contents = dict[str, bytes]
STEPS, EVERY, KEPT = 6, 2, 9
EXITED, REFUSED, DEFECT = 91, 92, 93
BARS = (
    Bar(figure="lost", op="==", value=0),
    Bar(figure="wrong but taken for right", op="==", value=0),
    Bar(figure="not made good by the next run", op="==", value=0),
    Bar(figure="full disks that went unsaid", op="==", value=0),
)


class Faults:
    """Counts what this process asks of the file system below a folder, and lets operation number `at` fail."""

    def __init__(self, root: Path, *, at: int, fault: Fault) -> None:
        self.root, self.at, self.fault = str(root), at, fault
        self.kinds: list[str] = []
        self._cut: set[int] = set()  # inodes
        self._open, self._fsync = builtins.open, os.fsync
        self._moves = {"replace": os.replace, "rename": os.rename}

    def install(self) -> None:
        """For the rest of this process."""
        builtins.open = io.open = self._opened  # type: ignore[assignment]
        os.fsync = self._synced  # type: ignore[assignment]
        for name in self._moves:
            setattr(os, name, lambda source, target, name=name: self._moved(name, source, target))

    def cut_power(self) -> None:
        """Take the second half from every file whose sync was a lie."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                if os.stat(path).st_ino in self._cut:
                    os.truncate(path, os.path.getsize(path) // 2)

    def strike(self, kind: str) -> bool:
        """Whether it is this operation's turn to lie; other faults are done here."""
        self.kinds.append(kind)
        if len(self.kinds) - 1 != self.at:
            return False
        if self.fault == "exit":
            os._exit(EXITED)
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True

    def is_half(self) -> bool:
        """Whether the write that comes next is done by half before its fault."""
        return len(self.kinds) == self.at and self.fault != "corrupt"

    def _opened(self, path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        file = self._open(path, mode, *given, **named)
        is_ours = isinstance(path, (str, Path)) and str(path).startswith(self.root)
        return _FaultyFile(file, self) if is_ours and set(mode) & set("wax+") else file

    def _synced(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(self.root) and self.strike("sync"):
            if os.path.isfile(path):
                self._cut.add(os.fstat(descriptor).st_ino)
        else:
            self._fsync(descriptor)

    def _moved(self, name: str, source: Any, target: Any) -> None:
        if not (str(target).startswith(self.root) and self.strike("rename")):
            self._moves[name](source, target)


class _FaultyFile:
    """An open file whose writes may fail."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def __enter__(self) -> "_FaultyFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        """All of the data, half of it before a fault, or all with one byte changed."""
        content = bytes(data)
        if self._faults.is_half():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
        if self._faults.strike("write") and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]
        self._file.write(content)
        return len(content)


class Interrupted(Counting):
    """The training, interrupted before the step `stop`."""

    def __init__(self, *, stop: int = STEPS) -> None:
        super().__init__(MODEL, rows=2)
        self._stop = stop

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's rows of a step."""
        if step == self._stop:
            raise KeyboardInterrupt
        return super().batch(step, ranks)


class Work(Protocol):
    """Something that goes on from a folder where some of it is done."""

    name: str

    def prepare(self, folder: Path) -> None: ...

    def go_on(self, folder: Path) -> None: ...

    def check(self, folder: Path, *, right: Contents) -> Counter[str]: ...

    def is_made_good(self, folder: Path, *, right: Contents) -> bool: ...


class CheckpointWork:
    """A training that goes on from its first checkpoint."""

    name = "checkpoint"

    def prepare(self, folder: Path) -> None:
        """Train until one checkpoint is there."""
        try:
            self._train(folder, Interrupted(stop=EVERY + 1))
        except KeyboardInterrupt:
            return

    def go_on(self, folder: Path) -> None:
        """Train to the end."""
        self._train(folder, Interrupted())

    def _train(self, folder: Path, task: Counting) -> None:
        loop = LoopConfig(
            num_steps=STEPS, global_batch_size=2, checkpoint_every=EVERY, keep_checkpoints=KEPT, prefetching="off"
        )
        train(task, config=loop, output=folder.parent, identity={}, ranks=Ranks())

    def check(self, folder: Path, *, right: Contents) -> Counter[str]:
        """The newest checkpoint that verifies is one; each that does has the right bytes."""
        found: Counter[str] = Counter()
        found["lost"] += latest_checkpoint(folder, identity={}) is None
        for step in sorted(folder.glob("step_*")):
            try:
                read_checkpoint(step)
            except (CheckpointError, ManifestError):
                found["seen to be damaged"] += 1
                continue
            names = {name for name in right if name.startswith(f"{step.name}/")}
            found["wrong"] += any((folder / name).read_bytes() != right[name] for name in names)
        return found

    def is_made_good(self, folder: Path, *, right: Contents) -> bool:
        """Whether the last checkpoint is there, and nothing that verifies is wrong."""
        newest = latest_checkpoint(folder, identity={})
        found = self.check(folder, right=right)
        return newest is not None and newest.step == STEPS and not (found["lost"] or found["wrong"])


class ShardWork:
    """A shard that is added to those that are done, and the manifest that closes the folder."""

    def __init__(self, name: str, write: Callable[[Path, int], Any]) -> None:
        self.name, self._write = name, write

    def prepare(self, folder: Path) -> None:
        """Write the first shard."""
        write_entry(folder, self._write(folder, 0))

    def go_on(self, folder: Path) -> None:
        """Write what is not done."""
        for shard in (0, 1):
            if read_entry(folder, shard) is None:
                write_entry(folder, self._write(folder, shard))
        write_manifest(folder, [entry for n in (0, 1) if (entry := read_entry(folder, n)) is not None], extra={})

    def check(self, folder: Path, *, right: Contents) -> Counter[str]:
        """The first shard is whole; the second one and the manifest are right if they look so."""
        found: Counter[str] = Counter()
        found["lost"] += read_entry(folder, 0, deep=True) is None
        entry = read_entry(folder, 1, deep=True)
        if entry is not None:
            found["wrong"] += any((folder / name).read_bytes() != right[name] for name in entry.files)
        try:
            read_manifest(folder, deep=True)
        except ManifestError:
            found["seen to be damaged"] += (folder / MANIFEST_NAME).exists()
        else:
            found["wrong"] += (folder / MANIFEST_NAME).read_bytes() != right[MANIFEST_NAME]
        return found

    def is_made_good(self, folder: Path, *, right: Contents) -> bool:
        """Whether all files have the right bytes."""
        remade = contents(folder)
        return all(remade.get(name) == data for name, data in right.items())


WORKS: tuple[Work, ...] = (CheckpointWork(), ShardWork("pairs", pair_entry), ShardWork("tokens", token_entry))


def measure(*, writes: int) -> Figures:
    """Let operations of every work fail in every way; `writes` of those in a row, 0 for all of them."""
    found: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    memory = Path("/dev/shm")  # where a sync that is not a lie costs nothing
    with tempfile.TemporaryDirectory(prefix="cogview-failpoints-", dir=memory if memory.is_dir() else None) as name:
        for work in WORKS:
            root = Path(name) / work.name
            start, whole = root / "start", root / "whole"
            apart(partial(work.prepare, below(start)))
            kinds = count_operations(work, start=start, whole=whole)
            operations.update(f"{work.name}/{kind}" for kind in kinds)
            right = contents(below(whole))
            for fault in get_args(Fault):
                for at in chosen(kinds, writes=writes):
                    found += trial(work, start=start, folder=root / "trial", at=at, fault=fault, right=right)
            say(f"{work.name}: {len(kinds)} operations, {dict(found)}")
    return {
        "lost": found["lost"],
        "wrong but taken for right": found["wrong"],
        "not made good by the next run": found["not made good"],
        "full disks that went unsaid": found["unsaid"],
        "trials": found["trials"],
        "damaged files that were named": found["seen to be damaged"],
        **{f"operations/{kind}": number for kind, number in sorted(operations.items())},
        **{f"ended/{how}": number for how, number in sorted(found.items()) if how.startswith(tuple(get_args(Fault)))},
    }


def chosen(kinds: Sequence[str], *, writes: int) -> list[int]:
    """The numbers of the operations that fail."""
    found: list[int] = []
    start = 0
    for kind, group in itertools.groupby(kinds):
        number = len(list(group))
        few = number if kind != "write" or not writes else min(writes, number)
        found += [start + (place * (number - 1)) // max(1, few - 1) for place in range(few)]
        start += number
    return found


def trial(work: Work, *, start: Path, folder: Path, at: int, fault: Fault, right: Contents) -> Counter[str]:
    """One fault, what it left, and whether the next run makes it good."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    faults = Faults(below(folder), at=at, fault=fault)
    code = apart(partial(work.go_on, below(folder)), faults=faults)
    if code == DEFECT:
        raise UnmeasuredError(f"{work.name}, operation {at}, {fault}: ended with a defect")
    found = work.check(below(folder), right=right)
    found["trials"] += 1
    found[f"{fault}/{ {EXITED: 'killed', REFUSED: 'with an error', 0: 'as if all were well'}[code] }"] += 1
    found["unsaid"] += fault == "full" and code == 0
    again = apart(partial(work.go_on, below(folder)))
    found["not made good"] += again != 0 or not work.is_made_good(below(folder), right=right)
    return found


def below(folder: Path) -> Path:
    """Where operations are counted: a training's metrics, which lie beside it, are no part of a checkpoint."""
    return folder / CHECKPOINTS_NAME


def contents(folder: Path) -> Contents:
    """The bytes of every file but the temporary ones."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def count_operations(work: Work, *, start: Path, whole: Path) -> list[str]:
    """Do the work without a fault; the kinds of its operations, in their order."""
    shutil.copytree(start, whole)
    faults = Faults(below(whole), at=-1, fault="exit")
    note = whole.parent / "kinds.txt"

    def counted() -> None:
        work.go_on(below(whole))
        note.write_text(" ".join(faults.kinds))

    if apart(counted, faults=faults):
        raise UnmeasuredError(f"{work.name} fails without a fault")
    return note.read_text().split()


def apart(work: Callable[[], None], *, faults: Faults | None = None) -> int:
    """Do it in a copy of this process: 0 if it ended well, EXITED, REFUSED for a named error, DEFECT for another."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = DEFECT
    try:
        torch.set_num_threads(1)
        if faults is not None:
            faults.install()
        work()
        code = 0
    except (CogViewError, OSError):
        code = REFUSED
    finally:
        if code == DEFECT:
            traceback.print_exc()
        if faults is not None:
            faults.cut_power()
        os._exit(code)


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--writes", type=int, default=6, help="of those in a row, 0 for all (default: 6)")
    flags = parser.parse_args()
    return verify("failpoints", lambda: measure(writes=flags.writes), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
