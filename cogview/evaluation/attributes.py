"""Attribute accuracy: does a picture show what its caption asked for?

In: pictures and the scenes they should show. Out: for each attribute the share of right answers, with the number of
answers and a 95 % interval. The judge is the analytic reader of `cogview.scenes.reading`, so the score exists for the
demo corpus only, and it cannot be flattered by a model that was trained on the same pictures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from cogview.errors import SchemaError
from cogview.scenes.reading import ATTRIBUTES, compare, read_scene
from cogview.scenes.scene import Scene, Shape

PER_SHAPE = ("shape", "colour", "size", "position")
REPORTED = (*ATTRIBUTES, "position", "count")  # `mean` is over ATTRIBUTES, which every caption names
RESAMPLES = 2000
Z_95 = 1.959964


@dataclass(frozen=True, kw_only=True)
class Score:
    """A share of right answers in [0, 1], the number `n` of answers, and its 95 % interval."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class JudgedPicture:
    """What the reader made of one picture. `marks`: attribute -> fraction right, as `compare` returns it."""

    expected: Scene
    marks: Mapping[str, float]
    language: str = ""

    @property
    def mean(self) -> float:
        """The fraction right over the attributes that every caption names."""
        return sum(self.marks[name] for name in ATTRIBUTES) / len(ATTRIBUTES)


def judge(picture: Image.Image, *, expected: Scene, language: str = "") -> JudgedPicture:
    """Read a picture of any size and compare it with the scene that was asked for."""
    return JudgedPicture(expected=expected, marks=compare(expected, read_scene(picture)), language=language)


def score_attributes(judged: Sequence[JudgedPicture], *, seed: int = 0) -> dict[str, Score]:
    """Score every attribute, and their `mean` over shape, colour, size and background.

    Single attributes get Wilson's interval over their answers (a scene of two shapes gives two); the mean gets a
    bootstrap interval over pictures, because the answers about one picture hang together. No pictures, no scores.
    """
    if not judged:
        return {}
    right_PA, asked_PA = _answers(judged)
    scores = {
        name: wilson(right=float(right_PA[:, column].sum()), n=int(asked_PA[:, column].sum()))
        for column, name in enumerate(REPORTED)
    }
    return {"mean": _bootstrap_mean(right_PA, asked_PA, seed=seed), **scores}


def score_groups(judged: Sequence[JudgedPicture], *, seed: int = 0) -> dict[str, dict[str, Score]]:
    """The scores of all pictures, of one-shape and two-shape scenes, of each language; empty groups are left out."""
    groups: dict[str, Callable[[JudgedPicture], bool]] = {
        "all": lambda picture: True,
        "one shape": lambda picture: len(picture.expected.shapes) == 1,
        "two shapes": lambda picture: len(picture.expected.shapes) == 2,
        "English": lambda picture: picture.language == "en",
        "Chinese": lambda picture: picture.language == "zh",
    }
    scored = {
        name: score_attributes([picture for picture in judged if belongs(picture)], seed=seed)
        for name, belongs in groups.items()
    }
    return {name: scores for name, scores in scored.items() if scores}


def scene_to_json(scene: Scene) -> str:
    """A scene as one line of JSON, to travel in a table."""
    return json.dumps(asdict(scene), ensure_ascii=False, separators=(",", ":"))


def scene_from_json(text: str) -> Scene:
    """The inverse of `scene_to_json`. SchemaError on anything else."""
    try:
        plain = json.loads(text)
        shapes = tuple(Shape(**{**shape, "jitter": tuple(shape["jitter"])}) for shape in plain["shapes"])
        return Scene(background=plain["background"], shapes=shapes)
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"not a scene: {text[:80]!r} ({error}); samples must come from the generate job") from error


def wilson(*, right: float, n: int) -> Score:
    """Wilson's score interval: it stays inside [0, 1] and is honest where all answers are right."""
    share = right / n
    centre = share + Z_95**2 / (2 * n)
    reach = Z_95 * (share * (1 - share) / n + Z_95**2 / (4 * n * n)) ** 0.5
    scale = 1 + Z_95**2 / n
    # At 0 and 1 the bound equals the share, up to rounding.
    low, high = min(share, (centre - reach) / scale), max(share, (centre + reach) / scale)
    return Score(value=share, n=n, low=max(0.0, low), high=min(1.0, high))


def _answers(judged: Sequence[JudgedPicture]) -> tuple[np.ndarray, np.ndarray]:
    """Right and asked answers, each [pictures, attributes]. A picture's share times its shapes is its right answers."""
    asked_PA = np.array(
        [[len(picture.expected.shapes) if name in PER_SHAPE else 1 for name in REPORTED] for picture in judged]
    )
    marks_PA = np.array([[picture.marks[name] for name in REPORTED] for picture in judged])
    return marks_PA * asked_PA, asked_PA


def _bootstrap_mean(right_PA: np.ndarray, asked_PA: np.ndarray, *, seed: int) -> Score:
    columns = [REPORTED.index(name) for name in ATTRIBUTES]
    right_PA, asked_PA = right_PA[:, columns], asked_PA[:, columns]
    value = float((right_PA.sum(axis=0) / asked_PA.sum(axis=0)).mean())
    pictures = len(right_PA)
    generator = np.random.default_rng(seed)
    means_R = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        drawn_P = generator.integers(pictures, size=pictures)
        means_R[resample] = (right_PA[drawn_P].sum(axis=0) / asked_PA[drawn_P].sum(axis=0)).mean()
    low, high = np.quantile(means_R, (0.025, 0.975))
    return Score(value=value, n=pictures, low=float(low), high=float(high))
