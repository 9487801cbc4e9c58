"""A real web server on the loopback address that may also misbehave, byte by byte."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from cogview.records.fetch import FetchSettings
from cogview.records.urls import AddressPolicy

HOST = "site.test"
Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Site:
    """What was asked, and the settings that reach this site and nothing else."""

    port: int
    requests: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def settings(self, **changes: Any) -> FetchSettings:
        resolve = {f"{HOST}:80": f"127.0.0.1:{self.port}", "other.test:80": f"127.0.0.1:{self.port}"}
        quick: dict[str, Any] = {"ask_ai_txt": False, "ask_tdmrep": False}
        quick |= {"host_rate": 1000.0, "total_s": 3.0, "read_s": 1.0, "max_wait_s": 0.05, "max_bytes": 1_000_000}
        return FetchSettings(**{**quick, "policy": AddressPolicy(resolve=resolve), **changes})


def reply(body: bytes = b"", *, status: str = "200 OK", headers: Mapping[str, str] | None = None) -> bytes:
    """A whole HTTP answer."""
    fields = {"Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


@asynccontextmanager
async def serve(answers: Mapping[str, Answer | list[Answer]]) -> AsyncIterator[Site]:
    """Serve raw answers by path, with its query or without; a list answers one request after the other, its last for
    ever. Else 404.
    """
    site = Site(port=0)
    visits: dict[str, int] = {}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            writer.close()
            return
        path = head.split(" ")[1]
        site.requests.append(path)
        site.heads.append(head)
        site.times.append(time.monotonic())
        known = path if path in answers else path.partition("?")[0]
        answer = answers.get(known, reply(b"nothing", status="404 Not Found"))
        if isinstance(answer, list):
            answer = answer[min(visits.get(known, 0), len(answer) - 1)]
        visits[known] = visits.get(known, 0) + 1
        try:
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()
