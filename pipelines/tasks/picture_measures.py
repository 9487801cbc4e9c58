"""Pictures of one side of a machine evaluation, measured shard by shard: real ones, drawn ones, another system's.

In: rows of captions, and how to come to the picture of each. Out: for each shard the features at every blur radius, the
classes, CapLoss and CLIP score of each picture, and a table of what became of each row. A shard is decided by its task
alone, so after any interruption the same numbers come out.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cogview.config import digest_of
from cogview.errors import ConfigError
from cogview.evaluation.blur import pixels_of, with_contrast
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.clip_network import ClipScorer
from cogview.evaluation.features import (
    FeatureExtractor,
    InceptionExtractor,
    Resize,
    SeededExtractor,
    TokenizerExtractor,
)
from cogview.evaluation.grids import to_pictures
from cogview.evaluation.reconstruction import reconstruct
from cogview.records.folders import read_image_file
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair, Unusable
from cogview.records.tars import read_foreign_tar
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.shards.manifest import ShardEntry, atomic_file, shard_name
from cogview.tokenizers.pixels import pixel_batch, square_pixels
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from pipelines.runtime.shard_jobs import ShardTask, shard_entry
from pipelines.tasks.caption_choice import CaptionRow

REFERENCE, RECONSTRUCTED = "reference", "recovered"
SHOWN = 24  # rows whose pictures are kept of every side, for the report
PREPARED = "centre square, Lanczos"
SIGNATURES = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP", b"GIF8": "GIF"}
MAX_SEED_BYTES = 6  # 48 bits: exact in JSON and in any table
ROWS_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("key", pa.string()),
        ("reason", pa.string()),  # why there is no picture; empty if there is one
        ("format", pa.string()),
        ("place", pa.string()),
        ("cap_loss", pa.float64()),
        ("clip_score", pa.float64()),
        ("seed", pa.int64()),  # of the candidate that was taken
        ("cap_loss_of_codes", pa.float64()),  # of the codes that were drawn, by which it was taken
        ("candidates", pa.int32()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One set of pictures. kind: `reference`, `recovered` (through the tokenizer and back), `drawn` or `folder`."""

    name: str
    kind: str
    contrast: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What drawn pictures are drawn with. candidates: of each caption, of which the lowest CapLoss is taken."""

    checkpoint: Path
    candidates: int
    sampling: SamplingConfig
    seed: int


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured, with what. Paths that are None are not asked; `extractor` needs the one that it names."""

    image_size: int
    radii: tuple[int, ...]
    extractor: str
    inception: Path | None
    inception_sha256: str
    resize: Resize
    text_tokenizer: Path | None
    image_tokenizer: Path | None
    captioner: Path | None
    clip: Path | None
    drawing: Drawing | None
    batch_size: int
    device: str
    threads: int


@dataclass(kw_only=True)
class Found:
    """A row's picture, or the reason why there is none."""

    row: CaptionRow
    picture: Image.Image | None
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MeasureShard:
    """The work on one shard; workers get it pickled, and load weights once per process."""

    measuring: Measuring
    sides: Mapping[str, Side]
    output: Path

    def __call__(self, task: ShardTask, progress: Callable[[int], None] | None = None) -> ShardEntry:
        """Come to the shard's pictures, measure them, and write what was found."""
        torch.set_num_threads(self.measuring.threads)
        side = self.sides[task.inputs["side"]]
        rows = [CaptionRow(**row) for row in task.inputs["rows"]]
        found = list(READERS[side.kind](rows, self.measuring, task.inputs))
        folder = f"{side.name}/{shard_name(task.shard, 'features')}"
        files = [*self._write_measures(found, side, folder=folder), *self._keep_pictures(found, side)]
        with atomic_file(self.output / folder / "rows.parquet") as file:
            table = [{"index": one.row.index, "key": one.row.key, **one.facts} for one in found]
            pq.write_table(pa.Table.from_pylist(table, schema=ROWS_SCHEMA), file)
        files.append(f"{folder}/rows.parquet")
        if progress is not None:
            progress(len(rows))
        reasons = [one.facts["reason"] for one in found if one.picture is None]
        rejected = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        return shard_entry(
            self.output,
            task,
            rows_in=len(rows),
            rows_out=len(rows) - len(reasons),
            rejected=rejected,
            files=files,
        )

    def _write_measures(self, found: Sequence[Found], side: Side, *, folder: str) -> Iterator[str]:
        """Features at each radius, and classes of the pictures as they are."""
        there = [one for one in found if one.picture is not None]
        pictures = [one.picture for one in there if one.picture is not None]
        measuring = self.measuring
        extractor = load_extractor(measuring)
        add_cap_losses(there, pictures, measuring)
        add_clip_scores(there, pictures, measuring, contrast=side.contrast)
        for radius in measuring.radii:
            features, logits = [], []
            for start in range(0, len(pictures), measuring.batch_size):
                some = pictures[start : start + measuring.batch_size]
                extracted = extractor(pixels_of(some, contrast=side.contrast, radius=radius))
                features.append(extracted.features_BD)
                logits += [extracted.logits_BK] if extracted.logits_BK is not None else []
            yield self._save(features, f"{folder}/blur-{radius}.npy", width=extractor.facts.dim)
            if radius == 0 and extractor.facts.num_classes:
                yield self._save(logits, f"{folder}/classes.npy", width=extractor.facts.num_classes)

    def _save(self, batches: Sequence[npt.NDArray[np.float32]], name: str, *, width: int) -> str:
        with atomic_file(self.output / name) as file:
            np.save(file, np.concatenate([np.empty((0, width), np.float32), *batches]))
        return name

    def _keep_pictures(self, found: Sequence[Found], side: Side) -> Iterator[str]:
        """All drawn pictures, and the first few of every other side."""
        for one in found:
            if one.picture is not None and (side.kind == "drawn" or one.row.index < SHOWN):
                name = picture_name(side.name, one.row.index)
                with atomic_file(self.output / name) as file:
                    one.picture.save(file, format="PNG")
                yield name


def plan_side(
    side: Side, rows: Sequence[CaptionRow], *, first: int, shard_size: int, places: Mapping[int, str] | None = None
) -> list[ShardTask]:
    """One task for every `shard_size` rows, numbered from `first`. places: row -> file, for pictures of a folder."""
    tasks = []
    for number, start in enumerate(range(0, len(rows), shard_size)):
        some = rows[start : start + shard_size]
        inputs: dict[str, Any] = {"side": side.name, "rows": [asdict(row) for row in some]}
        if places is not None:
            inputs["places"] = {str(row.index): places.get(row.index, "") for row in some}
        tasks.append(ShardTask(shard=first + number, input_digest=digest_of([asdict(side), inputs]), inputs=inputs))
    return tasks


def picture_name(side: str, index: int) -> str:
    """Where a picture of a side is kept."""
    return f"{side}/pictures/{index:06d}.png"


def add_cap_losses(found: Sequence[Found], pictures: Sequence[Image.Image], measuring: Measuring) -> None:
    """CapLoss of the pictures whose rows belong to its subset, encoded as they are, before contrast and blur."""
    if measuring.captioner is None:
        return
    captioner = load_captioner(measuring)
    asked = [number for number, one in enumerate(found) if one.row.has_cap_loss]
    for start in range(0, len(asked), measuring.batch_size):
        some = asked[start : start + measuring.batch_size]
        pixels = pixel_batch([np.asarray(pictures[number]) for number in some], device=measuring.device)
        with torch.inference_mode():
            codes_Bhw = captioner.image_tokenizer.encode(pixels)
        scores = score_pairs(captioner, [found[number].row.prompt for number in some], codes_Bhw)
        for number, score in zip(some, scores, strict=True):
            found[number].facts["cap_loss"] = score.cap_loss


def add_clip_scores(
    found: Sequence[Found], pictures: Sequence[Image.Image], measuring: Measuring, *, contrast: float
) -> None:
    """How well each picture, as it is scored, and its caption agree; the caption, not its translation."""
    if measuring.clip is None:
        return
    scorer = load_clip(measuring)
    for start in range(0, len(found), measuring.batch_size):
        some = found[start : start + measuring.batch_size]
        shown = [with_contrast(picture, contrast) for picture in pictures[start : start + measuring.batch_size]]
        for one, score in zip(some, scorer(shown, [one.row.caption for one in some]), strict=True):
            one.facts["clip_score"] = score


def read_reference(rows: Sequence[CaptionRow], measuring: Measuring, _: Mapping[str, Any]) -> Iterator[Found]:
    """The real pictures, each cut and scaled as the tokenizer's training does it."""
    for row, data in _bytes_of(rows):
        yield _opened(row, data, place=row.place, image_size=measuring.image_size)


def read_recovered(rows: Sequence[CaptionRow], measuring: Measuring, inputs: Mapping[str, Any]) -> Iterator[Found]:
    """The real pictures through the image tokenizer and back: as good as drawn ones can become."""
    found = list(read_reference(rows, measuring, inputs))
    there = [one for one in found if one.picture is not None]
    pictures = [one.picture for one in there if one.picture is not None]
    decoded = reconstruct(pictures, tokenizer=load_tokenizer(measuring), batch_size=measuring.batch_size)
    for one, picture in zip(there, decoded, strict=True):
        one.picture = picture
    yield from found


def read_folder(rows: Sequence[CaptionRow], measuring: Measuring, inputs: Mapping[str, Any]) -> Iterator[Found]:
    """The pictures that another system has drawn."""
    for row in rows:
        place = inputs["places"][str(row.index)]
        data = read_image_file(Path(place)) if place else Unusable("image_missing")
        yield _opened(row, data, place=place, image_size=measuring.image_size)


@torch.inference_mode()
def draw_best(rows: Sequence[CaptionRow], measuring: Measuring, _: Mapping[str, Any]) -> Iterator[Found]:
    """Draw candidates for each row, and take the one with the lowest CapLoss; the only one is taken without it."""
    drawing = measuring.drawing
    assert drawing is not None, "a side that is drawn has something to draw with"
    painter = load_painter(measuring)
    captioner = load_captioner(measuring) if measuring.captioner is not None else None
    orders = [(row, candidate) for row in rows for candidate in range(drawing.candidates)]
    codes, losses = [], []
    for start in range(0, len(orders), measuring.batch_size):
        some = orders[start : start + measuring.batch_size]
        prompts = [row.prompt for row, _ in some]
        seeds = [candidate_seed(drawing.seed, row.index, candidate) for row, candidate in some]
        codes_Bhw = painter.codes(prompts, seeds=seeds, sampling=drawing.sampling)
        codes.append(codes_Bhw)
        if captioner is not None:
            losses += [score.cap_loss for score in score_pairs(captioner, prompts, codes_Bhw)]
    codes_Nhw = torch.cat(codes)
    for number, row in enumerate(rows):
        first = number * drawing.candidates
        own = losses[first : first + drawing.candidates]
        best = int(np.argmin(own)) if own else 0
        facts = _facts(
            format="PNG",
            seed=candidate_seed(drawing.seed, row.index, best),
            cap_loss_of_codes=own[best] if own else None,
            candidates=drawing.candidates,
        )
        picture = to_pictures(painter.decode(codes_Nhw[first + best][None]))[0]
        if picture.width != measuring.image_size:
            picture = Image.fromarray(square_pixels(picture, image_size=measuring.image_size))
        yield Found(row=row, picture=picture, facts=facts)


READERS: Mapping[str, Callable[[Sequence[CaptionRow], Measuring, Mapping[str, Any]], Iterator[Found]]] = {
    "reference": read_reference,
    "recovered": read_recovered,
    "drawn": draw_best,
    "folder": read_folder,
}


def candidate_seed(seed: int, index: int, candidate: int) -> int:
    """A picture's own seed, from the run's, its caption and its number alone."""
    digest = hashlib.sha256(f"machine_evaluation:{seed}:{index}:{candidate}".encode()).digest()
    return int.from_bytes(digest[:MAX_SEED_BYTES], "big")


@functools.lru_cache(maxsize=1)
def load_extractor(measuring: Measuring) -> FeatureExtractor:
    """The extractor of a run. ConfigError if what it is made of is not given."""
    if measuring.extractor == "inception":
        if measuring.inception is None:
            raise ConfigError("extractor=inception needs its weights; give --inception FILE, or --extractor seeded")
        return InceptionExtractor(
            measuring.inception,
            sha256=measuring.inception_sha256,
            resize=measuring.resize,
            device=measuring.device,
        )
    if measuring.extractor == "tokenizer":
        return TokenizerExtractor(_given(measuring.image_tokenizer, "image_tokenizer"), device=measuring.device)
    return SeededExtractor(device=measuring.device)


@functools.lru_cache(maxsize=1)
def load_painter(measuring: Measuring) -> TextToImage:
    """The model that draws."""
    assert measuring.drawing is not None, "a side that is drawn has something to draw with"
    return TextToImage.load(
        measuring.drawing.checkpoint,
        text_tokenizer=_given(measuring.text_tokenizer, "text_tokenizer"),
        image_tokenizer=_given(measuring.image_tokenizer, "image_tokenizer"),
        device=measuring.device,
    )


@functools.lru_cache(maxsize=1)
def load_captioner(measuring: Measuring) -> Captioner:
    """The captioner that scores. ConfigError if it reads pictures of another size."""
    captioner = Captioner.load(
        _given(measuring.captioner, "captioner"),
        text_tokenizer=_given(measuring.text_tokenizer, "text_tokenizer"),
        image_tokenizer=_given(measuring.image_tokenizer, "image_tokenizer"),
        device=measuring.device,
    )
    if captioner.image_size != measuring.image_size:
        raise ConfigError(
            f"image_size={measuring.image_size}, but the captioner reads pictures of {captioner.image_size} pixels; "
            f"give --image-size {captioner.image_size}"
        )
    return captioner


@functools.lru_cache(maxsize=1)
def load_clip(measuring: Measuring) -> ClipScorer:
    """The CLIP of a folder."""
    return ClipScorer(_given(measuring.clip, "clip"), device=measuring.device)


@functools.lru_cache(maxsize=1)
def load_tokenizer(measuring: Measuring) -> AnyImageTokenizer:
    """The image tokenizer alone."""
    return load_image_tokenizer(_given(measuring.image_tokenizer, "image_tokenizer")).to(measuring.device).eval()


def _given(path: Path | None, name: str) -> Path:
    if path is None:
        raise ConfigError(f"{name} is not given; name its folder with --{name.replace('_', '-')}")
    return path


def _bytes_of(rows: Sequence[CaptionRow]) -> Iterator[tuple[CaptionRow, bytes | Unusable]]:
    """The bytes of each row's picture; a tar is read once for all its rows, and anyone's order stays."""
    in_tars: dict[tuple[str, str], bytes] = {}
    for place in dict.fromkeys(row.place for row in rows if row.place.lower().endswith(".tar")):
        wanted = {row.key for row in rows if row.place == place}
        for sample in read_foreign_tar(place):
            if isinstance(sample, TextImagePair) and sample.key in wanted:
                in_tars.setdefault((place, sample.key), sample.image_bytes)
                if sum(key in wanted for owner, key in in_tars if owner == place) == len(wanted):
                    break
    for row in rows:
        if row.place.lower().endswith(".tar"):
            yield row, in_tars.get((row.place, row.key), Unusable("image_missing"))
        else:
            yield row, read_image_file(Path(row.place))


def _opened(row: CaptionRow, data: bytes | Unusable, *, place: str, image_size: int) -> Found:
    image = data if isinstance(data, Unusable) else decode_image(data)
    if isinstance(image, Unusable):
        return Found(row=row, picture=None, facts=_facts(reason=image.reason, place=place))
    assert not isinstance(data, Unusable), "what was decoded had bytes"
    kind = next((name for start, name in SIGNATURES.items() if data.startswith(start)), "other")
    picture = Image.fromarray(square_pixels(image, image_size=image_size))
    return Found(row=row, picture=picture, facts=_facts(format=kind, place=place))


def _facts(**known: Any) -> dict[str, Any]:
    """A row of the table, with what is known of it."""
    return {**dict.fromkeys(ROWS_SCHEMA.names[2:]), "reason": "", "format": "", "place": "", **known}
