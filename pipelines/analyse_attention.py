"""Look at the attention of a trained model, head by head.

Command: python -m pipelines analyse_attention smoke (`make analyse-attention`; after `make pretrain`, or give folders)
Reads:   the output folders of pretrain and tokenize_pairs (held-out rows)
Writes:  report.html, heads.csv, attention_maps.png, offsets.png, heads.png
Time:    seconds for a small model; minutes for a large one

Appendix C of CogView: which heads follow the rows and columns of the picture, which rest on a few tokens, and how much
the scale of the scores differs from head to head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cogview.config import input_field, require_positive, runtime_field
from cogview.evaluation.attention_maps import (
    AttentionAnalysis,
    Head,
    HeadRules,
    analyse_attention,
    describe_heads,
    head_shares,
)
from cogview.models.gpt import GPT
from cogview.models.published import load_model
from cogview.sequences.batch import SequenceBatch, SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.shards.reader import TokenShards
from cogview.tokenizers.vocabulary import Vocabulary
from pipelines.runtime.chain import fill_from_chain
from pipelines.runtime.csv_file import write_csv
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.page import Page, PageFigure, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCES = {"checkpoint": "pretrain", "tokens": "tokenize_pairs"}
INK, FAINT, MARK = "#262a32", "#8a909c", "#d1495b"


@dataclass(frozen=True, kw_only=True)
class Config:
    """checkpoint: output of pretrain; tokens: output of tokenize_pairs. Without them, those of the last chain.

    num_rows: held-out rows that are looked at, evenly spread; layers_shown, heads_shown: of the pictures, evenly
    spread too (the table has all of them).
    """

    checkpoint: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    num_rows: int = 32
    layers_shown: int = 12
    heads_shown: int = 12
    rules: HeadRules = field(default_factory=HeadRules)
    batch_size: int = runtime_field(8)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        require_positive(self, "num_rows", "layers_shown", "heads_shown", "batch_size")


PAPER = Config(device="cuda", batch_size=1)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": replace(PAPER, device="cpu", batch_size=8)}


def main(config: Config, run: JobRun) -> None:
    """Read the heads on held-out rows; write their numbers, the pictures and the page."""
    torch.set_num_threads(config.threads)
    folders = given_folders(config, SOURCES)
    gpt, settings = load_model(folders["checkpoint"])
    shards = TokenShards.open(folders["tokens"], split="validation")
    shards.require(**settings["fingerprints"])
    batches = held_out_batches(shards, settings=settings, config=config)
    analysis = analyse_attention(gpt.to(config.device), batches, grid=shards.grid)
    heads = describe_heads(analysis, rules=config.rules)
    shares = head_shares(heads)
    run.scores.update(shares, rows=analysis.rows, heads=len(heads))
    write_csv([asdict(head) for head in heads], run.output / "heads.csv")
    for name, figure in draw_figures(analysis, heads, config=config).items():
        figure.savefig(run.output / name, dpi=120)
        run.tracker.log_figure(figure, name)
    write_page(
        build_page(run.output, gpt=gpt, heads=heads, analysis=analysis, config=config), run.output / "report.html"
    )
    run.tracker.log_artifact(run.output / "report.html")
    run.tracker.log_artifact(run.output / "heads.csv")
    run.say(
        f"{len(heads)} heads: {shares['follow_positions']:.0%} follow positions, "
        f"{shares['rest_on_few_tokens']:.0%} rest on few tokens: {run.output / 'report.html'}"
    )


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders that are not given from the chain that ran last under `root` (`chain.json`).

    ConfigError when no chain has trained a model yet.
    """
    filled: Config = fill_from_chain(config, SOURCES, root=root)
    return filled


def held_out_batches(shards: TokenShards, *, settings: dict[str, Any], config: Config) -> Iterator[SequenceBatch]:
    """Held-out rows, evenly spread, laid out as in training."""
    number = min(config.num_rows, len(shards))
    numbers = np.linspace(0, len(shards) - 1, number).astype(np.int64)
    vocabulary = Vocabulary(shards.origin.num_image_codes, shards.origin.num_text_pieces)
    sequence = SequenceConfig(length=settings["length"], is_image_fixed=bool(settings.get("is_image_fixed", False)))
    for start in range(0, number, config.batch_size):
        rows = shards.rows(numbers[start : start + config.batch_size], with_texts=False)
        yield build_batch(
            rows.text_ids,
            rows.image_codes,
            layout=TASKS["text_to_image"],
            config=sequence,
            vocabulary=vocabulary,
        )


def draw_figures(analysis: AttentionAnalysis, heads: Sequence[Head], *, config: Config) -> dict[str, "Figure"]:
    """The pictures by file name."""
    num_layers, num_heads = analysis.text_NH.shape
    layers, shown = _spread(num_layers, config.layers_shown), _spread(num_heads, config.heads_shown)
    return {
        "attention_maps.png": draw_panels(analysis.maps_NHSS[layers][:, shown], layers=layers, heads=shown),
        "offsets.png": draw_panels(analysis.offsets_NHRC[layers][:, shown].flip(-2), layers=layers, heads=shown),
        "heads.png": draw_heads(heads, rules=config.rules),
    }


def draw_panels(panels_NHYX: Tensor, *, layers: Sequence[int], heads: Sequence[int]) -> "Figure":
    """One small picture for each head, layers downwards. Each is drawn from 0 to its own maximum, as a square root."""
    from matplotlib.figure import Figure

    rows, columns, height, width = panels_NHYX.shape
    side = 1.5
    figure = Figure(figsize=(columns * side + 0.6, rows * side * height / width + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axes = grid[row, column]
            axes.imshow(_brightness(panels_NHYX[row, column]), cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("#e2e5ea")
            if row == 0:
                axes.set_title(f"head {head}", fontsize=9, color=INK)
            if column == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=9, color=INK)
    return figure


def draw_heads(heads: Sequence[Head], *, rules: HeadRules) -> "Figure":
    """Three panels over the layers, a point for each head: score scale, tokens attended to, share of text."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    scales, tokens, text = figure.subplots(1, 3)
    layers = [head.layer for head in heads]
    colours = [MARK if head.rests_on_few_tokens else "#3b6ea5" for head in heads]
    scales.scatter(layers, [head.largest_score for head in heads], c=colours, s=22)
    scales.set(title="Largest score of a head", ylabel=r"$|q \cdot k| / \sqrt{D}$", yscale="log")
    tokens.scatter(layers, [head.tokens for head in heads], c=colours, s=22)
    tokens.axhline(rules.few_tokens, color=FAINT, linestyle="--", linewidth=1)
    tokens.set(title="Tokens that a head attends to", ylabel="exp of the entropy", yscale="log")
    text.scatter(layers, [head.text_share for head in heads], c=colours, s=22)
    text.set(title="Share of attention on text", ylim=(0, 1))
    for axes in (scales, tokens):
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in (scales, tokens, text):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e5ea", linewidth=0.8)
    return figure


def build_page(folder: Path, *, gpt: GPT, heads: Sequence[Head], analysis: AttentionAnalysis, config: Config) -> Page:
    """The page, with the pictures of a folder."""
    shares, rules = head_shares(list(heads)), config.rules
    notes = {
        "attention_maps.png": (
            "Maps by head",
            "One held-out row: queries downwards, keys to the right; text comes first. Dark is much attention.",
        ),
        "offsets.png": (
            "Where in the picture a head looks",
            f"Mean over all image codes of {analysis.rows} rows. The code itself lies in the middle of the bottom row, "
            "the codes above it above, earlier ones of its row to the left.",
        ),
        "heads.png": (
            "Heads compared",
            f"Red: heads that rest on at most {rules.few_tokens:g} tokens. Scores differ in scale from head to head, "
            "which is why PB-relax takes its maximum for each head at least.",
        ),
    }
    return Page(
        title="Attention, head by head",
        lead=f"{gpt.config.num_layers} layers of {gpt.config.num_heads} heads on {analysis.rows} held-out rows.",
        headline={
            f"of heads: {rules.num_offsets} offsets hold {rules.offset_share:.0%} of their attention to the image": (
                f"{shares['follow_positions']:.0%}"
            ),
            f"of heads rest on {rules.few_tokens:g} tokens or fewer": f"{shares['rest_on_few_tokens']:.0%}",
            "of an image code's attention goes to text": f"{shares['text_share']:.0%}",
            "between the largest scores of two heads": f"{shares['score_ratio']:.3g} x",
        },
        figures=[PageFigure(path=folder / name, title=title, note=note) for name, (title, note) in notes.items()],
        table_title="Every head",
        rows=[asdict(head) for head in heads],
    )


def _brightness(panel_YX: Tensor) -> npt.NDArray[np.float32]:
    brightness: npt.NDArray[np.float32] = (panel_YX / panel_YX.max().clamp_min(1e-12)).sqrt().numpy()
    return brightness


def _spread(count: int, shown: int) -> list[int]:
    """At most `shown` of `count` numbers, evenly spread."""
    return sorted(set(np.linspace(0, count - 1, min(count, shown)).astype(int).tolist()))


JOB = Job(
    name="analyse_attention",
    version=1,
    products=("report.html", "heads.csv", "attention_maps.png", "offsets.png", "heads.png"),
    main=main,
)
