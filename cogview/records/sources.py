"""What kind of data a path holds: WebDataset tars, pictures with texts, or a table."""

from pathlib import Path
from typing import Literal

from cogview.errors import ConfigError
from cogview.records.folders import list_images
from cogview.records.tables import TABLE_SUFFIXES

SourceKind = Literal["tars", "images", "table"]


def detect_source(path: Path) -> SourceKind:
    """The kind of a user's data. ConfigError says what is missing and what would do."""
    if not path.exists():
        raise ConfigError(f"data: {path} does not exist; give an existing file or folder")
    if path.is_file():
        return _detect_file(path)
    if list_tars(path):
        return "tars"
    if not any(path.iterdir()):
        raise ConfigError(f"data: {path} is an empty folder; put tars, pictures with .txt files or a table there")
    tables = [table for table in sorted(path.iterdir()) if table.suffix.lower() in TABLE_SUFFIXES[:-1]]
    if tables and not any(path.glob("*.txt")):
        raise ConfigError(f"data: {path} is a folder with a table; give the table itself, such as {tables[0]}")
    list_images(path)
    return "images"


def list_tars(path: Path) -> list[Path]:
    """The tar itself, or the tars directly in a folder, by name."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    return sorted(item for item in path.iterdir() if item.suffix.lower() == ".tar" and item.is_file())


def _detect_file(path: Path) -> SourceKind:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "tars"
    if suffix in TABLE_SUFFIXES:
        return "table"
    raise ConfigError(
        f"data: {path.name} is neither a .tar nor a table ({', '.join(TABLE_SUFFIXES)}); "
        "for a single picture give the folder that holds it and its .txt"
    )
