"""Who may ask, what is read of a request, and what goes with every answer: the same for every server of ours.

A browser on the same machine is reachable from any web site, so a request must name this server in `Host`, come from
this server's own page if it has an `Origin`, and carry a content type that no form can send. On other addresses it must
bring the token, too. No path has a parameter, and no file is opened by a name from outside.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from pipelines.serving.fields import RefusedError

MAX_JSON = 64 * 1024  # bytes of a body
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
_PAGE = Path(__file__).parent / "page"
SHARED_FILES = {"/base.css": _PAGE / "base.css", "/asking.js": _PAGE / "asking.js"}  # of every page
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Who may ask. token: empty on loopback addresses; names: host names of this server besides addresses."""

    token: str = field(default="", repr=False)
    names: tuple[str, ...] = ()

    def check(self, request: web.Request, *, is_open: bool) -> None:
        """RefusedError for a request that is not meant for this server, or comes from another site's page.

        is_open: what is asked for needs no token, such as the page that will ask for one.
        """
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
        if self.token and not is_open and not is_same_secret(given, self.token):
            raise RefusedError(401, "this server wants its token; open the page with #token=... at its address")


def guarded_app(gate: Gate, *, pages: Mapping[str, Path]) -> web.Application:
    """An application whose every answer is guarded. pages: address -> file, read once, open to all."""
    contents = {address: path.read_bytes() for address, path in pages.items()}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every refusal is JSON with one sentence."""
        try:
            gate.check(request, is_open=request.path in pages)
            return await handler(request)
        except RefusedError as error:
            return refusal(error)
        except web.HTTPError as error:
            return refusal(RefusedError(error.status, f"{request.method} is not served at this address"))

    async def page(request: web.Request) -> web.Response:
        kind = KINDS[pages[request.path].suffix]
        return web.Response(body=contents[request.path], content_type=kind, charset="utf-8")

    app = web.Application(middlewares=[guard])
    app.on_response_prepare.append(_secure)
    for address in pages:
        app.router.add_get(address, page)
    return app


def is_same_secret(given: str, secret: str) -> bool:
    """Whether they are equal, in a time that does not tell how nearly."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), secret.encode())


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


async def json_body(request: web.Request) -> bytes:
    """The body of a request that says it is JSON."""
    if request.content_type != "application/json":
        raise RefusedError(415, "send JSON, with the content type application/json")
    return await whole_body(request, limit=MAX_JSON)


async def whole_body(request: web.Request, *, limit: int) -> bytes:
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


async def _secure(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY)


def _name_of(host: str) -> str:
    """`[::1]:8080` -> `::1`, `localhost:8080` -> `localhost`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
