"""Train image tokenizers side by side that differ in how their codebook is learned, how large or how wide it is.

Command: python -m pipelines compare_image_tokenizers smoke (`make compare-image-tokenizers DATA=/folder`)
Reads:   the tars of filter_pairs; without --pairs those of the chain that ran last
Writes:  report.html, curves.png, curves.csv, scores.csv, reconstructions.png; a folder for each arm with its
         tokenizer, metrics and checkpoints; one MLflow run with a nested one for each arm
Time:    smoke: about 10 minutes on two cores for the four rules

CogView, section 2.2 and figure 2: four ways to train the codebook, with the same architecture, pictures, seed, steps.
Arms are Ray tasks of one worker each; as many run at a time as there are GPUs, or CPUs where there is no GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet
from cogview.evaluation.reconstruction import reconstruct, score_reconstructions
from cogview.evaluation.tokenizer_arms import Arm, ArmTrace, combine_arms, read_trace, spread
from cogview.tokenizers.codebook import CodebookConfig, Rule
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.structural_similarity import least_side
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from cogview.training.loop import METRICS_NAME, LoopConfig
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.runtime.chain import fill_from_chain
from pipelines.runtime.csv_file import write_csv
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.nested import nested_tracker
from pipelines.runtime.page import Page, PageFigure, write_page
from pipelines.runtime.side_by_side import Part, train_side_by_side
from pipelines.runtime.workers import TrainingJob
from pipelines.tasks.image_tokenizer import (
    PIXELS_NAME,
    QUICK_OPTIMIZER,
    SMALL_MODEL,
    Pixels,
    TaskSettings,
    TokenizerTask,
    cache_pixels,
    check_image_size,
    held_out_count,
    in_batches,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOURCES = {"pairs": "filter_pairs"}
SHEET_PICTURES = 16
COLOURS: Mapping[Rule, str] = {
    "straight_through": "#3b6ea5",
    "gumbel": "#d98e04",
    "moving_average": "#2c7a5b",
    "fixed": "#8a909c",
}
LINE_STYLES = ("-", "--", ":", "-.")  # of arms with one rule
MAX_NAMES_IN_TITLE = 5


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared, and on what. pairs: the output of filter_pairs.

    rules, num_codes, code_dims, width_factors: every combination is an arm; sequences of one value, or of none, leave
    that of `model`. width_factors multiply `model.widths`. image_size, max_images, num_held_out: as in
    train_image_tokenizer. threads: of each arm, where it has no GPU.
    """

    pairs: Path | None = input_field(default=None)
    rules: tuple[Rule, ...] = ("straight_through", "gumbel", "moving_average", "fixed")
    num_codes: tuple[int, ...] = ()
    code_dims: tuple[int, ...] = ()
    width_factors: tuple[float, ...] = ()
    image_size: int = 256
    max_images: int = 200_000
    num_held_out: int = 256
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    loop: LoopConfig
    threads: int = runtime_field(1)

    def __post_init__(self) -> None:
        check_image_size(self.image_size, model=self.model)
        if self.image_size < least_side(1):
            raise ConfigError(f"image_size={self.image_size}: SSIM needs pictures of {least_side(1)} pixels or more")
        if self.threads < 1:
            raise ConfigError(f"threads={self.threads}: choose 1 or more")
        self.arms()

    def arms(self) -> list[Arm]:
        """The tokenizers to be trained."""
        return combine_arms(
            self.model,
            rules=self.rules,
            num_codes=self.num_codes,
            code_dims=self.code_dims,
            width_factors=self.width_factors,
        )


# The paper gives the architecture and about 25,000 iterations; rates, batch and temperatures are not published.
PAPER = Config(
    model=VQVAEConfig(codebook=CodebookConfig(start_after=500, temperature_steps=20_000)),
    loop=LoopConfig(
        num_steps=25_000,
        global_batch_size=64,  # on one GPU: an arm has one worker
        optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.0),
        precision="bf16",
        log_every=50,
        validate_every=500,
        checkpoint_every=1000,
    ),
)
SMOKE = replace(
    PAPER,
    image_size=64,
    num_held_out=200,
    model=replace(SMALL_MODEL, codebook=replace(SMALL_MODEL.codebook, temperature_end=0.1, temperature_steps=1000)),
    loop=LoopConfig(
        num_steps=1200,
        global_batch_size=16,
        optimizer=QUICK_OPTIMIZER,
        log_every=20,
        validate_every=100,
        checkpoint_every=200,
    ),
)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": SMOKE}


def main(config: Config, run: JobRun) -> None:
    """Decode the pictures once, train every arm, score them on pictures not trained on, and write what came out."""
    pairs = given_folders(config, SOURCES)["pairs"]
    count = cache_pixels(pairs, image_size=config.image_size, max_images=config.max_images, run=run)
    held_out = held_out_count(count, wanted=config.num_held_out, pairs=pairs)
    arms = config.arms()
    run.say(f"{len(arms)} arms on {count - held_out:,} pictures, scored on {held_out} others")
    with ExitStack() as stack:
        parts = {}
        for arm in arms:
            tracker = stack.enter_context(nested_tracker(run, job=JOB.name, name=arm.name, config=arm.model))
            own_run = replace(run, output=run.output / arm.name, tracker=tracker, scores={})
            settings = arm_settings(arm, config=config, run=run, num_train=count - held_out, num_held_out=held_out)
            parts[arm.name] = Part(training=arm_training(settings, run=own_run), run=own_run)
        last = train_side_by_side(parts, run=run, threads=config.threads)
        batch_size = config.loop.global_batch_size
        traces = [read_trace(arm, run.output / arm.name / METRICS_NAME, batch_size=batch_size) for arm in arms]
        tokenizers = {arm.name: ImageTokenizer.load(run.output / arm.name) for arm in arms}
        pixels = settings.held_out_pixels()
        rows = [
            score_arm(
                trace,
                tokenizers[trace.arm.name],
                pixels,
                last=last[trace.arm.name],
                batch_size=batch_size,
            )
            for trace in traces
        ]
        for row in rows:
            parts[row["arm"]].run.tracker.log_scores({name: value for name, value in row.items() if name != "arm"})
    write_results(traces, rows, sheet=draw_arms(tokenizers, pixels[:SHEET_PICTURES]), run=run)
    (run.output / PIXELS_NAME).unlink()


def resolve(config: Config, *, root: Path) -> Config:
    """Without pairs, those of the chain that ran last under `root`. ConfigError when there are none."""
    filled: Config = fill_from_chain(config, SOURCES, root=root)
    return filled


def arm_settings(arm: Arm, *, config: Config, run: JobRun, num_train: int, num_held_out: int) -> TaskSettings:
    """An arm's task: its own tokenizer on the pictures of all."""
    return TaskSettings(
        model=arm.model,
        loop=config.loop,
        pixels=run.output / PIXELS_NAME,
        output=run.output / arm.name,
        num_train=num_train,
        num_held_out=num_held_out,
    )


def arm_training(settings: TaskSettings, *, run: JobRun) -> TrainingJob:
    """An arm's training with one worker."""
    return TrainingJob(
        build=build_arm,
        config=settings,
        loop=settings.loop,
        identity={"digest": run.digest, "arm": run.output.name},
        output=run.output,
        num_workers=1,
    )


def build_arm(settings: TaskSettings, ranks: Ranks) -> TokenizerTask:
    """Runs on each worker: the task of train_image_tokenizer with more scores."""
    return TokenizerTask(settings, ranks, score=score_held_out)


def score_held_out(tokenizer: AnyImageTokenizer, pixels: Pixels) -> dict[str, float]:
    """L2, PSNR, SSIM and use of the codebook on pictures that were not trained on."""
    assert isinstance(tokenizer, ImageTokenizer), "the config allows no other kind"
    device = next(tokenizer.parameters()).device
    return asdict(score_reconstructions(tokenizer, in_batches(pixels, device=device)))


def score_arm(
    trace: ArmTrace, tokenizer: ImageTokenizer, pixels: Pixels, *, last: Mapping[str, float], batch_size: int
) -> dict[str, Any]:
    """An arm's row of the table. last: what its training logged last."""
    scores = score_held_out(tokenizer, pixels)
    return {
        "arm": trace.arm.name,
        "l2": trace.final_l2,
        "held_out_l2": scores["l2"],
        "psnr": scores["psnr"],
        "ssim": scores["ssim"],
        "codes_in_use": last["codes_in_use"],
        "held_out_codes_used": scores["codes_used"],
        "held_out_perplexity": scores["perplexity"],
        "pictures_per_second": trace.steps_per_second * batch_size,
        "seconds": trace.training[-1][0] / trace.steps_per_second,
    }


def write_results(
    traces: Sequence[ArmTrace], rows: Sequence[dict[str, Any]], *, sheet: Image.Image, run: JobRun
) -> None:
    """Write and track the tables, the plot, the sheet and the page; the scores of all arms become the job's."""
    figure = draw_curves(traces)
    figure.savefig(run.output / "curves.png", dpi=120)
    run.tracker.log_figure(figure, "curves.png")
    sheet.save(run.output / "reconstructions.png")
    run.tracker.log_image(sheet, "reconstructions.png")
    run.tracker.log_table(rows, "scores.json")
    write_csv([row for trace in traces for row in trace.rows()], run.output / "curves.csv")
    write_csv(rows, run.output / "scores.csv")
    for row in rows:
        run.scores.update({f"{row['arm']}/{name}": value for name, value in row.items() if name != "arm"})
    learned = [trace.final_l2 for trace in traces if trace.arm.rule != "fixed"]
    if len(learned) > 1:
        run.scores["l2_spread"] = spread(learned)
    write_page(build_page(traces, rows, folder=run.output, scores=run.scores), run.output / "report.html")
    for name in ("report.html", "curves.csv", "scores.csv"):
        run.tracker.log_artifact(run.output / name)
    best = max(rows, key=lambda row: float(row["psnr"]))
    run.say(f"best PSNR {best['psnr']:.1f} dB with {best['arm']}: {run.output / 'report.html'}")


def draw_curves(traces: Sequence[ArmTrace]) -> "Figure":
    """Two panels, L2 over steps: in training, and on pictures that were not trained on. A line for each arm.

    Held-out points from before the codebook was put onto vectors are left out: its codes are random until then.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    training, held_out = figure.subplots(1, 2, sharey=True)
    start_after = traces[0].arm.model.codebook.start_after or 0
    for trace, style in zip(traces, _line_styles(traces), strict=True):
        look: dict[str, Any] = {"color": COLOURS[trace.arm.rule], "linestyle": style, "linewidth": 1.8}
        training.plot(*zip(*trace.training, strict=True), label=_words(trace.arm.name), **look)
        points = [point for point in trace.held_out if point[0] > start_after]
        held_out.plot([step for step, _ in points], [l2 for _, l2 in points], **look)
    training.set(title="In training", ylabel="L2, normalised pixels")
    held_out.set(title="Pictures not trained on, nearest codes")
    for axes in (training, held_out):
        _dress(axes, start_after=start_after)
    training.legend(frameon=False)
    return figure


def draw_arms(tokenizers: Mapping[str, ImageTokenizer], pixels: Pixels) -> Image.Image:
    """A sheet: each picture beside what every arm makes of it."""
    originals = [Image.fromarray(picture) for picture in pixels]
    decoded = [reconstruct(originals, tokenizer=tokenizer) for tokenizer in tokenizers.values()]
    tiles = [Tile(images=images) for images in zip(originals, *decoded, strict=True)]
    names = [_words(name) for name in tokenizers]
    shown = names if len(names) <= MAX_NAMES_IN_TITLE else ["the arms in the order of the table"]
    columns = 2 if len(names) <= MAX_NAMES_IN_TITLE else 1
    return draw_sheet(tiles, title=" | ".join(["original", *shown]), columns=columns, picture_side=112)


def build_page(
    traces: Sequence[ArmTrace], rows: Sequence[dict[str, Any]], *, folder: Path, scores: Mapping[str, Any]
) -> Page:
    """The page, with the pictures of a folder."""
    best = max(rows, key=lambda row: float(row["psnr"]))
    headline = {f"PSNR on pictures not trained on, the best, {_words(best['arm'])}": f"{best['psnr']:.1f} dB"}
    if "l2_spread" in scores:
        headline["between the lowest and the highest final L2 of the codebooks that learn"] = (
            f"{scores['l2_spread']:.1%}"
        )
    start_after, num_steps = traces[0].arm.model.codebook.start_after, traces[0].training[-1][0]
    return Page(
        title="Image tokenizers compared",
        lead=f"{len(traces)} tokenizers on the same pictures, with the same seed, {num_steps:,} steps each.",
        headline=headline,
        figures=[
            PageFigure(
                path=folder / "curves.png",
                title="Reconstruction loss",
                note="Mean squared error in normalised pixels. "
                + (f"In the first {start_after} steps (grey) no vector is quantized yet." if start_after else ""),
            ),
            PageFigure(
                path=folder / "reconstructions.png",
                title="Reconstructions",
                note="Pictures that were not trained on. Left the original, then one picture for each tokenizer.",
            ),
        ],
        table_title="Scores",
        rows=[{**row, "arm": _words(row["arm"])} for row in rows],
    )


def _dress(axes: "Axes", *, start_after: int) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.set_xlabel("step")
    axes.axvspan(0, start_after, color="#f1f2f4", linewidth=0)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e5ea", linewidth=0.8)


def _line_styles(traces: Sequence[ArmTrace]) -> Iterator[str]:
    """Solid for the first arm of each rule, then the others in turn."""
    seen: dict[Rule, int] = {}
    for trace in traces:
        number = seen[trace.arm.rule] = seen.get(trace.arm.rule, -1) + 1
        yield LINE_STYLES[number % len(LINE_STYLES)]


def _words(name: str) -> str:
    return name.replace("_", " ")


JOB = Job(
    name="compare_image_tokenizers",
    version=2,
    products=("report.html", "curves.png", "curves.csv", "scores.csv", "reconstructions.png"),
    main=main,
)
