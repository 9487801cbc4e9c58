"""Pictures by style: where their names come from, and what is refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cogview.errors import ConfigError
from cogview.records.pair import Failure
from cogview.records.styles import StyledPicture, read_styles


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_tar(path: Path, samples: dict[str, dict[str, str]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, document in samples.items():
            for name, data in ((f"{key}.png", png()), (f"{key}.json", json.dumps(document).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def styles(data: Path, style: str = "") -> list[tuple[str, str]]:
    found = list(read_styles(data, style=style))
    return [(item.style if isinstance(item, StyledPicture) else item.reason, item.source) for item in found]


def test_a_folder_of_pictures_has_the_style_that_is_given(tmp_path: Path) -> None:
    write(tmp_path / "b.png", png())
    write(tmp_path / "deep" / "a.jpg", png())
    write(tmp_path / "notes.txt", b"no picture")
    assert styles(tmp_path, "oil painting") == [("oil painting", "b.png"), ("oil painting", "deep/a.jpg")]


def test_folders_in_a_folder_name_their_styles(tmp_path: Path) -> None:
    write(tmp_path / "oil_painting" / "more" / "a.png", png())
    write(tmp_path / "sketch" / "a.png", png())
    assert styles(tmp_path) == [("oil painting", "oil_painting/more/a.png"), ("sketch", "sketch/a.png")]


def test_a_picture_without_a_style_is_named_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "sketch" / "a.png", png())
    write(tmp_path / "stray.png", png())
    with pytest.raises(ConfigError, match=r"style: nothing tells the style of .*stray.png; name it with --style"):
        list(read_styles(tmp_path))


def test_tars_tell_the_style_in_their_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "000.tar", {"a": {"style": "fluent_3d", "caption": "a cat"}, "b": {"caption": "a dog"}})
    assert styles(tmp_path) == [("fluent 3d", "000.tar/a"), ("style_missing", "000.tar/b")]
    assert styles(tmp_path / "000.tar", "flat") == [("flat", "000.tar/a"), ("flat", "000.tar/b")]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="data: "):
            list(read_styles(path))
    write(tmp_path / "single.png", png())
    with pytest.raises(ConfigError, match=r"single.png is not a .tar"):
        list(read_styles(tmp_path / "single.png"))


def test_a_file_that_is_gone_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png())
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    write(tmp_path / "c.png", png())
    pictures = read_styles(tmp_path, style="flat")
    next(pictures)
    (tmp_path / "c.png").unlink()
    last = next(pictures)
    assert isinstance(last, Failure)
    assert last.reason == "file_missing"
