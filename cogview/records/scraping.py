"""Candidates with URLs in, pairs or failures out, in the same order: fetch, decode and encode anew in one process."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from cogview.records.candidates import Candidate
from cogview.records.fetch import Fetcher
from cogview.records.images import ImageSettings
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.records.pair_shards import pair_key, store_pair

_AHEAD = 4  # rows begun for each connection, so that one slow host does not hold up the others


async def scrape_pairs(
    candidates: Sequence[Candidate], *, shard: int, fetcher: Fetcher, settings: ImageSettings
) -> AsyncGenerator[TextImagePair | Failure, None]:
    """Fetch the candidates of one shard. Bounded: at most `4 x connections` pictures are held at a time."""
    waiting: deque[asyncio.Task[TextImagePair | Failure]] = deque()
    ahead = _AHEAD * fetcher.settings.connections
    try:
        for row, candidate in enumerate(candidates):
            key = pair_key(shard, row)
            waiting.append(asyncio.create_task(_scrape_one(candidate, key=key, fetcher=fetcher, settings=settings)))
            if len(waiting) >= ahead:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()


async def _scrape_one(
    candidate: Candidate, *, key: str, fetcher: Fetcher, settings: ImageSettings
) -> TextImagePair | Failure:
    if not candidate.captions:  # nothing to learn from it, so its site is not asked
        return Failure(key=key, source=candidate.source, reason="caption_missing")
    answer = await fetcher.fetch(candidate.source)
    if isinstance(answer, Unusable):
        return Failure(key=key, source=candidate.source, reason=answer.reason, detail=answer.detail)
    pair = TextImagePair(
        key=key,
        captions=candidate.captions,
        image_bytes=answer.body,
        source=candidate.source,
        extra=candidate.extra,
    )
    return await asyncio.to_thread(store_pair, pair, settings)
