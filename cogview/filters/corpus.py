"""The files through which the shards of a corpus are compared with each other, without anyone holding all of them.

Every shard leaves its verdicts, and for each of so many buckets the keys of its images and captions that belong there:
equal keys meet in one bucket, whatever shard they come from. Who compares a bucket reads that part of every shard's
file. A bucket has about `BUCKET_ROWS` images, so 30 million of them are 120 buckets of 50 MB each; the number follows
from the input alone, and the outcome does not depend on it.
"""

import functools
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cogview.filters.caption_keys import near_keys, wording_key
from cogview.filters.likeness import SIGNATURE_BYTES
from cogview.filters.pairs import FilterRules
from cogview.filters.repetition import Keys, Places, Repetitions, band_keys, frequent_keys, near_images, same_images
from cogview.records.pair_shards import MAX_SHARD_ROWS
from cogview.shards.manifest import atomic_file, shard_name

BUCKET_ROWS = 250_000
OPEN_FILES = 64
IMAGES, LIKENESS, CAPTIONS = "images", "likeness", "captions"  # folders of the exchange
JUDGEMENT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("rule", pa.string()),  # empty if the pair is kept so far
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("captions", pa.list_(pa.string())),  # that are left
        ("dropped", pa.list_(pa.string())),  # why others went
        ("redacted", pa.int32()),  # captions that something was cut out of
        ("digest", pa.binary(16)),  # half of the image's sha256: no two of 30 million share it by chance (1e-24)
        ("likeness", pa.uint64()),
        ("signature", pa.binary(SIGNATURE_BYTES)),
    ]
)
_MIX = np.uint64(0x9E3779B97F4A7C15)  # spreads the bands' small numbers over the buckets


def count_buckets(rows: int) -> int:
    """How many buckets a corpus of so many pairs is divided into."""
    return max(1, -(-rows // BUCKET_ROWS))


def write_judged(folder: Path, shard: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a shard's verdicts, a row for each pair in its order; the file's name."""
    name = shard_name(shard, "arrow")
    batch = pa.RecordBatch.from_pylist(list(rows), schema=JUDGEMENT_SCHEMA)
    with atomic_file(folder / name) as file, pa.ipc.new_file(file, JUDGEMENT_SCHEMA) as writer:
        writer.write_batch(batch)
    return name


def read_judged(folder: Path, shard: int, *, with_signatures: bool = False) -> pa.Table:
    """A shard's verdicts, mapped into memory."""
    table = pa.ipc.open_file(pa.memory_map(str(folder / shard_name(shard, "arrow")))).read_all()
    return table if with_signatures else table.drop_columns(["signature"])


def exchange_images(folder: Path, shard: int, judged: pa.Table, *, buckets: int, rules: FilterRules) -> list[str]:
    """Write the keys of the images that are kept so far, by bucket; the files' names."""
    is_kept = np.array(judged["rule"].to_pylist(), dtype=object) == ""
    rows = np.flatnonzero(is_kept)
    places = shard * MAX_SHARD_ROWS + rows.astype(np.int64)
    digests = b"".join(judged["digest"].take(pa.array(rows)).to_pylist())
    halves = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)
    high, low = halves[:, 0], halves[:, 1]
    names = [f"{IMAGES}/{shard_name(shard, 'arrow')}"]
    _write_buckets(folder / names[0], {"high": high, "low": low, "place": places}, high, buckets)
    if rules.near_levels >= 0:
        hashes = judged["likeness"].to_numpy()[rows]
        bands = band_keys(hashes)
        keys = np.concatenate(bands)
        columns: dict[str, npt.NDArray[Any]] = {
            "key": keys,
            "hash": np.tile(hashes, len(bands)),
            "place": np.tile(places, len(bands)),
        }
        names.append(f"{LIKENESS}/{shard_name(shard, 'arrow')}")
        _write_buckets(folder / names[1], columns, keys, buckets)
    return names


def exchange_captions(folder: Path, shard: int, judged: pa.Table, *, buckets: int, rules: FilterRules) -> str:
    """Write the keys of the captions of pairs that are kept so far, by bucket; the file's name."""
    kept = [row["captions"] for row in judged.select(["rule", "captions"]).to_pylist() if not row["rule"]]
    keys = [CaptionKeys.of(captions, rules) for captions in kept]
    wordings = [key for own in keys for key in sorted(set(own.wordings))]
    near = [key for own in keys for key in sorted({key for bands in own.near for key in bands})]
    is_near = np.arange(len(wordings) + len(near)) >= len(wordings)
    all_keys = np.array([*wordings, *near], np.uint64)
    name = f"{CAPTIONS}/{shard_name(shard, 'arrow')}"
    _write_buckets(folder / name, {"key": all_keys, "is_near": is_near.astype(np.uint8)}, all_keys, buckets)
    return name


@dataclass(frozen=True, kw_only=True)
class CaptionKeys:
    """The keys of a pair's captions: one for each wording, a few for all that is nearly equal to it (or none)."""

    wordings: list[int]
    near: list[list[int]]

    @classmethod
    def of(cls, captions: Sequence[str], rules: FilterRules) -> Self:
        """The keys that these rules need."""
        near = (
            [keys.tolist() for keys in near_keys(captions)] if rules.max_near_caption_repeats else [[]] * len(captions)
        )
        wordings = [wording_key(caption) for caption in captions] if rules.max_caption_repeats else []
        return cls(wordings=wordings or [0] * len(captions), near=near)


def frequent_captions(folder: Path, shards: Sequence[int], *, bucket: int, rules: FilterRules) -> tuple[Keys, Keys]:
    """Of one bucket: the keys of wordings, and of nearly equal wordings, that too many pairs have."""
    columns = _read_bucket(folder / CAPTIONS, shards, bucket)
    keys, is_near = columns["key"], columns["is_near"].astype(np.bool_)
    return (
        frequent_keys(keys[~is_near], at_most=rules.max_caption_repeats),
        frequent_keys(keys[is_near], at_most=rules.max_near_caption_repeats),
    )


def without_frequent(
    row: dict[str, Any], *, wordings: Container[int], near: Container[int], rules: FilterRules
) -> dict[str, Any]:
    """A judged row without the captions that too many pairs have; rejected if none is left."""
    if row["rule"]:
        return row
    keys = CaptionKeys.of(row["captions"], rules)
    reasons = [
        "caption_too_frequent" if wording in wordings else "caption_template" if any(b in near for b in bands) else ""
        for wording, bands in zip(keys.wordings, keys.near, strict=True)
    ]
    if not any(reasons):
        return row
    left = [caption for caption, reason in zip(row["captions"], reasons, strict=True) if not reason]
    changed = {**row, "captions": left, "dropped": [*row["dropped"], *filter(None, reasons)]}
    if left:
        return changed
    return {**changed, "rule": "repeated_captions", "reason": reasons[0], "detail": row["captions"][0][:80]}


def repeated_images(
    folder: Path, shards: Sequence[int], *, bucket: int, rules: FilterRules
) -> tuple[Repetitions, Repetitions]:
    """Of one bucket: the places of images that are copies of earlier ones, and of those that look the same."""
    exact = _read_bucket(folder / IMAGES, shards, bucket)
    same = same_images(exact["high"], exact["low"], exact["place"])
    if rules.near_levels < 0:
        return same, same_images(*(exact[name][:0] for name in ("high", "low", "place")))
    near = _read_bucket(folder / LIKENESS, shards, bucket)
    looks_same = functools.partial(_looks_same, signatures=Signatures(folder), levels=rules.near_levels)
    return same, near_images(near["key"], near["hash"], near["place"], looks_same)


class Signatures:
    """The signatures of images at any places; the files of the shards stay mapped while they are asked for."""

    def __init__(self, judged: Path) -> None:
        self._judged = judged
        self._of_shard = functools.lru_cache(maxsize=OPEN_FILES)(self._read)

    def at(self, places_M: Places) -> npt.NDArray[np.uint8]:
        """uint8 [M, 384]."""
        shards, rows = np.divmod(places_M, MAX_SHARD_ROWS)
        found = np.empty((len(places_M), SIGNATURE_BYTES), np.uint8)
        for shard in np.unique(shards).tolist():
            is_here = shards == shard
            found[is_here] = self._of_shard(shard)[rows[is_here]]
        return found

    def _read(self, shard: int) -> npt.NDArray[np.uint8]:
        column = read_judged(self._judged, shard, with_signatures=True)["signature"].combine_chunks()
        return np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, SIGNATURE_BYTES)


def _looks_same(places_M: Places, earlier_M: Places, *, signatures: Signatures, levels: int) -> npt.NDArray[np.bool_]:
    agrees = np.zeros(len(places_M), np.bool_)
    for start in range(0, len(places_M), BUCKET_ROWS // 10):
        part = slice(start, start + BUCKET_ROWS // 10)
        one, other = (signatures.at(places[part]).astype(np.int16) for places in (places_M, earlier_M))
        agrees[part] = (np.abs(one - other) <= levels).all(axis=1)
    return agrees


def _write_buckets(path: Path, columns: Mapping[str, npt.NDArray[Any]], keys_N: Keys, buckets: int) -> None:
    """One record batch for each bucket, in order; rows keep theirs within it."""
    belongs_N = ((keys_N * _MIX) >> np.uint64(32)) % np.uint64(buckets)
    order = np.argsort(belongs_N, kind="stable")
    ends = np.searchsorted(belongs_N[order], np.arange(buckets + 1))
    schema = pa.schema([(name, pa.from_numpy_dtype(values.dtype)) for name, values in columns.items()])
    with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for start, end in itertools.pairwise(ends):
            rows = order[start:end]
            writer.write_batch(pa.record_batch([pa.array(values[rows]) for values in columns.values()], schema=schema))


def _read_bucket(folder: Path, shards: Sequence[int], bucket: int) -> dict[str, npt.NDArray[Any]]:
    batches = list(_batches(folder, shards, bucket))
    return {
        name: np.concatenate([batch[name].to_numpy(zero_copy_only=False) for batch in batches])
        for name in batches[0].schema.names
    }


def _batches(folder: Path, shards: Sequence[int], bucket: int) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        with pa.memory_map(str(folder / shard_name(shard, "arrow"))) as file:
            yield pa.ipc.open_file(file).get_batch(bucket)
