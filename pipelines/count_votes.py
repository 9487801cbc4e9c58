"""Count the votes of a human evaluation: the paper's figure 10, with intervals, and how attentive the evaluators were.

Command: make count-votes [ARGS="--study FOLDER --least-attention 0.7"]
Reads:   the study of human_evaluation, by default the last one, with the votes up to now; also while it is served
Writes:  report.html, figure_10.png, models.csv, evaluators.csv, votes.csv
Time:    seconds
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogview.config import input_field, require_positive
from cogview.errors import ConfigError
from cogview.evaluation.human_votes import (
    BEST,
    FIGURES,
    RESAMPLES,
    SCALES,
    EvaluatorReport,
    Vote,
    attentive,
    report_evaluators,
    summarise,
)
from cogview.evaluation.intervals import Estimate
from pipelines.judging.ballots import VOTES_FOLDER, VOTES_NAME, load_votes
from pipelines.judging.study import STUDY, Study
from pipelines.runtime.chain import latest_output
from pipelines.runtime.csv_file import write_csv
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.page import Page, PageFigure, PageTable, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_NAME, REPORT_NAME = "figure_10.png", "report.html"
COLOURS = ("#3b6ea5", "#2c7a5b", "#d98e04", "#d1495b", "#7a5ba6", "#4f9aa8", "#8a909c", "#b07d4f")
Summary = Mapping[str, Mapping[str, Estimate]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """study: output of human_evaluation; number, digest: of the votes that are counted, filled in with those up to now.

    least_attention: evaluators who found the whole picture in a smaller share of their planted groups do not count.
    resamples: of the bootstrap, drawn from `seed`.
    """

    study: Path | None = input_field(default=None)
    number: int = 0
    digest: str = ""
    least_attention: float = 0.0
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "resamples")
        if not 0 <= self.least_attention <= 1:
            raise ConfigError(f"least_attention={self.least_attention}: give a share from 0 to 1")


PAPER = Config()
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": PAPER}


def main(config: Config, run: JobRun) -> None:
    """Count, then write the tables, the figure and the report."""
    if config.study is None:
        raise ConfigError("study is not given; run `make human-evaluation` first, or give --study FOLDER")
    study = Study.open(config.study)
    votes = read_counted(config)
    reports = report_evaluators(votes)
    counted = attentive(votes, least=config.least_attention)
    summary = summarise(counted, models=study.models, seed=config.seed, resamples=config.resamples)
    if not summary:
        raise ConfigError(
            f"least_attention={config.least_attention}: of {len(votes)} votes none is left to count; ask more people, "
            "or choose a smaller share"
        )
    run.scores.update(scores_of(summary, counted=counted, reports=reports))
    write_csv(model_rows(summary), run.output / "models.csv")
    write_csv(evaluator_rows(reports, least=config.least_attention), run.output / "evaluators.csv")
    write_csv(vote_rows(votes), run.output / "votes.csv")
    figure = plot_figure(summary)
    figure.savefig(run.output / FIGURE_NAME, dpi=120)
    run.tracker.log_figure(figure, FIGURE_NAME)
    run.tracker.log_table(list(model_rows(summary)), "models.json")
    write_report(config, study, summary, reports, run=run)
    run.tracker.log_artifact(run.output / REPORT_NAME)
    run.say(f"{len(counted)} votes counted: {run.output / REPORT_NAME}")


def resolve(config: Config, *, root: Path) -> Config:
    """Find the last study, and the votes up to now: the same votes are not counted twice."""
    if config.study is None:
        config = replace(config, study=latest_output(STUDY.name, flag="--study", root=root))
    assert config.study is not None
    votes = load_votes(config.study / VOTES_FOLDER / VOTES_NAME)[: config.number or None]
    return replace(config, number=len(votes), digest=_digest(votes))


def read_counted(config: Config) -> list[Vote]:
    """The votes that the config names. ConfigError if they are not those that it was made for."""
    assert config.study is not None
    votes = load_votes(config.study / VOTES_FOLDER / VOTES_NAME)[: config.number or None]
    if config.digest and _digest(votes) != config.digest:
        raise ConfigError(f"digest={config.digest[:12]}: {config.study} has other votes; leave digest and number out")
    if not votes:
        raise ConfigError(f"study={config.study}: nobody has voted yet; `make human-evaluation` asks people")
    return votes


def scores_of(summary: Summary, *, counted: Sequence[Vote], reports: Sequence[EvaluatorReport]) -> dict[str, float]:
    """What MLflow and the status show: shares chosen best first."""
    planted = sum(report.planted for report in reports)
    return {
        **{f"{figure}/{model}": summary[model][figure].value for figure in FIGURES for model in summary},
        "votes": sum(vote.kind == "measured" for vote in counted),
        "evaluators": len({vote.evaluator for vote in counted}),
        "groups": len({vote.group for vote in counted if vote.kind == "measured"}),
        **({"attention": sum(report.planted_right for report in reports) / planted} if planted else {}),
    }


def model_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    """A row for each model and figure."""
    for model, figures in summary.items():
        for name, found in figures.items():
            plain = {key: f"{value:.5g}" for key, value in asdict(found).items() if key != "n"}
            yield {"model": model, "figure": name, "n": found.n, **plain}


def evaluator_rows(reports: Sequence[EvaluatorReport], *, least: float) -> Iterator[dict[str, Any]]:
    """A row for each evaluator; counts: whether their votes do."""
    for report in reports:
        plain = asdict(report)
        difference = "" if report.repeated_difference is None else f"{report.repeated_difference:.3g}"
        yield plain | {"repeated_difference": difference, "counts": "yes" if report.attention >= least else "no"}


def vote_rows(votes: Sequence[Vote]) -> Iterator[dict[str, Any]]:
    """A row for each picture that was judged."""
    for number, vote in enumerate(votes):
        for model, scores in vote.scores.items():
            own = {"evaluator": vote.evaluator, "group": vote.group, "kind": vote.kind, "model": model}
            yield {"vote": number, **own, "best": int(vote.best == model), **scores, "seconds": f"{vote.seconds:.1f}"}


def plot_figure(summary: Summary) -> "Figure":
    """Three panels of bars with their intervals: chosen best, overall scores, scores of the three aspects."""
    from matplotlib.figure import Figure

    aspects = [name for name in SCALES if name != "overall"]
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    best, overall, details = figure.subplots(1, 3, width_ratios=(1, 1, 1.8))
    for place, model in enumerate(summary):
        colour = COLOURS[place % len(COLOURS)]
        _bar(best, place, summary[model][BEST], colour=colour, factor=100, label=model)
        _bar(overall, place, summary[model]["overall"], colour=colour)
        for aspect, name in enumerate(aspects):
            step = 0.84 / len(summary)
            _bar(details, aspect + step * (place + 0.5) - 0.42, summary[model][name], colour=colour, width=0.9 * step)
    best.set(title="(a) Chosen as the best", ylabel="% of votes", ylim=(0, None), xticks=[])
    overall.set(title="(b) Overall score", ylim=(1, SCALES["overall"]), xticks=[])
    details.set(title="(c) Scores of three aspects", ylim=(1, SCALES[aspects[0]]))
    details.set_xticks(np.arange(len(aspects)), [name.capitalize() for name in aspects])
    for axes in (best, overall, details):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e5ea", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(5, len(summary)), frameon=False)
    return figure


def write_report(
    config: Config, study: Study, summary: Summary, reports: Sequence[EvaluatorReport], *, run: JobRun
) -> None:
    """The page for people."""
    leader = max(summary, key=lambda model: summary[model][BEST].value)
    scores = run.scores
    attention = f"{scores['attention']:.0%}" if "attention" in scores else "none planted"
    page = Page(
        title="Human evaluation",
        lead=f"{scores['votes']} votes of {scores['evaluators']} evaluators on {scores['groups']} of "
        f"{len(study.groups)} groups. Every group shows a picture of each model for one caption, unnamed, in an order "
        "of its own for each evaluator.",
        headline={
            f"of votes: {leader} is the best": f"{summary[leader][BEST].value:.1%}",
            "highest overall score, of 10": f"{max(found['overall'].value for found in summary.values()):.2f}",
            "attention checks passed": attention,
        },
        figures=[
            PageFigure(
                path=run.output / FIGURE_NAME,
                title="Chosen best, overall, and three aspects",
                note="Means over votes. Lines are 95 % intervals of a bootstrap that draws evaluators and groups anew.",
            )
        ],
        table_title="All figures",
        rows=list(_wide_rows(summary)),
        tables=[
            PageTable(
                title="Evaluators",
                note="Planted groups have one whole picture among scrambled ones; repeated groups were shown twice. "
                "Neither counts in the figures above.",
                rows=list(evaluator_rows(reports, least=config.least_attention)),
            )
        ],
    )
    write_page(page, run.output / REPORT_NAME)


def _wide_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    for model, figures in summary.items():
        cells = {
            name: f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
            if name == BEST
            else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
            for name, found in figures.items()
        }
        yield {"model": model, "votes": figures[BEST].n, **cells}


def _bar(
    axes: "Axes", x: float, found: Estimate, *, colour: str, factor: float = 1.0, width: float = 0.78, label: str = ""
) -> None:
    """A bar with its interval. label: in the legend of the whole figure."""
    axes.bar(x, factor * found.value, width=width, color=colour, label=label or "_")
    axes.plot([x, x], [factor * found.low, factor * found.high], color="#262a32", linewidth=1.4)


def _digest(votes: Sequence[Vote]) -> str:
    text = json.dumps([asdict(vote) for vote in votes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


JOB = Job(
    name="count_votes",
    version=1,
    products=(REPORT_NAME, FIGURE_NAME, "models.csv", "evaluators.csv", "votes.csv"),
    main=main,
)
