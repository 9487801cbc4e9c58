"""A polite and wary HTTP client: URLs in, bodies or reasons out.

Polite: robots.txt first, a named user agent, few connections and a steady pace for each host. Wary: the address is
checked and pinned, redirects are checked again, time and decompressed bytes are capped, nothing is remembered between
hosts. A fetch never raises for what a server does; it answers with a reason code.
"""

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from cogview.config import runtime_field
from cogview.errors import ConfigError
from cogview.records.opt_out import OPTED_OUT, OptOut
from cogview.records.pace import HostGate
from cogview.records.pair import Unusable
from cogview.records.responses import read_body, retry_after_s
from cogview.records.robots import (
    ROBOTS_BYTES,
    RobotRules,
    parse_reservations,
    parse_robots,
    product_token,
    tag_forbids_training,
)
from cogview.records.site_rules import KnownRules, SiteRules
from cogview.records.urls import (
    AddressPolicy,
    host_and_port,
    is_public_address,
    normalise_url,
    origin_of,
    refuse_url,
)

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_HOSTS = 10_000  # whose pace is remembered from one piece of work to the next
LARGE_BODIES = 4  # large bodies in memory at a time, for each fetcher
OnLarge = Callable[[], Awaitable[None]]
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """Pace, patience and limits of one fetcher.

    user_agent: starts with the product name that robots.txt may address, and should name a contact;
    host_rate: requests per second to one host; host_connections: at once to one host; connections: at once in all;
    sharers: fetchers that work at the same time, who have these limits and a site's crawl delay together (each may have
    one connection to a host, so of more than `host_connections` only the pace is left to bound them);
    total_s, read_s: deadlines of one attempt and of one silence, seconds; max_bytes: of the decompressed body;
    max_attempts: for 429, 5xx, resets and timeouts; max_wait_s: longest pause between two, whatever the server asks;
    ask_ai_txt, ask_tdmrep: ask each site for /ai.txt and /.well-known/tdmrep.json too, and keep to them.
    """

    user_agent: str = "CogViewBot/0.1"
    host_rate: float = runtime_field(4.0)
    host_connections: int = runtime_field(4)
    connections: int = runtime_field(64)
    sharers: int = runtime_field(1)
    total_s: float = 30.0
    read_s: float = 10.0
    max_bytes: int = 16 * 1024 * 1024
    max_redirects: int = 5
    max_attempts: int = 3
    max_wait_s: float = 30.0
    ask_ai_txt: bool = True
    ask_tdmrep: bool = True
    policy: AddressPolicy = field(default_factory=AddressPolicy)

    def __post_init__(self) -> None:
        limits = ("host_rate", "host_connections", "connections", "sharers", "total_s", "read_s", "max_bytes")
        for name in (*limits, "max_attempts"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"fetch.{name}={getattr(self, name)} lets nothing through; give a positive number")
        if not product_token(self.user_agent).isascii() or not product_token(self.user_agent):
            raise ConfigError(
                f"fetch.user_agent={self.user_agent!r} has no name; write it like ExampleBot/1.0 (+contact)"
            )


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A body and what its reader needs to know. url: the last one after redirects."""

    url: str
    body: bytes
    content_type: str


@dataclass(frozen=True, kw_only=True)
class _Transient:
    """An outcome worth another attempt, after `wait_s` if the server said so."""

    outcome: Unusable
    wait_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Redirect:
    location: str


# What the client raises, first match first. Details stay out: they name ports and depend on timing.
_OUTCOMES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Unusable | _Transient], ...] = (
    (aiohttp.ClientConnectorDNSError, Unusable("dns_failed")),
    (aiohttp.ClientSSLError, Unusable("tls_failed")),
    (TimeoutError, _Transient(outcome=Unusable("timeout"))),
    (aiohttp.ClientPayloadError, _Transient(outcome=Unusable("bad_response", "the body broke off"))),
    ((aiohttp.ClientResponseError, ValueError), Unusable("bad_response")),
    (Exception, _Transient(outcome=Unusable("connection_failed"))),
)


class _LargeSlot:
    """One of the few places for large bodies, taken when a body turns out to be one; given back when `hold` is left."""

    def __init__(self, slots: asyncio.Semaphore, hold: AsyncExitStack) -> None:
        self._slots = slots
        self._hold = hold
        self._is_taken = False

    async def take(self) -> None:
        if not self._is_taken:
            self._is_taken = True
            await self._hold.enter_async_context(self._slots)


class AddressRefusedError(OSError):
    """A name that resolves to an address which the policy refuses."""


class PolicyResolver(AbstractResolver):
    """Resolves a name once, refuses it if any of its addresses is not public, and hands over what it looked at."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        override = self._policy.override(host, port)
        if override is not None:
            return [_resolved(host, *override)]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not addresses or not all(is_public_address(address) for address in addresses):
            raise AddressRefusedError(f"{host} does not resolve to public addresses alone")
        return [_resolved(host, address, port) for address in addresses]

    async def close(self) -> None:
        """Nothing is held."""


class Fetcher:
    """An open client; use it as an async context manager. One event loop, any number of tasks."""

    def __init__(self, settings: FetchSettings, *, opt_out: OptOut | None = None) -> None:
        self.settings = settings
        self.opt_out = opt_out or OptOut()
        self._known = KnownRules()
        self._product = product_token(settings.user_agent)
        self._rules: dict[str, asyncio.Task[SiteRules | Unusable]] = {}
        self._hosts: OrderedDict[str, HostGate] = OrderedDict()  # the one asked last comes last
        self._large = asyncio.Semaphore(LARGE_BODIES)
        self._connections = asyncio.Semaphore(max(1, settings.connections // settings.sharers))

    async def __aenter__(self) -> Self:
        settings = self.settings
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=PolicyResolver(settings.policy), limit=settings.connections, ttl_dns_cache=300
            ),
            timeout=aiohttp.ClientTimeout(
                total=settings.total_s, sock_connect=settings.read_s, sock_read=settings.read_s
            ),
            headers={"User-Agent": settings.user_agent, "Accept-Encoding": "gzip, deflate"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy from the environment would connect to addresses that nobody checked
            auto_decompress=False,  # decompressed here, so that the cap holds for what comes out
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._rules.values():
            task.cancel()
        await asyncio.gather(*self._rules.values(), return_exceptions=True)
        await self._session.close()

    def refresh(self) -> None:
        """Between two pieces of work, while nothing is under way: sites that did not answer with their rules, or did so
        a day ago, are asked anew, and hosts not asked for long are forgotten. All others keep connections and pace.
        """
        self._rules.clear()
        while len(self._hosts) > MAX_HOSTS:
            self._hosts.popitem(last=False)

    async def fetch(self, url: str, *, hold: AsyncExitStack | None = None) -> Fetched | Unusable:
        """The body behind a URL if its site lets us have it.

        hold: is left when the body is no longer needed, so that few large bodies are in memory at a time.

        Reasons: those of `normalise_url` and `refuse_url`, opted_out, robots_disallowed, robots_unavailable,
        robots_tag, ai_txt_disallowed, tdm_reserved, http_<status>, dns_failed, address_refused, connection_failed,
        tls_failed, timeout, bad_response, body_empty, body_too_large, body_damaged, encoding_refused, redirect_limit,
        redirect_downgrade.
        """
        async with AsyncExitStack() as own:
            large = _LargeSlot(self._large, hold or own)
            return await self._follow(
                url, cap=self.settings.max_bytes, truncate=False, ask_robots=True, on_large=large.take
            )

    async def call(self, url: str) -> Fetched | Unusable:
        """The answer of a public interface for programs. Its terms hold, and not robots.txt, which speaks of pages."""
        return await self._follow(url, cap=self.settings.max_bytes, truncate=False, ask_robots=False, on_large=_nothing)

    async def rules_of(self, url: str) -> SiteRules | Unusable:
        """The rules of a normalised URL's origin, asked for once."""
        origin = origin_of(url)
        if origin not in self._rules:
            self._rules[origin] = asyncio.create_task(self._load_rules(origin))
        return await asyncio.shield(self._rules[origin])

    async def _load_rules(self, origin: str) -> SiteRules | Unusable:
        rules = self._known.find(origin) or await self._ask_rules(origin)
        if isinstance(rules, SiteRules):
            self._known.add(origin, rules)
            self._gate(origin).slow_down(rules.robots.crawl_delay)
        return rules

    async def _ask_rules(self, origin: str) -> SiteRules | Unusable:
        robots = await self._load_robots(origin)
        if isinstance(robots, Unusable):
            return robots
        self._gate(origin).slow_down(robots.crawl_delay)
        ai = await self._optional(f"{origin}/ai.txt") if self.settings.ask_ai_txt else b""
        tdmrep = await self._optional(f"{origin}/.well-known/tdmrep.json") if self.settings.ask_tdmrep else b""
        return SiteRules(
            robots=robots,
            ai=parse_robots(ai, product=self._product) if ai else None,
            reservations=parse_reservations(tdmrep),
        )

    async def _load_robots(self, origin: str) -> RobotRules | Unusable:
        answer = await self._follow(
            f"{origin}/robots.txt", cap=ROBOTS_BYTES, truncate=True, ask_robots=False, on_large=_nothing
        )
        if isinstance(answer, Fetched):
            return parse_robots(answer.body, product=self._product)
        unavailable = answer.reason.startswith("http_4") and answer.reason != "http_429"
        if unavailable or answer.reason == "body_empty":
            return parse_robots(b"", product=self._product)  # RFC 9309, 2.3.1.3: no rules, everything is allowed
        if answer.reason.startswith("http_"):
            return Unusable("robots_unavailable", answer.reason)  # 2.3.1.4: assume that everything is disallowed
        return answer

    async def _optional(self, url: str) -> bytes:
        """The body of a file that most sites do not have; a page in its place says nothing."""
        answer = await self._small_file(url)
        is_file = isinstance(answer, Fetched) and "html" not in answer.content_type.lower()
        return answer.body if isinstance(answer, Fetched) and is_file else b""

    async def _small_file(self, url: str) -> Fetched | Unusable:
        return await self._follow(url, cap=ROBOTS_BYTES, truncate=True, ask_robots=False, on_large=_nothing)

    async def _follow(
        self, url: str, *, cap: int, truncate: bool, ask_robots: bool, on_large: OnLarge
    ) -> Fetched | Unusable:
        current = normalise_url(url)
        for _ in range(self.settings.max_redirects + 1):
            if isinstance(current, Unusable):
                return current
            refused = await self._refuse(current, ask_robots=ask_robots)
            if refused is not None:
                return refused
            answer = await self._attempts(current, cap=cap, truncate=truncate, on_large=on_large)
            if not isinstance(answer, _Redirect):
                return answer
            target = normalise_url(answer.location, base=current)
            if isinstance(target, str) and current.startswith("https:") and target.startswith("http:"):
                return Unusable("redirect_downgrade")
            current = target
        return Unusable("redirect_limit", f"more than {self.settings.max_redirects}")

    async def _refuse(self, url: str, *, ask_robots: bool) -> Unusable | None:
        refused = refuse_url(url, self.settings.policy)
        if refused is not None or not ask_robots:
            return refused
        if self.opt_out.has_url(url):
            return Unusable(OPTED_OUT)
        rules = await self.rules_of(url)
        return rules if isinstance(rules, Unusable) else rules.refuse(url)

    async def _attempts(
        self, url: str, *, cap: int, truncate: bool, on_large: OnLarge
    ) -> Fetched | Unusable | _Redirect:
        attempt = 1
        while True:
            result = await self._attempt(url, cap=cap, truncate=truncate, on_large=on_large)
            if not isinstance(result, _Transient):
                return result
            if attempt == self.settings.max_attempts:
                return result.outcome
            await asyncio.sleep(self._pause(attempt, asked=result.wait_s))
            attempt += 1

    def _pause(self, attempt: int, *, asked: float | None) -> float:
        """Seconds until the next attempt: what the server asked for, or twice as long each time."""
        pause = 0.5 * 2.0**attempt if asked is None else asked
        return min(max(pause, 0.1), self.settings.max_wait_s)

    async def _attempt(
        self, url: str, *, cap: int, truncate: bool, on_large: OnLarge
    ) -> Fetched | Unusable | _Redirect | _Transient:
        get = self._session.get
        try:
            async with (
                self._gate(url).turn(),
                self._connections,
                get(URL(url, encoded=True), allow_redirects=False) as response,
            ):
                refused = self._judge_head(response)
                if refused is not None:
                    return refused
                body = await read_body(response, cap=cap, truncate=truncate, on_large=on_large)
                if isinstance(body, Unusable):
                    return body
                return Fetched(url=url, body=body, content_type=response.headers.get("Content-Type", ""))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return _outcome_of(error)

    def _judge_head(self, response: aiohttp.ClientResponse) -> Unusable | _Redirect | _Transient | None:
        """What status and headers decide; None if the body is wanted."""
        status, headers = response.status, response.headers
        if status in REDIRECTS and "Location" in headers:
            return _Redirect(location=headers["Location"])
        if status in TRANSIENT_STATUSES:
            return _Transient(outcome=Unusable(f"http_{status}"), wait_s=retry_after_s(headers.get("Retry-After", "")))
        if status != 200:
            return Unusable(f"http_{status}")
        if tag_forbids_training(headers.getall("X-Robots-Tag", []), product=self._product):
            return Unusable("robots_tag")
        if headers.get("TDM-Reservation", "").strip() == "1":
            return Unusable("tdm_reserved")
        return None

    def _gate(self, url: str) -> HostGate:
        host, _ = host_and_port(url)
        if host not in self._hosts:
            limits = self.settings
            self._hosts[host] = HostGate(
                rate=limits.host_rate, connections=limits.host_connections, sharers=limits.sharers
            )
        self._hosts.move_to_end(host)
        return self._hosts[host]


def _resolved(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(
        hostname=host, host=address, port=port, family=family, proto=socket.IPPROTO_TCP, flags=socket.AI_NUMERICHOST
    )


def _outcome_of(error: Exception) -> Unusable | _Transient:
    if isinstance(error, aiohttp.ClientConnectorDNSError) and isinstance(error.os_error, AddressRefusedError):
        return Unusable("address_refused", "its name resolves to an address that is not public")
    return next(outcome for kinds, outcome in _OUTCOMES if isinstance(error, kinds))


async def _nothing() -> None:
    """A capped small file needs no place of its own."""
