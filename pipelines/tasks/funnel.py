"""The funnel of a corpus as a page: how many pairs came in, what each rule took and what that looked like.

In: the counts and samples that the shards left (`cogview.filters.funnel`). Out: `report.html`, one file that needs no
network, and the same numbers as a table in MLflow. The same shards give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cogview.config import flatten
from cogview.filters.funnel import ASPECT_BINS, LENGTH_BINS, SIDE_BINS, Funnel, bin_names, lowest_samples, read_funnel
from cogview.filters.pairs import FilterRules
from cogview.shards.manifest import read_json, shard_name
from pipelines.runtime.html import image_url, write_html
from pipelines.runtime.jobs import JobRun

FUNNEL_FOLDER = "funnel"
REPORT_NAME = "report.html"
TEMPLATE = "funnel.html"
TOP_NAMES = 16  # hosts, languages, licences that are shown
HISTOGRAMS = {
    "caption characters": ("Caption length", "characters", LENGTH_BINS),
    "shorter side": ("Image size", "shorter side, pixels", SIDE_BINS),
    "long : short side": ("Shape", "long side over short side", ASPECT_BINS),
}
RANKINGS = {
    "language": ("Languages", "captions, by their script"),
    "host": ("Hosts", "pairs, by where they came from"),
    "licence": ("Licences", "pairs, by the licence that came with them"),
}
# Reason -> what it says to people; `{name}` is the rule's setting. Reasons of unreadable images go without.
MEANINGS = {
    "image_too_small": "shorter side below {min_side} pixels",
    "image_too_long": "longer side more than {max_aspect:g} times the shorter one",
    "image_blank": "hardly any contrast: no channel deviates by {min_contrast:g} of 255",
    "image_duplicate": "the same bytes as an earlier pair's image; that one stays",
    "image_near_duplicate": "looks like an earlier pair's image, within {near_levels} of 255 all over; that one stays",
    "image_placeholder": "more than {max_image_copies} copies of one image, all of which go",
    "score_beyond_limit": "a score that came with the pair breaks a limit",
    "caption_missing": "no caption at all",
    "caption_too_short": "shorter than {min_caption} characters",
    "caption_too_long": "longer than {max_caption} characters",
    "caption_without_words": "not a letter or digit in it",
    "caption_misencoded": "decoded wrongly on its way",
    "caption_is_file_name": "a file name, a camera's or server's number, or an address",
    "caption_boilerplate": "page furniture that any picture could have",
    "caption_other_script": "less than {min_script_share:.0%} of its letters in the scripts that are wanted",
    "caption_listed_word": "a word of the word list",
    "caption_personal_data": "an e-mail address, a phone or identity number",
    "caption_too_frequent": "the same wording on more than {max_caption_repeats} pairs",
    "caption_template": "nearly the same wording on more than {max_near_caption_repeats} pairs",
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a histogram or ranking; heights and widths in percent of the largest."""

    name: str
    given: int
    kept: int
    given_share: float
    kept_share: float


def read_funnels(output: Path, shards: Sequence[int]) -> tuple[Funnel, list[dict[str, Any]]]:
    """The counts of all shards, and their samples; one shard's file at a time."""
    funnel, samples = Funnel(), list[dict[str, Any]]()
    for shard in shards:
        funnel.merge(read_funnel(read_json(output / FUNNEL_FOLDER / shard_name(shard, "json"))))
        rows = pq.read_table(output / FUNNEL_FOLDER / shard_name(shard, "parquet")).to_pylist()
        samples = lowest_samples([*samples, *rows])
    return funnel, samples


def write_funnel_report(
    funnel: Funnel, samples: Sequence[Mapping[str, Any]], *, run: JobRun, rules: FilterRules
) -> None:
    """Write `report.html` to the run's output, and log it and its numbers."""
    reasons = reason_rows(funnel, rules)
    tiles = [_tile(sample) for sample in samples]
    values = {
        "funnel": funnel,
        "reasons": reasons,
        "tiles": {row["reason"]: [tile for tile in tiles if tile["reason"] == row["reason"]] for row in reasons},
        "kept_tiles": [tile for tile in tiles if not tile["reason"]],
        "dropped": [(reason, count, _meaning(reason, rules)) for reason, count in funnel.dropped.most_common()],
        "histograms": [
            {"title": title, "unit": unit, "bars": histogram(funnel, table, bins)}
            for table, (title, unit, bins) in HISTOGRAMS.items()
        ],
        "rankings": [
            {"title": title, "unit": unit, "bars": ranking(funnel, table)} for table, (title, unit) in RANKINGS.items()
        ],
        "settings": flatten(rules),
    }
    write_html(run.output / REPORT_NAME, template=TEMPLATE, values=values)
    run.tracker.log_artifact(run.output / REPORT_NAME)
    run.tracker.log_table([{**row, "share": row["count"] / max(1, funnel.rows)} for row in reasons], "funnel.json")
    bars = {table: ranking(funnel, table) for table in RANKINGS}
    bars |= {table: histogram(funnel, table, bins) for table, (_, _, bins) in HISTOGRAMS.items()}
    table_rows = [
        {"of": table, "name": bar.name, "in": bar.given, "kept": bar.kept} for table, own in bars.items() for bar in own
    ]
    run.tracker.log_table(table_rows, "distributions.json")


def reason_rows(funnel: Funnel, rules: FilterRules) -> list[dict[str, Any]]:
    """Rule, reason, count and meaning, the heaviest first."""
    found = sorted(funnel.rejected.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"rule": rule, "reason": reason, "count": count, "meaning": _meaning(reason, rules)}
        for (rule, reason), count in found
    ]


def histogram(funnel: Funnel, table: str, bins: Sequence[float]) -> list[Bar]:
    """The bins from the first to the last that has anything."""
    names = bin_names(bins)
    filled = [index for index, name in enumerate(names) if funnel.given[table][name] or funnel.kept[table][name]]
    return _bars(funnel, table, names[filled[0] : filled[-1] + 1] if filled else [])


def ranking(funnel: Funnel, table: str) -> list[Bar]:
    """The most frequent names; the rest as `others`."""
    given, kept = funnel.given[table], funnel.kept[table]
    named = [name for name in given | kept if name != "others"]
    top = sorted(named, key=lambda name: (-given[name], -kept[name], name))[:TOP_NAMES]
    bars = _bars(funnel, table, top)
    rest = [counts.total() - sum(counts[name] for name in top) for counts in (given, kept)]
    if any(rest):
        largest = max([*(bar.given for bar in bars), *rest, 1])
        share = [min(100.0, 100 * count / largest) for count in rest]
        bars.append(Bar(name="others", given=rest[0], kept=rest[1], given_share=share[0], kept_share=share[1]))
    return bars


def _bars(funnel: Funnel, table: str, names: Sequence[str]) -> list[Bar]:
    given, kept = funnel.given[table], funnel.kept[table]
    largest = max((max(given[name], kept[name]) for name in names), default=1) or 1
    return [
        Bar(
            name=name,
            given=given[name],
            kept=kept[name],
            given_share=100 * given[name] / largest,
            kept_share=100 * kept[name] / largest,
        )
        for name in names
    ]


def _tile(sample: Mapping[str, Any]) -> dict[str, Any]:
    thumbnail = sample["thumbnail"]
    return {**sample, "data": image_url(thumbnail) if thumbnail else ""}


def _meaning(reason: str, rules: FilterRules) -> str:
    return MEANINGS.get(reason, "").format(**vars(rules))
