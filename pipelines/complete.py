"""Draw a part of a picture anew, as a caption says, and put candidates in the order in which it can be read off them.

Command: make complete IMAGE=/photo.jpg BOX="0.2 0.3 0.7 0.8" PROMPT="a large red circle"
         python -m pipelines complete smoke --requests FOLDER
Reads:   the output of pretrain_coglm, its tokenizers and, for pictures larger than it draws, the outputs of
         finetune_direct_sr and finetune_iterative_sr; pictures, with a box and a caption for each
Writes:  samples/000000.png ..., samples.parquet (caption, picture, box, seed, CapLoss, rank of each), sheet.png
         (before | candidates, the best first)
Time:    smoke: some seconds a picture on two cores
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet
from cogview.evaluation.reranking import ranking
from cogview.records.folders import read_image_file
from cogview.records.images import decode_image
from cogview.records.pair import Unusable
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.completion import Completer, CompletionConfig
from cogview.sampling.hierarchical_magnifier import HierarchicalSampling
from cogview.sampling.masks import Box
from cogview.shards.manifest import atomic_file
from pipelines.runtime.jobs import Job, JobRun
from pipelines.tasks.completing import SMOKE_FILLING, SMOKE_STAGES, CompleterFolders, find_folders, load_completer
from pipelines.tasks.drawing import save_picture

SAMPLES_FOLDER = "samples"
TABLE_NAME = "samples.parquet"
SHEET_NAME = "sheet.png"
SHEET_ROWS, CANDIDATES_SHOWN = 12, 8
REQUESTS_NAME = "requests.tsv"
COLUMNS = 6  # of a line of requests
MARKED = (220, 30, 30)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to complete, with what; folders that are not given are those made last.

    checkpoint: output of pretrain_coglm; text_tokenizer, image_tokenizer: its own; clusters: output of cluster_codes,
    for a choice by clusters. direct, iterative: super-resolution stages trained on it, with which pictures larger than
    it draws are completed at their own size; without `magnifies` they are scaled.
    image, box, prompt: a picture; top, left, bottom and right of its part in shares from 0 to 1; the caption.
    requests: a folder of pictures instead, with a file `requests.tsv`: a line for each request with caption, picture,
    top, left, bottom and right, and tabs between, as in the release.
    candidates: pictures drawn for each request, in the order in which the same weights find its caption likely for
    them (CogView2's post-selection); seed: of the whole run. completion: the square that is read, and the seam;
    filling, hierarchical: how codes are chosen in the small picture and by the stages.
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    clusters: Path | None = input_field(default=None)
    direct: Path | None = input_field(default=None)
    iterative: Path | None = input_field(default=None)
    image: Path | None = input_field(default=None)
    requests: Path | None = input_field(default=None)
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    prompt: str = ""
    magnifies: bool = True
    candidates: int = 8
    seed: int = 0
    completion: CompletionConfig = field(default_factory=CompletionConfig)
    filling: CogLMSampling = field(default_factory=CogLMSampling)
    hierarchical: HierarchicalSampling = field(default_factory=HierarchicalSampling)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        require_positive(self, "candidates", "threads")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: give 0 or more")
        if (self.image is None) == bool(self.prompt.strip()):
            raise ConfigError("image and prompt belong together; give both, with --box, or neither and --requests")
        if self.image is not None and self.requests is not None:
            raise ConfigError("image and requests are both given; complete one after the other")


PAPER = Config(device="cuda")
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        filling=SMOKE_FILLING,
        hierarchical=SMOKE_STAGES,
        device="cpu",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A part of a picture and what shall be there. source: as the picture was named."""

    picture: Image.Image
    box: Box
    prompt: str
    source: str


def main(config: Config, run: JobRun) -> None:
    """Complete every picture, then write the table and the sheet."""
    torch.set_num_threads(config.threads)
    requests = list(read_requests(config))
    completer = completer_of(config)
    rows: list[dict[str, Any]] = []
    tiles: list[Tile] = []
    for number, request in enumerate(requests):
        seeds = [_seed(config.seed, number, candidate) for candidate in range(config.candidates)]
        pictures, losses = complete(request, completer, seeds=seeds, config=config)
        order = ranking(losses)
        for candidate, picture in enumerate(pictures):
            row = _row(request, index=len(rows), seed=seeds[candidate], checkpoint=run.inputs["checkpoint"])
            rows.append({**row, "cap_loss": losses[candidate], "rank": order.index(candidate)})
            save_picture(picture, run.output / row["path"])
        shown = (with_box(request), *(pictures[candidate] for candidate in order[:CANDIDATES_SHOWN]))
        tiles.append(Tile(images=shown, caption=request.prompt, fallback=request.source))
        run.progress(number + 1, len(requests), "pictures")
    with atomic_file(run.output / TABLE_NAME) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    sheet = draw_sheet(tiles[:SHEET_ROWS], title="before | completed, the best first", columns=1)
    save_picture(sheet, run.output / SHEET_NAME)
    run.tracker.log_image(sheet, SHEET_NAME)
    run.tracker.log_table(rows, "samples.json")
    run.scores["samples"] = len(rows)
    run.scores["cap_loss_of_best"] = sum(row["cap_loss"] for row in rows if row["rank"] == 0) / len(requests)
    run.say(f"{len(rows)} pictures, the best of each request first: {run.output / SHEET_NAME}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in what is not given: the CogLM made last, its tokenizers, and the stages if there are any."""
    needs_clusters = config.filling.by_clusters or config.hierarchical.by_clusters
    folders = find_folders(
        CompleterFolders.of(config), root=root, magnifies=config.magnifies, needs_clusters=needs_clusters
    )
    found: dict[str, Any] = {field.name: getattr(folders, field.name) for field in fields(folders)}
    return replace(config, **found)


def completer_of(config: Config) -> Completer:
    """CogLM and, where they are given, both stages. ConfigError for stages that do not continue it."""
    folders = CompleterFolders.of(config)
    if not config.magnifies:
        folders = replace(folders, direct=None, iterative=None)
    return load_completer(folders, filling=config.filling, device=config.device)


def complete(
    request: Request, completer: Completer, *, seeds: Sequence[int], config: Config
) -> tuple[list[Image.Image], tuple[float, ...]]:
    """The picture completed, once for each seed, and the CapLoss of its caption for each, by the same weights."""
    drawn = completer.complete(
        _bytes_of(request.picture),
        request.box.mask(request.picture.height, request.picture.width),
        caption=request.prompt,
        seeds=seeds,
        config=config.completion,
        sampling=config.hierarchical,
    )
    pictures = [Image.fromarray(drawn_CHW.permute(1, 2, 0).numpy()) for drawn_CHW in drawn.pictures_BCHW]
    return pictures, drawn.cap_losses


def read_requests(config: Config) -> Iterator[Request]:
    """What is asked for. ConfigError, with the line, for what cannot be read."""
    if config.image is not None:
        yield _request(config.prompt.strip(), config.image, config.box, source=config.image.name, where="image")
    elif config.requests is not None:
        yield from _listed(config.requests)
    else:
        raise ConfigError('nothing to complete; give --image FILE --box 0.2 0.3 0.7 0.8 --prompt "...", or --requests')


def with_box(request: Request) -> Image.Image:
    """The picture with its box marked."""
    picture, box = request.picture.copy(), request.box
    width, height = picture.size
    corners = (box.left * width, box.top * height, box.right * width - 1, box.bottom * height - 1)
    ImageDraw.Draw(picture).rectangle(corners, outline=MARKED, width=max(1, min(picture.size) // 64))
    return picture


def _listed(folder: Path) -> Iterator[Request]:
    """The requests of a folder. ConfigError for a line of another form, or a file without lines."""
    try:
        lines = (folder / REQUESTS_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"requests={folder} has no {REQUESTS_NAME} in UTF-8 ({error}); write one") from error
    found = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ConfigError(f"requests={folder}: {REQUESTS_NAME} has no lines; there is nothing to complete")
    for number, line in found:
        where, words = f"{REQUESTS_NAME}, line {number}", line.split("\t")
        if len(words) != COLUMNS:
            raise ConfigError(
                f"{where} has {len(words)} columns; give caption, picture, top, left, bottom and right, tabs between"
            )
        try:
            top, left, bottom, right = map(float, words[2:])
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; the last four columns are numbers from 0 to 1") from error
        prompt, name = words[0].strip(), words[1].strip()
        if not prompt:
            raise ConfigError(f"{where} has no caption; say what shall be there")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{where}: {name} lies outside of {folder}; put the picture into the folder")
        yield _request(prompt, folder / name, (top, left, bottom, right), source=name, where=where)


def _request(prompt: str, path: Path, box: tuple[float, float, float, float], *, source: str, where: str) -> Request:
    data = read_image_file(path)
    picture = data if isinstance(data, Unusable) else decode_image(data)
    if isinstance(picture, Unusable):
        raise ConfigError(f"{where}: {path} is no picture that can be read ({picture.reason}); give another")
    top, left, bottom, right = box
    return Request(
        picture=picture, box=Box(top=top, left=left, bottom=bottom, right=right), prompt=prompt, source=source
    )


def _bytes_of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _row(request: Request, *, index: int, seed: int, checkpoint: str) -> dict[str, Any]:
    box = request.box
    return {
        "index": index,
        "prompt": request.prompt,
        "source": request.source,
        **{name: getattr(box, name) for name in ("top", "left", "bottom", "right")},
        "seed": seed,
        "path": f"{SAMPLES_FOLDER}/{index:06d}.png",
        "checkpoint": checkpoint,
    }


def _seed(seed: int, number: int, candidate: int) -> int:
    """48 bits: exact in JSON and in any table."""
    return int.from_bytes(hashlib.sha256(f"complete:{seed}:{number}:{candidate}".encode()).digest()[:6], "big")


JOB = Job(name="complete", version=2, products=(TABLE_NAME, SHEET_NAME), main=main)
