"""Tars of image-text pairs: foreign ones (WebDataset, img2dataset) are read warily, our own written deterministically.

A sample is a run of members with one base name: an image, and a .txt or .json (or both) with its captions. Nothing is
ever extracted to disk or unpickled; members that are neither image, text nor JSON are passed over.
"""

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cogview.errors import ConfigError, ManifestError
from cogview.locations import open_data
from cogview.records.captions import clean_caption, clean_captions
from cogview.records.pair import KEY_PATTERN, Failure, TextImagePair

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_TEXT_BYTES = 1024 * 1024
# A language tag at most: `caption_type` or `caption_zh_origin` are no captions.
_CAPTION_FIELD = re.compile(r"^(captions?|texts?|alt|txt)(_[a-z]{2,3}(_[a-z]{2,4})?)?$", re.IGNORECASE)
_PROBED_SAMPLES = 100
_LANGUAGE = re.compile(r"_[a-z]{2,3}(_[a-z]{2,4})?$", re.IGNORECASE)
_KEPT_TYPES = (str, int, float, bool, type(None))
# Ours to write anew, or another tool's bookkeeping. `exif` may hold the place where a picture was taken.
_LEFT_OUT = frozenset({"sha256", "width", "height", "key", "status", "error_message", "exif", "url"})


@dataclass
class _Sample:
    """Members of one base name, gathered while a tar streams by."""

    name: str
    images: list[bytes] = field(default_factory=list)
    suffix: str = ""
    text: bytes | None = None
    metadata: bytes | None = None
    refused: str = ""


def read_foreign_tar(path: Path | str, *, caption_fields: Sequence[str] = ()) -> Iterator[TextImagePair | Failure]:
    """Every sample of an outside tar, in order, as a pair (not yet decoded) or as the reason why it is none.

    path: may be an address on a remote file system; caption_fields: JSON fields to take captions from ("txt" is the
    .txt member); empty takes the usual names.
    Reasons: key_refused, image_missing, two_images, caption_missing, json_damaged, member_refused, member_too_large,
    tar_damaged (the rest of the file is lost; counted once).
    """
    sample: _Sample | None = None
    tar_name = str(path).rpartition("/")[2]
    try:
        with open_data(str(path)) as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if tar.offset > size + tarfile.BLOCKSIZE:  # tarfile would step through terabytes not there
                        raise EOFError(f"{member.name} is cut")
                    base, suffix = split_member_name(member.name)
                    if member.isdir():
                        continue
                    if sample is not None and sample.name != base:
                        yield _finish(sample, tar_name, caption_fields)
                        sample = None
                    sample = sample or _Sample(name=base)
                    _add_member(sample, tar, member, suffix)
                end = tar.offset
            if sample is not None:
                yield _finish(sample, tar_name, caption_fields)
            if not _ends_at(stream, end):
                yield _failure(sample.name if sample else "", tar_name, "tar_damaged", "does not end where a tar ends")
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        name = sample.name if sample is not None else ""
        yield _failure(name, tar_name, "tar_damaged", f"{type(error).__name__} after {name or 'the start'}")


def check_caption_fields(tars: Sequence[Path | str], fields: Sequence[str]) -> None:
    """ConfigError if the first samples of a corpus have no captions under these fields (or the usual names)."""
    failures: list[str] = []
    names: set[str] = set()
    for path in tars:
        for sample in itertools.islice(read_foreign_tar(path, caption_fields=fields), _PROBED_SAMPLES):
            if not isinstance(sample, Failure):
                return
            failures.append(sample.reason)
            names.update(sample.detail.split(", ") if sample.reason == "caption_missing" else ())
        if len(failures) >= _PROBED_SAMPLES:
            break
    if "caption_missing" in failures:
        wanted = f"no captions in {', '.join(fields)}" if fields else "no captions under the usual names"
        there = ", ".join(sorted(names - {""})) or "no fields"
        raise ConfigError(f"caption_fields: {tars[0]} has {wanted}; its JSON has {there}; name those to use")


def split_member_name(name: str) -> tuple[str, str]:
    """(`a/b`, `seg.png`) of `a/b.seg.png`: as WebDataset does, the suffix starts at the first dot of the file name."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    parent = str(path.parent)
    return (stem if parent == "." else f"{parent}/{stem}"), suffix.lower()


def captions_of(metadata: Mapping[str, Any], *, text: str | None = None, fields: Sequence[str] = ()) -> tuple[str, ...]:
    """The captions in a sample's JSON and .txt. A field may hold a string or a list of strings.

    Without `fields`: the .txt, then `caption`, `captions`, `text`, then those of languages by name.
    """
    if fields:
        values = [text if name == "txt" and "txt" not in metadata else metadata.get(name) for name in fields]
    else:
        values = [text, *(metadata[name] for name in usual_caption_fields(metadata))]
    flat: list[object] = []
    for value in values:
        flat.extend(value if isinstance(value, list) else [value])
    return clean_captions(flat)


def usual_caption_fields(names: Iterable[str]) -> list[str]:
    """Those of the names that usually hold captions; ones without a language first."""
    found = [name for name in names if _CAPTION_FIELD.match(name)]
    return sorted(found, key=lambda name: (bool(_LANGUAGE.search(name)), name))


def kept_extra(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What of a foreign sample's fields travels on: plain values that are neither captions nor bookkeeping."""
    captions = set(usual_caption_fields(metadata))
    names = [name for name in metadata if name not in captions and name not in _LEFT_OUT]
    return {
        ("original_source" if name == "source" else name): metadata[name]
        for name in names
        if isinstance(metadata[name], _KEPT_TYPES)
    }


def write_pairs(file: BinaryIO, pairs: Iterable[TextImagePair]) -> int:
    """Write pairs in img2dataset's layout: key.jpg|png, key.json, key.txt. The same pairs give the same bytes."""
    count, written = 0, 0
    for pair in pairs:
        suffix = "png" if pair.image_bytes.startswith(b"\x89PNG") else "jpg"
        document = {**pair.extra, "captions": list(pair.captions), "source": pair.source}
        encoded = json.dumps(document, ensure_ascii=False, sort_keys=True).encode("utf-8", errors="replace")
        members = {suffix: pair.image_bytes, "json": encoded, "txt": pair.text.encode()}
        written += file.write(b"".join(_member(f"{pair.key}.{ending}", data) for ending, data in members.items()))
        count += 1
    end = 2 * tarfile.BLOCKSIZE  # of zeros, and to the end of a record
    file.write(bytes(end + -(written + end) % tarfile.RECORDSIZE))
    return count


def read_pairs(path: Path) -> Iterator[TextImagePair]:
    """The pairs of a tar of our own. ManifestError if it is cut or was not written by `write_pairs`."""
    image = b""
    try:
        with tarfile.open(path, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member)
                base, suffix = split_member_name(member.name)
                data = content.read() if content is not None else b""
                if suffix in IMAGE_SUFFIXES:
                    image = data
                elif suffix == "json":
                    yield _own_pair(base, image, json.loads(data))
            with open(path, "rb") as file:
                is_whole = _ends_at(file, tar.offset)
            if not is_whole:
                raise EOFError("it does not end where a tar ends")
    except (tarfile.TarError, EOFError, ValueError, KeyError) as error:
        raise ManifestError(f"{path} is damaged ({error}); delete it and run the job that wrote it again") from error


def _own_pair(key: str, image: bytes, document: dict[str, Any]) -> TextImagePair:
    captions, source = tuple(document.pop("captions")), document.pop("source")
    return TextImagePair(key=key, captions=captions, image_bytes=image, source=source, extra=document)


def plain_header(name: str, *, size: int) -> tarfile.TarInfo:
    """The header of a file in a tar, with nothing of this machine or this moment."""
    header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner names are empty
    header.size = size
    return header


def _member(name: str, data: bytes) -> bytes:
    """A file as tarfile would add it, in one piece."""
    header = plain_header(name, size=len(data))
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _ends_at(file: BinaryIO, offset: int) -> bool:
    """Whether the empty block that ends a tar lies here. tarfile takes a cut or altered header for an end as well."""
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _add_member(sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
    wanted = suffix in IMAGE_SUFFIXES or suffix in ("txt", "json")
    if not member.isreg() or member.issparse():
        sample.refused = sample.refused or "member_refused"
        return
    if not wanted:
        return
    if member.size > (MAX_IMAGE_BYTES if suffix in IMAGE_SUFFIXES else MAX_TEXT_BYTES):
        sample.refused = sample.refused or "member_too_large"
        return
    content = tar.extractfile(member)
    data = content.read() if content is not None else b""
    if len(data) < member.size:
        raise EOFError("member is cut")
    if suffix == "txt":
        sample.text = data
    elif suffix == "json":
        sample.metadata = data
    elif len(sample.images) < 2:
        sample.images.append(data)


def _finish(sample: _Sample, tar_name: str, caption_fields: Sequence[str]) -> TextImagePair | Failure:
    if not KEY_PATTERN.match(sample.name.rpartition("/")[2]) or ".." in sample.name or sample.name.startswith("/"):
        return _failure(sample.name, tar_name, "key_refused")
    if sample.refused:
        return _failure(sample.name, tar_name, sample.refused)
    if len(sample.images) != 1:
        return _failure(sample.name, tar_name, "two_images" if sample.images else "image_missing")
    metadata = _metadata(sample.metadata)
    if metadata is None:
        return _failure(sample.name, tar_name, "json_damaged")
    text = sample.text.decode("utf-8-sig", errors="replace") if sample.text is not None else None
    captions = captions_of(metadata, text=_joined(text), fields=caption_fields)
    if not captions:
        return _failure(sample.name, tar_name, "caption_missing", ", ".join(sorted(metadata))[:200])
    return TextImagePair(
        key=sample.name.rpartition("/")[2],
        captions=captions,
        image_bytes=sample.images[0],
        source=clean_caption(str(metadata.get("url") or f"{tar_name}/{sample.name}")),
        extra=kept_extra(metadata),
    )


def _joined(text: str | None) -> str | None:
    """A .txt of several lines is one caption here: img2dataset writes alt texts with line breaks as they are."""
    return " ".join(text.split()) if text is not None else None


def _metadata(data: bytes | None) -> dict[str, Any] | None:
    if data is None:
        return {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _failure(name: str, tar_name: str, reason: str, detail: str = "") -> Failure:
    cleaned = clean_caption(name)[:200]
    return Failure(key="", source=f"{tar_name}/{cleaned}", reason=reason, detail=detail)
