"""A finished shard of pairs, and new outcomes for some of its failed rows, in; one outcome for every row out."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cogview.errors import ManifestError
from cogview.records.opt_out import OPTED_OUT, OptOut
from cogview.records.pair import Failure, TextImagePair

# What may have passed since: a busy or broken server, a network that was down. A 404 or a picture that is none stays.
RETRYABLE_REASONS = (
    *("timeout", "connection_failed", "bad_response", "dns_failed", "robots_unavailable"),
    *("http_408", "http_425", "http_429", "http_500", "http_502", "http_503", "http_504"),
)


def read_statuses(path: Path) -> list[dict[str, Any]]:
    """What became of every candidate of a shard, by row."""
    statuses: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return statuses


def rows_to_retry(statuses: Iterable[Mapping[str, Any]], *, reasons: Collection[str]) -> list[int]:
    """The rows that failed for one of these reasons."""
    return [row for row, status in enumerate(statuses) if status["status"] == "failed" and status["reason"] in reasons]


def merge_outcomes(
    statuses: Iterable[Mapping[str, Any]],
    *,
    pairs: Iterator[TextImagePair],
    retried: Mapping[int, None],
    fetched: Iterator[TextImagePair | Failure],
    opt_out: OptOut,
) -> Iterator[TextImagePair | Failure]:
    """Every row once: kept pairs as they were, retried rows as they are now, other failures with their reason.

    pairs: of the shard's tar; fetched: outcomes of the retried rows, in order. Who has opted out since is left out.
    """
    for row, status in enumerate(statuses):
        if row in retried:
            yield next(fetched)
        elif status["status"] != "ok":
            yield Failure(
                key=status["key"], source=status["source"], reason=status["reason"], detail=status["detail"] or ""
            )
        else:
            pair = next(pairs, None)
            if pair is None or pair.key != status["key"]:
                raise ManifestError(f"the tar of {status['key']} does not hold it; run the job that wrote it again")
            digests = {pair.extra.get("sha256"), pair.extra.get("original_sha256")}
            is_out = opt_out.has_url(pair.source) or not opt_out.sha256.isdisjoint(digests)
            yield Failure(key=pair.key, source=pair.source, reason=OPTED_OUT) if is_out else pair
