"""Whose pictures are compared: folders of ours or of any other system, brought together by their captions.

In: a folder. Out: one picture for each caption. Understood are the outputs of generate and super_resolve
(`samples.parquet`; of several candidates the best, else the first), and any folder of pictures whose captions stand in
same-named .txt files, or else are the files' names (`a_red_circle.png`).
"""

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.errors import ConfigError
from cogview.records.folders import read_captions, read_image_file
from cogview.records.pair import Failure, Unusable
from cogview.records.tars import IMAGE_SUFFIXES, read_foreign_tar

TABLE_NAME = "samples.parquet"
EXAMPLES = 3
_GAP = re.compile(r"[\W_]+")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model's picture for a caption.

    scene: what a right picture shows, as JSON, for captions of the demo corpus; data: the picture itself, where `path`
    is a tar with many.
    """

    caption: str
    path: Path
    scene: str = ""
    data: bytes = field(default=b"", repr=False)

    def read(self) -> bytes | Unusable:
        """The bytes of the picture, or why there are none."""
        return self.data or read_image_file(self.path)


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A model and its pictures by `caption_key`. unused: pictures beyond the first of their captions."""

    name: str
    entries: Mapping[str, Entry]
    unused: int


def read_entrant(name: str, folder: Path) -> Entrant:
    """The pictures of a folder. ConfigError where there is none, or its table cannot be read."""
    if not folder.is_dir():
        raise ConfigError(f"models: {name}={folder} is no folder; give the pictures of each model as NAME=FOLDER")
    found = list(_of_table(folder) if (folder / TABLE_NAME).is_file() else _of_files(folder))
    if not found:
        raise ConfigError(f"models: {name}={folder} holds no picture ({', '.join(IMAGE_SUFFIXES)}) with a caption")
    entries: dict[str, Entry] = {}
    for entry in found:
        entries.setdefault(caption_key(entry.caption), entry)
    return Entrant(name=name, entries=entries, unused=len(found) - len(entries))


def read_references(folder: Path, *, wanted: Collection[str]) -> Entrant:
    """The true pictures of captions: a folder as of any entrant, or one with tars of pairs, as filter_pairs has.

    wanted: keys of captions; of tars, nothing else is kept.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        return read_entrant("references", folder)
    entries: dict[str, Entry] = {}
    unused = 0
    for tar in tars:
        for pair in read_foreign_tar(tar):
            if isinstance(pair, Failure):
                continue
            keys = {caption_key(caption): caption for caption in pair.captions}
            for key in keys.keys() & wanted:
                unused += key in entries
                entries.setdefault(key, Entry(caption=keys[key], path=tar, data=pair.image_bytes))
    if not entries:
        raise ConfigError(f"references={folder}: no pair in {len(tars)} tars has a caption of the models' pictures")
    return Entrant(name="references", entries=entries, unused=unused)


def caption_key(caption: str) -> str:
    """What two spellings of a caption have in common: letters and digits, whatever stands between them."""
    return _GAP.sub(" ", unicodedata.normalize("NFKC", caption)).strip().casefold()


def shared_captions(entrants: Sequence[Entrant]) -> list[str]:
    """The captions, by key, for which every entrant has a picture, in the order of the first.

    ConfigError if there is none, with a few of those that are missing.
    """
    first, *others = entrants
    shared = [key for key in first.entries if all(key in other.entries for other in others)]
    if not shared:
        samples = [f"{entrant.name}: {', '.join(list(entrant.entries)[:EXAMPLES])}" for entrant in entrants]
        raise ConfigError(
            f"models: no caption has a picture of everyone ({'; '.join(samples)}); "
            "give folders that were drawn for the same captions"
        )
    return shared


def _of_table(folder: Path) -> Iterator[Entry]:
    """The best candidate of each prompt first, the others after it."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(folder / TABLE_NAME).to_pylist()
        ordered = sorted(rows, key=_rank)
        for row in ordered:
            yield Entry(caption=row["prompt"], path=folder / row["path"], scene=row.get("scene") or "")
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ConfigError(
            f"models: {folder / TABLE_NAME} is not a table of samples ({error}); give the output of generate"
        ) from error


def _rank(row: Mapping[str, Any]) -> int:
    rank = row.get("rank")
    return int(row.get("candidate") or 0) if rank is None else int(rank)


def _of_files(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix[1:].lower() not in IMAGE_SUFFIXES:
            continue
        captions = read_captions(folder, path.relative_to(folder).as_posix())
        caption = " ".join(path.stem.replace("_", " ").split()) if isinstance(captions, Unusable) else captions[0]
        if caption_key(caption):
            yield Entry(caption=caption, path=path)
