"""The web side of `serve`: who may ask, what is read of a request, and how answers go back.

In: HTTP on one address. Out: the page, JSON, and server-sent events while pictures are drawn. A browser on the same
machine is reachable from any web site, so a request must name this server in `Host`, come from this server's own page
if it has an `Origin`, and carry a content type that no form can send. On other addresses it must bring the token, too.
No path has a parameter, and no file is opened by a name from outside.
"""

import asyncio
import base64
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from cogview.records.images import decode_image
from cogview.records.pair import Unusable
from cogview.tokenizers.pixels import square_pixels
from pipelines.serving.desk import AnyOrder, Desk
from pipelines.serving.orders import (
    CaptionOrder,
    Limits,
    RefusedError,
    read_complete_order,
    read_draw_order,
    read_magnify_order,
)
from pipelines.serving.studio import Picture

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/complete.js": ("complete.js", "text/javascript"),
}
EVENTS = "text/event-stream"
MAX_JSON, MAX_IMAGE = 64 * 1024, 8 * 2**20  # bytes of a body
MAX_SIDE = 2048  # pixels of a picture that is completed
ORDER_HEADER = "X-Order"  # what shall be done with the picture in the body, as JSON in ASCII
BODY_SECONDS = 30.0  # in which a body has to arrive
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Who may ask. token: empty on loopback addresses; names: host names of this server besides addresses."""

    token: str = field(default="", repr=False)
    names: tuple[str, ...] = ()

    def check(self, request: web.Request) -> None:
        """RefusedError for a request that is not meant for this server, or comes from another site's page."""
        host = request.headers.get("Host", "")
        name = _name_of(host)
        # A number is safe: only names can be made to point elsewhere from one moment to the next.
        is_known = name in self.names or is_loopback(name) or (self.token and is_address(name))
        if not is_known:
            raise RefusedError(421, "this server is not known by that name; start it with --names NAME")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise RefusedError(403, "requests from pages of other sites are not served")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        is_open = not self.token or request.path in FILES
        if not is_open and not hmac.compare_digest(given.encode(errors="surrogateescape"), self.token.encode()):
            raise RefusedError(401, "this server wants its token; open the page with #token=... at its address")


class Site:
    """The handlers of all addresses."""

    def __init__(self, desk: Desk, *, limits: Limits, gate: Gate) -> None:
        self.desk, self.limits, self.gate = desk, limits, gate
        self._files = {path: (PAGE / name).read_bytes() for path, (name, _) in FILES.items()}

    def app(self) -> web.Application:
        """The application, with every address that it has."""
        app = web.Application(middlewares=[self._guard])
        app.on_response_prepare.append(_secure)
        for path in FILES:
            app.router.add_get(path, self._page)
        app.router.add_get("/about", self._about)
        app.router.add_get("/state", self._state)
        app.router.add_post("/draw", self._draw)
        app.router.add_post("/magnify", self._magnify)
        app.router.add_post("/caption", self._caption)
        app.router.add_post("/complete", self._complete)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every refusal is JSON with one sentence."""
        try:
            self.gate.check(request)
            return await handler(request)
        except RefusedError as error:
            return refusal(error)
        except web.HTTPError as error:
            return refusal(RefusedError(error.status, f"{request.method} is not served at this address"))

    async def _page(self, request: web.Request) -> web.Response:
        return web.Response(body=self._files[request.path], content_type=FILES[request.path][1], charset="utf-8")

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
        order = read_draw_order(await _json_body(request), limits=self.limits, is_streamed=is_streamed)
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
        order = read_magnify_order(await _json_body(request), limits=self.limits)
        return web.json_response(as_plain(await self._result(order), with_codes=False))

    async def _caption(self, request: web.Request) -> web.Response:
        """Captions of the picture in the body."""
        captioner = self.desk.studio.captioner
        if captioner is None:
            raise RefusedError(404, "no captioner is loaded; run `make finetune-captioning` first")
        if not request.content_type.startswith("image/"):
            raise RefusedError(415, "send a picture as it is, with its content type, such as image/png")
        data = await _body(request, limit=MAX_IMAGE)
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
        image = await asyncio.to_thread(decode_image, await _body(request, limit=MAX_IMAGE))
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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address. A name other than localhost may mean anything."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    """Whether this is a number such as 127.0.0.1 or ::1."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def refusal(error: RefusedError) -> web.Response:
    """A refusal as an answer."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    return web.json_response({"error": str(error)}, status=error.status, headers=headers)


def as_plain(picture: Picture, *, with_codes: bool = True) -> dict[str, Any]:
    """A picture for JSON, its PNG in base64."""
    plain = {"seed": picture.seed, "cap_loss": picture.cap_loss, "rank": picture.rank, "png": _text(picture.png)}
    return {**plain, "codes": picture.codes} if with_codes else plain


async def _json_body(request: web.Request) -> bytes:
    if request.content_type != "application/json":
        raise RefusedError(415, "send JSON, with the content type application/json")
    return await _body(request, limit=MAX_JSON)


async def _body(request: web.Request, *, limit: int) -> bytes:
    """The whole body; RefusedError when it is too large or too slow. What is too large is not read to its end."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.content.iter_any():
                data += piece
                if len(data) > limit:
                    raise RefusedError(413, f"the body is too large; at most {limit} bytes are read")
    except TimeoutError as error:
        raise RefusedError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
    return bytes(data)


async def _send(response: web.StreamResponse, name: str, value: Any) -> None:
    await response.write(f"event: {name}\ndata: {json.dumps(value)}\n\n".encode())


async def _secure(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY)


def _text(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _name_of(host: str) -> str:
    """`[::1]:8080` -> `::1`, `localhost:8080` -> `localhost`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
