"""The web side of `serve`: what is read of a request, and how answers go back.

In: HTTP on one address, through the gate. Out: the page, JSON, and server-sent events while pictures are drawn.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from cogview.records.images import decode_image
from cogview.records.pair import Unusable
from cogview.tokenizers.pixels import square_pixels
from pipelines.serving.desk import AnyOrder, Desk
from pipelines.serving.fields import RefusedError
from pipelines.serving.gate import SHARED_FILES, Gate, guarded_app, json_body, whole_body
from pipelines.serving.orders import CaptionOrder, Limits, read_complete_order, read_draw_order, read_magnify_order
from pipelines.serving.studio import Picture

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": PAGE / "index.html",
    "/page.css": PAGE / "page.css",
    "/page.js": PAGE / "page.js",
    "/complete.js": PAGE / "complete.js",
    **SHARED_FILES,
}
EVENTS = "text/event-stream"
MAX_IMAGE = 8 * 2**20  # bytes of a body
MAX_SIDE = 2048  # pixels of a picture that is completed
ORDER_HEADER = "X-Order"  # what shall be done with the picture in the body, as JSON in ASCII


class Site:
    """The handlers of all addresses."""

    def __init__(self, desk: Desk, *, limits: Limits, gate: Gate) -> None:
        self.desk, self.limits, self.gate = desk, limits, gate

    def app(self) -> web.Application:
        """The application, with every address that it has."""
        app = guarded_app(self.gate, pages=FILES)
        app.router.add_get("/about", self._about)
        app.router.add_get("/state", self._state)
        app.router.add_post("/draw", self._draw)
        app.router.add_post("/magnify", self._magnify)
        app.router.add_post("/caption", self._caption)
        app.router.add_post("/complete", self._complete)
        return app

    async def _about(self, request: web.Request) -> web.Response:
        """What the server offers, for the page."""
        studio, limits = self.desk.studio, self.limits
        return web.json_response(
            {
                "image_size": studio.painter.image_size,
                "can": {
                    "rank": studio.captioner is not None,
                    "caption": studio.captioner is not None,
                    "magnify": studio.magnifier is not None,
                    "complete": studio.completer is not None,
                },
                "max_prompt": limits.max_prompt,
                "max_candidates": limits.max_candidates,
                "temperature": limits.sampling.temperature,
                "top_k": limits.sampling.top_k or limits.num_codes,
                "num_codes": limits.num_codes,
            }
        )

    async def _state(self, request: web.Request) -> web.Response:
        return web.json_response(dict(self.desk.state()))

    async def _draw(self, request: web.Request) -> web.StreamResponse:
        """Pictures of a prompt: server-sent events if the client accepts them, else one JSON answer."""
        is_streamed = EVENTS in request.headers.get("Accept", "")
        order = read_draw_order(await json_body(request), limits=self.limits, is_streamed=is_streamed)
        if not is_streamed:
            return web.json_response({"pictures": [as_plain(picture) for picture in await self._result(order)]})
        ticket = self.desk.submit(order)
        response = web.StreamResponse(headers={"Content-Type": EVENTS, "X-Accel-Buffering": "no"})
        try:
            await response.prepare(request)
            await _send(response, "queued", {"seeds": order.seeds})
            async for name, value in self._events(ticket):
                await _send(response, name, value)
        finally:
            self.desk.cancel(ticket)
        return response

    async def _magnify(self, request: web.Request) -> web.Response:
        if self.desk.studio.magnifier is None:
            raise RefusedError(
                404, "no model for super-resolution is loaded; run `make finetune-super-resolution` first"
            )
        order = read_magnify_order(await json_body(request), limits=self.limits)
        return web.json_response(as_plain(await self._result(order), with_codes=False))

    async def _caption(self, request: web.Request) -> web.Response:
        """Captions of the picture in the body."""
        captioner = self.desk.studio.captioner
        if captioner is None:
            raise RefusedError(404, "no captioner is loaded; run `make finetune-captioning` first")
        if not request.content_type.startswith("image/"):
            raise RefusedError(415, "send a picture as it is, with its content type, such as image/png")
        data = await whole_body(request, limit=MAX_IMAGE)
        image = await asyncio.to_thread(decode_image, data, short_side=captioner.image_size)
        if isinstance(image, Unusable):
            raise RefusedError(422, f"the picture cannot be read: {image.reason}; send a PNG, JPEG, WebP or GIF")
        pixels_HWC = square_pixels(image, image_size=captioner.image_size)
        captions: Mapping[str, str] = await self._result(CaptionOrder(pixels_HWC=pixels_HWC))
        return web.json_response({"captions": dict(captions)})

    async def _complete(self, request: web.Request) -> web.Response:
        """The picture in the body with a part of it drawn anew; which part and what is in a header."""
        if self.desk.studio.completer is None:
            raise RefusedError(404, "no model for completion is loaded; run `make pretrain-coglm` first")
        if not request.content_type.startswith("image/"):
            raise RefusedError(415, "send a picture as it is, with its content type, such as image/png")
        words = request.headers.get(ORDER_HEADER, "")
        image = await asyncio.to_thread(decode_image, await whole_body(request, limit=MAX_IMAGE))
        if isinstance(image, Unusable):
            raise RefusedError(422, f"the picture cannot be read: {image.reason}; send a PNG, JPEG, WebP or GIF")
        if max(image.size) > MAX_SIDE:
            raise RefusedError(422, f"the picture has {max(image.size)} pixels along a side; send {MAX_SIDE} at most")
        order = read_complete_order(words, np.asarray(image), limits=self.limits)
        return web.json_response(as_plain(await self._result(order), with_codes=False))

    async def _result(self, order: AnyOrder) -> Any:
        """What becomes of an order. Its work stops when the client goes away, or the time is up."""
        ticket = self.desk.submit(order)
        try:
            async with asyncio.timeout(self.desk.timeout):
                event = await ticket.events.get()
        except TimeoutError as error:
            raise self._too_late() from error
        finally:
            self.desk.cancel(ticket)
        if event.name == "failed":
            raise event.value
        return event.value

    async def _events(self, ticket: Any) -> AsyncIterator[tuple[str, Any]]:
        """An order's events as names and plain values, up to the last."""
        try:
            async with asyncio.timeout(self.desk.timeout):
                while (event := await ticket.events.get()).name == "rows":
                    rows, parts = event.value
                    yield "rows", {"rows": rows, "of": self.limits.grid, "pngs": [_text(png) for png in parts]}
        except TimeoutError:
            yield "failed", {"error": str(self._too_late())}
            return
        if event.name == "failed":
            yield "failed", {"error": str(event.value)}
        else:
            yield "done", {"pictures": [as_plain(picture) for picture in event.value]}

    def _too_late(self) -> RefusedError:
        return RefusedError(504, f"not drawn within {self.desk.timeout:g} s; ask for fewer pictures, or later")


def as_plain(picture: Picture, *, with_codes: bool = True) -> dict[str, Any]:
    """A picture for JSON, its PNG in base64."""
    plain = {"seed": picture.seed, "cap_loss": picture.cap_loss, "rank": picture.rank, "png": _text(picture.png)}
    return {**plain, "codes": picture.codes} if with_codes else plain


async def _send(response: web.StreamResponse, name: str, value: Any) -> None:
    await response.write(f"event: {name}\ndata: {json.dumps(value)}\n\n".encode())


def _text(png: bytes) -> str:
    return base64.b64encode(png).decode()
