"""Token rows read back by number from memory-mapped Arrow files.

In: a folder closed by `tokenize_pairs`, or several whose rows are numbered through, and row indices of one split. Out:
`TokenRows`, ready to become sequences.

Opening reads the manifest and the end of each file; a shard's structure is checked when its first row is asked for,
and each batch's token ids are checked against the vocabulary, which costs little and keeps a damaged file from indexing
past the embedding table. Files are closed once mapped: the limit of open files does not bound the number of shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cogview.errors import ConfigError, ManifestError, SchemaError, VocabularyError
from cogview.shards.manifest import MANIFEST_NAME, read_manifest
from cogview.shards.schema import (
    SPLITS,
    TokenOrigin,
    check_ids,
    check_schema,
    check_structure,
    code_column,
    image_code_array,
    text_id_arrays,
)


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows in the order asked for.

    text_ids: one int32 array per row (views of the mapped file, read-only), without the vocabulary's offset;
    image_codes: uint16 [rows, grid * grid]; keys, texts: for people and for tracing a row back, empty if not asked for;
    other_codes: of the same pictures at those of the folder's other grids that were asked for, grid -> uint16
    [rows, grid * grid].
    """

    text_ids: list[npt.NDArray[np.int32]]
    image_codes: npt.NDArray[np.uint16]
    keys: list[str]
    texts: list[str]
    other_codes: dict[int, npt.NDArray[np.uint16]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.text_ids)


class TokenShards:
    """One split of a folder of token shards, addressed by row number from 0 to `len(shards) - 1`.

    corpus_sizes: rows of each folder, where several are read as one.
    """

    def __init__(
        self,
        batches: list["_MappedBatch"],
        *,
        origin: TokenOrigin,
        split: str,
        folder: Path,
        corpus_sizes: tuple[int, ...] = (),
    ) -> None:
        """Use `TokenShards.open`."""
        self._batches = batches
        self.corpus_sizes = corpus_sizes or (sum(batch.num_rows for batch in batches),)
        self._ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
        self.origin = origin
        self.split = split
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, *, split: str = "train", deep: bool = False) -> "TokenShards":
        """Map every shard of a split. `deep` compares sha256 as well as sizes, which reads everything once.

        Raises ConfigError for another split than train or validation, ManifestError for files that are missing or cut,
        SchemaError for files that are no token shards, VocabularyError for a shard of another folder's tokenizers.
        """
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}; there are {' and '.join(SPLITS)}")
        manifest = read_manifest(folder, deep=deep)
        origin = _origin(manifest, folder=folder)
        names = [
            name for entry in manifest["shards"] for name in sorted(entry["files"]) if name.startswith(f"{split}/")
        ]
        batches = [batch for name in names for batch in _map_batches(folder / name, origin=origin)]
        shards = cls(batches, origin=origin, split=split, folder=folder)
        expected = manifest["extra"].get(f"rows_{split}")
        if expected != len(shards):
            raise ManifestError(
                f"{folder / MANIFEST_NAME} promises {expected} {split} rows, but its shards hold {len(shards)}; delete "
                "the folder and run tokenize_pairs again"
            )
        return shards

    @classmethod
    def open_all(cls, folders: Sequence[Path], *, split: str = "train") -> "TokenShards":
        """The rows of several folders, numbered through. VocabularyError or ConfigError if they do not go together."""
        corpora = [cls.open(folder, split=split) for folder in folders]
        first = corpora[0]
        for corpus in corpora[1:]:
            corpus.require(**first.fingerprints)
            if corpus.origin.grids != first.origin.grids:
                grids, others = first.origin.grids, corpus.origin.grids
                raise ConfigError(
                    f"{corpus.folder} has codes of grids {others}, {first.folder} of {grids}; tokenize both alike"
                )
        return cls(
            [batch for corpus in corpora for batch in corpus._batches],
            origin=first.origin,
            split=split,
            folder=first.folder,
            corpus_sizes=tuple(len(corpus) for corpus in corpora),
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def grid(self) -> int:
        """Image codes along one side of an image."""
        return self.origin.grid

    @property
    def other_grids(self) -> tuple[int, ...]:
        """The same of the other sizes at which each picture was encoded; empty in most folders."""
        return self.origin.other_grids

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the tokens were made with: `text_tokenizer`, `image_tokenizer` and `vocabulary`."""
        return {
            "text_tokenizer": self.origin.text_tokenizer,
            "image_tokenizer": self.origin.image_tokenizer,
            "vocabulary": self.origin.vocabulary,
        }

    def require(
        self, *, text_tokenizer: str | None = None, image_tokenizer: str | None = None, vocabulary: str | None = None
    ) -> None:
        """Raise VocabularyError unless the rows were made with these fingerprints. None: not used, so not compared."""
        wanted = {"text_tokenizer": text_tokenizer, "image_tokenizer": image_tokenizer, "vocabulary": vocabulary}
        for name, fingerprint in wanted.items():
            found = self.fingerprints[name]
            if fingerprint is not None and fingerprint != found:
                raise VocabularyError(
                    f"{self.folder}: the rows were made with {name} {found[:12]}, but {fingerprint[:12]} is in use; "
                    f"run tokenize_pairs with the {name.replace('_', ' ')} in use, or use the one of the rows"
                )

    def rows(
        self, indices: npt.NDArray[np.int64], *, with_texts: bool = True, other_grids: Sequence[int] = ()
    ) -> TokenRows:
        """The rows with these numbers, in this order; a number may come twice.

        with_texts: also the keys and captions, which is half of the time and which training does not need;
        other_grids: also the codes of these. Raises IndexError for a number outside the split, SchemaError for a
        damaged shard, ConfigError for a grid that the folder does not have.
        """
        self._require_grids(other_grids)
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(f"rows {indices.min()} to {indices.max()} asked of {len(self)} {self.split} rows")
        codes = {grid: np.empty((len(indices), grid**2), np.uint16) for grid in (self.grid, *other_grids)}
        text_ids: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)] * len(indices)
        keys = [""] * (len(indices) if with_texts else 0)
        texts = keys.copy()
        for batch, places, local in self._by_batch(indices):
            batch.check_structure_once()
            for grid, found in codes.items():
                found[places] = batch.codes[grid][local]
            for place, ids in zip(places.tolist(), batch.text_ids(local), strict=True):
                text_ids[place] = ids
            for place, row in zip(places.tolist(), local.tolist(), strict=True) if with_texts else ():
                keys[place] = batch.keys[row].as_py()
                texts[place] = batch.texts[row].as_py()
        self._check_range(text_ids, codes)
        image_codes = codes.pop(self.grid)
        return TokenRows(text_ids=text_ids, image_codes=image_codes, keys=keys, texts=texts, other_codes=codes)

    def _require_grids(self, wanted: Sequence[int]) -> None:
        missing = sorted(set(wanted) - set(self.other_grids))
        if missing:
            found = ", ".join(f"{grid}x{grid}" for grid in self.origin.grids)
            raise ConfigError(
                f"{self.folder} has codes of {found}, not of {missing[0]}x{missing[0]} besides; run tokenize_pairs "
                f"with --other-image-sizes and a side of {missing[0]} codes"
            )

    def _by_batch(
        self, indices: npt.NDArray[np.int64]
    ) -> list[tuple["_MappedBatch", npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Group row numbers by file: (file, places in the answer, rows in the file), so that each file is met once."""
        numbers = np.searchsorted(self._ends, indices, side="right")
        order = np.argsort(numbers, kind="stable")
        borders = np.flatnonzero(np.diff(numbers[order])) + 1
        groups = []
        for places in np.split(order, borders) if len(order) else []:
            batch = self._batches[numbers[places[0]]]
            start = int(self._ends[numbers[places[0]]]) - batch.num_rows
            groups.append((batch, places, indices[places] - start))
        return groups

    def _check_range(self, text_ids: list[npt.NDArray[np.int32]], codes: dict[int, npt.NDArray[np.uint16]]) -> None:
        where = f"{self.folder / self.split}"
        for grid, found in codes.items():
            name = code_column(grid, origin=self.origin)
            check_ids(found, limit=self.origin.num_image_codes, name=name, where=where)
        if text_ids:
            check_ids(np.concatenate(text_ids), limit=self.origin.num_text_pieces, name="text_ids", where=where)


class _MappedBatch:
    """One record batch of a mapped file, with numpy views of its token columns."""

    def __init__(self, batch: pa.RecordBatch, *, path: Path, origin: TokenOrigin) -> None:
        self.num_rows = len(batch)
        self.path = path
        self.origin = origin
        self.keys = batch.column("key")
        self.texts = batch.column("text")
        self._batch: pa.RecordBatch | None = batch  # until its structure has been checked
        self._text_values: npt.NDArray[np.int32]
        self._text_offsets: npt.NDArray[np.int32]
        self.codes: dict[int, npt.NDArray[np.uint16]] = {}

    def check_structure_once(self) -> None:
        """Check the batch and take its views; SchemaError if it is damaged."""
        if self._batch is None:
            return
        check_structure(self._batch, where=str(self.path))
        self._text_values, self._text_offsets = text_id_arrays(self._batch)
        for grid in self.origin.grids:
            self.codes[grid] = image_code_array(self._batch, name=code_column(grid, origin=self.origin))
        self._batch = None

    def text_ids(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int32]]:
        # Through lists of plain integers: slices by numpy's own are three times as slow.
        starts, ends = self._text_offsets[rows].tolist(), self._text_offsets[rows + 1].tolist()
        return [self._text_values[start:end] for start, end in zip(starts, ends, strict=True)]


def _map_batches(path: Path, *, origin: TokenOrigin) -> list[_MappedBatch]:
    try:
        with pa.memory_map(str(path)) as mapped:  # closing returns the descriptor; the views keep the mapping
            file = pa.ipc.open_file(mapped)
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
            metadata = {key.decode(): value.decode() for key, value in (file.schema.metadata or {}).items()}
            check_schema(file.schema, origin=origin, where=str(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path} is no whole Arrow file ({error}); delete it and run tokenize_pairs again") from error
    for name, value in origin.metadata.items():
        if metadata.get(name) != value:
            raise VocabularyError(
                f"{path} was made with {name} {metadata.get(name)}, its folder's manifest says {value}; delete the "
                "file and run tokenize_pairs again"
            )
    return [_MappedBatch(batch, path=path, origin=origin) for batch in batches if len(batch)]


def _origin(manifest: dict[str, Any], *, folder: Path) -> TokenOrigin:
    extra = {"other_grids": (), **manifest["extra"]}
    names = [field.name for field in fields(TokenOrigin)]
    missing = [name for name in names if name not in extra]
    if missing:
        raise ManifestError(
            f"{folder / MANIFEST_NAME} does not say {', '.join(missing)}; give the output folder of tokenize_pairs"
        )
    return TokenOrigin(**{name: extra[name] for name in names} | {"other_grids": tuple(extra["other_grids"])})
