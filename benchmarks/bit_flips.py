"""Single bits flipped in checkpoints and shards: every one is noticed before anything is done with the file.

Command: make verify NAME=bit_flips [ARGS="--flips 1000"]
A small GPT is trained for a few steps, with plain and with sharded weights, and drawn scenes are written as a shard of
pairs (a WebDataset tar) and one of tokens (Arrow). Then one bit is flipped, in a file that is drawn evenly among all
and at a place drawn evenly in it, and the folder is read as a deep check reads it. Noticed means: the checkpoint is
refused, the manifest is refused, or the shard's own entry no longer counts as done. The bit is flipped back, after
which nothing may be refused.
"""

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.counting import Counting
from benchmarks.harness import Bar, Figures, argument_parser, say, verify
from cogview.errors import CheckpointError, ManifestError
from cogview.models.gpt import GPTConfig
from cogview.records.images import encode_image
from cogview.records.pair import TextImagePair
from cogview.records.pair_shards import write_pair_shard
from cogview.scenes.scene import corpus, draw_scene
from cogview.shards.manifest import (
    ShardEntry,
    atomic_file,
    file_record,
    read_entry,
    read_manifest,
    shard_name,
    write_entry,
    write_manifest,
)
from cogview.shards.schema import TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.training.checkpoints import read_checkpoint
from cogview.training.loop import CHECKPOINTS_NAME, LoopConfig, Sharding, train
from cogview.training.ranks import Ranks

MODEL = GPTConfig(vocab_size=40, max_positions=8, num_layers=2, hidden_size=16, num_heads=2)
SCENES, SIDE, GRID, CODES, PIECES = 12, 64, 8, 512, 256
ORIGIN = TokenOrigin(
    text_tokenizer="0" * 64,
    image_tokenizer="1" * 64,
    vocabulary="2" * 64,
    num_image_codes=CODES,
    num_text_pieces=PIECES,
    grid=GRID,
)
IsWhole = Callable[[Path], bool]


def measure(*, flips: int, seed: int) -> Figures:
    """Flip bits one by one; how many were noticed, in all and by kind of file."""
    with tempfile.TemporaryDirectory(prefix="cogview-flips-") as name:
        root = Path(name)
        folders: dict[Path, IsWhole] = {
            write_checkpoint(root, "none"): checkpoint_is_whole,
            write_checkpoint(root, "full"): checkpoint_is_whole,
            write_pairs(root / "pairs"): shards_are_whole,
            write_tokens(root / "tokens"): shards_are_whole,
        }
        files = [(path, folder) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        say(f"{len(files)} files, {sum(path.stat().st_size for path, _ in files):,} bytes")
        generator = random.Random(seed)
        flipped: Counter[str] = Counter()
        noticed: Counter[str] = Counter()
        false_alarms = 0
        for _ in range(flips):
            path, folder = generator.choice(files)
            kind = f"{folder.relative_to(root).parts[0]}/{path.suffix.removeprefix('.') or path.name.strip('.')}"
            bit = generator.randrange(8 * path.stat().st_size)
            flipped[kind] += 1
            flip(path, bit)
            noticed[kind] += not folders[folder](folder)
            flip(path, bit)
            false_alarms += not folders[folder](folder)
    return {
        "share noticed": noticed.total() / flips,
        "false alarms": false_alarms,
        "flips": flips,
        "noticed": noticed.total(),
        "files": len(files),
        **{f"{kind}, noticed of {number}": noticed[kind] for kind, number in sorted(flipped.items())},
    }


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def checkpoint_is_whole(folder: Path) -> bool:
    """Whether a run that goes on would start from this checkpoint."""
    try:
        read_checkpoint(folder)
    except (CheckpointError, ManifestError):
        return False
    return True


def shards_are_whole(folder: Path) -> bool:
    """Whether the folder counts as finished and its shard as done."""
    try:
        read_manifest(folder, deep=True)
    except ManifestError:
        return False
    return read_entry(folder, 0, deep=True) is not None


def write_checkpoint(root: Path, sharding: Sharding) -> Path:
    """The folder of a checkpoint after two steps."""
    output = root / f"checkpoint, sharding {sharding}"
    loop = LoopConfig(num_steps=2, global_batch_size=2, sharding=sharding, checkpoint_every=2)
    train(Counting(MODEL, rows=2), config=loop, output=output, identity={"digest": "of the config"}, ranks=Ranks())
    (folder,) = (output / CHECKPOINTS_NAME).iterdir()
    return folder


def write_pairs(folder: Path) -> Path:
    """A closed folder of one shard of drawn scenes."""
    return close(folder, pair_entry(folder, 0), {})


def write_tokens(folder: Path) -> Path:
    """A closed folder of one shard of tokens."""
    return close(folder, token_entry(folder, 0), asdict(ORIGIN))


def pair_entry(folder: Path, shard: int) -> ShardEntry:
    """Write a shard of drawn scenes; its entry."""
    pairs = [
        TextImagePair(
            key=f"{captioned.number:05d}",
            captions=(captioned.english, captioned.chinese),
            image_bytes=encode_image(draw_scene(captioned.scene, image_size=SIDE)).data,
            source=f"scene:{captioned.number}",
        )
        for captioned in corpus(shard, SCENES)
    ]
    written = write_pair_shard(folder, f"shard-{shard:05d}", pairs, open_file=atomic_file)
    files = {name: file_record(folder / name) for name in written.files}
    return ShardEntry(shard=shard, rows_in=SCENES, rows_out=SCENES, files=files)


def token_entry(folder: Path, shard: int) -> ShardEntry:
    """Write a shard of tokens; its entry."""
    generator = np.random.default_rng(shard)
    rows = [
        TokenRow(
            key=f"{captioned.number:05d}",
            text=captioned.english,
            text_ids=generator.integers(0, PIECES, 12, dtype=np.int32),
            image_codes=generator.integers(0, CODES, GRID**2, dtype=np.uint16),
            source=f"scene:{captioned.number}",
        )
        for captioned in corpus(shard, SCENES)
    ]
    name = f"train/{shard_name(shard, 'arrow')}"
    files = {name: write_token_shard(folder / name, rows, origin=ORIGIN)}
    return ShardEntry(shard=shard, rows_in=SCENES, rows_out=SCENES, files=files)


def close(folder: Path, entry: ShardEntry, extra: dict[str, object]) -> Path:
    """Enter the shard and write the manifest."""
    write_entry(folder, entry)
    write_manifest(folder, [entry], extra=extra)
    return folder


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--flips", type=int, default=1000, help="how many bits (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of bits (default: 1)")
    flags = parser.parse_args()
    bars = (
        Bar(figure="share noticed", op="==", value=1),
        Bar(figure="false alarms", op="==", value=0),
        Bar(figure="flips", op=">=", value=1000),
    )
    return verify("bit_flips", lambda: measure(flips=flags.flips, seed=flags.seed), bars=bars, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
