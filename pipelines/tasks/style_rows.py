"""Pictures of styles as token rows: the same sentence for all pictures of a style (CogView, section 3.3).

In: pictures sorted by style, and the tokenizers of the model to be finetuned. Out: a folder of token rows like that of
tokenize_pairs, `rejected.parquet` with the pictures that could not be used, and the names of the styles.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cogview.errors import ConfigError
from cogview.records.images import decode_image
from cogview.records.pair import Failure, Unusable
from cogview.records.styles import StyledPicture, read_styles
from cogview.shards.manifest import MANIFEST_NAME, ShardEntry, atomic_file, read_manifest, shard_name, write_manifest
from cogview.shards.schema import SPLITS
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.pixels import pixel_batch, square_pixels
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from pipelines.runtime.jobs import JobRun
from pipelines.tasks.origins import origin_of

REJECTED_NAME = "rejected.parquet"
REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("source", "reason", "detail")])
MIN_PICTURES = 4
HELD_OUT_SHARE = 20  # one picture of so many is not trained on


@dataclass(frozen=True, kw_only=True)
class StyleData:
    """Where the pictures are and what they are called.

    sentence: the caption of all pictures, with {style} in it; max_images: of each style, evenly chosen; grid: codes
    along a side; batch_size: pictures encoded at once.
    """

    data: Path
    style: str
    sentence: str
    max_images: int
    text_tokenizer: Path
    image_tokenizer: Path
    grid: int
    batch_size: int = 32


@dataclass(kw_only=True)
class _Encoded:
    """What the pictures have come to. chosen: style -> source, codes of each picture."""

    chosen: dict[str, list[tuple[str, npt.NDArray[np.uint16]]]] = field(default_factory=dict)
    rejected: list[Failure] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    num_pictures: int = 0


def write_style_rows(data: StyleData, *, output: Path, run: JobRun, device: str) -> list[str]:
    """Encode the pictures and write their rows into `output`, unless that is done; returns the styles by name.

    Raises ConfigError when a style has too few pictures to learn from.
    """
    if not (output / MANIFEST_NAME).is_file():
        text, image = TextTokenizer.load(data.text_tokenizer), load_image_tokenizer(data.image_tokenizer)
        encoded = _encode(data, image.to(device).eval(), run=run, device=device)
        _require_pictures(encoded, data=data)
        _write(encoded, data=data, text=text, image=image, output=output)
    manifest = read_manifest(output)
    used = sum(manifest["extra"]["styles"].values())
    counts = ", ".join(f"{style} {count:,}" for style, count in manifest["extra"]["styles"].items())
    run.say(f"{used:,} pictures: {counts}; {sum(manifest['rejected'].values())} rejected")
    run.scores.update(pictures=used, rejected=sum(manifest["rejected"].values()))
    return list(manifest["extra"]["styles"])


def _encode(data: StyleData, image: AnyImageTokenizer, *, run: JobRun, device: str) -> _Encoded:
    encoded = _Encoded()
    pictures = _decoded(data, encoded, image_size=data.grid * image.stride)
    while batch := list(islice(pictures, data.batch_size)):
        with torch.inference_mode():
            codes_Bhw = image.encode(pixel_batch([pixels for _, pixels in batch]).to(device))
        for (picture, _), codes in zip(batch, codes_Bhw.flatten(1).cpu().numpy().astype(np.uint16), strict=True):
            encoded.chosen.setdefault(picture.style, []).append((picture.source, codes))
        run.progress(encoded.num_pictures, encoded.num_pictures, "pictures encoded")
    return encoded


def _decoded(
    data: StyleData, encoded: _Encoded, *, image_size: int
) -> Iterator[tuple[StyledPicture, npt.NDArray[np.uint8]]]:
    """The pictures with their pixels, each once; the others go to `encoded.rejected`."""
    for picture in read_styles(data.data, style=data.style):
        encoded.num_pictures += 1
        if isinstance(picture, Failure):
            encoded.rejected.append(picture)
            continue
        digest = hashlib.sha256(picture.style.encode() + picture.image_bytes).digest()
        image = Unusable("image_duplicate") if digest in encoded.seen else decode_image(picture.image_bytes)
        encoded.seen.add(digest)
        if isinstance(image, Unusable):
            failure = Failure(key="", source=picture.source, reason=image.reason, detail=image.detail)
            encoded.rejected.append(failure)
            continue
        yield picture, square_pixels(image, image_size=image_size)


def _require_pictures(encoded: _Encoded, *, data: StyleData) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(f.reason for f in encoded.rejected).items())
    found = {style: len(pictures) for style, pictures in encoded.chosen.items()} or {"any style": 0}
    for style, count in found.items():
        if count < MIN_PICTURES:
            raise ConfigError(
                f"data: {data.data} has {count} usable pictures of {style}, and a style needs {MIN_PICTURES} or more "
                f"(the paper takes 1,000); rejected: {reasons or 'none'}"
            )


def _write(encoded: _Encoded, *, data: StyleData, text: TextTokenizer, image: AnyImageTokenizer, output: Path) -> None:
    origin = origin_of(text, image, grid=data.grid)
    rows: dict[str, list[TokenRow]] = {split: [] for split in SPLITS}
    counts: dict[str, int] = {}
    for number, (style, pictures) in enumerate(sorted(encoded.chosen.items())):
        caption = data.sentence.format(style=style)
        text_ids = np.array(text.encode(caption), np.int32)
        # In an order that has nothing to do with their names, so that any number of them is an even choice.
        kept = sorted(pictures, key=lambda item: hashlib.sha256(item[0].encode()).digest())[: data.max_images]
        held_out = max(1, len(kept) // HELD_OUT_SHARE)
        counts[style] = len(kept)
        for index, (source, codes) in enumerate(kept):
            key = f"{number:02d}_{index:06d}"
            row = TokenRow(key=key, text=caption, text_ids=text_ids, image_codes=codes, source=source)
            rows["validation" if index < held_out else "train"].append(row)
    names = {split: f"{split}/{shard_name(0, 'arrow')}" for split in SPLITS}
    files = {names[split]: write_token_shard(output / names[split], rows[split], origin=origin) for split in SPLITS}
    rejects = [{"source": f.source, "reason": f.reason, "detail": f.detail} for f in encoded.rejected]
    with atomic_file(output / REJECTED_NAME) as file:
        pq.write_table(pa.Table.from_pylist(rejects, schema=REJECTED_SCHEMA), file, compression="zstd")
    rejected = dict(Counter(failure.reason for failure in encoded.rejected))
    left_over = encoded.num_pictures - len(rejects) - sum(counts.values())
    if left_over:
        rejected["beyond_max_images"] = left_over
    entry = ShardEntry(
        shard=0, rows_in=encoded.num_pictures, rows_out=sum(counts.values()), rejected=rejected, files=files
    )
    sizes = {f"rows_{split}": len(split_rows) for split, split_rows in rows.items()}
    write_manifest(output, [entry], extra={**asdict(origin), **sizes, "styles": counts})
