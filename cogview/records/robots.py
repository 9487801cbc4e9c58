"""What a site says about being read by machines: robots.txt (RFC 9309) and robots tags."""

from collections.abc import Iterable

from protego import Protego

ROBOTS_BYTES = 500 * 1024  # RFC 9309, 2.5: at least this much must be parsed
TRAINING_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})


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


def parse_robots(body: bytes, *, product: str) -> RobotRules:
    """The rules in the body of a robots.txt; an empty body allows everything."""
    return RobotRules(body[:ROBOTS_BYTES].decode("utf-8-sig", errors="replace"), product=product)


def product_token(user_agent: str) -> str:
    """`ExampleBot` of `ExampleBot/1.0 (+https://example.org/bot)`: the name that robots.txt files address."""
    return user_agent.split("/", 1)[0].strip()


def tag_forbids_training(values: Iterable[str], *, product: str) -> bool:
    """Whether X-Robots-Tag headers, or the contents of robots meta tags, forbid using what they came with.

    A value may open with the name of the robot that it speaks to: `otherbot: noindex` does not concern us.
    """
    for value in values:
        head, colon, rest = value.partition(":")
        named = bool(colon) and head.strip().lower() != "unavailable_after"
        if named and head.strip().lower() != product.lower():
            continue
        words = {word.strip().lower() for word in (rest if named else value).split(",")}
        if words & TRAINING_DIRECTIVES:
            return True
    return False
