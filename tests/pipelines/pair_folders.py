"""Finished folders of pairs, as filter_pairs leaves them, written by the code that writes them in earnest."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import write_pair_shard
from cogview.shards.manifest import ShardEntry, atomic_file, file_record, write_manifest

COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "black": "黑"}


def png(colour: str, *, size: tuple[int, int] = (40, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def make_pairs(count: int, *, shard: int = 0) -> list[TextImagePair | Failure]:
    """Pictures of one colour with an English and a Chinese caption."""
    names = list(COLOURS.items())
    return [
        TextImagePair(
            key=f"{shard:05d}_{row:05d}",
            captions=(f"a {names[row % 4][0]} picture number {row}", f"{names[row % 4][1]}色的第{row}张图"),
            image_bytes=png(names[row % 4][0]),
            source=f"https://example.org/{shard}/{row}",
            extra={"sha256": "0" * 64, "width": 40, "height": 32},
        )
        for row in range(count)
    ]


def write_pair_folder(folder: Path, shards: Sequence[Sequence[TextImagePair | Failure]]) -> Path:
    entries = []
    for shard, pairs in enumerate(shards):
        counts = write_pair_shard(folder, f"shard-{shard:05d}", pairs, open_file=atomic_file)
        files = {name: file_record(folder / name) for name in counts.files}
        entries.append(
            ShardEntry(shard=shard, rows_in=counts.rows, rows_out=counts.ok, rejected=counts.failed, files=files)
        )
    write_manifest(folder, entries, extra={})
    return folder


class QuietDisplay:
    """Keeps what a job says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.notes: list[tuple[float, float, str]] = []

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.notes.append((done, total, note))

    def say(self, line: str) -> None:
        self.lines.append(line)
