"""Pictures that show styles: what style learning reads (CogView, section 3.3).

In: a folder of pictures of one style, a folder with a sub-folder for each style, or tars with a JSON field `style`.
Out: encoded pictures with the names of their styles, or the reasons why there are none. Captions are not needed: all
pictures of a style are called the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogview.errors import ConfigError
from cogview.records.captions import clean_caption
from cogview.records.folders import read_image_file
from cogview.records.pair import Failure, Unusable
from cogview.records.tars import IMAGE_SUFFIXES, read_foreign_tar

STYLE_FIELD = "style"


@dataclass(frozen=True, kw_only=True)
class StyledPicture:
    """An encoded picture, the style that it shows, and where it comes from."""

    style: str
    source: str
    image_bytes: bytes


def read_styles(data: Path, *, style: str = "") -> Iterator[StyledPicture | Failure]:
    """All pictures under `data`, in the order of their names.

    style: what all of them show; empty for the JSON field `style` of tars, or for the names of the folders that lie
    directly in `data`. ConfigError when there are no pictures, or one whose style nothing tells. Reasons of failures:
    style_missing and those of `read_foreign_tar`; file_missing, member_too_large.
    """
    if not data.exists():
        raise ConfigError(f"data: {data} does not exist; give a folder of pictures, or of tars")
    tars = _list_tars(data)
    if tars:
        for path in tars:
            yield from _of_tar(path, style=style)
        return
    if data.is_file():
        raise ConfigError(f"data: {data.name} is not a .tar; for a picture give the folder that holds it")
    names = list_pictures(data)
    for name in names:
        if not style and "/" not in name:
            raise ConfigError(
                f"style: nothing tells the style of {data / name}; name it with --style, or give a folder in which "
                "the pictures of each style lie in a folder of its name"
            )
    for name in names:
        yield _of_file(data, name, style=style or style_name(name.partition("/")[0]))


def list_pictures(folder: Path) -> list[str]:
    """The pictures under a folder as sorted relative paths. ConfigError if there are none."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in files if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES)
    if not names:
        raise ConfigError(f"data: {folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}) and no .tar files")
    return names


def style_name(text: str) -> str:
    """A style as a caption says it: `oil_painting` is "oil painting"."""
    return clean_caption(text.replace("_", " "))


def check_template(template: str, *, name: str, needed: Sequence[str]) -> None:
    """ConfigError unless the template has these places, and no others."""
    try:
        without = [place for place in needed if f"{{{place}}}" not in template]
        template.format(**dict.fromkeys(needed, ""))
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{name}={template!r}: {error} is no place to fill in; use {_places(needed)}") from error
    if without:
        raise ConfigError(f"{name}={template!r}: say where {_places(without)} goes")


def _list_tars(data: Path) -> list[Path]:
    """The tar itself, or the tars directly in a folder, by name."""
    found = [data] if data.is_file() else sorted(path for path in data.iterdir() if path.is_file())
    return [path for path in found if path.suffix.lower() == ".tar"]


def _of_tar(path: Path, *, style: str) -> Iterator[StyledPicture | Failure]:
    """With a style given, a sample needs no more than what our reader takes for a pair: a picture and some text."""
    for sample in read_foreign_tar(path, caption_fields=() if style else (STYLE_FIELD,)):
        if isinstance(sample, Failure):
            is_nameless = sample.reason == "caption_missing" and not style
            yield Failure(key="", source=sample.source, reason="style_missing") if is_nameless else sample
        else:
            named = style or style_name(sample.captions[0])
            yield StyledPicture(style=named, source=sample.source, image_bytes=sample.image_bytes)


def _of_file(folder: Path, name: str, *, style: str) -> StyledPicture | Failure:
    data = read_image_file(folder / name)
    if isinstance(data, Unusable):
        return Failure(key="", source=name, reason=data.reason, detail=data.detail)
    return StyledPicture(style=style, source=name, image_bytes=data)


def _places(names: Sequence[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names)
