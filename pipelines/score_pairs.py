"""Let a classifier of your own look at every picture; its scores travel with the pairs, and filter_pairs limits them.

Command: python -m pipelines score_pairs smoke --pairs RUN/scrape_pairs/... --scorer my_scorer.py
Then:    python -m pipelines filter_pairs smoke --pairs RUN/score_pairs/... --rules.limits "punsafe<=0.5"
Reads:   an output folder of scrape_pairs, import_pairs or filter_pairs; a Python file with a function `score`
Writes:  shard-00000.tar + .parquet + _stats.json (the input's numbers), manifest.json: the same pairs with scores
Time:    that of the classifier, which --plan tries on the first pairs

`score` takes a list of RGB pictures (PIL) and returns for each a dict of numbers, such as {"punsafe": 0.02,
"pwatermark": 0.9}. It is called in each worker with up to `batch_size` pictures; a model that it loads once it should
keep, for example by functools.lru_cache. The file is code of yours and runs with your rights.
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.records.images import decode_image
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.shards.manifest import ShardEntry
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, tasks_of
from pipelines.tasks.rewritten_pairs import rewrite_shard, rewriting_plan

PRODUCERS = {"pairs": "scrape_pairs, import_pairs or filter_pairs"}
FUNCTION = "score"
Scores = Mapping[str, float]
Scorer = Callable[[list[Image.Image]], Sequence[Scores]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs: tars of pairs; scorer: a Python file with a function `score`; batch_size: pictures that it gets at once;
    workers: shards at a time, 0 for one on each CPU; gpus: of each worker, such as 1 or 0.25.
    """

    pairs: Path | None = input_field(default=None)
    scorer: Path | None = input_field(default=None)
    batch_size: int = 64
    workers: int = runtime_field(0)
    gpus: float = runtime_field(0.0)

    def __post_init__(self) -> None:
        require_positive(self, "batch_size")
        if self.workers < 0 or self.gpus < 0:
            raise ConfigError(f"workers={self.workers}, gpus={self.gpus}: give 0 or more")


PAPER = Config(gpus=1.0)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": replace(PAPER, gpus=0.0)}


def main(config: Config, run: JobRun) -> None:
    """Score shard by shard."""
    pairs, scorer = given_folders(config, PRODUCERS)["pairs"], given_scorer(config)
    load_scorer(scorer)  # what is wrong with it is better known now
    work = partial(score_shard, pairs=pairs, scorer=scorer, output=run.output, batch_size=config.batch_size)
    tasks = tasks_of(pairs)
    entries = run_shards(
        work, tasks, folder=run.output, run=run, workers=config.workers, num_gpus=config.gpus, note="scored"
    )
    run.scores.update(scored=sum(entry.rows_out for entry in entries))
    close_folder(run, entries, extra={"stage": "score_pairs"})


def plan(config: Config, *, root: Path) -> Iterator[str]:
    """What `--plan` tells: the shards, and an estimate from scoring the first pairs."""
    pairs, scorer = given_folders(config, PRODUCERS)["pairs"], given_scorer(config)
    return rewriting_plan(
        JOB,
        config,
        root=root,
        pairs=pairs,
        rewrite=partial(scored, score=load_scorer(scorer), scorer=scorer),
        step="scored",
        workers=config.workers,
    )


def given_scorer(config: Config) -> Path:
    """The scorer's file. ConfigError if none is given."""
    if config.scorer is None:
        raise ConfigError(f"scorer is not given; name a Python file with a function {FUNCTION} with --scorer")
    return config.scorer


def score_shard(task: ShardTask, *, pairs: Path, scorer: Path, output: Path, batch_size: int) -> ShardEntry:
    """On a worker: the pairs of a shard with their scores."""
    rewrite = partial(scored, score=load_scorer(scorer), scorer=scorer)
    return rewrite_shard(task, pairs=pairs, output=output, batch_size=batch_size, rewrite=rewrite)


def scored(pairs: Sequence[TextImagePair], score: Scorer, *, scorer: Path) -> list[TextImagePair | Failure]:
    """Each pair with what `score` says of its picture. ConfigError if it does not say it of all, or not in numbers."""
    pictures = [decode_image(pair.image_bytes) for pair in pairs]
    shown = [picture for picture in pictures if not isinstance(picture, Unusable)]
    said = list(score(shown)) if shown else []
    if len(said) != len(shown):
        raise ConfigError(
            f"scorer={scorer}: {FUNCTION} gave {len(said)} results for {len(shown)} pictures; give one for each"
        )
    verdicts, outcomes = iter(said), list[TextImagePair | Failure]()
    for pair, picture in zip(pairs, pictures, strict=True):
        if isinstance(picture, Unusable):
            outcomes.append(Failure(key=pair.key, source=pair.source, reason=picture.reason))
        else:
            outcomes.append(replace(pair, extra={**pair.extra, **_numbers(next(verdicts), scorer=scorer)}))
    return outcomes


def _numbers(verdict: Scores, *, scorer: Path) -> dict[str, float]:
    """The scores as plain floats."""
    try:
        found = {str(name): float(value) for name, value in verdict.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"scorer={scorer}: {FUNCTION} gave {verdict!r}; give a dict of numbers ({error})") from error
    if not all(math.isfinite(value) for value in found.values()):
        raise ConfigError(f"scorer={scorer}: {FUNCTION} gave {verdict!r}; give numbers that are finite")
    return found


@functools.lru_cache(maxsize=1)
def load_scorer(path: Path) -> Scorer:
    """The function of a Python file, once per process. ConfigError if there is none."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise ConfigError(f"scorer={path}: give a Python file with a function {FUNCTION}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise ConfigError(f"scorer={path}: the file has no function {FUNCTION}; write one")
    found: Scorer = function
    return found


JOB = Job(name="score_pairs", version=1, products=("manifest.json",), main=main)
