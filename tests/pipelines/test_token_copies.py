"""Token shards at remote addresses: copied once, whole, by one worker of a machine; and several corpora as one."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest

from cogview.errors import ConfigError, ManifestError, VocabularyError
from cogview.shards.manifest import MANIFEST_NAME, file_record, write_sealed
from cogview.shards.reader import TokenShards
from cogview.training.loop import LoopConfig, train
from cogview.training.ranks import Ranks
from pipelines.pretrain import PRESETS, build_task
from pipelines.runtime.jobs import digest_input
from pipelines.runtime.token_copies import local_copies
from pipelines.tasks.language_model import require_inputs
from pipelines.tasks.new_weights import TaskSettings
from tests.pipelines.trained_folders import write_trained_folders
from tests.shards.conftest import ORIGIN, WriteFolder, write_folder

__all__ = ["write_folder"]


@pytest.fixture
def remote(tmp_path: Path, write_folder: WriteFolder) -> str:
    """A folder of token shards behind an address that is no local path."""
    write_folder(5, 0, 7, folder=tmp_path / "bucket" / "tokens")
    return f"file://{tmp_path}/bucket/tokens"


def test_a_remote_folder_is_read_from_a_copy(remote: str, tmp_path: Path) -> None:
    (folder,) = local_copies([remote], cache=tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    there, here = TokenShards.open(tmp_path / "bucket" / "tokens"), TokenShards.open(folder, deep=True)
    assert here.rows(np.arange(12)).image_codes.tolist() == there.rows(np.arange(12)).image_codes.tolist()


def test_local_folders_are_not_copied(tmp_path: Path) -> None:
    assert local_copies([tmp_path / "a", f"{tmp_path}/b"], cache=tmp_path / "cache") == [tmp_path / "a", tmp_path / "b"]
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_copy_goes_on(remote: str, tmp_path: Path) -> None:
    (folder,) = local_copies([remote], cache=tmp_path / "cache")
    kept, lost = folder / "train" / "shard-00000.arrow", folder / "train" / "shard-00002.arrow"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert local_copies([remote], cache=tmp_path / "cache") == [folder]
    TokenShards.open(folder, deep=True)
    assert kept.stat().st_mtime_ns == before


def test_content_that_is_not_the_manifests_is_refused(remote: str, tmp_path: Path) -> None:
    shard = tmp_path / "bucket" / "tokens" / "train" / "shard-00002.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ManifestError, match=r"shard-00002.arrow has .* its manifest says"):
        local_copies([remote], cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("shard-00002.arrow"))


def test_a_manifest_cannot_name_files_outside(remote: str, tmp_path: Path) -> None:
    outside = tmp_path / "bucket" / "secret.txt"
    outside.write_text("content")
    shards = [{"files": {"../secret.txt": file_record(outside)}}]
    write_sealed(tmp_path / "bucket" / "tokens" / MANIFEST_NAME, {"shards": shards, "extra": {}})
    with pytest.raises(ManifestError, match="outside its folder"):
        local_copies([remote], cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("secret.txt"))


def test_an_address_with_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing/manifest.json cannot be read"):
        local_copies([f"file://{tmp_path}/nothing"], cache=tmp_path / "cache")


def test_other_content_never_takes_the_place_of_the_old(remote: str, tmp_path: Path, write_folder: WriteFolder) -> None:
    (first,) = local_copies([remote], cache=tmp_path / "cache")
    write_folder(3, folder=tmp_path / "bucket" / "tokens")
    (second,) = local_copies([remote], cache=tmp_path / "cache")
    assert first != second
    assert [len(TokenShards.open(folder, deep=True)) for folder in (first, second)] == [12, 3]


def test_workers_of_a_machine_copy_once(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(5, 7, folder=tmp_path / "bucket")
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form: str, *values: Any) -> None:
            if self.command == "GET":
                asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "bucket")))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        local_copies([address], cache=tmp_path / "alone")
        of_one = [path for path in asked if path.endswith(".arrow")]
        asked.clear()
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=local_copies, args=([address],), kwargs={"cache": tmp_path / "cache"})
            for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
    finally:
        server.shutdown()
    (folder,) = (tmp_path / "cache").iterdir()
    TokenShards.open(folder, deep=True)
    assert sorted(path for path in asked if path.endswith(".arrow")) == sorted(of_one)
    assert len(set(of_one)) == 4


def test_a_finished_remote_output_stands_for_its_products(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    address = ("memory://bucket/tokens",)

    def upload(output_digest: str, *, seconds: float) -> None:
        content = json.dumps({"job": "tokenize_pairs", "output_digest": output_digest, "seconds": seconds})
        memory.pipe("/bucket/tokens/complete.json", content.encode())

    try:
        upload("d" * 64, seconds=1.0)
        first = digest_input(address, field_name="more_tokens")
        upload("d" * 64, seconds=200.0)
        assert digest_input(address, field_name="more_tokens") == first
        upload("e" * 64, seconds=200.0)
        assert digest_input(address, field_name="more_tokens") != first
    finally:
        memory.rm("/bucket", recursive=True)


def test_several_corpora_are_numbered_through(tmp_path: Path, write_folder: WriteFolder) -> None:
    rows = [*write_folder(4, 3, folder=tmp_path / "a"), *write_folder(6, folder=tmp_path / "b")]
    shards = TokenShards.open_all([tmp_path / "a", tmp_path / "b"])
    assert shards.corpus_sizes == (7, 6)
    found = shards.rows(np.arange(13))
    assert found.image_codes.tolist() == [row.image_codes.tolist() for row in rows]


def test_corpora_of_other_tokenizers_or_grids_are_refused(tmp_path: Path, write_folder: WriteFolder) -> None:
    write_folder(4, folder=tmp_path / "a")
    write_folder(4, folder=tmp_path / "b", origin=replace(ORIGIN, image_tokenizer="f" * 64))
    with pytest.raises(VocabularyError, match="image_tokenizer"):
        TokenShards.open_all([tmp_path / "a", tmp_path / "b"])


def test_pretraining_mixes_corpora_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_trained_folders(tmp_path / "trained")
    shutil.copytree(folders.tokens, tmp_path / "bucket")
    monkeypatch.setenv("COGVIEW_CACHE", str(tmp_path / "cache"))
    loop = LoopConfig(num_steps=2, global_batch_size=16, log_every=1)
    inputs = replace(require_inputs(folders), more_tokens=(f"file://{tmp_path}/bucket",), shares=(1.0, 3.0))
    config = replace(PRESETS["smoke"], loop=loop, num_samples=2, num_validation_rows=8, max_text=24)
    task = build_task(TaskSettings(config=config, output=tmp_path / "run", inputs=inputs), Ranks())
    rows = task.parts.train.corpus_sizes[0]
    assert task.parts.train.corpus_sizes == (rows, rows)
    assert int((task.order.indices(0) < rows).sum()) == 4
    held_out = task.spread_rows(8)
    assert held_out.min() < len(task.parts.validation) // 2 <= held_out.max()
    assert train(task, config=loop, output=tmp_path / "run", identity={}, ranks=Ranks())
    assert (tmp_path / "run" / "model.safetensors").is_file()
