"""What a rule says of an image, a caption or a pair."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Kept:
    """Nothing against it."""


@dataclass(frozen=True)
class Rejected:
    """A reason code; `detail` is the value that broke the rule, `rule` the name of the rule."""

    reason: str
    detail: str = ""
    rule: str = ""


KEPT = Kept()
Verdict = Kept | Rejected


def first_rejection(value: Any, rules: Iterable[partial[Verdict] | Callable[[Any], Verdict]]) -> Verdict:
    """Ask the rules in order; the first rejection, with its rule's name, or KEPT."""
    for rule in rules:
        verdict = rule(value)
        if isinstance(verdict, Rejected):
            function = rule.func if isinstance(rule, partial) else rule
            return Rejected(verdict.reason, verdict.detail, function.__name__)
    return KEPT
