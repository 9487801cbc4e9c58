"""Scene reading: an analytic oracle that reads a scene back from any image.

In: an image, drawn by `scene.py`, decoded from tokens or sampled from a model. Out: the scene it shows, or as much of
one as it shows, and a score against the scene that was asked for. No network and no training data: the reader knows
only the palette and the outlines of `scene.py`, so a score cannot drift with a learned judge.

How it reads: the border tells the background; what differs from it falls into connected components; the core of a
component tells its colour; its coverage, centred and scaled by its own moments, is compared with every kind; the scale
tells the size, the centre the position.
"""

from itertools import permutations
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cogview.scenes.outlines import fit_kind
from cogview.scenes.scene import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    CENTRE,
    COLOUR_RGB,
    COLOURS,
    POSITIONS,
    RADIUS,
    Colour,
    Scene,
    Shape,
)

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
ScalarT = TypeVar("ScalarT", np.bool_, np.float32)

SIDE = 64  # images are read at this size
MIN_CONTRAST = 45.0  # RGB distance from the background; noise of sigma 12 stays below it after a 3x3 mean
MIN_AREA = 70  # pixels; the thinnest kind, a small star, covers 260
MAX_SHAPES = 3  # one more than any scene has, so that a surplus is seen
FADING = 0.15  # a soft reconstruction of a thin shape keeps at least about 0.85 of its colour
LONGEST_SINGLE = 40  # pixels; no small shape is longer, and a large one is about as wide as high
SIZE_BOUNDARY = (RADIUS["small"] * RADIUS["large"]) ** 0.5

ATTRIBUTES = ("background", "shape", "colour", "size")


def read_scene(image: Image.Image | NDArray[np.uint8]) -> Scene:
    """Read any image; what cannot be read is left out (`shapes` may be empty), the background is the best guess.

    `image` is a Pillow image of any mode and size, or a uint8 array [height, width] or [height, width, 1, 3 or 4].
    `jitter` of a shape is its offset from the named position, as in a drawn scene.
    """
    pixels = _pixels(image)
    ground = _ground_colour(pixels)
    shapes = [_read_shape(pixels, ground=ground, part=part) for part in _components(pixels, ground=ground)]
    shapes.sort(key=lambda shape: shape.centre[0] + shape.centre[1])
    return Scene(background=BACKGROUNDS[_nearest(ground, _BACKGROUND_TABLE)], shapes=tuple(shapes))


def compare(expected: Scene, reading: Scene) -> dict[str, float]:
    """Score a reading: the fraction of right answers per attribute, in [0, 1].

    `background`, `shape`, `colour` and `size` are the attributes that every caption names (`ATTRIBUTES`); `position`
    and `count` (whether the number of shapes is right) stand beside them. Shapes are matched to the expected ones by
    the assignment with most right answers; a missing shape is wrong in everything.
    """
    missing: tuple[None, ...] = (None,) * len(expected.shapes)
    candidates: tuple[Shape | None, ...] = (*reading.shapes, *missing)
    assignments = permutations(candidates, len(expected.shapes))
    scores = max(
        ([_score(*pair) for pair in zip(expected.shapes, found, strict=True)] for found in assignments), key=_total
    )
    number = max(1, len(expected.shapes))
    return {
        "background": float(expected.background == reading.background),
        "shape": sum(score.shape for score in scores) / number,
        "colour": sum(score.colour for score in scores) / number,
        "size": sum(score.size for score in scores) / number,
        "position": sum(score.position for score in scores) / number,
        "count": float(len(expected.shapes) == len(reading.shapes)),
    }


class _Score(NamedTuple):
    shape: bool
    colour: bool
    size: bool
    position: bool


def _score(expected: Shape, found: Shape | None) -> _Score:
    if found is None:
        return _Score(False, False, False, False)
    return _Score(
        shape=expected.kind == found.kind,
        colour=expected.colour == found.colour,
        size=expected.size == found.size,
        position=expected.position == found.position,
    )


def _total(scores: list[_Score]) -> int:
    return sum(sum(score) for score in scores)


# --- pixels and background


_BACKGROUND_TABLE = np.array([BACKGROUND_RGB[name] for name in BACKGROUNDS], dtype=np.float32)
_COLOUR_TABLE = np.array([COLOUR_RGB[name] for name in COLOURS], dtype=np.float32)


def _pixels(image: Image.Image | NDArray[np.uint8]) -> Floats:
    """Return the image as float32 [64, 64, 3] of 0..255; an image without pixels is black."""
    if not isinstance(image, Image.Image):
        image = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
        image = Image.fromarray(np.ascontiguousarray(image)) if image.size else Image.new("RGB", (SIDE, SIDE))
    if 0 in image.size:
        image = Image.new("RGB", (SIDE, SIDE))
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX if min(image.size) > SIDE else Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def _ground_colour(pixels: Floats) -> Floats:
    """The median colour [3] of a border two pixels wide: shapes keep clear of it."""
    border = (pixels[:2], pixels[-2:], pixels[2:-2, :2], pixels[2:-2, -2:])
    return _median(np.concatenate([part.reshape(-1, 3) for part in border]))


def _median(colours: Floats) -> Floats:
    """The median of each channel of [n, 3]; much quicker than `numpy.median` at this size."""
    middle: Floats = np.sort(colours, axis=0)[len(colours) // 2]
    return middle


def _nearest(colour: Floats, table: Floats) -> int:
    return int(np.argmin(((table - colour) ** 2).sum(axis=1)))


# --- components


class _Part(NamedTuple):
    """A component: its own pixels, and the pixels of every other one, both bool [64, 64]."""

    own: Mask
    others: Mask


def _components(pixels: Floats, *, ground: Floats) -> list[_Part]:
    """Return the largest connected regions that stand out from the background, largest first."""
    contrast = _mean3(np.sqrt(((pixels - ground) ** 2).sum(axis=2)))
    # Half of the local maximum is where a blurred edge was, whatever the contrast of the shape.
    foreground = contrast > np.maximum(MIN_CONTRAST, 0.5 * _spread(contrast, reach=3))
    labels, count = _label(foreground)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    largest = [int(label) for label in np.argsort(-areas)[:MAX_SHAPES] if areas[label] >= MIN_AREA]
    masks = [half for label in largest for half in _halves(labels == label)]
    return [_Part(own=mask, others=foreground & ~mask) for mask in masks]


def _halves(mask: Mask) -> list[Mask]:
    """Cut a component that is as long as two small shapes at its waist: a blur has joined them."""
    for axis in (0, 1):
        (low, high), (other_low, other_high) = _extent(mask, axis=axis), _extent(mask, axis=1 - axis)
        if high - low < 1.45 * (other_high - other_low) or high - low < LONGEST_SINGLE:
            continue
        third = (high - low) // 3
        profile = mask.sum(axis=axis)[low + third : high - third]
        waist = low + third + int(np.argmin(profile))
        before = np.arange(SIDE) < waist
        first = mask & (before if axis == 0 else before[:, None])
        return [first, mask & ~first]
    return [mask]


def _extent(mask: Mask, *, axis: int) -> tuple[int, int]:
    """The first and one past the last index with a pixel: columns for axis 0, rows for axis 1."""
    hit = np.flatnonzero(mask.any(axis=axis))
    return int(hit[0]), int(hit[-1]) + 1


def _label(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Number the 4-connected regions of a mask from 1: runs of each row, joined with the runs they touch above."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]
    parent = list(range(len(rows)))
    # Runs come sorted by row, so the ones in the row above lie within a window that `searchsorted` finds.
    above_from = np.searchsorted(rows, rows - 1, side="left").tolist()
    above_to = np.searchsorted(rows, rows - 1, side="right").tolist()
    start_of, end_of = starts.tolist(), ends.tolist()
    for run, (low, high) in enumerate(zip(above_from, above_to, strict=True)):
        for other in range(low, high):
            if start_of[other] < end_of[run] and start_of[run] < end_of[other]:
                parent[_root(parent, run)] = _root(parent, other)
    numbers: dict[int, int] = {}
    labels = np.zeros((height, width), dtype=np.int32)
    for run, row in enumerate(rows.tolist()):
        labels[row, start_of[run] : end_of[run]] = numbers.setdefault(_root(parent, run), len(numbers) + 1)
    return labels, len(numbers)


def _root(parent: list[int], item: int) -> int:
    while parent[item] != item:
        parent[item] = parent[parent[item]]
        item = parent[item]
    return item


def _mean3(values: Floats) -> Floats:
    """The mean over 3x3 pixels; beyond the edge counts as zero."""
    rows = values.copy()
    rows[1:] += values[:-1]
    rows[:-1] += values[1:]
    total = rows.copy()
    total[:, 1:] += rows[:, :-1]
    total[:, :-1] += rows[:, 1:]
    return total / np.float32(9)


def _spread(values: NDArray[ScalarT], *, reach: int) -> NDArray[ScalarT]:
    """The maximum over a square of 2 x reach + 1 pixels around each pixel."""
    rows = values.copy()
    for step in range(1, reach + 1):
        np.maximum(rows[step:], values[:-step], out=rows[step:])
        np.maximum(rows[:-step], values[step:], out=rows[:-step])
    result = rows.copy()
    for step in range(1, reach + 1):
        np.maximum(result[:, step:], rows[:, :-step], out=result[:, step:])
        np.maximum(result[:, :-step], rows[:, step:], out=result[:, :-step])
    return result


# --- one shape


def _read_shape(pixels: Floats, *, ground: Floats, part: _Part) -> Shape:
    colour = _core_colour(pixels[part.own], ground=ground)
    coverage = _coverage(pixels, ground=ground, colour=colour, part=part)
    kind, (x, y), radius = fit_kind(coverage)
    position = min(POSITIONS, key=lambda name: (CENTRE[name][0] - x) ** 2 + (CENTRE[name][1] - y) ** 2)
    return Shape(
        kind=kind,
        colour=_name_colour(colour, ground=ground),
        size="large" if radius > SIZE_BOUNDARY else "small",
        position=position,
        jitter=(x - CENTRE[position][0], y - CENTRE[position][1]),
    )


def _core_colour(colours: Floats, *, ground: Floats) -> Floats:
    """The median of the half that is furthest from the background: edges are mixtures, the core is not."""
    distance = ((colours - ground) ** 2).sum(axis=1)
    return _median(colours[distance >= np.sort(distance)[len(distance) // 2]])


def _name_colour(colour: Floats, *, ground: Floats) -> Colour:
    """The colour whose fill, faded towards the background by up to FADING, comes nearest."""
    axis = ground - _COLOUR_TABLE
    faded = ((colour - _COLOUR_TABLE) * axis).sum(axis=1) / np.maximum((axis**2).sum(axis=1), 1.0)
    nearest = _COLOUR_TABLE + np.clip(faded, 0.0, FADING)[:, None] * axis
    return COLOURS[_nearest(colour, nearest)]


def _coverage(pixels: Floats, *, ground: Floats, colour: Floats, part: _Part) -> Floats:
    """How far each pixel has gone from the background to the shape's colour, 0..1, near the component alone."""
    axis = colour - ground
    mixture = (pixels - ground) @ (axis / max(float(axis @ axis), 1.0))
    coverage = np.clip((mixture - 0.2) / 0.6, 0.0, 1.0)
    (top, bottom), (left, right) = _extent(part.own, axis=1), _extent(part.own, axis=0)
    near = (slice(max(0, top - 2), bottom + 2), slice(max(0, left - 2), right + 2))
    foreign = _spread(part.others, reach=2) & ~part.own
    kept = np.zeros(coverage.shape, dtype=np.float32)
    kept[near] = np.where(foreign[near], 0.0, coverage[near])
    return kept
