"""Score drawn pictures against real ones: FID at five blurs, IS, CapLoss, KID, precision, recall (CogView, Table 1).

Command: make machine-evaluation [REFERENCE=captions_val2014.json PICTURES=/val2014] [IMAGES=/folder] [ARGS="..."]
Reads:   captioned pictures (COCO's JSON with its folder, tables, tars, pictures with .txt files; without any, the
         held-out ones of the chain that ran last); the outputs of pretrain, finetune_captioning and both tokenizers;
         folders of pictures that other systems drew; weights of Inception and CLIP, if there are any
Writes:  report.html, scores.json, scores.csv, captions.tsv, distances.png, pictures.png, features and drawn pictures
Time:    smoke: some minutes on two cores, most of them for 4 x 200 candidates; paper: that of 1.8 million candidates

Without weights of the published Inception network distances are of an extractor of our own, and named after it, never
FID. Killed at any moment, the same command goes on, and ends in the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.blur import RADII
from cogview.evaluation.clip_network import ClipScorer
from cogview.evaluation.features import RESIZES, Resize
from cogview.records.tars import IMAGE_SUFFIXES
from cogview.sampling.choice import SamplingConfig
from cogview.shards.manifest import read_entry, write_entry, write_json
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.shard_jobs import ShardTask, run_shards
from pipelines.tasks.caption_choice import (
    CaptionRow,
    Language,
    Rule,
    captions_digest,
    choose_captions,
    held_out_keys,
    read_captioned,
    read_translations,
    write_rows,
)
from pipelines.tasks.evaluation_page import Evaluated, warning_lines, write_evaluation
from pipelines.tasks.evaluation_scores import ScoreConfig, Scoring, metric_key, score_side, side_files
from pipelines.tasks.picture_measures import (
    RECONSTRUCTED,
    REFERENCE,
    Drawing,
    MeasureShard,
    Measuring,
    Side,
    load_captioner,
    load_clip,
    load_extractor,
    load_painter,
    plan_side,
)

MODELS = {
    "checkpoint": "pretrain",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
}
CORPUS = {"reference": "filter_pairs", "tokens": "tokenize_pairs"}
LARGE_DIM = 512  # decompositions of smaller covariances are faster on one thread, on a busy machine forty times
HERE_PICTURES = 2000  # up to so many, Ray's start would take longer than it saves
Extractor = Literal["inception", "seeded", "tokenizer"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is scored, against what, and how. Folders of models that are not given are those of the chain that ran last.

    checkpoint, text_tokenizer, image_tokenizer: what draws; captioner: output of finetune_captioning, takes the best of
    `candidates` and scores CapLoss; draws: off, to score folders alone. images: folders of pictures that other systems
    drew, named as captions.tsv numbers them, or as the real pictures are named.
    reference: captioned real pictures; reference_pictures: the folder in which a table's file names lie; tokens: of
    these take only what tokenize_pairs held out; language: of the captions; translations: a file, on each line a
    caption, a tab and what the model is given instead. num_captions: that are drawn, by `rule`: of different pictures,
    or from all captions; num_cap_loss: of these, scored by CapLoss.
    contrast: of our drawn pictures; radii: of the Gaussian filter on both sides; recovered: score the real pictures
    through the tokenizer and back as well. image_size: to which all pictures are cut and scaled, in pixels.
    extractor: of features; inception: the weight file of pytorch-fid or torch-fidelity, inception_sha256: what it must
    have; resize: how pictures come to its 299 pixels; clip: a folder of CLIP as transformers saves it.
    seed: of captions and candidates; shard_size: captions of a unit of work; workers: on Ray, 1 for none (0: Ray from
    2,000 pictures, one for each CPU); batch_size: pictures at a time.
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    captioner: Path | None = input_field(default=None)
    reference: tuple[str, ...] = input_field(default=())
    reference_pictures: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    images: tuple[str, ...] = input_field(default=())
    translations: Path | None = input_field(default=None)
    inception: Path | None = input_field(default=None)
    clip: Path | None = input_field(default=None)
    inception_sha256: str = ""
    draws: bool = True
    language: Language = "any"
    rule: Rule = "pictures"
    num_captions: int = 30_000
    num_cap_loss: int = 5_000
    candidates: int = 60
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    contrast: float = 1.5
    radii: tuple[int, ...] = RADII
    recovered: bool = True
    image_size: int = 256
    extractor: Extractor = "inception"
    resize: Resize = "bilinear"
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    seed: int = 0
    shard_size: int = 25
    batch_size: int = 60
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)
    workers: int = runtime_field(0)

    def __post_init__(self) -> None:
        require_positive(
            self, "num_captions", "num_cap_loss", "candidates", "image_size", "shard_size", "batch_size", "threads"
        )
        if not 0 < self.contrast <= 10:
            raise ConfigError(f"contrast={self.contrast}: choose a factor above 0, up to 10; 1 changes nothing")
        if 0 not in self.radii or min(self.radii) < 0 or len(set(self.radii)) < len(self.radii):
            raise ConfigError(f"radii={self.radii}: give different ones of 0 or more, with 0 among them")
        for name, allowed in (("extractor", get_args(Extractor)), ("resize", tuple(RESIZES))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if min(self.seed, self.workers) < 0:
            raise ConfigError(f"seed={self.seed}, workers={self.workers}: give 0 or more")


PAPER = Config(device="cuda")
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        num_captions=200,
        num_cap_loss=200,
        candidates=4,
        sampling=SamplingConfig(top_k=12),  # of 512 codes, as the release keeps 200 of 8192
        image_size=64,
        extractor="seeded",
        batch_size=50,
        device="cpu",
    ),
}


def main(config: Config, run: JobRun) -> None:
    """Choose captions, draw and measure every side shard by shard, score each against the real pictures, and tell."""
    measuring = measuring_of(config)
    facts = load_extractor(measuring).facts  # what does not belong together is said before anything is drawn
    clip = load_models(measuring)
    run.say(f"features of {facts.name}, {facts.dim} numbers, sha256 {facts.sha256}; resized: {facts.resize}")
    rows = caption_rows(config)
    write_rows(rows, run.output)
    digest = captions_digest(rows)
    run.say(f"{len(rows):,} captions, digest {digest}")
    plans = plan_sides(config, rows)
    measure = MeasureShard(measuring=measuring, sides={side.name: side for side, _ in plans}, output=run.output)
    entries = measure_all([task for _, tasks in plans for task in tasks], measure, config=config, run=run)
    found = {
        side.name: side_files(side, [entries[task.shard] for task in tasks], output=run.output) for side, tasks in plans
    }
    torch.set_num_threads(config.threads if facts.dim >= LARGE_DIM else 1)
    scoring = Scoring(
        config=config.scores,
        facts=facts,
        radii=config.radii,
        image_size=config.image_size,
        captions_digest=digest,
        reference=found[REFERENCE],
        device=config.device,
        clip=clip.name if clip else "",
        clip_sha256=clip.sha256 if clip else "",
    )
    scores = [row for files in found.values() for row in score_side(files, scoring, run=run)]
    evaluated = Evaluated(
        rows=scores,
        sides=list(found),
        captions=rows,
        captions_digest=digest,
        facts=facts,
        radii=config.radii,
        settings=settings_of(config, run=run),
        rejected={name: files.counts for name, files in found.items()},
    )
    tell(evaluated, run=run)


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in what is not given from the chain that ran last: models to draw with, and its held-out pictures."""
    producers = dict(MODELS) if config.draws else {}
    if not config.reference:
        chain = fill_from_chain(_Corpus(), CORPUS, root=root)
        config = replace(config, reference=(str(chain.reference),), tokens=config.tokens or chain.tokens)
    if config.draws and config.captioner is None and config.candidates > 1:
        config = replace(config, captioner=latest_output("finetune_captioning", flag="--captioner", root=root))
    if config.captioner is not None or config.extractor == "tokenizer":
        producers = (
            dict(MODELS) if config.draws else {name: job for name, job in MODELS.items() if name != "checkpoint"}
        )
    filled: Config = fill_from_chain(config, producers, root=root)
    return filled


def measuring_of(config: Config) -> Measuring:
    """What workers measure with. ConfigError names what is missing."""
    if not config.reference:
        raise ConfigError("reference is not given; name captioned pictures with --reference, such as COCO's JSON")
    if config.draws:
        for name in MODELS:
            if getattr(config, name) is None:
                flag = f"--{name.replace('_', '-')} FOLDER"
                raise ConfigError(f"{name} is not given; run `make pretrain` first, give {flag}, or --no-draws")
    elif not config.images:
        raise ConfigError("draws is off and images is not given; there is nothing to score")
    if config.draws and config.candidates > 1 and config.captioner is None:
        raise ConfigError(
            f"candidates={config.candidates}: the best is the one with the lowest CapLoss; run `make "
            "finetune-captioning` first, give --captioner FOLDER, or --candidates 1"
        )
    drawing = None
    if config.draws and config.checkpoint is not None:
        drawing = Drawing(
            checkpoint=config.checkpoint, candidates=config.candidates, sampling=config.sampling, seed=config.seed
        )
    return Measuring(
        image_size=config.image_size,
        radii=config.radii,
        extractor=config.extractor,
        inception=config.inception,
        inception_sha256=config.inception_sha256,
        resize=config.resize,
        text_tokenizer=config.text_tokenizer,
        image_tokenizer=config.image_tokenizer,
        captioner=config.captioner,
        clip=config.clip,
        drawing=drawing,
        batch_size=config.batch_size,
        device=config.device,
        threads=config.threads,
    )


def load_models(measuring: Measuring) -> ClipScorer | None:
    """Load what will be needed, so that what does not belong together is said at once; CLIP, if there is one."""
    if measuring.drawing is not None:
        load_painter(measuring)
    if measuring.captioner is not None:
        load_captioner(measuring)
    return load_clip(measuring) if measuring.clip is not None else None


def caption_rows(config: Config) -> list[CaptionRow]:
    """The captions to draw, chosen by the seed."""
    keys = held_out_keys(config.tokens) if config.tokens is not None else None
    captioned = read_captioned(
        config.reference, pictures=config.reference_pictures, language=config.language, keys=keys
    )
    return choose_captions(
        captioned,
        number=config.num_captions,
        number_of_cap_losses=config.num_cap_loss,
        rule=config.rule,
        seed=config.seed,
        translations=read_translations(config.translations) if config.translations is not None else None,
    )


def plan_sides(config: Config, rows: Sequence[CaptionRow]) -> list[tuple[Side, list[ShardTask]]]:
    """Every side with its shards, numbered through."""
    sides: list[tuple[Side, Mapping[int, str] | None]] = [(Side(name=REFERENCE, kind="reference"), None)]
    if config.draws:
        sides.append((Side(name="drawn", kind="drawn", contrast=config.contrast), None))
    if config.recovered and config.image_tokenizer is not None:
        sides.append((Side(name=RECONSTRUCTED, kind="recovered"), None))
    for folder in config.images:
        sides.append((Side(name=Path(folder).resolve().name, kind="folder"), find_pictures(Path(folder), rows)))
    names = [side.name for side, _ in sides]
    if len(set(names)) < len(names):
        raise ConfigError(f"images={config.images}: two sides of one name among {', '.join(names)}; rename a folder")
    plans, first = [], 0
    for side, places in sides:
        tasks = plan_side(side, rows, first=first, shard_size=config.shard_size, places=places)
        plans.append((side, tasks))
        first += len(tasks)
    return plans


def find_pictures(folder: Path, rows: Sequence[CaptionRow]) -> dict[int, str]:
    """Row -> the picture of another system: named as the real picture is, or by the number in captions.tsv.

    ConfigError if not one picture is named so.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    by_stem = {path.stem: str(path) for path in reversed(files)}
    by_number = {int(stem): path for stem, path in by_stem.items() if stem.isdigit()}
    named = {row.index: by_stem[row.key] for row in rows if row.key in by_stem}
    numbered = {row.index: by_number[row.index] for row in rows if row.index in by_number}
    places = max(named, numbered, key=len)
    if not places:
        raise ConfigError(
            f"images={folder}: none of its {len(files)} pictures is named as a real one ({rows[0].key}.png) or by the "
            "number of its caption (000000.png); captions.tsv in the output of this job lists both"
        )
    return places


def measure_all(tasks: Sequence[ShardTask], measure: MeasureShard, *, config: Config, run: JobRun) -> dict[int, Any]:
    """Do the shards that are not done yet, here or on Ray; the entries of all by number."""
    pictures = sum(len(task.inputs["rows"]) * _cost(task, config) for task in tasks)
    if config.workers == 1 or (config.workers == 0 and pictures <= HERE_PICTURES):
        for number, task in enumerate(tasks):
            if read_entry(run.output, task.shard, input_digest=task.input_digest) is None:
                write_entry(run.output, measure(task))
            run.progress(number + 1, len(tasks), f"shards, {task.inputs['side']}")
    is_cuda = config.device.startswith("cuda")
    on_ray = replace(measure, measuring=replace(measure.measuring, threads=1))
    entries = run_shards(
        on_ray,
        tasks,
        folder=run.output,
        run=run,
        workers=config.workers,
        num_gpus=1.0 if is_cuda else 0.0,
        as_actors=True,
        note="shards of pictures",
    )
    return {entry.shard: entry for entry in entries}


def settings_of(config: Config, *, run: JobRun) -> dict[str, str]:
    """What the page tells of how it was measured."""
    named = {name: digest[:12] for name, digest in run.inputs.items()}
    drawn = f"{config.candidates} candidates of each caption, the one with the lowest CapLoss" if config.draws else "-"
    return {
        "captions": f"{config.num_captions:,}, by seed {config.seed}, rule: {config.rule}, language: {config.language}",
        "drawn": drawn,
        "contrast": f"{config.contrast:g}, of drawn pictures alone; no other side, and not for CapLoss",
        "blur": f"Gaussian filter of radius {', '.join(map(str, config.radii))} pixels, on both sides",
        "CapLoss": f"of {min(config.num_cap_loss, config.num_captions):,} pictures, encoded as they are",
        **{f"input: {name}": digest for name, digest in named.items()},
    }


def tell(evaluated: Evaluated, *, run: JobRun) -> None:
    """Write the scores and the page, and track them."""
    write_json(run.output / "scores.json", {"scores": list(evaluated.rows), "captions": evaluated.captions_digest})
    figure, sheet = write_evaluation(evaluated, run.output)
    for row in evaluated.rows:
        run.scores[f"{row['side']}/{metric_key(row['score'])}"] = row["value"]
    for line in warning_lines(evaluated):
        run.say(line)
    run.tracker.log_figure(figure, "distances.png")
    run.tracker.log_image(sheet, "pictures.png")
    run.tracker.log_table(list(evaluated.rows), "scores.json")
    for name in ("report.html", "scores.csv", "captions.tsv"):
        run.tracker.log_artifact(run.output / name)
    run.say(f"{len(evaluated.rows)} scores: {run.output / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    """What of a chain serves as the reference."""

    reference: Path | None = None
    tokens: Path | None = None


def _cost(task: ShardTask, config: Config) -> int:
    return config.candidates if task.inputs["side"] == "drawn" else 1


JOB = Job(
    name="machine_evaluation",
    version=1,
    products=("report.html", "scores.json", "scores.csv", "captions.tsv", "distances.png", "pictures.png"),
    main=main,
)
