from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.records.folders import list_images, read_captions, read_image_file
from cogview.records.pair import Unusable
from cogview.records.sources import Source, detect_source
from tests.records.test_images import RED_TO_BLUE
from tests.records.web_site import encode


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


PNG = encode(RED_TO_BLUE)


def test_kinds_of_data_are_told_apart(tmp_path: Path) -> None:
    pictures = fill(tmp_path / "p", {"a.PNG": PNG, "a.txt": "x", "sub/b.jpg": PNG})
    tars = fill(tmp_path / "t", {"0.tar": b"", "0.parquet": b"", "0_stats.json": "{}"})
    table = fill(tmp_path / "c", {"t.csv": "url,caption"})
    assert detect_source(pictures) == Source(kind="images", folder=pictures)
    assert [file.name for file in detect_source(tars).files] == ["0.tar"]
    for given in (tars, tars / "0.tar", f"{tars}/*", [f"{tmp_path}/**/*.tar", str(tars / "0.tar")]):
        assert detect_source(given).kind == "tars", given
    for given in (table, table / "t.csv", f"{table}/*.csv", f"file://{table}"):
        assert detect_source(given).kind == "table", given


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({}, "missing", "does not exist"),
        ({}, "", "is an empty folder"),
        ({"readme.md": "x"}, "", "holds no pictures"),
        ({"a.png": PNG, "b.png": PNG}, "", "2 pictures but no captions.* such as a.txt"),
        ({"a.png": PNG}, "a.png", "neither a .tar nor a table"),
        ({"a.zip": PNG}, "a.zip", "neither a .tar nor a table"),
    ],
)
def test_what_cannot_work_says_what_would(tmp_path: Path, files: dict[str, bytes | str], name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        detect_source(fill(tmp_path, files) / name if name else fill(tmp_path, files))


def test_each_line_beside_a_picture_is_a_caption(tmp_path: Path) -> None:
    fill(
        tmp_path,
        {
            "b/a.v2.png": PNG,
            "b/a.v2.txt": "\ufeffa dog\n\n 一只狗 \r\na dog\n",
            "c.png": PNG,
            "d.png": PNG,
            "d.txt": " \n",
        },
    )
    assert list_images(tmp_path) == ["b/a.v2.png", "c.png", "d.png"]
    assert read_captions(tmp_path, "b/a.v2.png") == ("a dog", "一只狗")
    for name in ("c.png", "d.png"):
        missing = read_captions(tmp_path, name)
        assert isinstance(missing, Unusable)
        assert missing.reason == "caption_missing"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": PNG})
    assert read_image_file(tmp_path / "a.png") == PNG
    for path in (tmp_path, tmp_path / "none.png", Path("/dev/zero"), tmp_path / ("x" * 5000), tmp_path / "nul\0.png"):
        answer = read_image_file(path)
        assert isinstance(answer, Unusable)
        assert answer.reason == "file_missing"
