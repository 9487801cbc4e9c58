"""Pictures come out the same and in order, whether the loop decodes them, a thread, or a child process."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image

from cogview.records import scraping
from cogview.records.candidates import Candidate
from cogview.records.containment import contained
from cogview.records.fetch import Fetcher
from cogview.records.images import ImageSettings
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import store_pair
from cogview.records.responses import LARGE_BODY
from tests.records.web_site import HOST, reply, serve

SETTINGS = ImageSettings(image_size=64)


def noise(side: int) -> bytes:
    """A picture that no format makes small."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("apart", [False, True])
def test_small_and_large_pictures_come_out_as_they_are_stored_alone(apart: bool) -> None:
    bodies = {"/large": noise(620), "/small": noise(80), "/damaged": noise(80)[:5000], "/again": noise(620)}
    assert len(bodies["/small"]) < LARGE_BODY < len(bodies["/large"])
    candidates = [Candidate(source=f"http://{HOST}{path}", captions=("noise",)) for path in [*bodies, "/gone"]]

    async def run() -> list[TextImagePair | Failure]:
        async with (
            serve({path: reply(body) for path, body in bodies.items()}) as site,
            Fetcher(site.settings(max_bytes=2_000_000)) as fetcher,
        ):
            pairs = scraping.scrape_pairs(enumerate(candidates), shard=3, fetcher=fetcher, settings=SETTINGS)
            return [outcome async for outcome in pairs]

    with contained(apart=apart):
        found = asyncio.run(run())
    keys = [f"00003_{row:05d}" for row in range(len(candidates))]
    assert found[:4] == [
        store_pair(
            TextImagePair(key=key, captions=("noise",), image_bytes=body, source=candidate.source, extra={}), SETTINGS
        )
        for key, body, candidate in zip(keys, bodies.values(), candidates, strict=False)
    ]
    assert found[4] == Failure(key=keys[4], source=candidates[4].source, reason="http_404")
    assert [outcome.key for outcome in found] == keys
    assert [isinstance(outcome, TextImagePair) for outcome in found] == [True, True, False, True, False]
