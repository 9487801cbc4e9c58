"""How fast one host is asked: few connections at a time, a steady pace, slower if its robots.txt says so."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

MAX_CRAWL_DELAY_S = 60.0
_SMOOTHING_S = 0.05  # above 20 requests a second the pace is kept over windows of this length


class HostGate:
    """Lets requests to one host through at its pace.

    rate: requests per second; connections: at once; sharers: gates of the same host, in other processes, that have
    these limits together.
    """

    def __init__(self, *, rate: float, connections: int, sharers: int) -> None:
        self._sharers = sharers
        self._slots = asyncio.Semaphore(max(1, connections // sharers))
        self._rate = rate / sharers
        self._pace = _limiter(self._rate)

    def slow_down(self, crawl_delay: float) -> None:
        """Keep at least this many seconds (a minute at most) between two requests of all sharers together."""
        if crawl_delay <= 0:
            return
        rate = 1.0 / (min(crawl_delay, MAX_CRAWL_DELAY_S) * self._sharers)
        if rate < self._rate:  # asked again with every URL: a new limiter each time would let each of them go at once
            self._rate = rate
            self._pace = _limiter(rate)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self._slots:
            await self._pace.acquire()
            yield


def _limiter(rate: float) -> AsyncLimiter:
    burst = max(1.0, rate * _SMOOTHING_S)
    return AsyncLimiter(burst, burst / rate)
