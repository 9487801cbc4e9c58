"""Candidates with URLs in, pairs or failures out, in the same order: fetch, decode and encode anew in one process.

One event loop fetches, and decodes what is not large: the milliseconds that this takes are less than it costs to hand
a picture to a thread and to take turns with it. Large ones go to few threads, so that the loop goes on meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial

from cogview.records.candidates import Candidate
from cogview.records.containment import is_apart
from cogview.records.fetch import Fetched, Fetcher
from cogview.records.images import ImageSettings
from cogview.records.opt_out import OPTED_OUT
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.records.pair_shards import pair_key, store_pair
from cogview.records.responses import LARGE_BODY

DECODERS = 2  # threads: one works while the other waits for the event loop to let go of the interpreter
_AHEAD = 4  # rows begun for each connection, so that one slow host does not hold up the others


async def scrape_pairs(
    candidates: Iterable[tuple[int, Candidate]], *, shard: int, fetcher: Fetcher, settings: ImageSettings
) -> AsyncGenerator[TextImagePair | Failure, None]:
    """Fetch candidates of one shard, given with their rows, and answer in their order.

    Bounded: at most `4 x connections` pictures are held at a time.
    """
    waiting: deque[asyncio.Task[TextImagePair | Failure]] = deque()
    ahead = _AHEAD * max(1, fetcher.settings.connections // fetcher.settings.sharers)
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as decoders:
        scrape_one = partial(_scrape_one, fetcher=fetcher, settings=settings, decoders=decoders)
        try:
            for row, candidate in candidates:
                waiting.append(asyncio.create_task(scrape_one(candidate, key=pair_key(shard, row))))
                if len(waiting) >= ahead:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()


async def _scrape_one(
    candidate: Candidate, *, key: str, fetcher: Fetcher, settings: ImageSettings, decoders: Executor
) -> TextImagePair | Failure:
    if not candidate.captions:  # nothing to learn from it, so its site is not asked
        return Failure(key=key, source=candidate.source, reason="caption_missing")
    async with AsyncExitStack() as hold:
        answer = await fetcher.fetch(candidate.source, hold=hold)
        return await _store(answer, candidate, key=key, fetcher=fetcher, settings=settings, decoders=decoders)


async def _store(
    answer: Fetched | Unusable,
    candidate: Candidate,
    *,
    key: str,
    fetcher: Fetcher,
    settings: ImageSettings,
    decoders: Executor,
) -> TextImagePair | Failure:
    if isinstance(answer, Unusable):
        return Failure(key=key, source=candidate.source, reason=answer.reason, detail=answer.detail)
    if fetcher.opt_out.has_image(answer.body):
        return Failure(key=key, source=candidate.source, reason=OPTED_OUT, detail="by the sha256 of its image")
    pair = TextImagePair(
        key=key,
        captions=candidate.captions,
        image_bytes=answer.body,
        source=candidate.source,
        extra=candidate.extra,
    )
    if len(pair.image_bytes) <= LARGE_BODY and not is_apart():
        stored = store_pair(pair, settings)
    else:
        stored = await asyncio.get_running_loop().run_in_executor(decoders, store_pair, pair, settings)
    if isinstance(stored, TextImagePair) and stored.extra["sha256"] in fetcher.opt_out.sha256:
        return Failure(key=key, source=candidate.source, reason=OPTED_OUT, detail="by the sha256 of its image")
    return stored
