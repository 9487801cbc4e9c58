"""Every job that decodes pictures, run over some that kill or hang Pillow's GIF reader: a program for a test.

`python -m tests.pipelines.poisoned_jobs FOLDER`, in an environment that `poison.plant` has prepared; writes what each
job counted to FOLDER/outcomes.json.
"""

import functools
import http.server
import io
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogview.records.fetch import FetchSettings
from cogview.records.pair import TextImagePair
from cogview.records.urls import AddressPolicy
from cogview.shards.manifest import read_manifest
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.text import TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines import filter_pairs, import_pairs, scrape_pairs, tokenize_pairs
from pipelines.runtime.cluster import ensure_ray, shutdown_ray
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import make_pairs, write_pair_folder
from tests.pipelines.poison import CRASH, EXIT, HANG

PAIRS_IN_SHARD = 6
OUTCOMES = "outcomes.json"


def poisoned_pairs(poisons: Sequence[bytes]) -> list[list[TextImagePair]]:
    """Two shards of six pairs; some of the first are poisoned."""
    shards = [
        [
            replace(
                pair,
                image_bytes=patches(10 * shard + row),
                extra={"sha256": f"{10 * shard + row:064x}", "width": 48, "height": 48},
            )
            for row, pair in enumerate(make_pairs(PAIRS_IN_SHARD, shard=shard))
        ]
        for shard in range(2)
    ]
    for row, poison in enumerate(poisons):
        shards[0][2 * row] = replace(shards[0][2 * row], image_bytes=poison)
    return shards


def patches(seed: int) -> bytes:
    """A picture like no other, also for rules that compare what is left of it when it is small."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(12, axis=0).repeat(12, axis=1)).save(buffer, format="PNG")
    return buffer.getvalue()


def outcome(job: Any, config: Any, folder: Path) -> dict[str, Any]:
    """What a job counted, by shard, and which files that it should not leave are there."""
    run = open_run(folder)
    job.main(config, run)
    shards = read_manifest(folder, deep=True)["shards"]
    left = [path.name for pattern in (".*.tmp", ".*.attempts") for path in folder.rglob(pattern)]
    return {"rejected": [shard["rejected"] for shard in shards], "rows": [s["rows_out"] for s in shards], "left": left}


def scraped(folder: Path) -> dict[str, Any]:
    site = folder / "site"
    site.mkdir()
    pairs = [pair for shard in poisoned_pairs([EXIT, HANG]) for pair in shard]
    for number, pair in enumerate(pairs):
        (site / f"{number}.png").write_bytes(pair.image_bytes)
    rows = [f"http://site.test/{number}.png,{pair.text}" for number, pair in enumerate(pairs)]
    (folder / "urls.csv").write_text("\n".join(["url,caption", *rows]))
    with served(site) as address:
        fetch = FetchSettings(policy=AddressPolicy(resolve={"site.test:80": address}), host_rate=1000.0)
        config = scrape_pairs.Config(table=folder / "urls.csv", shard_size=PAIRS_IN_SHARD, fetch=fetch)
        return outcome(scrape_pairs, config, folder / "scraped")


def imported(folder: Path) -> dict[str, Any]:
    data = folder / "pictures"
    data.mkdir()
    for number, pair in enumerate(pair for shard in poisoned_pairs([CRASH, EXIT]) for pair in shard):
        (data / f"{number:02d}.png").write_bytes(pair.image_bytes)
        (data / f"{number:02d}.txt").write_text(pair.text)
    config = import_pairs.Config(data=data, shard_size=PAIRS_IN_SHARD)
    return outcome(import_pairs, config, folder / "imported")


def filtered(folder: Path) -> dict[str, Any]:
    pairs = write_pair_folder(folder / "to_filter", poisoned_pairs([HANG, CRASH]))
    config = replace(filter_pairs.PRESETS["smoke"], pairs=pairs)
    return outcome(filter_pairs, config, folder / "filtered")


def tokenized(folder: Path) -> dict[str, Any]:
    pairs = write_pair_folder(folder / "to_tokenize", poisoned_pairs([CRASH, EXIT, HANG]))
    captions = [caption for pair in make_pairs(20) for caption in pair.captions]
    text, image = folder / "text_tokenizer", folder / "image_tokenizer"
    train_text_tokenizer(captions, config=TextTokenizerConfig(num_pieces=100, exact=False), output=text)
    torch.manual_seed(0)
    ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=32, code_dim=8))).save(image)
    config = tokenize_pairs.Config(
        pairs=pairs, text_tokenizer=text, image_tokenizer=image, image_size=32, validation_fraction=0.2
    )
    return outcome(tokenize_pairs, config, folder / "tokenized")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server for the files of a folder; `host:port`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def main(folder: Path) -> None:
    ensure_ray(num_cpus=2)
    outcomes = {job.__name__: job(folder) for job in (scraped, imported, filtered, tokenized)}
    shutdown_ray()
    (folder / OUTCOMES).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
