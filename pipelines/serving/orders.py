"""What a client may ask for: JSON in, checked orders out, or a refusal that names the field, its value and the remedy.

Nothing here knows of HTTP but for the status code that a refusal carries.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.masks import Box
from pipelines.serving.fields import RefusedError, read_fields, real_number, shown, whole_number

MAX_SEED = 2**48  # exact in JSON, in JavaScript and in any table
MAX_TEMPERATURE = 10.0
EXAMPLE = '{"prompt": "a red circle"}'
SIDES = ("top", "left", "bottom", "right")  # of a box


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the models and the server allow. grid: codes along a side; sampling: where a request says nothing."""

    grid: int
    num_codes: int
    sampling: SamplingConfig
    max_prompt: int
    max_candidates: int


@dataclass(frozen=True, kw_only=True)
class DrawOrder:
    """Pictures of one prompt, one for each seed; is_streamed: shown row by row while they are drawn."""

    prompt: str
    seeds: tuple[int, ...]
    sampling: SamplingConfig
    is_streamed: bool = False


@dataclass(frozen=True, kw_only=True)
class MagnifyOrder:
    """A picture by its codes, uint16 [grid, grid], to be drawn again at twice the size."""

    prompt: str
    seed: int
    codes_hw: npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class CaptionOrder:
    """A picture to be described, uint8 [H, W, 3], square and of the model's size."""

    pixels_HWC: npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class CompleteOrder:
    """A part of a picture, uint8 [H, W, 3], to be drawn anew."""

    prompt: str
    seed: int
    box: Box
    pixels_HWC: npt.NDArray[np.uint8]


def read_draw_order(body: bytes, *, limits: Limits, is_streamed: bool) -> DrawOrder:
    """`{"prompt": ..., "candidates": 1, "seed": ..., "temperature": ..., "top_k": ..., "top_p": ...}`.

    The seeds of several candidates follow each other, so each can be had again alone. Without a seed one is drawn.
    """
    fields = read_fields(body, example=EXAMPLE, known=("prompt", "candidates", "seed", "temperature", "top_k", "top_p"))
    candidates = whole_number(fields, "candidates", default=1, lowest=1, highest=limits.max_candidates)
    seed = whole_number(fields, "seed", default=secrets.randbelow(MAX_SEED), lowest=0, highest=MAX_SEED - 1)
    default, codes = limits.sampling, limits.num_codes
    sampling = SamplingConfig(
        temperature=real_number(fields, "temperature", default=default.temperature, highest=MAX_TEMPERATURE),
        top_k=whole_number(fields, "top_k", default=default.top_k or codes, lowest=1, highest=codes),
        top_p=real_number(fields, "top_p", default=default.top_p, highest=1.0),
    )
    prompt = _prompt(fields, limits=limits)
    return DrawOrder(prompt=prompt, seeds=seeds_from(seed, candidates), sampling=sampling, is_streamed=is_streamed)


def read_magnify_order(body: bytes, *, limits: Limits) -> MagnifyOrder:
    """`{"prompt": ..., "codes": [...], "seed": 0}`, with the codes of a picture as it was drawn."""
    fields = read_fields(body, example=EXAMPLE, known=("prompt", "codes", "seed"))
    codes, wanted = fields.get("codes"), limits.grid**2
    if not isinstance(codes, list) or len(codes) != wanted:
        found = f"{len(codes)} of them" if isinstance(codes, list) else shown(codes)
        raise RefusedError(422, f"codes: give the {wanted} codes of a picture, not {found}")
    wrong = next((code for code in codes if type(code) is not int or not 0 <= code < limits.num_codes), None)
    if wrong is not None:
        raise RefusedError(422, f"codes: {shown(wrong)} is none; they are whole numbers below {limits.num_codes}")
    return MagnifyOrder(
        prompt=_prompt(fields, limits=limits),
        seed=whole_number(fields, "seed", default=0, lowest=0, highest=MAX_SEED - 1),
        codes_hw=np.array(codes, np.uint16).reshape(limits.grid, limits.grid),
    )


def read_complete_order(words: str, pixels_HWC: npt.NDArray[np.uint8], *, limits: Limits) -> CompleteOrder:
    """`{"prompt": ..., "box": [top, left, bottom, right], "seed": ...}`, the box in shares of the picture."""
    fields = read_fields(words.encode(), example=EXAMPLE, known=("prompt", "box", "seed"))
    box = fields.get("box")
    is_box = isinstance(box, list) and len(box) == len(SIDES) and all(type(share) in (int, float) for share in box)
    if not is_box:
        raise RefusedError(422, f"box={shown(box)}: give top, left, bottom and right, four numbers from 0 to 1")
    assert isinstance(box, list)
    try:
        checked = Box(**dict(zip(SIDES, map(float, box), strict=True)))
    except (ConfigError, OverflowError) as error:
        raise RefusedError(422, str(error)) from error
    return CompleteOrder(
        prompt=_prompt(fields, limits=limits),
        seed=whole_number(fields, "seed", default=secrets.randbelow(MAX_SEED), lowest=0, highest=MAX_SEED - 1),
        box=checked,
        pixels_HWC=pixels_HWC,
    )


def seeds_from(seed: int, number: int) -> tuple[int, ...]:
    """As many seeds as candidates, one after the other."""
    return tuple((seed + place) % MAX_SEED for place in range(number))


def _prompt(fields: Mapping[str, Any], *, limits: Limits) -> str:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RefusedError(422, f"prompt={shown(prompt)}: say what to draw")
    if len(prompt) > limits.max_prompt:
        raise RefusedError(413, f"prompt: {len(prompt)} characters are too many; at most {limits.max_prompt} are read")
    return prompt.strip()
