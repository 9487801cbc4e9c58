"""Draw pictures for captions with a trained model, and keep the best of several candidates.

Command: make generate PROMPT="a large red circle on a blue background" [BEST=8] [LEXICON=/file.toml]
Reads:   the outputs of pretrain, train_text_tokenizer, train_image_tokenizer (tokenize_pairs for held-out captions,
         finetune_captioning for the best of several)
Writes:  samples/000000.png ..., samples.parquet (prompt, seed, codes, CapLoss, rank, checkpoint of each), grid.png,
         prompts.json; with a captioner best/000000.png for each prompt, and candidates/000000.png, all in order
Time:    about 20 s for 200 pictures of 64 x 64 pixels on two cores
"""

import itertools
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, drawable
from cogview.evaluation.reranking import ranking
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.word_replacing import Lexicon, read_lexicon
from cogview.shards.manifest import atomic_file, write_json
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.jobs import Job, JobRun
from pipelines.tasks.drawing import DrawShard, Order, Prompt, draw_orders, save_picture
from pipelines.tasks.prompts import MAX_SEED, place_orders, scene_prompts, validation_prompts

SOURCES = {
    "checkpoint": "pretrain",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
    "tokens": "tokenize_pairs",
}
STANDARD_INPUT = "-"
BEST_FOLDER, ORDERED_FOLDER = "best", "candidates"
GRID_TILES = 48
CANDIDATES_SHOWN = 8
SHEETS = 48  # prompts whose candidates get a sheet of their own
RANK = pa.field("rank", pa.int32())  # among the candidates of a prompt, 0 is the best; null without a captioner
DRAWN = "drawn_prompt"  # the column of prompts as they were drawn, there with a lexicon only


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to draw, with what: given prompts (`prompt`, `prompts_file`) first, then scenes, then held-out captions.

    checkpoint, text_tokenizer, image_tokenizer: output folders; without them, those of the chain that ran last.
    prompt: captions; prompts_file: a text file with a caption on every line, or - for standard input.
    candidates: pictures of each given prompt; seeds: theirs, to draw known pictures again (else from `seed`).
    captioner: the output of finetune_captioning, which puts the candidates in the order of CapLoss; best: take the one
    that was finetuned last. contrast: of the pictures that are written; the paper's evaluation takes 1.5.
    num_scenes: captions of the demo corpus that it never showed, one picture each, of which a share of two_shape_share
    asks for two shapes; num_validation_prompts: captions from the held-out rows of `tokens`.
    sampling, and scene_sampling for the scenes: a scene has few right pictures, other captions have many.
    seed: of the whole run; each picture gets a seed of its own from it. batch_size, device, threads: the machine;
    is_recorded: on a GPU, the step by one token as one command (CUDA graphs), for batches too small to fill it.
    workers: on Ray, 1 for none (0: Ray from 2,000 pictures, one for each CPU); shard_size: pictures of a unit of work.
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    captioner: Path | None = input_field(default=None)
    lexicon: Path | None = input_field(default=None)
    prompt: tuple[str, ...] = ()
    prompts_file: Path | None = input_field(default=None)
    candidates: int = 4
    seeds: tuple[int, ...] = ()
    best: bool = runtime_field(False)
    contrast: float = 1.0
    num_scenes: int = 0
    two_shape_share: float = 0.2
    num_validation_prompts: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scene_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    batch_size: int = runtime_field(8)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)
    is_recorded: bool = runtime_field(False)
    workers: int = runtime_field(0)
    shard_size: int = runtime_field(200)

    def __post_init__(self) -> None:
        require_positive(self, "candidates", "batch_size", "threads", "shard_size")
        for name in ("num_scenes", "num_validation_prompts", "seed", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or more")
        if not 0 < self.contrast <= 10:
            raise ConfigError(f"contrast={self.contrast}: choose a factor above 0, up to 10; 1 changes nothing")
        if any(not 0 <= seed < MAX_SEED for seed in self.seeds):
            raise ConfigError(f"seeds={self.seeds}: a seed is 0 or more, and below 2**48")


PAPER = Config(candidates=60, device="cuda", batch_size=12)  # 60 candidates for each caption, section 4.1
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        candidates=4,
        num_scenes=400,
        sampling=SamplingConfig(top_k=12),  # of 512 codes, as the release keeps 200 of 8192
        scene_sampling=SamplingConfig(temperature=0.2, top_k=12),  # a small model is less sure of what it knows
        device="cpu",
        batch_size=50,
    ),
}


def main(config: Config, run: JobRun) -> None:
    """Draw every picture that is asked for, then write the table and the sheets."""
    prompts = collect_prompts(config)
    orders = list(place_orders(prompts, seed=config.seed, seeds=config.seeds))
    if config.lexicon is not None:
        orders = rewritten(orders, read_lexicon(config.lexicon), is_ranked=config.captioner is not None)
        run.scores["rewritten"] = sum(order.rewritten != "" for order in orders)
    work = draw_shard(config, run=run)
    work.load()  # what does not belong together is said before anything is drawn
    started = time.monotonic()
    drawn = draw_orders(orders, work, shard_size=config.shard_size, workers=config.workers, run=run)
    drawn = ranked(drawn)
    if config.lexicon is not None:
        drawn = drawn.append_column(DRAWN, pa.array([order.text for order in orders], pa.string()))
    run.scores["samples"] = len(drawn)
    run.scores["seconds_per_sample"] = (time.monotonic() - started) / len(drawn)
    with atomic_file(run.output / "samples.parquet") as file:
        pq.write_table(drawn, file)
    write_json(run.output / "prompts.json", [prompt.text for prompt in prompts])
    rows = drawn.drop_columns(["codes"]).to_pylist()
    sheet = draw_grid(run.output, rows)
    save_picture(sheet, run.output / "grid.png")
    run.tracker.log_image(sheet, "grid.png")
    columns = ("prompt", DRAWN, "kind", "candidate", "seed", "cap_loss", "rank", "path")
    run.tracker.log_table([{key: row[key] for key in columns if key in row} for row in rows], "samples.json")
    if config.captioner is not None:
        keep_best(run.output, rows)
        best = [row["cap_loss"] for row in rows if row["rank"] == 0]
        run.scores["cap_loss"] = sum(row["cap_loss"] for row in rows) / len(rows)
        run.scores["cap_loss_of_best"] = sum(best) / len(best)
        run.say(f"the best of each prompt: {run.output / BEST_FOLDER}; all in order: {run.output / ORDERED_FOLDER}")
    run.say(f"{len(rows)} pictures: {run.output / 'grid.png'}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders that are not given from the chain that ran last under `root` (`chain.json`).

    Given prompts are then all that is drawn; those of standard input are read here. ConfigError when no chain has
    trained a model yet.
    """
    if config.prompts_file is not None and config.prompts_file.name == STANDARD_INPUT:
        prompts = _lines(sys.stdin.read(), where="standard input")
        config = replace(config, prompts_file=None, prompt=(*config.prompt, *prompts))
    if config.prompt or config.prompts_file:
        config = replace(config, num_scenes=0, num_validation_prompts=0)
    if config.best and config.captioner is None:
        config = replace(config, captioner=latest_output("finetune_captioning", flag="--captioner", root=root))
    producers = {name: job for name, job in SOURCES.items() if name != "tokens" or config.num_validation_prompts}
    filled: Config = fill_from_chain(config, producers, root=root)
    return filled


def draw_shard(config: Config, *, run: JobRun) -> DrawShard:
    """What workers draw with. ConfigError names a folder that is not given."""
    folders = {name: getattr(config, name) for name in ("checkpoint", "text_tokenizer", "image_tokenizer")}
    for name, folder in folders.items():
        if folder is None:
            flag = f"--{name.replace('_', '-')} FOLDER"
            raise ConfigError(f"{name} is not given; run `make pretrain` first, or give {flag}")
    return DrawShard(
        **folders,
        captioner=config.captioner,
        sampling=config.sampling,
        scene_sampling=config.scene_sampling,
        contrast=config.contrast,
        checkpoint_digest=run.inputs["checkpoint"],
        output=run.output,
        batch_size=config.batch_size,
        device=config.device,
        threads=config.threads,
        is_recorded=config.is_recorded,
    )


def collect_prompts(config: Config) -> list[Prompt]:
    """All prompts in the order in which they are drawn. ConfigError when there is none, or an empty one."""
    given = [*config.prompt, *(_file_prompts(config.prompts_file) if config.prompts_file else ())]
    if any(not text.strip() for text in given):
        raise ConfigError(f"prompt={given}: an empty caption asks for nothing; leave it out")
    prompts = [
        *(Prompt(text=text.strip(), kind="given", candidates=len(config.seeds) or config.candidates) for text in given),
        *scene_prompts(config.num_scenes, seed=config.seed, two_shape_share=config.two_shape_share),
        *validation_prompts(config.tokens, number=config.num_validation_prompts, seed=config.seed),
    ]
    if not prompts:
        raise ConfigError("nothing to draw; give --prompt, --prompts-file, --num-scenes or --num-validation-prompts")
    return prompts


def rewritten(orders: Sequence[Order], lexicon: Lexicon, *, is_ranked: bool) -> list[Order]:
    """The orders with their prompts qualified by a lexicon, each by its own seed.

    is_ranked: a captioner will choose among the candidates of a prompt, so they share the draw of the first.
    """
    firsts = {order.prompt_index: order.seed for order in reversed(orders)}
    made = []
    for order in orders:
        seed = firsts[order.prompt_index] if is_ranked else order.seed
        changed = lexicon.rewrite(order.prompt.text, seed=seed)
        made.append(replace(order, rewritten=changed.text) if changed.replacements else order)
    return made


def ranked(drawn: pa.Table) -> pa.Table:
    """The table of samples with the rank of each among the candidates of its prompt, if their CapLoss is known."""
    losses, prompts = drawn["cap_loss"].to_pylist(), drawn["prompt_index"].to_pylist()
    ranks: list[int | None] = [None] * len(drawn)
    for _, group in itertools.groupby(range(len(drawn)), key=lambda row: prompts[row]):
        rows = list(group)
        if losses[rows[0]] is not None:
            for rank, place in enumerate(ranking([losses[row] for row in rows])):
                ranks[rows[place]] = rank
    return drawn.append_column(RANK, pa.array(ranks, type=RANK.type))


def draw_grid(folder: Path, table: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The sheet of the first prompts, every candidate of a prompt side by side over its caption, the best first."""
    tiles = []
    for rows in itertools.islice(by_prompt(table), GRID_TILES):
        pictures = tuple(Image.open(folder / row["path"]).convert("RGB") for row in rows[:CANDIDATES_SHOWN])
        note = " | ".join(dict.fromkeys(row.get(DRAWN, "") for row in rows[:CANDIDATES_SHOWN]))
        note = "" if note == rows[0]["prompt"] else note
        tiles.append(Tile(images=pictures, caption=rows[0]["prompt"], fallback=rows[0]["latin_prompt"], note=note))
    return draw_sheet(tiles)


def keep_best(folder: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Write the best picture of each prompt, and for the first prompts a sheet of all candidates in their order."""
    for rows in by_prompt(table):
        name = f"{rows[0]['prompt_index']:06d}.png"
        with atomic_file(folder / BEST_FOLDER / name) as copy, open(folder / rows[0]["path"], "rb") as original:
            shutil.copyfileobj(original, copy)
        if len(rows) > 1 and rows[0]["prompt_index"] < SHEETS:
            save_picture(draw_ordered(folder, rows), folder / ORDERED_FOLDER / name)


def draw_ordered(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """All candidates of a prompt in the order of CapLoss, as figure 6."""
    tiles = [
        Tile(
            images=(Image.open(folder / row["path"]).convert("RGB"),),
            caption=f"{row['cap_loss']:.3f}",
            note=f"seed {row['seed']}",
        )
        for row in rows
    ]
    title = drawable(rows[0]["prompt"], fallback=rows[0]["latin_prompt"])
    return draw_sheet(tiles, title=f"In the order of CapLoss: {title}", picture_side=128)


def by_prompt(table: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The rows of each prompt, in the order of their rank if they have one."""
    for _, group in itertools.groupby(table, key=lambda row: row["prompt_index"]):
        yield sorted(group, key=lambda row: row["candidate"] if row["rank"] is None else row["rank"])


def _file_prompts(path: Path) -> list[str]:
    """The captions of a UTF-8 text file, one on a line; empty lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts_file={path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return _lines(text, where=f"prompts_file={path}")


def _lines(text: str, *, where: str) -> list[str]:
    texts = [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise ConfigError(f"{where} holds no caption; write one on each line")
    return texts


JOB = Job(name="generate", version=2, products=("samples.parquet", "grid.png", "prompts.json"), main=main)
