"""Give pairs a caption in the language that they lack, by a translation model on disk.

Command: python -m pipelines translate_pairs paper --pairs RUN/filter_pairs/... --model /folder
Reads:   an output folder of filter_pairs; a CTranslate2 model and its source.spm, target.spm of SentencePiece
Writes:  shard-00000.tar + .parquet + _stats.json (the input's numbers), manifest.json: as filter_pairs does
Time:    that of the model, which --plan tries on the first pairs
Before:  pip install 'cogview[translate]'

The paper's captions were English by half, and translated to Chinese by machine (appendix A). A pair that has a caption
in the target's script is left as it is; of the others each caption is translated, and says so in the pair's JSON.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.filters.scripts import SCRIPTS, letters_by_script
from cogview.filters.translation import TranslationSettings, Translator
from cogview.records.pair import Failure, TextImagePair
from cogview.shards.manifest import ShardEntry
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.shard_jobs import ShardTask, close_folder, run_shards, tasks_of
from pipelines.tasks.rewritten_pairs import rewrite_shard, rewriting_plan

PRODUCERS = {"pairs": "filter_pairs", "model": "CTranslate2's converters"}
PAIRS_AT_ONCE = 256
MACHINE_TRANSLATED = "machine_translated"  # in a pair's JSON: how many of its captions are


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs: output of filter_pairs; model: the translation model's folder; source_script, target_script: a pair with
    no caption mostly in the target's gets translations of those in the source's; keep: which captions such a pair has
    then; translation: how; workers: shards at a time, 0 for one on each CPU; device: cpu or cuda.
    """

    pairs: Path | None = input_field(default=None)
    model: Path | None = input_field(default=None)
    source_script: str = "latin"
    target_script: str = "han"
    keep: Literal["both", "translation"] = "both"
    translation: TranslationSettings = field(default_factory=TranslationSettings)
    workers: int = runtime_field(0)
    device: str = runtime_field("cpu")

    def __post_init__(self) -> None:
        for name in ("source_script", "target_script"):
            if getattr(self, name) not in SCRIPTS:
                raise ConfigError(f"{name}={getattr(self, name)!r} is no script; choose of {', '.join(SCRIPTS)}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; give cpu or cuda")


PAPER = Config(keep="translation")
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, keep="both", translation=TranslationSettings(beam_size=1)),
}


def main(config: Config, run: JobRun) -> None:
    """Translate shard by shard, and count what was translated."""
    folders = given_folders(config, PRODUCERS)
    load_translator(folders["model"], config.translation, config.device)  # what is wrong with it is better known now
    work = partial(translate_shard, config=config, output=run.output, pairs=folders["pairs"], model=folders["model"])
    num_gpus = 1.0 if config.device == "cuda" else 0.0
    tasks = tasks_of(folders["pairs"])
    entries = run_shards(
        work, tasks, folder=run.output, run=run, workers=config.workers, num_gpus=num_gpus, note="translated"
    )
    counts = {name: sum(entry.extra[name] for entry in entries) for name in ("translated", "untranslated")}
    run.scores.update(counts)
    close_folder(run, entries, extra={"stage": "translate_pairs", **counts})


def plan(config: Config, *, root: Path) -> Iterator[str]:
    """What `--plan` tells: the shards, and an estimate from translating the first pairs."""
    folders = given_folders(config, PRODUCERS)
    translator = load_translator(folders["model"], config.translation, config.device)
    return rewriting_plan(
        JOB,
        config,
        root=root,
        pairs=folders["pairs"],
        rewrite=partial(translate_pairs, translator=translator, config=config),
        step="translated",
        workers=config.workers,
    )


def translate_shard(task: ShardTask, *, pairs: Path, model: Path, output: Path, config: Config) -> ShardEntry:
    """On a worker: translate what a shard's pairs lack, some hundred pairs at a time."""
    translator = load_translator(model, config.translation, config.device)
    counts = {"translated": 0, "untranslated": 0}

    def translated(batch: Sequence[TextImagePair]) -> list[TextImagePair | Failure]:
        outcomes = translate_pairs(batch, translator, config=config)
        for pair, outcome in zip(batch, outcomes, strict=True):
            is_translated = isinstance(outcome, TextImagePair) and MACHINE_TRANSLATED in outcome.extra
            counts["translated"] += is_translated
            counts["untranslated"] += not is_translated and lacks_translation(pair, config)
        return outcomes

    entry = rewrite_shard(task, pairs=pairs, output=output, batch_size=PAIRS_AT_ONCE, rewrite=translated)
    return replace(entry, extra=counts)


def translate_pairs(
    pairs: Sequence[TextImagePair], translator: Translator, *, config: Config
) -> list[TextImagePair | Failure]:
    """Each pair with its translations. One that gets none stays, or goes where `keep` wants translations only."""
    lacking = [lacks_translation(pair, config) for pair in pairs]
    wanted = [
        [caption for caption in pair.captions if mostly_in(caption, config.source_script)] if is_lacking else []
        for pair, is_lacking in zip(pairs, lacking, strict=True)
    ]
    found = iter(translator.translate([caption for captions in wanted for caption in captions]))
    outcomes: list[TextImagePair | Failure] = []
    for pair, captions, is_lacking in zip(pairs, wanted, lacking, strict=True):
        translations = tuple(dict.fromkeys(text for text in islice(found, len(captions)) if text))
        if translations:
            kept = (*translations, *pair.captions) if config.keep == "both" else translations
            extra = {**pair.extra, MACHINE_TRANSLATED: len(translations)}
            outcomes.append(replace(pair, captions=kept, extra=extra))
        elif is_lacking and config.keep == "translation":
            outcomes.append(Failure(key=pair.key, source=pair.source, reason="caption_untranslated"))
        else:
            outcomes.append(pair)
    return outcomes


def lacks_translation(pair: TextImagePair, config: Config) -> bool:
    """Whether no caption is mostly in the target's script."""
    return not any(mostly_in(caption, config.target_script) for caption in pair.captions)


def mostly_in(caption: str, script: str) -> bool:
    """Whether no other script has more of the caption's letters; a Chinese character counts as three."""
    letters = letters_by_script(caption)
    letters["han"] *= 3
    return letters[script] > 0 and letters[script] == max(letters.values())


@functools.lru_cache(maxsize=1)
def load_translator(model: Path, settings: TranslationSettings, device: str) -> Translator:
    """The model, once per process. One thread: there are as many workers as CPUs."""
    return Translator(model, settings, device=device)


JOB = Job(name="translate_pairs", version=1, products=("manifest.json",), main=main)
