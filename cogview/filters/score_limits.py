"""Limits on scores that came with a pair: many tables bring the verdicts of classifiers (`punsafe`, `pwatermark`,
`similarity`, `AESTHETIC_SCORE`), and whatever a user computes outside can be brought along in a column of its own.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cogview.errors import ConfigError
from cogview.filters.verdicts import KEPT, Rejected, Verdict

_LIMIT = re.compile(r"^\s*([^\s<>=]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*$")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, kw_only=True)
class ScoreLimit:
    """`punsafe<=0.5`: what must hold of a field."""

    field: str
    sign: str
    value: float


def read_limit(text: str) -> ScoreLimit:
    """`"punsafe<=0.5"` as a limit. ConfigError for anything else."""
    match = _LIMIT.match(text)
    try:
        value = float(match[3]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or math.isnan(value):
        raise ConfigError(f"rules.limits: {text!r} is no limit; write one such as punsafe<=0.5 or similarity>=0.28")
    return ScoreLimit(field=match[1], sign=match[2], value=value)


def within_limit(extra: Mapping[str, Any], *, limit: ScoreLimit) -> Verdict:
    """Reject pairs whose field breaks the limit. A pair without the field, or without a number in it, is kept."""
    value = extra.get(limit.field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return KEPT
    return (
        KEPT if _HOLDS[limit.sign](value, limit.value) else Rejected("score_beyond_limit", f"{limit.field} {value:g}")
    )
