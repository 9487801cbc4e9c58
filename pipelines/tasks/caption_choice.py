"""Which captions a machine evaluation draws, and the real pictures that they describe (CogView, section 4.1).

In: captioned pictures of any kind that the project reads: COCO's captions JSON with its folder of pictures, tables,
pictures with .txt files, tars of pairs. Out: rows drawn by a seed, in the order of the data, and a digest of them that
travels with every number. Nothing is decoded here.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cogview.errors import ConfigError
from cogview.locations import beside, is_remote
from cogview.records.folders import list_images, read_captions
from cogview.records.pair import Failure, Unusable
from cogview.records.sources import detect_source
from cogview.records.tables import inspect_table, read_table, require_captions
from cogview.records.tars import read_foreign_tar
from cogview.shards.manifest import atomic_file
from cogview.shards.reader import TokenShards
from cogview.tokenizers.text import CHINESE_CHARACTER

COCO_COLUMN = "file_name"
Rule = Literal["pictures", "captions"]
Language = Literal["any", "en", "zh"]
SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("key", pa.string()),
        ("place", pa.string()),
        ("caption", pa.string()),
        ("prompt", pa.string()),
        ("has_cap_loss", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """A caption to be drawn. key, place: of the picture that it describes, which lies there, or in the tar there;
    prompt: what a model is given, the caption or its translation; has_cap_loss: belongs to the smaller subset."""

    index: int
    key: str
    place: str
    caption: str
    prompt: str
    has_cap_loss: bool


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """A picture of the data with its captions."""

    key: str
    place: str
    captions: tuple[str, ...]


def read_captioned(
    data: Sequence[str],
    *,
    pictures: Path | None = None,
    language: Language = "any",
    keys: Collection[str] | None = None,
) -> list[Captioned]:
    """All pictures of the data that have a caption in this language, in their order.

    pictures: the folder in which a table's file names lie; keys: take these alone. ConfigError where there is none.
    """
    if language not in get_args(Language):
        raise ConfigError(f"language={language!r}: choose one of {', '.join(get_args(Language))}")
    found = []
    for item in _read(data, pictures=pictures):
        captions = tuple(text for text in item.captions if _is_in(text, language))
        if captions and (keys is None or item.key in keys):
            found.append(Captioned(key=item.key, place=item.place, captions=captions))
    if not found:
        held_out = ", held out of training," if keys is not None else ""
        raise ConfigError(f"reference={tuple(data)}: no picture{held_out} has a caption in the language {language!r}")
    return found


def choose_captions(
    captioned: Sequence[Captioned],
    *,
    number: int,
    number_of_cap_losses: int,
    rule: Rule,
    seed: int,
    translations: Mapping[str, str] | None = None,
) -> list[CaptionRow]:
    """Draw `number` captions, in the order of the data. ConfigError if there are fewer, or one has no translation.

    rule: "pictures" takes different pictures and one caption of each; "captions" draws from all captions, so that a
    picture may come more than once, on both sides. translations: caption -> what the model is given.
    """
    generator = np.random.default_rng(seed)
    sizes = np.array([len(item.captions) for item in captioned])
    if rule == "pictures":
        _require_enough(number, available=len(captioned), what="pictures")
        owners = np.sort(generator.choice(len(captioned), number, replace=False))
        places = generator.integers(sizes[owners])
    elif rule == "captions":
        _require_enough(number, available=int(sizes.sum()), what="captions")
        chosen = np.sort(generator.choice(int(sizes.sum()), number, replace=False))
        ends = np.cumsum(sizes)
        owners = np.searchsorted(ends, chosen, side="right")
        places = chosen - (ends - sizes)[owners]
    else:
        raise ConfigError(f"rule={rule!r}: choose one of {', '.join(get_args(Rule))}")
    subset = set(generator.choice(number, min(number_of_cap_losses, number), replace=False).tolist())
    rows = []
    for index, (owner, place) in enumerate(zip(owners.tolist(), places.tolist(), strict=True)):
        item = captioned[owner]
        caption = item.captions[place]
        prompt = caption if translations is None else _translated(caption, translations)
        rows.append(
            CaptionRow(
                index=index,
                key=item.key,
                place=item.place,
                caption=caption,
                prompt=prompt,
                has_cap_loss=index in subset,
            )
        )
    return rows


def captions_digest(rows: Sequence[CaptionRow]) -> str:
    """sha256 of the keys, captions and prompts, in their order."""
    lines = "".join(f"{row.key}\t{row.caption}\t{row.prompt}\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def held_out_keys(tokens: Path) -> set[str]:
    """Keys of the pictures that training never saw, from the output of tokenize_pairs."""
    shards = TokenShards.open(tokens, split="validation")
    return set(shards.rows(np.arange(len(shards))).keys)


def read_translations(path: Path) -> dict[str, str]:
    """The lines of a UTF-8 file, each a caption, a tab and its translation. ConfigError names a line without a tab."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"translations={path} cannot be read as UTF-8 text: {error}") from error
    pairs = {}
    for number, line in enumerate(lines, start=1):
        caption, tab, translation = line.partition("\t")
        if line.strip() and not (tab and translation.strip()):
            raise ConfigError(f"translations={path}, line {number}: {line[:60]!r} is no caption, tab and translation")
        pairs[caption.strip()] = translation.strip()
    return pairs


def write_rows(rows: Sequence[CaptionRow], folder: Path) -> None:
    """`captions.parquet`, and `captions.tsv` (number, key, caption), from which another system can draw."""
    with atomic_file(folder / "captions.parquet") as file:
        pq.write_table(pa.Table.from_pylist([vars(row) for row in rows], schema=SCHEMA), file)
    with atomic_file(folder / "captions.tsv") as file:
        file.writelines(f"{row.index:06d}\t{row.key}\t{row.caption}\n".encode() for row in rows)


def _read(data: Sequence[str], *, pictures: Path | None) -> Iterator[Captioned]:
    source = detect_source(tuple(data))
    if source.kind == "images":
        for name in list_images(source.folder):
            captions = read_captions(source.folder, name)
            if not isinstance(captions, Unusable):
                yield Captioned(key=PurePosixPath(name).stem, place=str(source.folder / name), captions=captions)
    elif source.kind == "tars":
        for tar in source.files:
            for sample in read_foreign_tar(tar.address):
                if not isinstance(sample, Failure):
                    yield Captioned(key=sample.key, place=tar.address, captions=sample.captions)
    else:
        for table in source.files:
            yield from _table_rows(table.address, pictures=pictures)


def _table_rows(address: str, *, pictures: Path | None) -> Iterator[Captioned]:
    columns = inspect_table(address)
    if columns.is_web and pictures is not None:
        columns = inspect_table(address, image_column=COCO_COLUMN)
    if columns.is_web:
        raise ConfigError(
            f"reference: {address} lists URLs in column {columns.image}; name the folder that holds its pictures with "
            "--reference-pictures"
        )
    for row in read_table(address, require_captions(columns, path=address)):
        if row.source and not is_remote(row.source):
            place = str(pictures / row.source) if pictures is not None else beside(address, row.source)
            yield Captioned(key=PurePosixPath(row.source).stem, place=place, captions=row.captions)


def _is_in(text: str, language: Language) -> bool:
    return language == "any" or bool(CHINESE_CHARACTER.search(text)) == (language == "zh")


def _require_enough(number: int, *, available: int, what: str) -> None:
    if number > available:
        raise ConfigError(
            f"num_captions={number}, but the reference has {available} {what}; give --num-captions {available} or less"
        )


def _translated(caption: str, translations: Mapping[str, str]) -> str:
    if caption not in translations:
        raise ConfigError(f"translations: there is none of {caption!r}; translate every line of captions.tsv")
    return translations[caption]
