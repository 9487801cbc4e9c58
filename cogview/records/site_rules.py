"""What a site as a whole says about its URLs, and the memory of it."""

import time
from dataclasses import dataclass, field

from cogview.records.pair import Unusable
from cogview.records.robots import Reservations, RobotRules

MAX_AGE_S = 24 * 3600.0  # RFC 9309, 2.4: not longer
MAX_ORIGINS = 100_000


@dataclass(frozen=True, kw_only=True)
class SiteRules:
    """What the site at one origin says about all of its URLs. ai: its ai.txt."""

    robots: RobotRules
    ai: RobotRules | None = None
    reservations: Reservations = field(default_factory=Reservations)

    def refuse(self, url: str) -> Unusable | None:
        """Why this normalised URL of the site must be left alone, or None."""
        if not self.robots.allows(url):
            return Unusable("robots_disallowed")
        if self.ai is not None and not self.ai.allows(url):
            return Unusable("ai_txt_disallowed")
        return Unusable("tdm_reserved", "tdmrep.json") if self.reservations.reserves(url) else None


class KnownRules:
    """The rules of many origins for a day at most, so that a site is not asked anew by every shard.

    Bounded: of more than `MAX_ORIGINS` the ones learned first are forgotten.
    """

    def __init__(self) -> None:
        self._rules: dict[str, tuple[float, SiteRules]] = {}

    def find(self, origin: str) -> SiteRules | None:
        """What is known of an origin and still counts."""
        learned, rules = self._rules.get(origin, (0.0, None))
        return rules if rules is not None and time.monotonic() - learned < MAX_AGE_S else None

    def add(self, origin: str, rules: SiteRules) -> None:
        """Remember what an origin has just said; what is known already keeps its age."""
        if self.find(origin) is None:
            self._rules.pop(origin, None)
            self._rules[origin] = (time.monotonic(), rules)
        if len(self._rules) > MAX_ORIGINS:
            del self._rules[next(iter(self._rules))]
