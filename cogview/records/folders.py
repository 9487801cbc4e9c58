"""A folder of pictures with same-named .txt files: each line of a .txt is one caption of its picture."""

from pathlib import Path

from cogview.errors import ConfigError
from cogview.locations import is_remote, open_data
from cogview.records.captions import clean_captions
from cogview.records.pair import Unusable
from cogview.records.tars import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, MAX_TEXT_BYTES


def list_images(folder: Path) -> list[str]:
    """The pictures under a folder as sorted relative paths. ConfigError if there are none, or none with a .txt."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    images = sorted(name for name in files if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES)
    if not images:
        raise ConfigError(
            f"data: {folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}), no .tar files and no table; "
            "give a folder of pictures with same-named .txt files, a folder of WebDataset tars, or a table file"
        )
    if not any(_caption_name(name) in files for name in images):
        raise ConfigError(
            f"data: {folder} holds {len(images)} pictures but no captions; put a .txt of the same name beside each, "
            f"such as {_caption_name(images[0])}, one caption a line"
        )
    return images


def read_captions(folder: Path, image: str) -> tuple[str, ...] | Unusable:
    """The captions beside a picture. Reasons: caption_missing, member_too_large."""
    path = folder / _caption_name(image)
    if not path.is_file():
        return Unusable("caption_missing", f"no {path.name}")
    if path.stat().st_size > MAX_TEXT_BYTES:
        return Unusable("member_too_large", path.name)
    captions = clean_captions(path.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    return captions or Unusable("caption_missing", f"{path.name} is empty")


def read_image_file(path: Path | str) -> bytes | Unusable:
    """The bytes of a picture on this machine, where only regular files are opened, or at a remote address.

    Reasons: file_missing, member_too_large.
    """
    if isinstance(path, str) and is_remote(path):
        return _read_remote(path)
    path = Path(path)
    try:
        if not path.is_file():
            return Unusable("file_missing")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Unusable("member_too_large", f"more than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name too long for the system, or with a NUL inside
        return Unusable("file_missing", type(error).__name__)


def _read_remote(address: str) -> bytes | Unusable:
    try:
        with open_data(address) as stream:
            data = stream.read(MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError, ConfigError) as error:
        return Unusable("file_missing", type(error).__name__)
    return data if len(data) <= MAX_IMAGE_BYTES else Unusable("member_too_large", f"more than {MAX_IMAGE_BYTES} bytes")


def _caption_name(image: str) -> str:
    return f"{image.rpartition('.')[0]}.txt"
