"""Stand-ins for what only a reader of the pages has: pictures and tables of their own, released weights, web sites.

Pictures are scenes of the demo, weights are random in the layouts in which they are published, and the web is a server
on the loopback address that is allowed by its name. `STAND_INS` says which literal text of a command each is for.
"""

import csv
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import ImageFilter, ImageOps

from benchmarks.chains import stage_folders
from benchmarks.tar_files import add_file
from benchmarks.tiny_clip import write_clip
from cogview.evaluation.inception_network import InceptionNetwork
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.released import save_released_gpt
from cogview.scenes.scene import CaptionedScene, corpus, draw_scene
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.released import save_released_vqvae
from cogview.tokenizers.text import MODEL_NAME, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig

NUM_SCENES = 600  # the smoke preset holds 200 pictures out of the image tokenizer's training
NUM_REAL = 40  # of the table with COCO's layout
NUM_WEB = 12
NUM_CODES, POSITIONS = 32, 1089  # positions: of the released base model, 32 x 32 codes and their text
LOOPBACK, HOST = "127.0.0.1", "example.org"
# The literal text of a command -> its stand-in, a name in the folder of inputs.
STAND_INS: Mapping[str, str] = {
    "/data/tars": "tars",
    "/data/photos": "photos",
    "/data/list.parquet": "list.parquet",
    "/data/list.csv": "list.csv",
    "/data/drawings": "drawings",
    "/data/gan": "gan",
    "/data/own": "own",
    "/data/text": "text",
    "/data/image": "image",
    "/photo.jpg": "photo.jpg",
    "/coco/val2014": "val2014",
    "/models/clip-vit-base-patch32": "clip",
    "/pictures/of/another-system": "another-system",
    "/weights/cogview-base": "cogview-base",
    "/weights/vqvae_hard_biggerset_011.pt": "vqvae.pt",
    "/weights/cog-pretrain.model": MODEL_NAME,
    "/shared/runs": "shared",
    "s3://bucket/pairs": "tars",
    "s3://bucket/web": "web",
    "captions_val2014.json": "captions.json",
    "FILE.pth": "inception.pth",
    "entities.tsv": "entities.tsv",
    "list.txt": "opt-out.txt",
    "my_scorer.py": "scorer.py",
    "urls.parquet": "urls.parquet",
}
SCORER = '''"""How bright a picture is, as if bright pictures had watermarks."""

import numpy as np


def score(pictures):
    """A score for each picture."""
    return [{"pwatermark": float(np.asarray(picture).mean()) / 255} for picture in pictures]
'''


def write_inputs(folder: Path) -> None:
    """All stand-ins but those that a first run leaves (`keep_outputs`)."""
    folder.mkdir(parents=True)
    rows = list(corpus(1, NUM_SCENES))
    write_pictures(rows, folder)
    write_tars(rows, folder / "tars")
    write_tables(rows, folder)
    write_weights(rows, folder)
    (folder / "scorer.py").write_text(SCORER)
    (folder / "entities.tsv").write_text("products\tred circle\nproducts\tblue square\n")
    (folder / "shared").mkdir()


def keep_outputs(root: Path, folder: Path) -> None:
    """From the chain under `root`: a corpus with its tokenizers, another one, and shards to take two addresses out of.

    They are copies, so that taking down does not touch what the other commands read.
    """
    stages = stage_folders(root, "scrape_pairs", "tokenize_pairs")
    names = {"own": "tokenize_pairs", "web": "tokenize_pairs"}
    names |= {"text": "train_text_tokenizer", "image": "train_image_tokenizer"}
    names |= {f"taken/{job}": job for job in ("scrape_pairs", "tokenize_pairs")}
    for name, job in names.items():
        shutil.copytree(stages[job], folder / name)
    fetched = pq.read_table(stages["scrape_pairs"] / "shard-00000.parquet", columns=["source", "reason"]).to_pylist()
    unwanted = [row["source"] for row in fetched if not row["reason"]][:2]
    (folder / "opt-out.txt").write_text("".join(f"{address}\n" for address in unwanted))


def write_pictures(rows: Sequence[CaptionedScene], folder: Path) -> None:
    """Folders of pictures: captioned by files, named by their captions, in another style, and one photo alone."""
    for name in ("photos", "gan", "drawings"):
        (folder / name).mkdir()
    for row in rows:
        picture = draw_scene(row.scene)
        picture.save(folder / "photos" / f"{row.number:05d}.png")
        (folder / "photos" / f"{row.number:05d}.txt").write_text(f"{row.english}\n{row.chinese}\n")
        for caption in (row.english, row.chinese):
            picture.filter(ImageFilter.GaussianBlur(2)).save(folder / "gan" / f"{caption.replace(' ', '_')}.png")
    for row in rows[:NUM_REAL]:
        lines = ImageOps.invert(draw_scene(row.scene).convert("L").filter(ImageFilter.FIND_EDGES))
        lines.convert("RGB").save(folder / "drawings" / f"{row.number:05d}.png")
    draw_scene(rows[0].scene, image_size=192).save(folder / "photo.jpg")


def write_tars(rows: Sequence[CaptionedScene], folder: Path) -> None:
    """WebDataset tars as img2dataset writes them, with both captions in the JSON."""
    folder.mkdir()
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in part:
                fields = {"caption": row.english, "caption_en": row.english, "caption_zh": row.chinese}
                members = {
                    "jpg": encoded(row, "JPEG"),
                    "txt": row.english.encode(),
                    "json": json.dumps(fields).encode(),
                }
                for suffix, data in members.items():
                    add_file(tar, f"{row.number:09d}.{suffix}", data)


def write_tables(rows: Sequence[CaptionedScene], folder: Path) -> None:
    """Tables of local pictures, of addresses, and COCO's JSON with the pictures that it names."""
    paths = [str(folder / "photos" / f"{row.number:05d}.png") for row in rows]
    english, chinese = [row.english for row in rows], [row.chinese for row in rows]
    pq.write_table(pa.table({"image": paths, "caption": english}), folder / "list.parquet")
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "title_en", "title_zh"), *zip(paths, english, chinese, strict=True)])
    addresses = [f"http://{HOST}{picture_path(row)}" for row in rows[:NUM_WEB]]
    pq.write_table(pa.table({"url": addresses, "caption": english[:NUM_WEB]}), folder / "urls.parquet")
    for name in ("val2014", "another-system"):
        (folder / name).mkdir()
    for row in rows[:NUM_REAL]:
        name = f"COCO_val2014_{row.number:012d}.jpg"
        draw_scene(row.scene).save(folder / "val2014" / name)
        draw_scene(row.scene).filter(ImageFilter.GaussianBlur(2)).save(folder / "another-system" / name)
    images = [{"id": row.number, "file_name": f"COCO_val2014_{row.number:012d}.jpg"} for row in rows[:NUM_REAL]]
    notes = [{"id": row.number, "image_id": row.number, "caption": row.english} for row in rows[:NUM_REAL]]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))


def write_weights(rows: Sequence[CaptionedScene], folder: Path) -> None:
    """Small random models in the layouts in which CogView, Inception and CLIP are published."""
    texts = [caption for row in rows for caption in (row.english, row.chinese)]
    text = train_text_tokenizer(texts, config=TextTokenizerConfig(num_pieces=200, exact=False), output=folder)
    torch.manual_seed(0)
    image = VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=NUM_CODES, code_dim=8))
    save_released_vqvae(ImageTokenizer(image), folder / "vqvae.pt")
    size = Vocabulary(NUM_CODES, text.num_pieces, 2).size
    shape = GPTConfig(vocab_size=size, max_positions=POSITIONS, num_layers=2, hidden_size=128, num_heads=2)
    save_released_gpt(GPT(shape), folder / "cogview-base", iteration=20_000, num_ranks=2)
    torch.save(InceptionNetwork().state_dict(), folder / "inception.pth")
    write_clip(folder / "clip")


def picture_path(row: CaptionedScene) -> str:
    """Where the web's picture of a scene lies."""
    return f"/pictures/{row.number:05d}.png"


def encoded(row: CaptionedScene, kind: str) -> bytes:
    """The scene's picture as a file."""
    buffer = io.BytesIO()
    draw_scene(row.scene, image_size=96).save(buffer, format=kind)
    return buffer.getvalue()


@contextmanager
def web() -> Iterator[int]:
    """A site with a sitemap, a page of pictures and the answers of two providers; yields its port."""
    answers = web_answers(list(corpus(1, NUM_WEB)))
    server = ThreadingHTTPServer((LOOPBACK, 0), partial(_Site, answers))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def web_answers(rows: Sequence[CaptionedScene]) -> dict[str, tuple[str, bytes]]:
    """Path -> content type and body."""
    figures = [f'<figure><img src="{picture_path(row)}" alt="{row.english}"></figure>' for row in rows]
    page = f"<!doctype html><html><head><title>Scenes</title></head><body>{''.join(figures)}</body></html>"
    sitemap = (
        '<?xml version="1.0" encoding="UTF-8"?><urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
        f"<url><loc>http://{HOST}/scenes.html</loc></url></urlset>"
    )
    half = len(rows) // 2
    return {
        "/sitemap.xml": ("application/xml", sitemap.encode()),
        "/scenes.html": ("text/html; charset=utf-8", page.encode()),
        "/openverse": ("application/json", json.dumps(openverse_answer(rows[:half])).encode()),
        "/wikimedia": ("application/json", json.dumps(wikimedia_answer(rows[half:])).encode()),
        **{picture_path(row): ("image/png", encoded(row, "PNG")) for row in rows},
    }


def openverse_answer(rows: Sequence[CaptionedScene]) -> dict[str, Any]:
    """An answer of /v1/images/, as Openverse documents it."""
    results = [
        {"title": row.english, "url": f"http://{HOST}{picture_path(row)}", "license": "cc0", "license_version": "1.0"}
        for row in rows
    ]
    return {"result_count": len(rows), "page_count": 1, "page": 1, "results": results}


def wikimedia_answer(rows: Sequence[CaptionedScene]) -> dict[str, Any]:
    """An answer of the action interface of Wikimedia Commons."""
    pages = [
        {
            "title": f"File:Scene {row.number}.png",
            "index": index,
            "imageinfo": [
                {
                    "url": f"http://{HOST}{picture_path(row)}",
                    "mime": "image/png",
                    "extmetadata": {
                        "LicenseShortName": {"value": "CC BY-SA 4.0"},
                        "ImageDescription": {"value": row.english},
                    },
                }
            ],
        }
        for index, row in enumerate(rows)
    ]
    return {"batchcomplete": True, "query": {"pages": pages}}


class _Site(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, answers: Mapping[str, tuple[str, bytes]], *request: Any) -> None:
        self._answers = answers
        super().__init__(*request)

    def do_GET(self) -> None:
        kind, body = self._answers.get(self.path.partition("?")[0], ("text/plain", b""))
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was asked stands in the outputs of the job that asked."""
