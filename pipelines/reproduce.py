"""The paper's experiments at a size of your own, on one page, beside the reference curves of the project.

Command: make reproduce [PRESET=smoke] [ARGS="..."]
Reads:   what `make pretrain` reads; what it has already made under the same root is taken as it is
Writes:  reproduction.html, reproduction.png, reproduction.json (this run's curves and scores); every job's own output
Time:    smoke: about half an hour on two cores, of which `make pretrain` is a third

The road from pages to pictures; then Figure 2 (how a codebook is learned), Figure 4 (b) (what Sandwich-LN and PB-relax
are for: the paper's ablation), Figures 6 and 9 (self-reranking) and Table 1. The reference is the same command's
reproduction.json from a machine that is named in it; a small run that is in order comes close to its curves, though
not to the last digit: processors round differently, and the scores of some hundred pictures vary by a few points.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogview.config import runtime_field
from cogview.errors import ConfigError, ManifestError
from cogview.evaluation.stress_arms import ARMS
from cogview.shards.manifest import atomic_file, read_json, write_json
from cogview.training.loop import METRICS_NAME
from cogview.training.metrics_file import read_metrics
from pipelines import compare_image_tokenizers as comparing
from pipelines import finetune_captioning as captioning
from pipelines import machine_evaluation as evaluating
from pipelines import rank_candidates as ranking
from pipelines import road
from pipelines import stress_stability as stressing
from pipelines.runtime.chain import read_chain, show_finished
from pipelines.runtime.cluster import shutdown_ray
from pipelines.runtime.display import open_display
from pipelines.runtime.flags import Order
from pipelines.runtime.jobs import Finished, Job, run_job
from pipelines.runtime.machine import machine, machine_words
from pipelines.runtime.page import Page, PageFigure, PageTable, write_page
from pipelines.runtime.status import shown_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = Path(__file__).parent / "reference"
PAGE_NAME, PLOT_NAME, RECORD_NAME = "reproduction.html", "reproduction.png", "reproduction.json"
CURVES = {
    "train_image_tokenizer": ("l2", "validation_psnr"),
    "pretrain": ("text_loss", "image_loss", "validation_text_loss", "validation_image_loss"),
    "finetune_captioning": ("loss", "validation_cap_loss"),
}
COLUMNS = 4
LOGARITHMIC = ("loss", "l2")  # curves that fall steeply, then slowly
Resolve = Callable[..., Any]
# job -> its pictures, each with a title and how to read it
PICTURES = {
    "generate": (("grid.png", "Pictures", "Drawn for captions of combinations that the corpus never showed."),),
    "compare_image_tokenizers": (
        (
            "curves.png",
            "Figure 2: four ways to learn a codebook",
            "The paper finds the learned ones alike, and a fixed random codebook not far behind.",
        ),
        ("reconstructions.png", "Reconstructions", "Pictures not trained on, and what each tokenizer makes of them."),
    ),
    "stress_stability": (
        (
            "stability.png",
            "Figure 4 (b): Sandwich-LN and PB-relax",
            "A deep narrow model at a rate that none should stand. A cross marks the tensor that left half precision.",
        ),
    ),
    "rank_candidates": (
        (
            "curves.png",
            "Figure 9: the best of n",
            "Candidates are ranked by CapLoss. The scene reader knows the truth: nobody can choose better.",
        ),
        ("candidates.png", "Figure 6: candidates in the order of CapLoss", "Of one caption, the lowest first."),
    ),
    "machine_evaluation": (
        (
            "distances.png",
            "Table 1: distance from real pictures by blur",
            "Both sides under the same Gaussian filter. Unless you have the published Inception network, this is the "
            "distance of other features, and no FID.",
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The config of every job, and what to compare with: reference is a reproduction.json, by default the project's."""

    road: road.Config
    compare_image_tokenizers: comparing.Config
    stress_stability: stressing.Config
    finetune_captioning: captioning.Config
    rank_candidates: ranking.Config
    machine_evaluation: evaluating.Config
    reference: Path | None = runtime_field(None)


def compose(preset: str) -> Config:
    """Every job with the same preset."""
    return Config(
        road=road.PRESETS[preset],
        compare_image_tokenizers=comparing.PRESETS[preset],
        stress_stability=stressing.PRESETS[preset],
        finetune_captioning=captioning.PRESETS[preset],
        rank_candidates=ranking.PRESETS[preset],
        machine_evaluation=evaluating.PRESETS[preset],
    )


PRESETS: dict[str, Config] = {"paper": compose("paper"), "smoke": compose("smoke")}


def main(config: Config, *, order: Order, command: str) -> list[str]:
    """Run what is not done yet, then write the page."""
    if config.road.until:
        raise ConfigError(f"road.until={config.road.until!r}: the page needs the whole road; leave it away")
    reference = read_reference(config.reference or REFERENCES / f"{order.preset}.json", is_given=bool(config.reference))
    root = order.root
    lines = road.main(config.road, order=order, command=command)
    jobs = list(experiments(config))
    names = [job.name for job, _, _ in jobs]
    stages = read_chain(root)["stages"]
    outputs = {stage["job"]: root / stage["output"] for stage in stages}
    scores = {stage["job"]: stage["scores"] for stage in stages}
    with open_display(names, title=f"reproduce {order.preset}", root=root, is_verbose=order.is_verbose) as display:
        for job, asked, resolve in jobs:
            display.start(job.name)
            done: Finished = run_job(job, resolve(asked, root=root), root=root, display=display)
            show_finished(display, done)
            outputs[job.name], scores[job.name] = done.output, done.scores
        shutdown_ray()
    curves = read_curves(outputs)
    record = {
        "preset": order.preset,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "curves": curves,
        "scores": {job: numbers(found) for job, found in scores.items()},
    }
    write_json(root / RECORD_NAME, record)
    with atomic_file(root / PLOT_NAME) as file:
        plot_curves(curves, reference=reference).savefig(file, dpi=110, format="png")
    write_page(build_page(record, reference=reference, outputs=outputs, root=root), root / PAGE_NAME)
    return [*lines, f"reproduction: {shown_path(root / PAGE_NAME)}"]


def experiments(config: Config) -> Iterator[tuple[Job, Any, Resolve]]:
    """The jobs after the road: each with its config, and what fills that in from earlier jobs."""
    yield comparing.JOB, config.compare_image_tokenizers, comparing.resolve
    yield stressing.JOB, config.stress_stability, lambda asked, root: asked
    yield captioning.JOB, config.finetune_captioning, captioning.resolve
    yield ranking.JOB, config.rank_candidates, ranking.resolve
    yield evaluating.JOB, config.machine_evaluation, evaluating.resolve


def read_reference(path: Path, *, is_given: bool) -> dict[str, Any] | None:
    """An earlier run's record; None if the project has none of this preset. ConfigError for a file that is none."""
    if not path.is_file() and not is_given:
        return None
    try:
        found = read_json(path)
    except (OSError, ManifestError) as error:
        raise ConfigError(f"reference={path} cannot be read ({error}); give a {RECORD_NAME}") from error
    if not isinstance(found, dict) or not {"curves", "scores", "machine", "date"} <= found.keys():
        raise ConfigError(f"reference={path} is no {RECORD_NAME} of this command")
    return found


def read_curves(outputs: Mapping[str, Path]) -> dict[str, dict[str, list[float]]]:
    """`job/metric` -> its steps and values, as the trainings logged them."""
    curves = {}
    for job, names in CURVES.items():
        lines = read_metrics(outputs[job] / METRICS_NAME)
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            curves[f"{job}/{name}"] = {
                "steps": [step for step, _ in points],
                "values": [float(f"{value:.5g}") for _, value in points],
            }
    return curves


def numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores that are numbers; floats to five digits."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in scores.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def plot_curves(
    curves: Mapping[str, Mapping[str, Sequence[float]]], *, reference: Mapping[str, Any] | None
) -> "Figure":
    """A panel for each curve, the reference's in grey behind it."""
    from matplotlib.figure import Figure

    num_rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.2 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, COLUMNS, squeeze=False).ravel()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, curve) in zip(panels, curves.items(), strict=False):
        old = (reference or {"curves": {}})["curves"].get(name)
        if old:
            axes.plot(old["steps"], old["values"], color="#b9bec7", linewidth=4, label="reference")
        marker = "o" if len(curve["steps"]) < 12 else ""
        axes.plot(curve["steps"], curve["values"], color="#3b6ea5", marker=marker, markersize=3, label="this run")
        job, _, metric = name.partition("/")
        axes.set_title(f"{job.replace('_', ' ')}: {metric.replace('_', ' ')}", fontsize=10)
        axes.set_xlabel("step")
        if metric.endswith(LOGARITHMIC):
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e5ea", linewidth=0.8, which="both")
    panels[0].legend(frameon=False)
    return figure


def build_page(
    record: Mapping[str, Any], *, reference: Mapping[str, Any] | None, outputs: Mapping[str, Path], root: Path
) -> Page:
    """Curves, figures, and every job's scores beside the reference's."""
    beside = f" Grey: the reference of {reference['date']}, {machine_words(reference['machine'])}." if reference else ""
    figures = [PageFigure(path=root / PLOT_NAME, title="Curves", note=f"What the trainings logged.{beside}")]
    for job, pictures in PICTURES.items():
        figures += [PageFigure(path=outputs[job] / name, title=title, note=note) for name, title, note in pictures]
    tables = [
        PageTable(title=job.replace("_", " "), note=f"Output: {shown_path(outputs[job])}", rows=rows)
        for job, found in record["scores"].items()
        if (rows := list(score_rows(found, old=(reference or {"scores": {}})["scores"].get(job, {}))))
    ]
    return Page(
        title="The paper's experiments",
        lead=f"Preset {record['preset']}, {record['date']}, {machine_words(record['machine'])}.",
        headline=dict(headline(record["scores"])),
        figures=figures,
        table_title="",
        rows=(),
        tables=tables,
    )


def score_rows(found: Mapping[str, float], *, old: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each score, with the reference's where there is one."""
    for name, value in found.items():
        yield {"score": name.replace("_", " "), "this run": value, "reference": old.get(name, "–")}


def headline(scores: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    """What people ask first."""
    if "attributes/mean" in scores["evaluate"]:
        yield "of the attributes in held-out captions drawn right", f"{scores['evaluate']['attributes/mean']:.1%}"
    ranked = scores["rank_candidates"]
    yield (
        f"CapLoss of one candidate, and of the best of {ranked['candidates']:.0f}",
        f"{ranked['cap_loss_of_one']:.2f} → {ranked['cap_loss_of_best']:.2f}",
    )
    steps = {arm: f"{scores['stress_stability'][f'{arm}/steps']:.0f}" for arm in ARMS}
    others = ", ".join(f"{arm} {stood}" for arm, stood in steps.items() if arm != "both")
    yield f"steps of the stress test with Sandwich-LN and PB-relax; {others}", steps["both"]
