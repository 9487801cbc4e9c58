"""What the best of n candidates gains: each caption drawn many times, and ranked (CogView, section 3.2, figures 6, 9).

Command: make rank-candidates [PRESET=smoke] [ARGS="--candidates 32 --clip /folder"]
Reads:   the outputs of pretrain, finetune_captioning, tokenize_pairs and both tokenizers; CLIP, if there is one
Writes:  report.html, curves.png, curves.csv, candidates.png (those of one caption in their order), the pictures
Time:    about three minutes for 100 x 16 pictures of 64 x 64 pixels on two cores

Candidates are put in order by CapLoss (self-reranking), by a CLIP of yours (as DALL-E does), and for scenes of the demo
corpus by the scene reader, which knows the truth: nobody can choose better. What the best of n has is no single draw,
but the exact mean over all choices of n among the candidates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.attributes import judge, scene_from_json
from cogview.evaluation.clip_network import ClipScorer
from cogview.evaluation.grids import Tile, draw_sheet, drawable
from cogview.evaluation.reranking import Floats, best_of, ranking
from cogview.sampling.choice import SamplingConfig
from cogview.scenes.reading import ATTRIBUTES
from pipelines.runtime.chain import DEMO_DATA, fill_from_chain, latest_output, read_chain
from pipelines.runtime.csv_file import write_csv
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.page import Page, PageFigure, write_page
from pipelines.tasks.drawing import DrawShard, Prompt, draw_orders, save_picture
from pipelines.tasks.prompts import place_orders, scene_prompts, validation_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = {
    "checkpoint": "pretrain",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
    "captioner": "finetune_captioning",
}
CHAIN = {**{name: job for name, job in MODELS.items() if name != "captioner"}, "tokens": "tokenize_pairs"}
OWN_PROMPTS = 100
SHEET_CANDIDATES = 24
SHARD_SIZE = 200  # pictures
POWERS = tuple(2**power for power in range(11))
NAMES = {"CapLoss": "CapLoss", "CLIP": "CLIP score", "the reader": "wrong attributes"}  # of what each judge says
OF_THE_BEST = " of the best by "
COLOURS = {"CapLoss": "#d1495b", "CLIP": "#3b6ea5", "the reader": "#8a909c"}  # by whom is chosen


@dataclass(frozen=True, kw_only=True)
class Config:
    """Folders that are not given are those of the chain that ran last; captioner: the one that was finetuned last.

    clip: a folder of CLIP as transformers saves it. num_scenes: captions of scenes that the demo corpus never showed,
    of which a share of two_shape_share has two shapes; num_validation_prompts: captions of held-out rows of `tokens`,
    which is what other data is asked for. candidates: pictures of each; sampling: how they are drawn.
    batch_size, device, threads: the machine; workers: on Ray, 1 for none (0: Ray from 2,000 pictures, one on each CPU).
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    captioner: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    clip: Path | None = input_field(default=None)
    num_scenes: int = 0
    two_shape_share: float = 0.25
    num_validation_prompts: int = OWN_PROMPTS
    candidates: int = 60
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    batch_size: int = runtime_field(12)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)
    workers: int = runtime_field(0)

    def __post_init__(self) -> None:
        require_positive(self, "batch_size", "threads")
        if self.candidates < 2:
            raise ConfigError(f"candidates={self.candidates}: there is nothing to rank; give 2 or more")
        if min(self.num_scenes, self.num_validation_prompts, self.seed, self.workers) < 0:
            raise ConfigError("num_scenes, num_validation_prompts, seed, workers: give 0 or more")


PAPER = Config(device="cuda")  # 60 candidates for each caption, section 4.1
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        num_scenes=100,
        num_validation_prompts=0,
        candidates=16,
        sampling=SamplingConfig(top_k=12),  # of 512 codes, as the release keeps 200 of 8192
        device="cpu",
        batch_size=100,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """P captions with M candidates each. by: whose choice -> float64 [P, M], the lower the better; CapLoss is there."""

    table: pa.Table
    by: Mapping[str, Floats]

    def rows(self) -> Iterator[dict[str, float | int]]:
        """A row for each n: what the best of n by each choice has of each value."""
        for n in range(1, self.by["CapLoss"].shape[1] + 1):
            row: dict[str, float | int] = {"n": n}
            for value, values_PM in self.by.items():
                sign = -1.0 if value == "CLIP" else 1.0
                for choice, losses_PM in self.by.items():
                    row[column(NAMES[value], choice)] = sign * best_of(losses_PM, values_PM, n=n)
            yield row


def main(config: Config, run: JobRun) -> None:
    """Draw all candidates, let each judge put them in order, and write what the best of n has."""
    prompts = [replace(prompt, candidates=config.candidates) for prompt in collect_prompts(config)]
    orders = list(place_orders(prompts, seed=config.seed))
    work = draw_shard(config, run=run)
    work.load()  # what does not belong together is said before anything is drawn
    clip = ClipScorer(config.clip, device=config.device) if config.clip is not None else None
    table = draw_orders(orders, work, shard_size=SHARD_SIZE, workers=config.workers, run=run)
    found = rank(table, candidates=config.candidates, clip=clip, folder=run.output)
    rows = list(found.rows())
    write_csv(rows, run.output / "curves.csv")
    figure = plot_curves(rows)
    figure.savefig(run.output / "curves.png", dpi=120)
    sheet = draw_ordered(found, folder=run.output)
    save_picture(sheet, run.output / "candidates.png")
    for row in rows:
        run.tracker.log_metrics({metric_name(name): row[name] for name in row if name != "n"}, step=int(row["n"]))
    run.scores.update({"captions": len(prompts), "candidates": config.candidates, **gains(rows)})
    write_page(build_page(rows, folder=run.output, scores=run.scores), run.output / "report.html")
    run.tracker.log_figure(figure, "curves.png")
    run.tracker.log_image(sheet, "candidates.png")
    for name in ("report.html", "curves.csv"):
        run.tracker.log_artifact(run.output / name)
    run.say(f"{len(prompts)} captions, {config.candidates} candidates each: {run.output / 'report.html'}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in what is not given from what ran last under `root`; data of one's own is asked for held-out captions."""
    if config.captioner is None:
        config = replace(config, captioner=latest_output("finetune_captioning", flag="--captioner", root=root))
    filled: Config = fill_from_chain(config, CHAIN, root=root)
    if config.tokens is None and config.num_scenes and read_chain(root).get("data") != DEMO_DATA:
        filled = replace(filled, num_scenes=0, num_validation_prompts=config.num_validation_prompts or OWN_PROMPTS)
    return filled


def collect_prompts(config: Config) -> list[Prompt]:
    """The captions that are drawn. ConfigError when there is none."""
    prompts = [
        *scene_prompts(config.num_scenes, seed=config.seed, two_shape_share=config.two_shape_share),
        *validation_prompts(config.tokens, number=config.num_validation_prompts, seed=config.seed),
    ]
    if not prompts:
        raise ConfigError("nothing to draw; give --num-scenes or --num-validation-prompts")
    return prompts


def draw_shard(config: Config, *, run: JobRun) -> DrawShard:
    """What workers draw with. ConfigError names a folder that is not given."""
    return DrawShard(
        **given_folders(config, MODELS),
        sampling=config.sampling,
        scene_sampling=config.sampling,
        contrast=1.0,
        checkpoint_digest=run.inputs["checkpoint"],
        output=run.output,
        batch_size=config.batch_size,
        device=config.device,
        threads=config.threads,
        is_recorded=False,
    )


def rank(table: pa.Table, *, candidates: int, clip: ClipScorer | None, folder: Path) -> Ranked:
    """Every judge's opinion of every drawn picture, read back from its file. The reader judges if all are scenes."""
    rows = table.select(["prompt", "scene", "path", "cap_loss"]).to_pylist()
    has_truth = all(row["scene"] for row in rows)
    found: dict[str, list[float]] = {"CapLoss": [row["cap_loss"] for row in rows]}
    for row in rows if clip is not None or has_truth else ():
        picture = _picture(folder, row)
        if clip is not None:
            found.setdefault("CLIP", []).append(-clip([picture], [row["prompt"]])[0])
        if has_truth:
            mark = judge(picture, expected=scene_from_json(row["scene"])).mean
            found.setdefault("the reader", []).append(1.0 - mark)
    by = {name: np.array(values, dtype=np.float64).reshape(-1, candidates) for name, values in found.items()}
    return Ranked(table=table, by=by)


def gains(rows: Sequence[Mapping[str, float | int]]) -> dict[str, float]:
    """One candidate against all, in the words of scores."""
    first, last = rows[0], rows[-1]
    found: dict[str, float] = {}
    for score, value in (("cap_loss", "CapLoss"), ("wrong_attributes", NAMES["the reader"])):
        if (name := column(value, "CapLoss")) in first:
            found |= {f"{score}_of_one": first[name], f"{score}_of_best": last[name]}
    return found


def plot_curves(rows: Sequence[Mapping[str, float | int]]) -> "Figure":
    """A panel for each value against the number of candidates, a line for each who chooses."""
    from matplotlib.figure import Figure

    values = [name for name in NAMES.values() if column(name, "CapLoss") in rows[0]]
    choices = [name for name in NAMES if column(values[0], name) in rows[0]]
    numbers = [row["n"] for row in rows]
    figure = Figure(figsize=(5 * len(values), 4.2), layout="constrained")
    for axes, value in zip(figure.subplots(1, len(values), squeeze=False)[0], values, strict=True):
        for choice in choices:
            style = ":" if choice == "the reader" else "-"
            heights = [row[column(value, choice)] for row in rows]
            axes.plot(numbers, heights, style, color=COLOURS[choice], label=f"chosen by {choice}")
        axes.set(title=f"{value[0].upper()}{value[1:]} of the best", xlabel="candidates")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e5ea", linewidth=0.8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(choices), frameon=False)
    return figure


def draw_ordered(found: Ranked, *, folder: Path) -> Image.Image:
    """Candidates of the first caption in the order of CapLoss, with what the reader says of each: figure 6."""
    losses_PM = found.by["CapLoss"]
    rows = found.table.slice(0, losses_PM.shape[1]).to_pylist()
    tiles = []
    for place in ranking(list(losses_PM[0]))[:SHEET_CANDIDATES]:
        picture, note = _picture(folder, rows[place]), ""
        if "the reader" in found.by:
            marks = judge(picture, expected=scene_from_json(rows[place]["scene"])).marks
            wrong = [name for name in ATTRIBUTES if marks[name] < 1]
            note = f"wrong: {', '.join(wrong)}" if wrong else "all right"
        tiles.append(Tile(images=(picture,), caption=f"CapLoss {losses_PM[0, place]:.3f}", note=note))
    title = drawable(rows[0]["prompt"], fallback=rows[0]["latin_prompt"])
    return draw_sheet(tiles, title=title, columns=8, picture_side=112)


def build_page(rows: Sequence[Mapping[str, float | int]], *, folder: Path, scores: Mapping[str, Any]) -> Page:
    """The page, with the pictures of a folder."""
    headline = {
        f"CapLoss of one, and of the best of {scores['candidates']}": (
            f"{scores['cap_loss_of_one']:.3f} → {scores['cap_loss_of_best']:.3f}"
        )
    }
    if "wrong_attributes_of_one" in scores:
        headline["attributes wrong in one, and in the best by CapLoss"] = (
            f"{scores['wrong_attributes_of_one']:.1%} → {scores['wrong_attributes_of_best']:.1%}"
        )
    return Page(
        title="The best of n",
        lead=f"{scores['captions']} captions, {scores['candidates']} candidates of each.",
        headline=headline,
        figures=[
            PageFigure(
                path=folder / "curves.png",
                title="What the best has",
                note="The mean over all choices of n among the candidates. As the paper's Figure 9 does, it shows what "
                "more candidates are worth; the reader chooses knowing the truth, and bounds what a ranking can gain.",
            ),
            PageFigure(
                path=folder / "candidates.png",
                title="Candidates in their order",
                note="Of the first caption, the lowest CapLoss first, as the paper's Figure 6 shows them.",
            ),
        ],
        table_title="Best of n",
        rows=[row for row in rows if row["n"] in POWERS],
    )


def column(value: str, choice: str) -> str:
    """The name of a column: what the best has of a value, if it is chosen by `choice`."""
    return f"{value}{OF_THE_BEST}{choice}"


def metric_name(title: str) -> str:
    """`wrong attributes of the best by CLIP` as a name that MLflow takes: `wrong_attributes/CLIP`."""
    value, _, choice = title.partition(OF_THE_BEST)
    return f"{value.replace(' ', '_')}/{choice.replace(' ', '_')}"


def _picture(folder: Path, row: Mapping[str, Any]) -> Image.Image:
    return Image.open(folder / row["path"]).convert("RGB")


JOB = Job(
    name="rank_candidates",
    version=1,
    products=("report.html", "curves.png", "curves.csv", "candidates.png"),
    main=main,
)
