import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cogview.errors import ConfigError, ManifestError
from cogview.records.pair import Failure, TextImagePair
from cogview.records.tars import (
    captions_of,
    check_caption_fields,
    read_foreign_tar,
    read_pairs,
    usual_caption_fields,
    write_pairs,
)
from tests.records.test_images import RED_TO_BLUE
from tests.records.web_site import encode

PNG = encode(RED_TO_BLUE)


def write_tar(path: Path, members: list[tuple[str, bytes | str | dict[str, Any]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def outcomes(path: Path, **given: Any) -> list[str]:
    return [row.reason if isinstance(row, Failure) else row.key for row in read_foreign_tar(path, **given)]


def only(path: Path, **given: Any) -> TextImagePair:
    (pair,) = read_foreign_tar(path, **given)
    assert isinstance(pair, TextImagePair), pair
    return pair


def test_img2dataset_samples_are_read(tmp_path: Path) -> None:
    document = {"caption": "a dog", "url": "http://a.org/1.jpg", "key": "000", "status": "success", "exif": "{gps}"}
    path = write_tar(
        tmp_path / "0.tar", [("000.jpg", PNG), ("000.txt", "a dog\n"), ("000.json", {**document, "nsfw": 0.1})]
    )
    pair = only(path)
    assert pair.captions == ("a dog",)
    assert pair.source == "http://a.org/1.jpg"
    assert pair.extra == {"nsfw": 0.1}


def test_captions_of_several_languages_are_found_and_remarks_are_not() -> None:
    document = {
        "caption_zh": "木瓜",
        "caption_en": "papaya",
        "captions_en": ["papaya", "a fruit"],
        "caption_type": "class_label",
        "caption_zh_origin": "translated",
        "keywords_en": ["fruit"],
        "caption": None,
    }
    assert usual_caption_fields(document) == ["caption", "caption_en", "caption_zh", "captions_en"]
    assert captions_of(document, text="from the txt") == ("from the txt", "papaya", "木瓜", "a fruit")
    assert captions_of(document, text="from the txt", fields=("keywords_en", "txt")) == ("fruit", "from the txt")


def test_bad_samples_are_reasons_and_the_others_stay(tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = [
        ("good.png", PNG),
        ("good.txt", "x"),
        ("nocap.png", PNG),
        ("nocap.json", {"note": "x"}),
        ("noimage.txt", "x"),
        ("two.png", PNG),
        ("two.jpg", PNG),
        ("two.txt", "x"),
        ("broken.png", PNG),
        ("broken.json", b"{"),
        ("list.png", PNG),
        ("list.json", b"[1]"),
        ("deep.png", PNG),
        ("deep.json", b"[" * 100_000),
        ("../../evil.png", PNG),
        ("../../evil.txt", "x"),
        ("/absolute.png", PNG),
        ("/absolute.txt", "x"),
        ("sp ace.png", PNG),
        ("sp ace.txt", "x"),
        ("long" * 20 + ".png", PNG),
        ("long" * 20 + ".txt", "x"),
        ("folder/last.png", PNG),
        ("folder/last.seg.png", PNG),
        ("folder/last.txt", "x"),
    ]
    assert outcomes(write_tar(tmp_path / "0.tar", members)) == [
        "good",
        "caption_missing",
        "image_missing",
        "two_images",
        "json_damaged",
        "json_damaged",
        "json_damaged",
        "key_refused",
        "key_refused",
        "key_refused",
        "key_refused",
        "last",
    ]
    assert not (tmp_path.parent / "evil.png").exists()


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"k{ord(kind)}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert outcomes(path) == ["member_refused"] * 4


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    members: list[tuple[str, Any]] = [
        ("a.png", PNG),
        ("a.txt", "x"),
        *((f"a.{s}", payload) for s in ("pkl", "pyd", "pth")),
    ]
    assert outcomes(write_tar(tmp_path / "0.tar", members)) == ["a"]
    assert not canary.exists()


def test_a_million_members_of_one_key_hold_two_images_at_most(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.png", PNG)] * 5000 + [("a.txt", "x")])
    assert outcomes(path) == ["two_images"]


@pytest.mark.parametrize("cut", [700, 1200, 3000])
def test_a_cut_tar_gives_its_whole_samples_and_one_reason(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "0.tar", [(f"k{n}.{s}", d) for n in range(4) for s, d in (("png", PNG), ("txt", "x"))])
    size = 512 + -(-len(PNG) // 512) * 512 + 1024
    path.write_bytes(path.read_bytes()[: 2 * size + cut])
    found = outcomes(path)
    assert found[:2] == ["k0", "k1"]
    assert found[-1] == "tar_damaged"
    assert found.count("tar_damaged") == 1


def test_an_altered_header_does_not_end_a_tar_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [(f"k{n}.{s}", d) for n in range(4) for s, d in (("png", PNG), ("txt", "x"))])
    data = bytearray(path.read_bytes())
    data[data.index(b"k2.png") + 130] ^= 1  # in its size
    path.write_bytes(data)
    assert outcomes(path) == ["k0", "k1", "tar_damaged"]


def test_garbage_is_one_reason(tmp_path: Path) -> None:
    for data in (b"", b"garbage" * 1000, b"\x1f\x8b gzip?" * 100):
        (tmp_path / "0.tar").write_bytes(data)
        assert outcomes(tmp_path / "0.tar") == ["tar_damaged"]


def test_a_member_that_claims_terabytes_is_not_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = 2**50
    (tmp_path / "0.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert outcomes(tmp_path / "0.tar") == ["tar_damaged"]


def test_our_own_tars_come_back_as_they_were_and_are_deterministic(tmp_path: Path) -> None:
    pairs = [
        TextImagePair(
            key=f"00000_{n:05d}",
            captions=("a dog", "一只狗\n", "lone"),
            image_bytes=PNG if n % 2 else encode(RED_TO_BLUE, "JPEG"),
            source=f"http://a.org/{n}",
            extra={"sha256": "ab", "width": 96, "licence": None},
        )
        for n in range(3)
    ]
    for name in ("a.tar", "b.tar"):
        with open(tmp_path / name, "wb") as file:
            assert write_pairs(file, iter(pairs)) == 3
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert list(read_pairs(tmp_path / "a.tar")) == pairs
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = tar.getnames()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}
    assert names[:3] == ["00000_00000.jpg", "00000_00000.json", "00000_00000.txt"]


def test_a_damaged_tar_of_our_own_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        write_pairs(file, [TextImagePair(key="k", captions=("x",), image_bytes=PNG, source="s")])
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ManifestError, match="run the job that wrote it again"):
        list(read_pairs(path))
    foreign = write_tar(tmp_path / "0.tar", [("a.png", PNG), ("a.json", {"caption": "x"})])
    with pytest.raises(ManifestError):
        list(read_pairs(foreign))


def test_a_corpus_without_captions_says_which_fields_there_are(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.png", PNG), ("a.json", {"titel": "x", "note": 1})])
    with pytest.raises(ConfigError, match="its JSON has note, titel"):
        check_caption_fields([path], ())
    with pytest.raises(ConfigError, match="no captions in caption"):
        check_caption_fields([path], ("caption",))
    check_caption_fields([path], ("titel",))
