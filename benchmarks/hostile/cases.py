"""One bad input with what must become of it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """topic: such as "addresses"; expected: a reason code (several where the system decides), or "ok"."""

    topic: str
    name: str
    expected: tuple[str, ...]
    given: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A case and what became of it."""

    case: Case
    found: str

    @property
    def is_right(self) -> bool:
        return self.found in self.case.expected


def wrong(verdicts: Sequence[Verdict]) -> list[str]:
    """A sentence for each case that went otherwise."""
    return [
        f"{v.case.topic}: {v.case.name[:80]}: {v.found!r}, expected {' or '.join(v.case.expected)}"
        for v in verdicts
        if not v.is_right
    ]
