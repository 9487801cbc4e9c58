"""The desk between many clients and one worker: a bounded queue, batches of what can be drawn together, cancellation.

In: orders from the event loop. Out: their events, in the event loop again. The worker is one thread that owns the
models: nothing else computes, so a request waits for its turn and not for a lock. Orders are served in the order in
which they came, but for those that join a batch because they are sampled alike.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.runtime.failures import Isolated, first_line
from pipelines.serving.fields import RefusedError
from pipelines.serving.orders import CaptionOrder, CompleteOrder, DrawOrder, MagnifyOrder
from pipelines.serving.studio import Studio

log = logging.getLogger(__name__)

AnyOrder = DrawOrder | MagnifyOrder | CaptionOrder | CompleteOrder
PARTS_SHOWN = 8  # how often a picture is shown while it is drawn
SOON = 2  # seconds after which to come again, as long as nobody knows how long a picture takes


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happens to an order: `rows` of pictures, `done` with the result, `failed` with a RefusedError."""

    name: str
    value: Any


@dataclass(eq=False, kw_only=True)
class Ticket:
    """An order in the queue or at work. The event loop takes its events; either side may end it."""

    order: AnyOrder
    deadline: float
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False

    @property
    def size(self) -> int:
        """Pictures that it takes."""
        return len(self.order.seeds) if isinstance(self.order, DrawOrder) else 1

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return not self.is_cancelled and time.monotonic() < self.deadline

    def tell(self, name: str, value: Any) -> None:
        """From the worker's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, Event(name=name, value=value))


class AbandonedError(Exception):
    """Nobody waits for what is being drawn any more."""


class Desk:
    """A queue of at most `max_waiting` requests, and the worker; `with` starts and ends it.

    batch_size: pictures drawn at once; timeout: seconds from a request to its answer; threads: of torch.
    """

    def __init__(self, studio: Studio, *, max_waiting: int, batch_size: int, timeout: float, threads: int) -> None:
        self.studio = studio
        self.max_waiting, self.batch_size, self.timeout, self.threads = max_waiting, batch_size, timeout, threads
        self.counts = {"served": 0, "refused": 0, "abandoned": 0, "failed": 0, "longest_queue": 0}
        self._waiting: list[Ticket] = []
        self._at_work: list[Ticket] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._seconds_each: float | None = None  # a picture takes, of those drawn lately
        self._worker = threading.Thread(target=self._work, name="worker", daemon=True)

    def __enter__(self) -> "Desk":
        self._worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is at work, tell those who wait, and end the worker."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._worker.join()

    def submit(self, order: AnyOrder) -> Ticket:
        """Queue an order of the running event loop. RefusedError with 429 when the queue is full."""
        loop = asyncio.get_running_loop()
        ticket = Ticket(order=order, deadline=time.monotonic() + self.timeout, loop=loop)
        with self._changed:
            if self._is_closing:
                raise RefusedError(503, "the server is ending", retry_after=10)
            if len(self._waiting) >= self.max_waiting:
                self.counts["refused"] += 1
                message = f"{self.max_waiting} requests are waiting already; try again later"
                raise RefusedError(429, message, retry_after=self._come_again())
            self._waiting.append(ticket)
            self.counts["longest_queue"] = max(self.counts["longest_queue"], len(self._waiting))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this any more: it leaves the queue, or its drawing stops after the current token."""
        ticket.is_cancelled = True
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self.counts["abandoned"] += 1

    def state(self) -> Mapping[str, int]:
        """How many requests wait and are at work, and what became of the others."""
        with self._changed:
            return {"waiting": len(self._waiting), "at_work": len(self._at_work), **self.counts}

    def _come_again(self) -> int:
        """Seconds after which whoever is sent away may try again: some moment before the queue is drawn, another for
        each, so that they do not all come back at once."""
        if self._seconds_each is None:
            return SOON
        seconds = self._seconds_each * sum(ticket.size for ticket in (*self._waiting, *self._at_work))
        return max(1, round(random.uniform(0, min(seconds, self.timeout))))

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        while batch := self._next_batch():
            started = time.monotonic()
            with Isolated() as tried:
                self._serve(batch)
            if isinstance(tried.error, AbandonedError):
                self._end(batch, "abandoned", RefusedError(503, "the server is ending, or the time is up"))
            elif tried.error is not None:
                log.error("an order failed: %s", first_line(tried.error), exc_info=tried.error)
                self._end(batch, "failed", RefusedError(500, f"the model failed: {type(tried.error).__name__}"))
            else:
                each = (time.monotonic() - started) / sum(ticket.size for ticket in batch)
                before = each if self._seconds_each is None else self._seconds_each
                self._seconds_each = before + (each - before) / 4
        self._end(self._waiting, "abandoned", RefusedError(503, "the server is ending", retry_after=10))
        self._waiting = []

    def _next_batch(self) -> list[Ticket]:
        """The first in the queue with those that can be drawn together with it; empty when the server ends."""
        with self._changed:
            while True:
                gone = [ticket for ticket in self._waiting if not ticket.is_wanted]
                self.counts["abandoned"] += len(gone)
                self._waiting = [ticket for ticket in self._waiting if ticket.is_wanted]
                if self._is_closing:
                    return []
                if self._waiting:
                    break
                self._changed.wait()
            batch = _batch_of(self._waiting, batch_size=self.batch_size)
            self._waiting = [ticket for ticket in self._waiting if ticket not in batch]
            self._at_work = batch
            return batch

    def _serve(self, batch: Sequence[Ticket]) -> None:
        first = batch[0].order
        if isinstance(first, CaptionOrder):
            results: Sequence[Any] = [self.studio.caption(first)]
        elif isinstance(first, MagnifyOrder):
            results = [self.studio.magnify(first, progress=lambda done, total: self._check(batch))]
        elif isinstance(first, CompleteOrder):
            results = [self.studio.complete(first, progress=lambda done, total: self._check(batch))]
        else:
            orders = [ticket.order for ticket in batch if isinstance(ticket.order, DrawOrder)]
            results = self.studio.draw(orders, watch=lambda codes: self._watch(batch, codes))
        with self._changed:
            self.counts["served"] += len(batch)
            self._at_work = []
        for ticket, result in zip(batch, results, strict=True):
            ticket.tell("done", result)

    def _end(self, batch: Sequence[Ticket], name: str, error: RefusedError) -> None:
        with self._changed:
            self.counts[name] += len(batch)
            self._at_work = []
        for ticket in batch:
            ticket.tell("failed", error)

    def _check(self, batch: Sequence[Ticket]) -> None:
        if self._is_closing or not any(ticket.is_wanted for ticket in batch):
            raise AbandonedError

    def _watch(self, batch: Sequence[Ticket], codes: Sequence[Tensor]) -> None:
        """After each token: stop if nobody waits; after some rows, show them to those who look on."""
        self._check(batch)
        side = self.studio.painter.grid
        rows, rest = divmod(len(codes), side)
        if rest or rows == side or rows % max(1, side // PARTS_SHOWN):
            return
        places: list[int] = []
        lookers: list[tuple[Ticket, range]] = []
        start = 0
        for ticket in batch:
            if isinstance(ticket.order, DrawOrder) and ticket.order.is_streamed and ticket.is_wanted:
                lookers.append((ticket, range(len(places), len(places) + ticket.size)))
                places += range(start, start + ticket.size)
            start += ticket.size
        if lookers:
            upper_Bhw = torch.stack(list(codes), dim=1)[places].view(len(places), rows, side)
            parts = self.studio.unfinished(upper_Bhw)
            for ticket, own in lookers:
                ticket.tell("rows", (rows, [parts[place] for place in own]))


def _batch_of(waiting: Sequence[Ticket], *, batch_size: int) -> list[Ticket]:
    """The first, and others in their order that are drawn with the same sampling, as far as they fit."""
    batch, room = [waiting[0]], batch_size - waiting[0].size
    first = waiting[0].order
    if isinstance(first, DrawOrder):
        for ticket in waiting[1:]:
            order = ticket.order
            if isinstance(order, DrawOrder) and order.sampling == first.sampling and ticket.size <= room:
                batch.append(ticket)
                room -= ticket.size
    return batch
