"""Train a SentencePiece tokenizer on the captions, or take one that there is.

Command: python -m pipelines train_text_tokenizer smoke --pairs runs/smoke/filter_pairs/<digest>
Reads:   the captions of filter_pairs (or of scrape_pairs, import_pairs)
Writes:  text.model (SentencePiece), text.json (settings, number of pieces, fingerprint)
Time:    2 s for the smoke preset; about 1 s for each 10,000 captions
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cogview.config import input_field
from cogview.errors import ConfigError
from cogview.shards.manifest import read_manifest, shard_name
from cogview.tokenizers.text import (
    MODEL_NAME,
    SETTINGS_NAME,
    TextTokenizer,
    TextTokenizerConfig,
    train_text_tokenizer,
)
from pipelines.runtime.jobs import Job, JobRun

SCORED_CAPTIONS = 20_000
SHOWN_CAPTIONS = 40


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs: folder of pairs; model: a SentencePiece .model to take instead of training one.

    seed: which shards of a corpus with more than `tokenizer.max_texts` pairs are read.
    """

    pairs: Path | None = input_field(default=None)
    model: Path | None = input_field(default=None)
    tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    seed: int = 0


PAPER = Config()
SMOKE = replace(PAPER, tokenizer=TextTokenizerConfig(num_pieces=512, exact=False, split_chinese=True))
# icetk's size and kind; its range of rare pieces follows the corpus here.
BILINGUAL = replace(PAPER, tokenizer=TextTokenizerConfig(num_pieces=130_000, is_bilingual=True, model_type="unigram"))
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": SMOKE,
    "bilingual": BILINGUAL,
    "bilingual_smoke": replace(SMOKE, tokenizer=replace(SMOKE.tokenizer, is_bilingual=True)),
}


def main(config: Config, run: JobRun) -> None:
    """Read captions, train or take a tokenizer, and show what it makes of them."""
    if config.pairs is None:
        raise ConfigError("pairs is not given; name the output folder of filter_pairs with --pairs")
    captions = list(read_captions(config.pairs, config=config, run=run))
    if not captions:
        raise ConfigError(f"pairs: {config.pairs} has no caption; give the output of filter_pairs")
    tokenizer = take_or_train(config, captions=captions, run=run)
    # Evenly over the corpus: neighbours in a shard are alike.
    scored = captions[:: max(1, len(captions) // SCORED_CAPTIONS)]
    run.scores.update(score_tokenizer(tokenizer, captions=scored))
    run.say(
        f"{tokenizer.num_pieces:,} pieces; " + ", ".join(f"{k} {v:.4g}" for k, v in run.scores.items() if k != "pieces")
    )
    shown = scored[:: max(1, len(scored) // SHOWN_CAPTIONS)][:SHOWN_CAPTIONS]
    run.tracker.log_table([segmentation(tokenizer, text) for text in shown], "segmentations.json")


def read_captions(pairs: Path, *, config: Config, run: JobRun) -> Iterator[str]:
    """All captions of the corpus, or those of whole shards drawn by the seed until there are enough pairs."""
    shards = draw_shards(read_manifest(pairs)["shards"], num_pairs=config.tokenizer.max_texts, seed=config.seed)
    for done, shard in enumerate(shards):
        run.progress(done, len(shards), "shards read")
        table = pq.read_table(pairs / shard_name(shard["shard"], "parquet"), filters=[("status", "=", "ok")])
        for captions in table["captions"].to_pylist():
            yield from captions
    run.progress(len(shards), len(shards), "shards read")


def draw_shards(shards: Sequence[Mapping[str, Any]], *, num_pairs: int, seed: int) -> list[Mapping[str, Any]]:
    """Shards at random until they hold num_pairs pairs, in their own order. A shard is the least that is read."""
    drawn: list[Mapping[str, Any]] = []
    total = 0
    for shard in random.Random(seed).sample(list(shards), len(shards)):
        if total >= num_pairs:
            break
        drawn.append(shard)
        total += shard["rows_out"]
    return sorted(drawn, key=lambda shard: shard["shard"])


def take_or_train(config: Config, *, captions: Sequence[str], run: JobRun) -> TextTokenizer:
    """The tokenizer, which now lies in the output folder."""
    if config.model is not None:
        tokenizer = TextTokenizer.load(config.model)
        tokenizer.save(run.output, settings={"origin": config.model.name})
        return tokenizer
    tokenizer = train_text_tokenizer(captions, config=config.tokenizer, output=run.output)
    if tokenizer.num_pieces != config.tokenizer.num_pieces:
        run.say(
            f"{config.tokenizer.num_pieces:,} pieces were asked for; {len(captions):,} captions give "
            f"{tokenizer.num_pieces:,} (the size follows the corpus unless tokenizer.exact is set)"
        )
    return tokenizer


def score_tokenizer(tokenizer: TextTokenizer, *, captions: Sequence[str]) -> dict[str, float]:
    """Number of pieces, pieces per caption by language, and the share of pieces that are `<unk>`."""
    ids = tokenizer.encode_batch(captions)
    scores: dict[str, float] = {"pieces": tokenizer.num_pieces}
    for language in ("en", "zh"):
        lengths = [len(row) for row, text in zip(ids, captions, strict=True) if language_of(text) == language]
        if lengths:
            scores[f"mean_pieces_{language}"] = sum(lengths) / len(lengths)
    scores["longest_caption"] = max(map(len, ids))
    unknown = sum(row.count(tokenizer.unknown_id) for row in ids)
    scores["unknown_share"] = unknown / max(1, sum(map(len, ids)))
    return scores


def language_of(text: str) -> str:
    """`zh` if the text has a Chinese character, else `en`: enough to count by."""
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in text) else "en"


def segmentation(tokenizer: TextTokenizer, text: str) -> dict[str, Any]:
    """A caption and how it is cut, as a row for people."""
    pieces = tokenizer.pieces(text)
    return {"caption": text, "pieces": " | ".join(pieces), "count": len(pieces)}


JOB = Job(name="train_text_tokenizer", version=1, products=(MODEL_NAME, SETTINGS_NAME), main=main)
