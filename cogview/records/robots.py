"""What a site says about being read by machines: robots.txt (RFC 9309), ai.txt, tdmrep.json, robots tags.

tdmrep.json and the tdm-reservation header are the TDM Reservation Protocol, with which publishers in the EU reserve
their rights in text and data mining; ai.txt has the form of a robots.txt and speaks of training alone.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from protego import Protego

ROBOTS_BYTES = 500 * 1024  # RFC 9309, 2.5: at least this much must be parsed
TRAINING_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_UNAVAILABLE_AFTER = re.compile(r"unavailable_after\s*:\s*(.+)", re.IGNORECASE)
MAX_RESERVATIONS = 10_000
# Directives with a value of their own: in `noai, max-image-preview: none` nothing is a robot's name.
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview", "tdm-reservation"})


class RobotRules:
    """The rules of one origin. Asked with a URL, answers for the product token that it was made for."""

    def __init__(self, text: str, *, product: str) -> None:
        self._rules = Protego.parse(text)
        self._product = product

    def allows(self, url: str) -> bool:
        return bool(self._rules.can_fetch(url, self._product))

    @property
    def crawl_delay(self) -> float:
        """Seconds that the site wants between two requests; 0 if it says nothing."""
        return float(self._rules.crawl_delay(self._product) or 0.0)

    @property
    def sitemaps(self) -> tuple[str, ...]:
        return tuple(self._rules.sitemaps)


@dataclass(frozen=True, kw_only=True)
class Reservations:
    """The rules of a tdmrep.json in their order: (pattern of paths, whether rights are reserved there)."""

    rules: tuple[tuple[re.Pattern[str], bool], ...] = ()

    def reserves(self, url: str) -> bool:
        """Whether the first rule that matches this URL reserves the right to mine it."""
        parts = urlsplit(url)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        return next((reserved for pattern, reserved in self.rules if pattern.match(path)), False)


def parse_robots(body: bytes, *, product: str) -> RobotRules:
    """The rules in the body of a robots.txt or ai.txt; an empty body allows everything."""
    return RobotRules(body[:ROBOTS_BYTES].decode("utf-8-sig", errors="replace"), product=product)


def parse_reservations(body: bytes) -> Reservations:
    """The rules in the body of a tdmrep.json; what is no such file reserves nothing."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return Reservations()
    entries = document if isinstance(document, list) else [document]
    rules = []
    for entry in entries[:MAX_RESERVATIONS]:
        location = entry.get("location") if isinstance(entry, dict) else None
        if isinstance(location, str):
            rules.append((_path_pattern(location), str(entry.get("tdm-reservation")).strip() == "1"))
    return Reservations(rules=tuple(rules))


def product_token(user_agent: str) -> str:
    """`ExampleBot` of `ExampleBot/1.0 (+https://example.org/bot)`: the name that robots.txt files address."""
    return user_agent.split("/", 1)[0].strip()


def tag_forbids_training(values: Iterable[str], *, product: str) -> bool:
    """Whether X-Robots-Tag headers, or the contents of robots meta tags, forbid using what they came with.

    A part of a value may open with the name of the robot that it and what follows speak to: in
    `otherbot: noindex, noai, ourbot: nofollow` nothing concerns us.
    """
    for value in values:
        if _is_over(value):
            return True
        is_ours = True
        for part in value.split(","):
            head, colon, rest = part.partition(":")
            name = head.strip().lower()
            if colon and name in _VALUED:
                continue
            if colon:
                is_ours = name == product.lower()
            directive = (rest if colon else part).strip().lower()
            if is_ours and directive in TRAINING_DIRECTIVES:
                return True
    return False


def _is_over(value: str) -> bool:
    """Whether an `unavailable_after` of this value lies in the past."""
    found = _UNAVAILABLE_AFTER.search(value)
    try:
        moment = parsedate_to_datetime(found.group(1)) if found else None
    except (ValueError, OverflowError):
        return False
    if moment is None:
        return False
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) < datetime.now(UTC)


def _path_pattern(location: str) -> re.Pattern[str]:
    """A location as in robots.txt: the start of a path, `*` for anything, `$` for the end."""
    is_whole = location.endswith("$")
    path = location.removesuffix("$")
    if "://" in path:
        path = urlsplit(path).path or "/"
    wild = ".*".join(re.escape(part) for part in re.split(r"\*+", path if path.startswith(("/", "*")) else f"/{path}"))
    return re.compile(wild + (r"\Z" if is_whole else ""), re.DOTALL)
