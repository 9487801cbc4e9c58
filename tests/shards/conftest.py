"""Small real token folders."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cogview.shards.manifest import ShardEntry, shard_name, write_manifest
from cogview.shards.schema import TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard

ORIGIN = TokenOrigin(
    text_tokenizer="a" * 64,
    image_tokenizer="b" * 64,
    vocabulary="c" * 64,
    num_image_codes=32,
    num_text_pieces=50,
    grid=3,
)
WriteFolder = Callable[..., list[TokenRow]]


def make_rows(count: int, *, seed: int = 0, start: int = 0) -> list[TokenRow]:
    generator = np.random.default_rng(seed)
    return [
        TokenRow(
            key=f"key{start + number}",
            text=f"第 {start + number} caption",
            text_ids=generator.integers(0, 50, generator.integers(0, 7), dtype=np.int32),
            image_codes=generator.integers(0, 32, 9, dtype=np.uint16),
            source="https://example.org/",
        )
        for number in range(count)
    ]


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Write `train` shards of these row counts beside empty validation shards, close the folder, return the rows."""

    def write(*counts: int, folder: Path = tmp_path, origin: TokenOrigin = ORIGIN) -> list[TokenRow]:
        rows: list[TokenRow] = []
        entries = []
        for shard, count in enumerate(counts):
            shard_rows = make_rows(count, seed=shard, start=len(rows))
            files = {
                f"{split}/{shard_name(shard, 'arrow')}": write_token_shard(
                    folder / split / shard_name(shard, "arrow"), shard_rows if split == "train" else [], origin=origin
                )
                for split in ("train", "validation")
            }
            entries.append(ShardEntry(shard=shard, rows_in=count, rows_out=count, files=files))
            rows.extend(shard_rows)
        write_manifest(folder, entries, extra={**asdict(origin), "rows_train": len(rows), "rows_validation": 0})
        return rows

    return write
