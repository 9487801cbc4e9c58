"""What evaluators made of pictures: how often a model's was the best of its group, and its mean scores (section 4.2).

In: votes, each on one group of pictures for one caption, one picture from each model. Out: what a study like the
paper's reports (its figure 10): for each model the share chosen best, an overall score and the scores of three aspects,
each with its n and a 95 % interval; for each evaluator how they did on the attention checks, which count for nothing
else. The scales are ours to choose: from 1 to 10, and from 1 to 5.

Votes on one group hang together, and so do those of one evaluator. So the intervals come from drawing both anew: a vote
weighs as often as its evaluator was drawn times as often as its group was (Owen, *The pigeonhole bootstrap*, 2007).
Where there is one evaluator, only groups are drawn, and the intervals say nothing of other people.
"""

# R resamples, E evaluators, G groups

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Literal

import numpy as np
import numpy.typing as npt

from cogview.evaluation.attributes import wilson
from cogview.evaluation.intervals import Estimate

SCALES = {"overall": 10, "clarity": 5, "texture": 5, "relevance": 5}  # from 1 to this
BEST = "best"
FIGURES = (BEST, *SCALES)
RESAMPLES = 2000

# measured: counts; repeated: a group that the evaluator has seen before; planted: a group of which all pictures but one
# are scrambled. The last two are the attention checks.
Kind = Literal["measured", "repeated", "planted"]


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One evaluator's judgement of one group.

    best: the model of the picture that was chosen; in a planted group, `right` if it was the one that is whole.
    scores: model -> scale -> score, empty for a planted group. seconds: from seeing the group to voting.
    """

    evaluator: str
    group: str
    kind: Kind
    best: str
    scores: Mapping[str, Mapping[str, int]]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluatorReport:
    """One evaluator's work and attention.

    planted, planted_right: planted groups that were judged, and in how many the whole picture was chosen; repeated,
    repeated_alike: groups judged twice, and in how many the same model was chosen; repeated_difference: mean absolute
    difference of overall scores between the two times, None without any.
    """

    evaluator: str
    votes: int
    seconds: float
    planted: int
    planted_right: int
    repeated: int
    repeated_alike: int
    repeated_difference: float | None

    @property
    def attention(self) -> float:
        """The share of planted groups in which the whole picture was found; 1 where there was none."""
        return self.planted_right / self.planted if self.planted else 1.0


RIGHT = "right"


def summarise(
    votes: Iterable[Vote], *, models: Sequence[str], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, Estimate]]:
    """model -> figure (`best`, as a share, and each of SCALES) -> estimate; empty without a measured vote."""
    measured = [vote for vote in votes if vote.kind == "measured"]
    if not measured:
        return {}
    table = _Table(measured, seed=seed, resamples=resamples)
    return {
        model: {
            BEST: _as_share(table.mean([float(vote.best == model) for vote in measured])),
            **{name: table.mean([float(vote.scores[model][name]) for vote in measured]) for name in SCALES},
        }
        for model in models
    }


def report_evaluators(votes: Iterable[Vote]) -> list[EvaluatorReport]:
    """A report on each evaluator, by name."""
    by_evaluator: dict[str, list[Vote]] = {}
    for vote in votes:
        by_evaluator.setdefault(vote.evaluator, []).append(vote)
    return [_report(name, own) for name, own in sorted(by_evaluator.items())]


def attentive(votes: Sequence[Vote], *, least: float) -> list[Vote]:
    """The votes of evaluators who found the whole picture in at least this share of their planted groups."""
    kept = {report.evaluator for report in report_evaluators(votes) if report.attention >= least}
    return [vote for vote in votes if vote.evaluator in kept]


class _Table:
    """Votes by evaluator and group, with the weights of all resamples; the same for every figure of every model."""

    def __init__(self, votes: Sequence[Vote], *, seed: int, resamples: int) -> None:
        evaluators = sorted({vote.evaluator for vote in votes})
        groups = sorted({vote.group for vote in votes})
        self._rows = np.array([evaluators.index(vote.evaluator) for vote in votes])
        places = {group: place for place, group in enumerate(groups)}
        self._columns = np.array([places[vote.group] for vote in votes])
        self._shape = (len(evaluators), len(groups))
        generator = np.random.default_rng(seed)
        self._weights_RE = _drawn(len(evaluators), resamples=resamples, generator=generator)
        self._weights_RG = _drawn(len(groups), resamples=resamples, generator=generator)
        self._totals_R = self._weighted(np.ones(len(votes)))

    def mean(self, values: Sequence[float]) -> Estimate:
        """The mean of a value of each vote."""
        sums_R = self._weighted(np.array(values))
        met = self._totals_R > 0  # evaluators and groups that were drawn may have no vote in common
        low, high = np.quantile(sums_R[met] / self._totals_R[met], (0.025, 0.975))
        return Estimate(value=float(np.mean(values)), n=len(values), low=float(low), high=float(high))

    def _weighted(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        sums_EG = np.zeros(self._shape)
        np.add.at(sums_EG, (self._rows, self._columns), values)
        weighted: npt.NDArray[np.float64] = ((self._weights_RE @ sums_EG) * self._weights_RG).sum(axis=1)
        return weighted


def _as_share(found: Estimate) -> Estimate:
    """A share's interval is never narrower than Wilson's: who was chosen 0 of 48 times may be chosen yet."""
    known = wilson(right=found.value * found.n, n=found.n)
    return replace(found, low=min(found.low, known.low), high=max(found.high, known.high))


def _drawn(number: int, *, resamples: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """How often each of `number` is drawn in each resample, [R, number]. One alone is there always."""
    return generator.multinomial(number, np.full(number, 1 / number), size=resamples).astype(np.float64)


def _report(name: str, votes: Sequence[Vote]) -> EvaluatorReport:
    first = {vote.group: vote for vote in votes if vote.kind == "measured"}
    planted = [vote for vote in votes if vote.kind == "planted"]
    pairs = [(first[vote.group], vote) for vote in votes if vote.kind == "repeated" and vote.group in first]
    differences = [
        abs(before.scores[model]["overall"] - after.scores[model]["overall"])
        for before, after in pairs
        for model in before.scores
    ]
    return EvaluatorReport(
        evaluator=name,
        votes=len(votes),
        seconds=median(vote.seconds for vote in votes),
        planted=len(planted),
        planted_right=sum(vote.best == RIGHT for vote in planted),
        repeated=len(pairs),
        repeated_alike=sum(before.best == after.best for before, after in pairs),
        repeated_difference=mean(differences) if differences else None,
    )
