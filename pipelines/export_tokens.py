"""Write token shards as the int32 rows that CogView's and CogView2's own training reads.

Command: python -m pipelines export_tokens cogview --tokens RUN/tokenize_pairs/...
Reads:   the output folder of tokenize_pairs or import_tokens
Writes:  train/shard-00000.bin, validation/shard-00000.bin (the input's numbers), manifest.json
Time:    as fast as the disk

A row of CogView has place for 64 text ids, but one of more than 61 costs its trainer the last codes of the picture, so
longer texts are cut to 61 unless you ask for more. How many were cut is counted and shown.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from cogview.config import digest_of, input_field, runtime_field
from cogview.errors import ConfigError
from cogview.shards.integer_rows import PAD_PIECE, Layout, RowLayout, write_rows
from cogview.shards.manifest import MANIFEST_NAME, ShardEntry, atomic_file, read_manifest, shard_name
from cogview.shards.reader import TokenShards
from cogview.shards.schema import SPLITS, TokenOrigin, check_tokens, image_code_array, text_id_arrays
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, shard_entry


@dataclass(frozen=True, kw_only=True)
class Config:
    """tokens: output folder of tokenize_pairs; layout: of the rows; max_text: longer texts are cut to so many ids;
    workers: shards at a time, 0 for one on each CPU."""

    tokens: Path | None = input_field(default=None)
    layout: Layout = "cogview"
    max_text: int = 61  # 1,089 positions - 1,024 codes - 4 command tokens
    workers: int = runtime_field(0)

    def __post_init__(self) -> None:
        if self.max_text < 1:
            raise ConfigError(f"max_text is {self.max_text}; it must be at least 1")


COGVIEW = Config()
PRESETS: dict[str, Config] = {
    "cogview": COGVIEW,
    "cogview2": replace(COGVIEW, layout="cogview2", max_text=111),  # 512 ids - 400 codes - 1 pad
    "smoke": COGVIEW,
}


def main(config: Config, run: JobRun) -> None:
    """Rewrite each shard, close the folder, say what did not fit."""
    tokens = given_folders(config, {"tokens": "tokenize_pairs"})["tokens"]
    origin = TokenShards.open(tokens).origin
    layout = RowLayout(
        layout=config.layout,
        grid=origin.grid,
        num_image_codes=origin.num_image_codes,
        num_text_pieces=origin.num_text_pieces,
    )
    if config.max_text > layout.max_text:
        raise ConfigError(f"max_text is {config.max_text}; a row of {config.layout} has place for {layout.max_text}")
    work = ExportShard(tokens=tokens, output=run.output, origin=origin, layout=layout, max_text=config.max_text)
    tasks = [
        ShardTask(shard=shard["shard"], input_digest=digest_of(shard["files"]))
        for shard in read_manifest(tokens)["shards"]
    ]
    entries = run_shards(work, tasks, folder=run.output, run=run, workers=config.workers, note="exported")
    cut = sum(entry.extra["texts_cut"] for entry in entries)
    extra = {"layout": config.layout, "row_length": layout.length, "grid": origin.grid, "texts_cut": cut}
    close_folder(run, entries, extra={**extra, "text_offset": origin.num_image_codes})
    run.scores.update(extra)
    run.say(f"rows of {layout.length:,} int32; {cut:,} texts were cut to {config.max_text} ids")


@dataclass(frozen=True, kw_only=True)
class ExportShard:
    """The work on one shard."""

    tokens: Path
    output: Path
    origin: TokenOrigin
    layout: RowLayout
    max_text: int

    def __call__(self, task: ShardTask) -> ShardEntry:
        """On a worker: the rows of both splits of a shard."""
        counts: Counter[str] = Counter()
        names = []
        for split in SPLITS:
            names.append(f"{split}/{shard_name(task.shard, 'bin')}")
            rows = self._rows(self.tokens / split / shard_name(task.shard, "arrow"), counts)
            with atomic_file(self.output / names[-1]) as file:
                file.write(rows.tobytes())
        cut = counts.pop("texts_cut", 0)
        kept = counts.pop("kept", 0)
        rejected = {reason: count for reason, count in counts.items() if count}
        entry = shard_entry(
            self.output,
            task,
            rows_in=kept + sum(rejected.values()),
            rows_out=kept,
            rejected=rejected,
            files=names,
        )
        return replace(entry, extra={"texts_cut": cut})

    def _rows(self, path: Path, counts: Counter[str]) -> "np.ndarray[tuple[int, int], np.dtype[np.int32]]":
        """The rows of a file, int32 [rows, length]. A text with the pad's id in it would be two, so it is rejected."""
        with pa.memory_map(str(path)) as mapped:
            batch = pa.ipc.open_file(mapped).read_all().combine_chunks().to_batches()
        if not batch:
            return np.empty((0, self.layout.length), np.int32)
        check_tokens(batch[0], origin=self.origin, where=str(path))
        values, offsets = text_id_arrays(batch[0])
        texts = [values[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        is_whole = np.array([self.layout.layout == "cogview" or PAD_PIECE not in text for text in texts], bool)
        counts["text_has_pad"] += int((~is_whole).sum())
        counts["texts_cut"] += sum(len(text) > self.max_text for text in texts)
        counts["kept"] += int(is_whole.sum())
        kept = [text[: self.max_text] for text, whole in zip(texts, is_whole.tolist(), strict=True) if whole]
        return write_rows(kept, image_code_array(batch[0])[is_whole], layout=self.layout)


JOB = Job(name="export_tokens", version=1, products=(MANIFEST_NAME,), main=main)
