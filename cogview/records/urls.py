"""URLs of unknown origin in, canonical ASCII URLs out; and the policy on which addresses may be connected to.

The policy has two halves. `normalise_url` and `refuse_url` look at the spelling: scheme, user information, port,
addresses written as numbers. `is_public_address` looks at what a name resolved to; the fetcher connects to exactly the
address that was looked at, so a second DNS answer cannot change it.
"""

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from cogview.config import runtime_field
from cogview.errors import ConfigError
from cogview.records.pair import Unusable

MAX_URL_LENGTH = 4096
DEFAULT_PORTS = {"http": 80, "https": 443}

# A backslash in front of the query reads as a slash to some parsers and as part of a name to others.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]|^[^?#]*\\")
_ENDPOINT = re.compile(r"^\S+:\d{1,5}$")
_SAFE = "/%:@!$&'()*+,;=~-._"
_HOST = re.compile(r"^(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*$")
_ENDS_IN_NUMBER = re.compile(r"(^|\.)(\d+|0x[0-9a-f]*)$")
_LOCAL_NAMES = ("localhost", "local", "internal", "intranet", "home.arpa", "lan", "corp")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_REFUSED_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",
        "2002::/16",  # 6to4: carries an IPv4 address inside
        "3fff::/20",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "168.63.129.16/32",  # the host agent of one cloud, a public number inside its private network
    )
)


@dataclass(frozen=True, kw_only=True)
class AddressPolicy:
    """Where a fetch may connect to.

    resolve: "name:port" -> "address:port"; such a name is served from there and from nowhere else, whatever the address
    (as with curl's --resolve). It is how a site on this machine is allowed, by name, one at a time;
    ports: what other hosts may be asked on.
    """

    resolve: Mapping[str, str] = runtime_field(default=MISSING, default_factory=dict)
    ports: tuple[int, ...] = (80, 443)

    def __post_init__(self) -> None:
        for name, target in self.resolve.items():
            if not _ENDPOINT.match(name) or not _ENDPOINT.match(target):
                raise ConfigError(f"policy.resolve: {name!r} -> {target!r} must read name:port -> address:port")

    def override(self, host: str, port: int) -> tuple[str, int] | None:
        """The address and port given for this host, or None."""
        target = self.resolve.get(f"{host}:{port}")
        if target is None:
            return None
        address, _, target_port = target.rpartition(":")
        return address.strip("[]"), int(target_port)


def normalise_url(url: str, *, base: str = "") -> str | Unusable:
    """The URL in canonical ASCII: lower-case host, no fragment, no default port, percent-encoded path and query.

    Reasons: url_empty, url_too_long, url_invalid, scheme_refused, userinfo_refused.
    """
    url = url.strip()
    misspelt = _refuse_spelling(url)
    if misspelt is not None:
        return misspelt
    try:
        parts = urlsplit(urljoin(base, url) if base else url)
        port = parts.port
    except ValueError:
        return Unusable("url_invalid", "cannot be parsed")
    if parts.scheme not in DEFAULT_PORTS:
        return Unusable("scheme_refused", parts.scheme[:16])
    if "@" in parts.netloc:
        return Unusable("userinfo_refused")
    host = _canonical_host(parts.hostname or "")
    if host is None or port == 0:
        return Unusable("url_invalid", "host or port")
    default = port is None or port == DEFAULT_PORTS[parts.scheme]
    netloc = host if default else f"{host}:{port}"
    path = quote(parts.path or "/", safe=_SAFE)
    query = quote(parts.query, safe=f"{_SAFE}?")
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def refuse_url(url: str, policy: AddressPolicy) -> Unusable | None:
    """Why a normalised URL must not be asked for, from its spelling alone; None if only its addresses decide.

    Reasons: address_refused, port_refused.
    """
    host, port = host_and_port(url)
    if policy.override(host, port) is not None:
        return None
    if port not in policy.ports:
        return Unusable("port_refused", str(port))
    literal = _literal_address(host)
    if literal is not None:
        return None if is_public_address(literal) else Unusable("address_refused", "not a public address")
    if _ENDS_IN_NUMBER.search(host):
        return Unusable("address_refused", "a number that is no address")
    if "." not in host or any(host == name or host.endswith(f".{name}") for name in _LOCAL_NAMES):
        return Unusable("address_refused", "a local name")
    return None


def host_and_port(url: str) -> tuple[str, int]:
    """Host (an IPv6 address without brackets) and port of a normalised URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or DEFAULT_PORTS[parts.scheme]


def origin_of(url: str) -> str:
    """Scheme, host and port of a normalised URL: what a robots.txt speaks for."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def is_public_address(address: str) -> bool:
    """Whether this is a unicast address of the open internet.

    Everything that can lead back inside is not: private, loopback, link-local, shared (CGNAT), reserved, multicast, and
    IPv6 forms that carry an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64).
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if parsed.version == 6 and parsed not in _GLOBAL_UNICAST:
        return False
    if not parsed.is_global or parsed.is_multicast or parsed.is_reserved:
        return False
    return not any(parsed.version == network.version and parsed in network for network in _REFUSED_NETWORKS)


def _refuse_spelling(url: str) -> Unusable | None:
    if not url:
        return Unusable("url_empty")
    if len(url) > MAX_URL_LENGTH:
        return Unusable("url_too_long", f"{len(url)} characters")
    if _FORBIDDEN.search(url):
        return Unusable("url_invalid", "control character, backslash or surrogate")
    return None


def _canonical_host(host: str) -> str | None:
    host = host.lower()
    if "%" in host:  # a scope names a network card of this machine
        return None
    try:
        if ":" in host:
            return f"[{ipaddress.IPv6Address(host)}]"
        ascii_host = host if host.isascii() else host.encode("idna").decode("ascii").lower()
    except ValueError:  # also what a name that cannot be encoded raises
        return None
    ascii_host = ascii_host.removesuffix(".")
    return ascii_host if _HOST.match(ascii_host) else None


def _literal_address(host: str) -> str | None:
    """The address that a host spells out: `127.1`, `0x7f.1`, `2130706433` and `0177.0.0.1` are all 127.0.0.1."""
    if ":" in host:
        return host
    if not _ENDS_IN_NUMBER.search(host):
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None
