"""HTTP answers read with a cap: compressed or not, honest about their length or not."""

import zlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp

from cogview.records.pair import Unusable

LARGE_BODY = 1024 * 1024  # a photo of two megapixels or so; few are larger
_CHUNK = 64 * 1024


async def read_body(
    response: aiohttp.ClientResponse,
    *,
    cap: int,
    truncate: bool,
    on_large: Callable[[], Awaitable[None]],
) -> bytes | Unusable:
    """Read and decompress, and stop at `cap` bytes: cut there if `truncate`, refuse otherwise.

    on_large: awaited before more than LARGE_BODY bytes are taken into memory.
    """
    decompress = _decompressor(response.headers.get("Content-Encoding", "identity").strip().lower())
    if isinstance(decompress, Unusable):
        return decompress
    if not truncate and (response.content_length or 0) > cap:
        return Unusable("body_too_large", f"more than {cap} bytes")
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        try:
            body += decompress(chunk, cap + 1 - len(body))
        except zlib.error:
            return Unusable("body_damaged", "cannot be decompressed")
        if len(body) > LARGE_BODY:
            await on_large()
        if len(body) > cap:
            return bytes(body[:cap]) if truncate else Unusable("body_too_large", f"more than {cap} bytes")
    return bytes(body) if body else Unusable("body_empty")


def _decompressor(encoding: str) -> Callable[[bytes, int], bytes] | Unusable:
    """A function of (chunk, room): at most `room` bytes come out of a chunk."""
    if encoding in ("", "identity"):
        return lambda chunk, room: chunk[:room]
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress  # 32: gzip or zlib by its header
    return Unusable("encoding_refused", encoding[:16])


def retry_after_s(value: str) -> float | None:
    """Seconds that a server asks us to wait: a number or a date; None if it says nothing sensible."""
    value = value.strip()
    if value.isdecimal() and len(value) < 10:
        return float(value)
    if value.isdecimal():
        return float("inf")
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime.now(UTC)).total_seconds()
