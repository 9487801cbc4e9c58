"""The fields of a request: JSON in, checked values out, or a refusal that names the field, its value and the remedy.

Nothing here knows of HTTP but for the status code that a refusal carries.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_SHOWN = 60  # characters of a refused value


class RefusedError(Exception):
    """A request that is not served. status: of HTTP; retry_after: seconds after which it may be, 0 for never."""

    def __init__(self, status: int, message: str, *, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def read_fields(body: bytes, *, known: tuple[str, ...], example: str) -> Mapping[str, Any]:
    """The fields of a JSON object. RefusedError for anything else, and for a field that is not known.

    example: of an object that is understood, for the sentence.
    """

    def refuse(name: str) -> None:
        raise RefusedError(422, f"{name} is not a number; give one")

    try:
        content = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON ({type(error).__name__}); send an object") from error
    if not isinstance(content, dict):
        raise RefusedError(400, f"the body is JSON, but not an object; send one such as {example}")
    unknown = next((name for name in content if name not in known), None)
    if unknown is not None:
        raise RefusedError(422, f"{shown(unknown)} is no field; there are {', '.join(known)}")
    return content


def whole_number(fields: Mapping[str, Any], name: str, *, lowest: int, highest: int, default: int | None = None) -> int:
    """A whole number within bounds. Without a default it has to be there."""
    value = fields.get(name, default)
    if type(value) is not int or not lowest <= value <= highest:  # True is an int, too
        raise RefusedError(422, f"{name}={shown(value)}: give a whole number from {lowest} to {highest}")
    return value


def real_number(fields: Mapping[str, Any], name: str, *, default: float, highest: float) -> float:
    """A number from 0 to `highest`."""
    value = fields.get(name, default)
    is_number = type(value) in (int, float) and abs(value) < 1e6 and math.isfinite(value)
    if not is_number or not 0 <= value <= highest:
        raise RefusedError(422, f"{name}={shown(value)}: give a number from 0 to {highest:g}")
    return float(value)


def shown(value: Any) -> str:
    """A value for a sentence: short, on one line, nothing in it that a terminal obeys."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
