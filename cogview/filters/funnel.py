"""What a shard's pairs were and what became of them, as counts and a few samples: small, whatever the shard's size.

Counts of shards add up. Samples are those whose keys have the lowest hashes, so the samples of a corpus are among those
of its shards, and the same whoever draws them.
"""

import bisect
import functools
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from cogview.filters.scripts import language_group
from cogview.filters.verdicts import Rejected
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair, Unusable

LENGTH_BINS = (0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)  # characters
SIDE_BINS = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # pixels of the shorter side
ASPECT_BINS = (1.0, 1.1, 1.25, 1.4, 1.6, 2.0, 3.0)
TABLES = ("caption characters", "shorter side", "long : short side", "language", "host", "licence")
MAX_NAMES = 500  # of hosts or licences that a shard tells; a corpus has more, but few of them matter
SAMPLES = 6  # of each reason
KEPT_SAMPLES = 24
THUMBNAIL = 112  # pixels
_LICENCE_FIELDS = ("license", "licence", "license_url", "LICENSE")
SAMPLE_SCHEMA = pa.schema(
    [
        ("reason", pa.string()),  # empty for a kept pair
        ("rule", pa.string()),
        ("rank", pa.uint64()),
        ("key", pa.string()),
        ("detail", pa.string()),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("thumbnail", pa.binary()),  # JPEG or PNG; null if there is no picture to see
    ]
)


@dataclass(kw_only=True)
class Funnel:
    """rejected: (rule, reason) -> pairs; dropped: reason -> captions; given, kept: table -> name -> count."""

    rows: int = 0
    redacted: int = 0
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    given: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in TABLES})
    kept: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in TABLES})

    def add(self, pair: TextImagePair, captions: Sequence[str], verdict: Rejected | None) -> None:
        """Count a pair as it came, with the captions that are left of it, or with why it went."""
        self.rows += 1
        if verdict is not None:
            self.rejected[verdict.rule, verdict.reason] += 1
        facts = {text: (_bin(len(text), LENGTH_BINS), language_group(text)) for text in {*pair.captions, *captions}}
        short, long = sorted((int(pair.extra.get("width") or 0), int(pair.extra.get("height") or 0)))
        names = {"host": host_of(pair.source), "licence": _licence(pair.extra), "shorter side": _bin(short, SIDE_BINS)}
        if short:
            names["long : short side"] = _bin(long / short, ASPECT_BINS)
        for tables, texts in ((self.given, pair.captions), (self.kept, captions)):
            if tables is self.kept and verdict is not None:
                return
            for text in texts:
                length, language = facts[text]
                tables["caption characters"][length] += 1
                tables["language"][language] += 1
            for table, name in names.items():
                tables[table][name] += 1

    def merge(self, other: "Funnel") -> None:
        """Add another funnel's counts."""
        self.rows += other.rows
        self.redacted += other.redacted
        self.rejected.update(other.rejected)
        self.dropped.update(other.dropped)
        for mine, theirs in ((self.given, other.given), (self.kept, other.kept)):
            for name in TABLES:
                mine[name].update(theirs[name])

    @property
    def rows_kept(self) -> int:
        """Pairs that no rule rejected."""
        return self.rows - self.rejected.total()

    def as_plain(self) -> dict[str, Any]:
        """For JSON; of hosts and licences the most frequent, the rest as `others`."""
        return {
            "rows": self.rows,
            "redacted": self.redacted,
            "rejected": [[rule, reason, count] for (rule, reason), count in sorted(self.rejected.items())],
            "dropped": dict(sorted(self.dropped.items())),
            "given": {name: _shortened(counts) for name, counts in self.given.items()},
            "kept": {name: _shortened(counts) for name, counts in self.kept.items()},
        }


def read_funnel(plain: Mapping[str, Any]) -> Funnel:
    """A funnel from its plain form."""
    return Funnel(
        rows=plain["rows"],
        redacted=plain["redacted"],
        rejected=Counter({(rule, reason): count for rule, reason, count in plain["rejected"]}),
        dropped=Counter(plain["dropped"]),
        given={name: Counter(plain["given"][name]) for name in TABLES},
        kept={name: Counter(plain["kept"][name]) for name in TABLES},
    )


class Samples:
    """The few pairs of each reason whose keys have the lowest hashes."""

    def __init__(self) -> None:
        self._chosen: dict[str, list[tuple[int, TextImagePair, Sequence[str], Rejected | None]]] = {}

    def add(self, pair: TextImagePair, captions: Sequence[str], verdict: Rejected | None) -> None:
        """Offer a pair, with the captions that are left of it and why it went."""
        reason = verdict.reason if verdict else ""
        chosen = self._chosen.setdefault(reason, [])
        chosen.append((_rank(pair.key), pair, captions, verdict))
        if len(chosen) >= 4 * KEPT_SAMPLES:
            self._chosen[reason] = _lowest(chosen, reason)

    def rows(self) -> list[dict[str, Any]]:
        """The chosen pairs, as `SAMPLE_SCHEMA` has them."""
        return [
            {
                "reason": reason,
                "rule": verdict.rule if verdict else "",
                "rank": rank,
                "key": pair.key,
                "detail": verdict.detail if verdict else "",
                "caption": " · ".join(captions[:3])[:300],
                "source": pair.source[:300],
                "thumbnail": thumbnail(pair.image_bytes),
            }
            for reason, chosen in sorted(self._chosen.items())
            for rank, pair, captions, verdict in _lowest(chosen, reason)
        ]


def lowest_samples(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the samples of several shards those of the corpus, by reason and rank."""
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(dict(row))
    return [
        row
        for reason, found in sorted(by_reason.items())
        for row in sorted(found, key=lambda row: row["rank"])[: SAMPLES if reason else KEPT_SAMPLES]
    ]


def thumbnail(image_bytes: bytes) -> bytes | None:
    """A small picture of an image; None if it cannot be decoded."""
    image = decode_image(image_bytes, short_side=THUMBNAIL)
    if isinstance(image, Unusable):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    if image.getcolors(256) is not None:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def host_of(source: str) -> str:
    """The host of a URL, `files` for a path."""
    try:
        return urlsplit(source).hostname or "files"
    except ValueError:
        return "no address"


def bin_names(bins: Sequence[float]) -> list[str]:
    """The names of bins, in order: `4-7`, ..., `1024+`."""
    return [_bin(start, bins) for start in bins]


def _bin(value: float, bins: Sequence[float]) -> str:
    return _bin_name(max(0, bisect.bisect_right(bins, value) - 1), tuple(bins))


@functools.cache
def _bin_name(index: int, bins: tuple[float, ...]) -> str:
    start = bins[index]
    if index + 1 == len(bins):
        return f"{start:g}+"
    stop = bins[index + 1]
    if isinstance(start, float):
        return f"{start:g}-{stop:g}"
    return f"{start}-{stop - 1}" if stop - 1 > start else str(start)


def _licence(extra: Mapping[str, Any]) -> str:
    named = (extra.get(name) for name in _LICENCE_FIELDS)
    return next((str(value)[:80] for value in named if value not in (None, "")), "not told")


def _shortened(counts: Counter[str]) -> dict[str, int]:
    kept = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_NAMES])
    others = counts.total() - sum(kept.values())
    if others:
        kept["others"] = kept.get("others", 0) + others
    return kept


def _rank(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _lowest(
    chosen: list[tuple[int, TextImagePair, Sequence[str], Rejected | None]], reason: str
) -> list[tuple[int, TextImagePair, Sequence[str], Rejected | None]]:
    return sorted(chosen, key=lambda item: item[0])[: SAMPLES if reason else KEPT_SAMPLES]
