"""Bad files: tars, tables, lists, shards and manifests, written to a folder, and what must be said of each."""

import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.hostile.cases import Case, Verdict
from benchmarks.hostile.pictures import encode, photo
from benchmarks.tar_files import add_file
from cogview.errors import CogViewError
from cogview.records.opt_out import read_opt_out
from cogview.records.pair import Failure
from cogview.records.tables import inspect_table, read_table, require_captions
from cogview.records.tars import read_foreign_tar
from cogview.shards.manifest import ShardEntry, file_record, read_manifest, write_manifest
from cogview.shards.reader import TokenShards
from cogview.shards.schema import TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard

CANARY = "canary-that-must-not-exist"
ORIGIN = TokenOrigin(
    text_tokenizer="t", image_tokenizer="i", vocabulary="v", num_image_codes=512, num_text_pieces=100, grid=8
)


class Payload:
    """A pickle of this writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self._path), "w"))


def file_verdicts(folder: Path) -> list[Verdict]:
    """Write every bad file below a folder, read it the way the jobs do, and say what became of it."""
    return [*_tars(folder), *_tables(folder), *_shards(folder), *_canary(folder)]


def _tars(folder: Path) -> list[Verdict]:
    """The samples of one tar, and tars that are damaged as a whole."""
    picture = encode(photo())
    samples: list[tuple[str, str, list[tuple[str, bytes]]]] = [
        ("a good sample", "ok", [("a.png", picture), ("a.txt", b"x")]),
        ("a way out", "key_refused", [("../../evil.png", picture), ("../../evil.txt", b"x")]),
        ("an absolute path", "key_refused", [("/etc/evil.png", picture), ("/etc/evil.txt", b"x")]),
        ("a key of 300 characters", "key_refused", [(f"{'k' * 300}.png", picture)]),
        ("no caption", "caption_missing", [("nocaption.png", picture)]),
        ("no picture", "image_missing", [("noimage.txt", b"x")]),
        ("two pictures", "two_images", [("two.png", picture), ("two.jpg", picture), ("two.txt", b"x")]),
        ("a name twice", "two_images", [("twice.png", picture), ("twice.png", picture), ("twice.txt", b"x")]),
        ("broken JSON", "json_damaged", [("json.png", picture), ("json.json", b"{")]),
        ("JSON 100,000 deep", "json_damaged", [("deep.png", picture), ("deep.json", b"[" * 100_000)]),
        ("a caption of 2 MB", "member_too_large", [("long.png", picture), ("long.txt", b"x" * 2_000_000)]),
        ("pickles beside it", "ok", [("p.png", picture), ("p.txt", b"x"), *_pickles(folder / CANARY)]),
        ("another case", "ok", [("A.png", picture), ("A.txt", b"x")]),
    ]
    path = folder / "samples.tar"
    with tarfile.open(path, "w") as tar:
        for _, _, members in samples:
            for name, data in members:
                add_file(tar, name, data)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"special{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    names = [(name, reason) for name, reason, _ in samples]
    names += [(f"a {kind}", "member_refused") for kind in ("symbolic link", "hard link", "FIFO", "device")]
    verdicts = [
        _verdict("tars", name, reason, found)
        for (name, reason), found in zip(names, map(_outcome, read_foreign_tar(path)), strict=True)
    ]
    whole = path.read_bytes()
    sparse = whole[:124] + b"77777777777\0" + whole[136:]
    wholes = {"cut in a member": whole[:9000], "a huge size": sparse, "no tar": b"x" * 20_000, "0 bytes": b""}
    for name, data in wholes.items():
        (folder / "whole.tar").write_bytes(data)
        *_, last = read_foreign_tar(folder / "whole.tar")
        verdicts.append(_verdict("tars", name, "tar_damaged", _outcome(last)))
    return verdicts


def _tables(folder: Path) -> list[Verdict]:
    urls, words = ["http://a.org/1.jpg"] * 3, ["x", "y", "z"]
    deep: Any = "x"
    for _ in range(90):
        deep = {"d": deep}
    bomb = pa.table({"url": urls, "caption": ["x" * 2**20] * 3})
    empty = pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())})
    tables: list[tuple[str, str, Callable[[Path], object]]] = [
        ("a missing column", "refused", _parquet(pa.table({"url": urls, "n": [1, 2, 3]}))),
        ("two columns of a name", "refused", _parquet(pa.Table.from_arrays([pa.array(words)] * 2, ["url", "url"]))),
        ("addresses that are numbers", "0 rows", _parquet(pa.table({"url": [1, 2, 3], "caption": [4, 5, 6]}))),
        ("text as bytes", "3 rows", _parquet(pa.table({"url": [u.encode() for u in urls], "caption": words}))),
        ("90 levels deep", "3 rows", _parquet(pa.table({"url": urls, "caption": words, "deep": [deep] * 3}))),
        ("a long dictionary page", "3 rows", _parquet(bomb)),
        ("0 rows", "refused", _parquet(empty)),
        ("0 bytes", "refused", lambda path: path.write_bytes(b"")),
        ("a crafted footer", "refused", lambda path: path.write_bytes(b"PAR1" + bytes(40) + b"\xff\xff\xff\x7fPAR1")),
    ]
    verdicts = []
    for name, expected, write in tables:
        write(folder / "t.parquet")
        verdicts.append(_verdict("tables", name, expected, _rows(folder / "t.parquet")))
    texts = {
        ("mixed line ends", "t.csv"): (
            b"url,caption\rhttp://a.org/1,x\r\nhttp://a.org/2,y\nhttp://a.org/3,z",
            "3 rows",
        ),
        ("formula cells", "t.csv"): (b"url,caption\nhttp://a.org/1,=cmd|' /C calc'!A0\n", "1 rows"),
        ("a line of 100 MB", "t.csv"): (b"url,caption\nhttp://a.org/1,x\n" + b"y" * 100_000_000 + b"\n", "1 rows"),
        ("a BOM and NULs", "t.tsv"): (b"\xef\xbb\xbfurl\tcaption\nhttp://a.org/1\t\0x\n", "1 rows"),
        ("broken lines", "t.jsonl"): (b'{"url": "http://a.org/1", "caption": "x"}\n{\n[[[\n"\xff"\n', "1 rows"),
        ("JSON 100,000 deep", "t.json"): (b"[" * 100_000, "refused"),
        ("GBK called UTF-8", "t.tsv"): ("狗\thttp://a.org/1\n".encode("gbk"), "1 rows"),
        ("no table", "t.xlsx"): (b"PK\x03\x04", "refused"),
    }
    for (name, file_name), (data, expected) in texts.items():
        (folder / file_name).write_bytes(data)
        verdicts.append(_verdict("tables", name, expected, _rows(folder / file_name)))
    (folder / "out.txt").write_text("not a url\n")
    listed = _said(lambda: read_opt_out([str(folder / "out.txt")]))
    verdicts.append(_verdict("tables", "a bad opt-out list", "refused", listed))
    return verdicts


def _shards(folder: Path) -> list[Verdict]:
    """Token shards and manifests that somebody has changed, in the second half also those who mended the manifest."""
    shards, first = folder / "tokens", folder / "tokens" / "train" / "shard-00000.arrow"
    whole = _write_tokens(shards)
    codes, offsets = whole.index(b"\x07\x00" * 64), whole.index(struct.pack("<3i", 0, 3, 6))
    changes = {
        "0 bytes": (b"", False),
        "cut": (whole[:-100], False),
        "wrong magic": (whole[:-6] + b"NOROW1", True),
        "a code of no codebook": (whole[:codes] + b"\xff\xff" + whole[codes + 2 :], True),
        "offsets past the end": (whole[:offsets] + struct.pack("<3i", 0, 3, 2**30) + whole[offsets + 12 :], True),
        "offsets below zero": (whole[:offsets] + struct.pack("<3i", 0, -3, 6) + whole[offsets + 12 :], True),
    }
    verdicts = []
    for name, (content, is_mended) in changes.items():
        _write_tokens(shards)
        first.write_bytes(content)
        if is_mended:
            _close_tokens(shards)
        verdicts.append(_verdict("shards", name, "refused", _said(lambda: _read_tokens(shards))))
    _write_tokens(shards)
    for name, files in (("leads out", {"../../../etc/hostname": 1}), ("promises more", {"train/shard-9.arrow": 1})):
        manifest = json.loads((shards / "manifest.json").read_text())
        manifest["shards"][0]["files"] = {file: {"bytes": size, "sha256": "0"} for file, size in files.items()}
        (shards / "manifest.json").write_text(json.dumps(manifest))
        verdicts.append(_verdict("shards", f"a manifest that {name}", "refused", _said(lambda: read_manifest(shards))))
    for name, text_id, dtype in (("a text id of no vocabulary", 100, np.uint16), ("codes of 32 bits", 1, np.int32)):
        row = _token_row(text_id, np.zeros(64, dtype))
        said = _said(lambda row=row: write_token_shard(folder / "x.arrow", [row], origin=ORIGIN))  # type: ignore[misc]
        verdicts.append(_verdict("shards", name, "refused", said))
    np.save(folder / "o.npy", np.array([Payload(folder / CANARY)], dtype=object))
    verdicts.append(_verdict("shards", "an .npy of objects", "refused", _rows(folder / "o.npy")))
    return verdicts


def _canary(folder: Path) -> list[Verdict]:
    found = "executed" if (folder / CANARY).exists() else "untouched"
    return [_verdict("tars", "pickled code is not run", "untouched", found)]


def _pickles(target: Path) -> list[tuple[str, bytes]]:
    return [(f"p.{suffix}", pickle.dumps(Payload(target))) for suffix in ("pkl", "pyd", "pth", "pickle")]


def _parquet(table: pa.Table) -> Callable[[Path], object]:
    def write(path: Path) -> object:
        return pq.write_table(table, path, compression="zstd")

    return write


def _rows(path: Path) -> str:
    """How many usable rows a table has, or that it was refused."""
    try:
        columns = require_captions(inspect_table(path), path=path)
        return f"{sum(bool(row.source and row.captions) for row in read_table(path, columns))} rows"
    except CogViewError:
        return "refused"


def _said(work: Callable[[], object]) -> str:
    try:
        answer = work()
    except CogViewError:
        return "refused"
    return answer if isinstance(answer, str) else "taken"


def _write_tokens(folder: Path) -> bytes:
    """A sound folder of two rows to a split; the bytes of its first shard."""
    for split in ("train", "validation"):
        rows = [_token_row(5, np.full(64, 7, np.uint16)) for _ in range(2)]
        write_token_shard(folder / split / "shard-00000.arrow", rows, origin=ORIGIN)
    _close_tokens(folder)
    return (folder / "train" / "shard-00000.arrow").read_bytes()


def _close_tokens(folder: Path) -> None:
    names = [f"{split}/shard-00000.arrow" for split in ("train", "validation")]
    counts = {"rows_train": 2, "rows_validation": 2}
    files = {name: file_record(folder / name) for name in names}
    entry = ShardEntry(shard=0, rows_in=2, rows_out=2, files=files, extra=counts)
    write_manifest(folder, [entry], extra={**asdict(ORIGIN), **counts})


def _token_row(text_id: int, codes: npt.NDArray[Any]) -> TokenRow:
    return TokenRow(key="k", text="x", text_ids=np.full(3, text_id, np.int32), image_codes=codes, source="s")


def _read_tokens(folder: Path) -> str:
    shards = TokenShards.open(folder, split="train")
    return f"{len(shards.rows(np.arange(len(shards))).texts)} rows"


def _outcome(sample: object) -> str:
    return sample.reason if isinstance(sample, Failure) else "ok"


def _verdict(topic: str, name: str, expected: str, found: str) -> Verdict:
    return Verdict(case=Case(topic=topic, name=name, expected=(expected,)), found=found)
