"""A real web site on the loopback address that misbehaves in every way that we know of, and URLs that lead inside.

Hosts are names under `.test`, which the fetcher's policy maps to the site. Names under `.lies.test` go through the
name server of the machine, which `LYING_RESOLVER` replaces in the processes under test: it mixes public and private
answers, and changes its mind between two questions.
"""

import asyncio
import gzip
import ssl
import subprocess
import threading
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from benchmarks.hostile.cases import Case
from benchmarks.hostile.pictures import encode, photo, pictures

HOST = "site.test"
GOOD = "/good.png"
Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]

_LINES = """
http://127.0.0.1/ http://127.0.0.1:8265/ http://localhost/ http://localhost./ http://LOCALHOST/ http://a.localhost/
http://169.254.169.254/latest/meta-data/ http://metadata.google.internal/ http://metadata/ http://printer.local/
http://[::1]/ http://[::]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/ http://[fe80::1]/ http://[fd00::1]/
http://2130706433/ http://0x7f.1/ http://0177.0.0.1/ http://0x7f000001/ http://127.1/ http://127.0.1/ http://0/
http://0.0.0.0/ http://10.0.0.1/ http://172.16.0.1/ http://192.168.1.1/ http://100.64.0.1/ http://100.100.100.200/
http://198.18.0.1/ http://224.0.0.1/ http://255.255.255.255/ http://240.0.0.1/ http://192.0.0.192/ http://192.88.99.1/
http://[64:ff9b::7f00:1]/ http://[64:ff9b:1::1]/ http://[2002:7f00:1::]/ http://[2001::1]/ http://[fd00:ec2::254]/
http://[fec0::1]/ http://[ff02::1]/ http://[2001:db8::1]/ http://168.63.129.16/ http://①②⑦.0.0.1/ http://127。0。0。1/
http://999.999.999.999/ http://1.2.3.4.5/ http://intranet/ http://127.0.0.1.:80/ http://127.0.0.1#@good.com
http://0000::1/ http://[::127.0.0.1]/ http://[0:0:0:0:0:ffff:a9fe:a9fe]/ http://017700000001/ http://127.0.0.1%2f@x.org/
http://good.com@127.0.0.1/ http://[fe80::1%25eth0]/ http://127.0.0.1\\@good.com/ https://127.0.0.1/ http://0x7F.0.0.1/
http://private.lies.test/ http://mixed.lies.test/ http://six.lies.test/ http://rebinds.lies.test/
"""
INSIDE = _LINES.split()
INSIDE_REASONS = ("address_refused", "url_invalid", "userinfo_refused", "port_refused")

# Put before a Python process's own `socket.getaddrinfo` by `sitecustomize`; the public address answers nobody here.
LYING_RESOLVER = """
import socket
_ask = socket.getaddrinfo
_PUBLIC, _asked = "192.88.98.1", {}
_LIES = {"private.lies.test": ["127.0.0.1"], "mixed.lies.test": [_PUBLIC, "10.0.0.1"], "six.lies.test": ["::1"]}

def _lie(host, port, *given, **options):
    if not str(host).endswith(".lies.test"):
        return _ask(host, port, *given, **options)
    _asked[host] = _asked.get(host, 0) + 1
    rebinding = [_PUBLIC] if _asked[host] == 1 else ["127.0.0.1"]
    return [entry for a in _LIES.get(host, rebinding) for entry in _ask(a, port, type=socket.SOCK_STREAM)]

socket.getaddrinfo = _lie
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """An open site. resolve: the names that lead to it, for an `AddressPolicy`; asked: the paths, as they came."""

    resolve: Mapping[str, str]
    asked: list[str]


class HostileSite:
    """Serves `site_answers`, and the same over TLS with a certificate that nobody signed, while it is entered."""

    def __init__(self, folder: Path, *, large: bool = True) -> None:
        self._folder = folder
        self._answers = site_answers(large=large)
        self._asked: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Site:
        self._thread.start()
        http, https = self._run(self._open())
        names = {f"{host}:80": f"127.0.0.1:{http}" for host in (HOST, "noai.test", "down.test", "tdm.test", "ai.test")}
        return Site(resolve={**names, f"{HOST}:443": f"127.0.0.1:{https}"}, asked=self._asked)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def _run(self, work: Awaitable[tuple[int, int]]) -> tuple[int, int]:
        async def wait() -> tuple[int, int]:
            return await work

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result(timeout=30)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _open(self) -> tuple[int, int]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self_signed(self._folder))
        plain = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        secure = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=context)
        self._servers = (plain, secure)
        return plain.sockets[0].getsockname()[1], secure.sockets[0].getsockname()[1]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path, host = head.split(" ")[1], head.lower().partition("\r\nhost: ")[2].partition("\r\n")[0]
            self._asked.append(f"{host}{path}")
            answer = self._answers.get(f"{host}{path}") or self._answers.get(path) or reply(status="404 None")
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (OSError, EOFError, ValueError, IndexError):
            pass
        finally:
            writer.close()


def site_answers(*, large: bool) -> dict[str, Answer]:
    """What the site says, by path or by host and path; everything else is a 404."""
    body = encode(photo())
    answers: dict[str, Answer] = {path: answer for path, answer, *_ in _responses()}
    answers |= {f"/picture/{number}": reply(data) for number, (_, data) in enumerate(pictures(large=large))}
    answers |= {
        GOOD: reply(body),
        "noai.test/robots.txt": reply(b"\xef\xbb\xbfUser-agent: CogViewBot\r\nDisallow: /*.png$\r\n"),
        "down.test/robots.txt": reply(status="500 Oops"),
        "tdm.test/.well-known/tdmrep.json": reply(b'[{"location": "/*.png", "tdm-reservation": 1}]'),
        "ai.test/ai.txt": reply(b"User-Agent: *\nDisallow: *.png\n"),
        f"/{HOST}-loop": _moved(f"/{HOST}-loop"),
    }
    return answers | {f"/chain/{number}": _moved(f"/chain/{number + 1}") for number in range(11)}


def web_cases(*, large: bool = True) -> list[Case]:
    """Every URL that is asked for, with what must become of it. large: pictures that take time and memory, too."""
    base = f"http://{HOST}"
    cases = [_case("addresses", url, url, *INSIDE_REASONS) for url in INSIDE if "rebinds" not in url]
    cases.append(_case("addresses", "rebinding", "http://rebinds.lies.test/x", *_REBINDING))
    cases += [_case("urls", name, url, reason) for name, url, reason in _URLS]
    cases += [_case("answers", path, f"{base}{path}", *expected) for path, _, *expected in _responses()]
    cases += [_case("answers", name, f"{base}{path}", *reasons) for name, path, *reasons in _WAYS]
    cases += [_case("policy", url, url, reason) for url, reason in _POLICIES]
    cases += [
        Case(topic="pictures", name=case.name, given=f"{base}/picture/{number}", expected=case.expected)
        for number, (case, _) in enumerate(pictures(large=large))
    ]
    return cases


def reply(body: bytes = b"", *, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; header names are written with underscores, and an empty one is left out."""
    fields = {"Content_Length": str(len(body)), "Connection": "close", **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items() if value)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate that nobody vouches for, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={HOST}", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


# The public address may be nobody, or a gateway that answers for it; that nothing inside was asked is counted apart.
_REBINDING = ("connection_failed", "timeout", "address_refused", "robots_unavailable", "http_404", "http_403")
_URLS = [
    ("a file", "file:///etc/passwd", "scheme_refused"),
    ("ftp", "ftp://example.org/", "scheme_refused"),
    ("gopher", "gopher://example.org/", "scheme_refused"),
    ("data", "data:image/png;base64,AAAA", "scheme_refused"),
    ("javascript", "javascript:alert(1)", "scheme_refused"),
    ("s3", "s3://bucket/key", "scheme_refused"),
    ("a user", "http://user:secret@site.test/good.png", "userinfo_refused"),
    ("a line break", "http://site.test/%0d%0aHost:%20evil", "http_404"),
    ("port 22", "http://site.test:22/", "port_refused"),
    ("port 6379", "http://site.test:6379/", "port_refused"),
    ("64 kB", f"http://site.test/{'a' * 65536}", "url_too_long"),
    ("no host", "http:///x", "url_invalid"),
    ("a control", "http://site.test/a\x01b", "url_invalid"),
    ("a backslash", "http:\\\\site.test\\good.png", "url_invalid"),
    ("a homograph", "http://sіte.test/good.png", "dns_failed"),
    ("nothing", "", "url_empty"),
    ("no address", "nonsense", "scheme_refused"),
]
_WAYS = [
    ("a loop", f"/{HOST}-loop", "redirect_limit"),
    ("a chain of 11", "/chain/0", "redirect_limit"),
    ("nothing there", "/nothing", "http_404"),
    ("a good picture", GOOD, "ok"),
]
_POLICIES = [
    (f"http://noai.test{GOOD}", "robots_disallowed"),
    (f"http://down.test{GOOD}", "robots_unavailable"),
    (f"http://tdm.test{GOOD}", "tdm_reserved"),
    (f"http://ai.test{GOOD}", "ai_txt_disallowed"),
    (f"https://{HOST}{GOOD}", "tls_failed"),
]


def _case(topic: str, name: str, url: str, *expected: str) -> Case:
    return Case(topic=topic, name=name, given=url, expected=expected)


def _moved(location: str) -> bytes:
    return reply(status="302 Found", Location=location)


@cache
def _responses() -> list[tuple[str, Answer, *tuple[str, ...]]]:
    """(path, answer, reasons) of everything that a server may do instead of sending a picture."""
    good, bomb = encode(photo()), gzip.compress(bytes(300_000_000), 1)
    inside = ("http://127.0.0.1/", "http://[::1]/", "http://169.254.169.254/", "http://10.0.0.1/", "http://0x7f.1/")
    return [
        *((f"/moved/{n}", _moved(to), "address_refused") for n, to in enumerate(inside)),
        ("/moved/file", _moved("file:///etc/passwd"), "scheme_refused"),
        ("/moved/redis", _moved(f"http://{HOST}:6379/"), "port_refused"),
        ("/moved/lies", _moved("http://mixed.lies.test/"), "address_refused"),
        ("/endless", _endless, "body_too_large"),
        ("/long", reply(bytes(20_000_000)), "body_too_large"),
        ("/liar/large", reply(b"x", Content_Length="99999999999"), "body_too_large"),
        ("/liar/small", reply(good, Content_Length="100"), "image_truncated", "bad_response"),
        ("/liar/short", reply(good[:-9], Content_Length=str(len(good))), "bad_response"),
        ("/bomb/gzip", reply(bomb, Content_Encoding="gzip"), "body_too_large"),
        ("/bomb/deflate", reply(zlib.compress(bytes(99_000_000)), Content_Encoding="deflate"), "body_too_large"),
        ("/gzip/broken", reply(b"no gzip", Content_Encoding="gzip"), "body_damaged"),
        ("/gzip/brotli", reply(b"x", Content_Encoding="br"), "encoding_refused"),
        ("/slow", _slow, "timeout"),
        ("/silent", _silent, "timeout"),
        ("/headers/endless", _endless_headers, "bad_response"),
        ("/headers/large", b"HTTP/1.1 200 OK\r\nX-Big: " + b"y" * 1_000_000 + b"\r\n\r\n", "bad_response"),
        ("/ssh", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "bad_response"),
        ("/reset", _reset, "connection_failed"),
        ("/cookie", reply(good, Set_Cookie="id=1; Domain=test"), "ok"),
        *((f"/status/{code}", reply(good, status=f"{code} X"), f"http_{code}") for code in (206, 401, 403, 410, 500)),
        *((f"/status/{code}", reply(status=f"{code} X"), f"http_{code}") for code in (204, 304, 503)),
        ("/empty", reply(), "body_empty"),
        *((f"/later/{n}", _busy(wait), "http_429") for n, wait in enumerate(("999999999", "soon", "-5", "9" * 50))),
        ("/later/past", _busy("Wed, 21 Oct 2015 07:28:00 GMT"), "http_429"),
        ("/tag/noai", reply(good, X_Robots_Tag="noai, noimageai"), "robots_tag"),
        ("/tag/ours", reply(good, X_Robots_Tag="CogViewBot: NoIndex"), "robots_tag"),
        ("/tag/theirs", reply(good, X_Robots_Tag="otherbot: noai, noindex"), "ok"),
        ("/tag/valued", reply(good, X_Robots_Tag="noimageai, max-image-preview:large"), "robots_tag"),
        ("/tag/over", reply(good, X_Robots_Tag="unavailable_after: 25 Jun 2010 15:00:00 GMT"), "robots_tag"),
        ("/tag/tdm", reply(good, TDM_Reservation="1"), "tdm_reserved"),
    ]


def _busy(wait: str) -> bytes:
    return reply(status="429 Slow down", Retry_After=wait)


async def _endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while not writer.is_closing():
        writer.write(bytes(65536))
        await writer.drain()


async def _slow(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.1)


async def _silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(20)


async def _endless_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        writer.write(f"X-{number}: {'y' * 1000}\r\n".encode())
        await writer.drain()


async def _reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
