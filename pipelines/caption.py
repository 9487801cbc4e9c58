"""Write captions for pictures: image files, or what generate drew.

Command: make caption IMAGES=/folder
Reads:   a picture, a folder of pictures or the output of generate; the outputs of finetune_captioning (or of
         pretrain_coglm, or a released captioner, imported) and of both tokenizers
Writes:  captions.parquet (every caption with its log-probability), captions.png, rejected.parquet (unreadable pictures)
Time:    smoke: about a second for 100 pictures of 64 x 64 pixels in two languages on two cores
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import Tile, draw_sheet
from cogview.records.images import decode_image
from cogview.records.pair import Unusable
from cogview.sampling.caption_search import BeamConfig, draw_captions, search_captions
from cogview.sampling.captioning import Caption, CaptionModel, Language
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.coglm_captioning import load_captioner
from cogview.shards.manifest import atomic_file
from cogview.tokenizers.pixels import pixel_batch, square_pixels
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.jobs import Job, JobRun, given_folders

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
SAMPLES_NAME = "samples.parquet"  # of generate
SOURCES = {"text_tokenizer": "train_text_tokenizer", "image_tokenizer": "train_image_tokenizer"}
Method = Literal["greedy", "sampled", "beam"]
SHEET_PICTURES = 48
CAPTION_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("language", pa.string()),  # that was asked for
        ("rank", pa.int32()),  # 0: the likeliest of this picture in this language
        ("caption", pa.string()),
        ("log_probability", pa.float64()),  # of its tokens and its end, in nats
        ("tokens", pa.int32()),
        ("is_whole", pa.bool_()),  # false: cut at the longest text
        ("seed", pa.int64()),
        ("prompt", pa.string()),  # what a sample was drawn for; empty for other pictures
        ("prompt_cap_loss", pa.float64()),  # how far the captioner is from saying that; null without a prompt
        ("captioner", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Config:
    """Folders that are not given are those that ran last under the root.

    images: a picture, a folder of pictures (searched through), or the output of generate; captioner: the output of
    finetune_captioning or pretrain_coglm, or an imported captioner, with the text_tokenizer and image_tokenizer that it
    was trained with.
    language: of the captions: "en" allows no Chinese character, "zh" no Latin letter, "any" everything; several give a
    caption in each. method: "greedy" takes the likeliest token, "sampled" draws by `sampling`, "beam" searches by
    `beams`. captions: of each picture in each language; greedy has one.
    """

    images: Path | None = input_field(default=None)
    captioner: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    language: tuple[Language, ...] = ("en", "zh")
    method: Method = "beam"
    captions: int = 1
    beams: BeamConfig = field(default_factory=BeamConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    batch_size: int = runtime_field(32)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        require_positive(self, "captions", "batch_size", "threads")
        if self.method not in get_args(Method):
            raise ConfigError(f"method={self.method!r}: choose one of {', '.join(get_args(Method))}")
        most = {"greedy": 1, "beam": self.beams.width}.get(self.method, self.captions)
        if self.captions > most:
            raise ConfigError(
                f"captions={self.captions}: method {self.method!r} finds {most}; choose sampled, or a wider beam"
            )
        if not self.language:
            raise ConfigError("language: name one at least, such as any")


PAPER = Config(
    language=("any",),  # the released captioner writes Chinese
    method="sampled",  # as the release does
    device="cuda",
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, language=("en", "zh"), method="beam", device="cpu"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture to caption. prompt: what it was drawn for, if it was."""

    path: Path
    shown_path: str
    prompt: str = ""


def main(config: Config, run: JobRun) -> None:
    """Caption every readable picture, and write the table and the sheet."""
    torch.set_num_threads(config.threads)
    folders = given_folders(config, {"captioner": "finetune_captioning", **SOURCES})
    captioner = load_captioner(
        folders["captioner"],
        text_tokenizer=folders["text_tokenizer"],
        image_tokenizer=folders["image_tokenizer"],
        device=config.device,
    )
    sources = find_sources(config)
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    tiles: list[Tile] = []
    pictures = readable(sources, image_size=captioner.image_size, rejected=rejected)
    while batch := list(islice(pictures, config.batch_size)):
        written = caption_batch(batch, captioner=captioner, first=len(tiles), config=config, run=run)
        rows += [row for rows_of_one in written for row in rows_of_one]
        tiles += [tile(picture, some) for (_, picture), some in zip(batch, written, strict=True)]
        run.progress(len(tiles) + len(rejected), len(sources), "pictures")
    write_tables(rows, rejected, run=run)
    if not rows:
        raise ConfigError(f"images={config.images}: none of {len(sources)} pictures could be read ({rejected[0]})")
    sheet = draw_sheet(tiles[:SHEET_PICTURES])
    with atomic_file(run.output / "captions.png") as file:
        sheet.save(file, format="PNG")
    run.tracker.log_image(sheet, "captions.png")
    run.tracker.log_table([{k: row[k] for k in ("path", "language", "caption")} for row in rows], "captions.json")
    run.scores.update(pictures=len(tiles), captions=len(rows), rejected=len(rejected))
    run.scores["cut"] = sum(not row["is_whole"] for row in rows)
    for row in rows[:5]:
        run.say(f"{row['path']}: {row['caption']}")
    run.say(f"{len(rows)} captions: {run.output / 'captions.png'}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders that are not given: the captioner that was finetuned last, tokenizers of the last chain."""
    if config.images is None:
        raise ConfigError("images is not given; name a picture or a folder of pictures with --images")
    if config.captioner is None:
        config = replace(config, captioner=latest_output("finetune_captioning", flag="--captioner", root=root))
    filled: Config = fill_from_chain(config, SOURCES, root=root)
    return filled


def find_sources(config: Config) -> list[Source]:
    """The pictures to caption, in the order of their names, or of the samples. ConfigError when there is none."""
    images = config.images
    if images is None:
        raise ConfigError("images is not given; name a picture or a folder of pictures with --images")
    if images.is_file():
        return [Source(path=images, shown_path=images.name)]
    if (images / SAMPLES_NAME).is_file():
        try:
            samples = pq.read_table(images / SAMPLES_NAME, columns=["path", "prompt"]).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"images={images}: {SAMPLES_NAME} cannot be read ({error}); run generate again"
            ) from error
        return [Source(path=images / row["path"], shown_path=row["path"], prompt=row["prompt"]) for row in samples]
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ConfigError(f"images={images} holds no picture ({', '.join(SUFFIXES)}); give another folder")
    return [Source(path=path, shown_path=path.relative_to(images).as_posix()) for path in found]


def readable(
    sources: Sequence[Source], *, image_size: int, rejected: list[dict[str, str]]
) -> Iterator[tuple[Source, Image.Image]]:
    """The pictures that can be read, as squares of `image_size` pixels; the others are added to `rejected`."""
    for source in sources:
        try:
            data = source.path.read_bytes()
        except OSError as error:
            rejected.append({"path": source.shown_path, "reason": "file_unreadable", "detail": str(error)})
            continue
        image = decode_image(data, short_side=image_size)
        if isinstance(image, Unusable):
            rejected.append({"path": source.shown_path, "reason": image.reason, "detail": image.detail})
        else:
            yield source, Image.fromarray(square_pixels(image, image_size=image_size))


def caption_batch(
    batch: Sequence[tuple[Source, Image.Image]], *, captioner: CaptionModel, first: int, config: Config, run: JobRun
) -> list[list[dict[str, Any]]]:
    """The rows of each picture: its captions, language by language, the likeliest first."""
    codes_Bhw = encode([picture for _, picture in batch], captioner=captioner)
    prompted = [number for number, (source, _) in enumerate(batch) if source.prompt.strip()]
    scores = score_pairs(captioner, [batch[number][0].prompt for number in prompted], codes_Bhw[prompted])
    losses = dict(zip(prompted, (score.cap_loss for score in scores), strict=True))
    rows: list[list[dict[str, Any]]] = [[] for _ in batch]
    for language in config.language:
        written = write_captions(captioner, codes_Bhw, first=first, language=language, config=config)
        for number, captions in enumerate(written):
            rows[number] += [
                {
                    "path": batch[number][0].shown_path,
                    "language": language,
                    "rank": rank,
                    "caption": caption.text,
                    "log_probability": caption.log_probability,
                    "tokens": len(caption.pieces),
                    "is_whole": caption.is_whole,
                    "seed": seed,
                    "prompt": batch[number][0].prompt,
                    "prompt_cap_loss": losses.get(number),
                    "captioner": run.inputs.get("captioner", ""),
                }
                for rank, (caption, seed) in enumerate(captions)
            ]
    return rows


def encode(pictures: Sequence[Image.Image], *, captioner: CaptionModel) -> torch.Tensor:
    """Image codes of square pictures, int64 [B, grid, grid]."""
    device = captioner.model.word_embeddings.weight.device
    pixels = pixel_batch([np.asarray(picture) for picture in pictures])
    with torch.inference_mode():
        return captioner.image_tokenizer.encode(pixels.to(device))


def write_captions(
    captioner: CaptionModel, codes_Bhw: torch.Tensor, *, first: int, language: Language, config: Config
) -> list[list[tuple[Caption, int]]]:
    """For each picture its captions with their seeds (0 where nothing is drawn), the likeliest first.

    first: how many pictures came before these; a caption's seed comes from the run's, the picture and its number.
    """
    if config.method == "beam":
        found = search_captions(captioner, codes_Bhw, beams=config.beams, language=language)
        return [[(caption, 0) for caption in captions[: config.captions]] for captions in found]
    is_greedy = config.method == "greedy"
    sampling = replace(config.sampling, temperature=0.0) if is_greedy else config.sampling
    number = len(codes_Bhw) * config.captions
    seeds = [0 if is_greedy else config.seed + first * config.captions + place for place in range(number)]
    drawn = draw_captions(
        captioner,
        codes_Bhw.repeat_interleave(config.captions, dim=0),
        sampling=sampling,
        seeds=seeds,
        language=language,
    )
    pairs = list(zip(drawn, seeds, strict=True))
    groups = [pairs[start : start + config.captions] for start in range(0, number, config.captions)]
    return [sorted(group, key=lambda pair: -pair[0].log_probability / max(1, len(pair[0].pieces))) for group in groups]


def tile(picture: Image.Image, rows: Sequence[dict[str, Any]]) -> Tile:
    """A picture over its best caption in each language."""
    best = [row["caption"] for row in rows if row["rank"] == 0]
    prompt = rows[0]["prompt"] if rows else ""
    note = f"drawn for: {prompt}" if prompt else ""
    return Tile(images=(picture,), caption=" · ".join(best), fallback=best[0] if best else "", note=note)


def write_tables(rows: Sequence[dict[str, Any]], rejected: Sequence[dict[str, str]], *, run: JobRun) -> None:
    """`captions.parquet` and `rejected.parquet`."""
    for name, some, schema in (("captions", rows, CAPTION_SCHEMA), ("rejected", rejected, REJECTED_SCHEMA)):
        with atomic_file(run.output / f"{name}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(list(some), schema=schema), file)


JOB = Job(name="caption", version=1, products=("captions.parquet", "captions.png", "rejected.parquet"), main=main)
