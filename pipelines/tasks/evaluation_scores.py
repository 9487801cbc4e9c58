"""Scores of one side of a machine evaluation against the real pictures, each with all that it depends on.

In: the features, classes and tables that the shards left. Out: rows of plain values: the score, its interval, how many
pictures are behind it, and the extractor, resizing, formats, blur, contrast and captions without which it says nothing.
Every score has a file of its own, so an interrupted run goes on with the next one.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogview.config import require_positive
from cogview.errors import ConfigError
from cogview.evaluation import inception_score as inception
from cogview.evaluation import kernel_distance as kernel
from cogview.evaluation.feature_rows import FeatureRows
from cogview.evaluation.features import ExtractorFacts
from cogview.evaluation.frechet import frechet_estimate
from cogview.evaluation.intervals import Estimate, mean_estimate
from cogview.evaluation.precision_recall import NEIGHBOURS, precision_and_recall
from cogview.shards.manifest import ShardEntry, read_json, write_json
from pipelines.runtime.jobs import JobRun
from pipelines.tasks.picture_measures import PREPARED, ROWS_SCHEMA, Side

SCORES_FOLDER = "scores"
RELIABLE_PER_CLASS = 10  # pictures to a class, below which an Inception Score is bound by their number


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How scores are taken. seed: of resamples, splits and subsets; distance_resamples: of each Frechet distance, which
    take a decomposition of dim x dim each; splits: of the Inception Score; subsets, subset_size: of the kernel
    distance; neighbours: of precision and recall. All but the resamples are as published.
    """

    seed: int = 0
    distance_resamples: int = 20
    splits: int = inception.SPLITS
    subsets: int = kernel.SUBSETS
    subset_size: int = kernel.SUBSET_SIZE
    neighbours: int = NEIGHBOURS

    def __post_init__(self) -> None:
        require_positive(self, "splits", "subsets", "neighbours", prefix="scores.")
        for name in ("distance_resamples", "subset_size"):
            if getattr(self, name) < 2:
                raise ConfigError(f"scores.{name}={getattr(self, name)}: choose 2 or more")


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """What the shards of one side left. counts: of reasons why a row has no picture."""

    side: Side
    folders: Sequence[Path]
    table: pa.Table
    counts: Mapping[str, int] = field(default_factory=dict)

    def features(self, radius: int) -> FeatureRows:
        """Of the pictures at one blur radius."""
        return FeatureRows([folder / f"blur-{radius}.npy" for folder in self.folders])

    def classes(self) -> FeatureRows:
        """The classifier's scores."""
        return FeatureRows([folder / "classes.npy" for folder in self.folders])

    def values(self, column: str) -> list[float]:
        """The values of a column that are there."""
        return [value for value in self.table[column].to_pylist() if value is not None]

    @property
    def formats(self) -> str:
        """Of the files that were read: `JPEG 198, PNG 2`."""
        found = Counter(name for name in self.table["format"].to_pylist() if name)
        return ", ".join(f"{name} {count}" for name, count in found.most_common())


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What all scores of a run share. clip, clip_sha256: the name of the CLIP model and its weights."""

    config: ScoreConfig
    facts: ExtractorFacts
    radii: tuple[int, ...]
    image_size: int
    captions_digest: str
    reference: SideFiles
    device: str
    clip: str = ""
    clip_sha256: str = ""


def side_files(side: Side, entries: Sequence[ShardEntry], *, output: Path) -> SideFiles:
    """The files of a side, from the entries of its shards."""
    names = [name for entry in entries for name in entry.files if name.endswith("/rows.parquet")]
    tables = [pq.read_table(output / name, schema=ROWS_SCHEMA) for name in names]
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry.rejected)
    return SideFiles(
        side=side,
        folders=[(output / name).parent for name in names],
        table=pa.concat_tables(tables),
        counts=dict(counts),
    )


def score_side(files: SideFiles, scoring: Scoring, *, run: JobRun) -> list[dict[str, Any]]:
    """All scores of a side. Those that its pictures, or what was given, do not allow are left out."""
    rows = []
    for name, radius, compute in _planned(files, scoring):
        path = run.output / SCORES_FOLDER / files.side.name / f"{_file_name(name)}.json"
        if not path.is_file():
            run.say(f"{files.side.name}: {name}")
            write_json(path, [_row(*found, files=files, scoring=scoring, radius=radius) for found in compute()])
        rows += read_json(path)
    return rows


def metric_key(name: str) -> str:
    """A score's name as MLflow takes it: `FD[seeded-conv-1]-4` is `FD:seeded-conv-1-4`."""
    return name.replace("[", ":").replace("]", "")


Computed = list[tuple[str, Estimate, list[str]]]


def _planned(files: SideFiles, scoring: Scoring) -> Iterator[tuple[str, int, Callable[[], Computed]]]:
    """(name, blur radius, how to compute it) of every score that can be taken."""
    facts, config = scoring.facts, scoring.config
    smallest = min(len(files.features(0)), len(scoring.reference.features(0)))
    if files is not scoring.reference and smallest > 1:
        for radius in scoring.radii:
            name = f"{facts.score_name('FID', other='FD')}-{radius}"
            yield name, radius, _distance(name, radius, files, scoring)
        if smallest >= kernel.LEAST:
            name = facts.score_name("KID", other="KD")
            yield name, 0, _kernel_distance(name, files, scoring)
        if smallest > config.neighbours:
            yield "precision and recall", 0, _precision_and_recall(files, scoring)
    if facts.num_classes and len(files.classes()) >= config.splits:
        name = facts.score_name("IS", other="IS")
        yield name, 0, _inception_score(name, files, scoring)
    if files.values("cap_loss"):
        yield "CapLoss", 0, _mean("CapLoss", files.values("cap_loss"), config)
    if files.values("clip_score"):
        name = f"CLIP[{scoring.clip}]"
        yield name, 0, _mean(name, files.values("clip_score"), config)


def _distance(name: str, radius: int, files: SideFiles, scoring: Scoring) -> Callable[[], Computed]:
    def compute() -> Computed:
        rows, reference = files.features(radius), scoring.reference.features(radius)
        estimate = frechet_estimate(
            rows,
            reference,
            seed=scoring.config.seed,
            resamples=scoring.config.distance_resamples,
            device=scoring.device,
        )
        warnings = []
        if estimate.n < rows.dim + 1:
            warnings.append(
                f"{estimate.n} pictures for {rows.dim} features: the covariances have not their full rank, and the "
                f"distance is too large; take {rows.dim + 1} or more"
            )
        return [(name, estimate, warnings)]

    return compute


def _kernel_distance(name: str, files: SideFiles, scoring: Scoring) -> Callable[[], Computed]:
    def compute() -> Computed:
        config = scoring.config
        estimate = kernel.kernel_distance(
            files.features(0),
            scoring.reference.features(0),
            seed=config.seed,
            subsets=config.subsets,
            subset_size=config.subset_size,
        )
        few = estimate.n < config.subset_size
        warnings = [f"subsets of {estimate.n} pictures instead of {config.subset_size}"] if few else []
        return [(name, estimate, warnings)]

    return compute


def _precision_and_recall(files: SideFiles, scoring: Scoring) -> Callable[[], Computed]:
    def compute() -> Computed:
        config, facts = scoring.config, scoring.facts
        found = precision_and_recall(
            files.features(0),
            scoring.reference.features(0),
            seed=config.seed,
            neighbours=config.neighbours,
            device=scoring.device,
        )
        names = [facts.score_name(name, other=name) for name in ("precision", "recall")]
        return [(name, estimate, []) for name, estimate in zip(names, found, strict=True)]

    return compute


def _inception_score(name: str, files: SideFiles, scoring: Scoring) -> Callable[[], Computed]:
    def compute() -> Computed:
        config, classes = scoring.config, files.classes()
        estimate = inception.inception_score(classes, seed=config.seed, splits=config.splits)
        wanted = RELIABLE_PER_CLASS * classes.dim
        few = len(classes) < wanted
        warnings = [f"{len(classes)} pictures for {classes.dim} classes: too low; take {wanted} or more"] if few else []
        return [(name, estimate, warnings)]

    return compute


def _mean(name: str, values: Sequence[float], config: ScoreConfig) -> Callable[[], Computed]:
    return lambda: [(name, mean_estimate(values, seed=config.seed), [])]


def _row(
    name: str, estimate: Estimate, warnings: Sequence[str], *, files: SideFiles, scoring: Scoring, radius: int
) -> dict[str, Any]:
    """A score with its provenance."""
    is_compared = name.startswith(("F", "K", "precision", "recall"))
    is_by_features = is_compared or name.startswith("IS")
    extractor, sha256 = (scoring.facts.name, scoring.facts.sha256) if is_by_features else ("", "")
    if name.startswith("CLIP"):
        extractor, sha256 = scoring.clip, scoring.clip_sha256
    return {
        "side": files.side.name,
        "score": name,
        **asdict(estimate),
        "n_reference": len(scoring.reference.features(0)) if is_compared else 0,
        "extractor": extractor,
        "extractor_sha256": sha256,
        "resize": scoring.facts.resize if is_by_features else "",
        "prepared": f"{PREPARED}, {scoring.image_size} px",
        "formats": files.formats,
        "reference_formats": scoring.reference.formats if is_compared else "",
        "blur_radius": radius,
        "contrast": 1.0 if name == "CapLoss" else files.side.contrast,
        "captions_digest": scoring.captions_digest,
        "warnings": list(warnings),
    }


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
