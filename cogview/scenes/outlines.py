"""Kinds by their outline: fits a drawn kind, its centre and its radius to the coverage of one shape.

In: how much of each pixel a shape covers. Out: the kind that explains it best, and where and how large it is. The
coverage is centred and scaled by its own moments, so one small table of templates serves every place and size.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from cogview.scenes.scene import KINDS, Kind, shape_mask

Floats = NDArray[np.float32]

PATCH = 28  # pixels of a normalized shape
REACH = 2.4  # half the side of a patch, in root-mean-square radii of the shape


class Fit(NamedTuple):
    """A kind, with the centre (x, y) and the radius that `scene.draw_scene` would have drawn it with, in pixels."""

    kind: Kind
    centre: tuple[float, float]
    radius: float


def fit_kind(coverage: Floats) -> Fit:
    """Fit every kind to a coverage [height, width] of 0..1 and return the best."""
    x, y, scale = _moments(coverage)
    kind, factor, shift = _best_template(_patch(coverage, x=x, y=y, scale=scale))
    unit = _unit_shape(kind)
    radius = factor * scale / unit.scale
    centre = (x + shift[0] * scale - unit.x * radius, y + shift[1] * scale - unit.y * radius)
    return Fit(kind, centre, radius)


def _moments(coverage: Floats) -> tuple[float, float, float]:
    """The centroid (x, y) and the root-mean-square radius of a coverage, in pixels."""
    height, width = coverage.shape
    by_column, by_row = coverage.sum(axis=0), coverage.sum(axis=1)
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    total = max(float(by_row.sum()), 1e-6)
    x, y = float(by_column @ columns) / total, float(by_row @ rows) / total
    spread = float(by_column @ (columns - x) ** 2 + by_row @ (rows - y) ** 2) / total
    return x, y, max(spread, 1.0) ** 0.5


def _patch(coverage: Floats, *, x: float, y: float, scale: float) -> Floats:
    """Cut a square of REACH root-mean-square radii around (x, y) and bring it to PATCH x PATCH pixels."""
    half = REACH * scale
    margin = int(half) + 2  # Pillow's box must lie inside the image
    height, width = coverage.shape
    padded = Image.fromarray(coverage).crop((-margin, -margin, width + margin, height + margin))
    box = (x - half + margin, y - half + margin, x + half + margin, y + half + margin)
    return np.asarray(padded.resize((PATCH, PATCH), Image.Resampling.BILINEAR, box=box), dtype=np.float32)


class _Unit(NamedTuple):
    """Centroid and root-mean-square radius of a kind drawn with radius 1 around (0, 0)."""

    x: float
    y: float
    scale: float


class _Template(NamedTuple):
    """What a row of the template table shows: a kind, a little too large or small, a little off the centroid."""

    kind: Kind
    factor: float
    shift: tuple[float, float]


@lru_cache(maxsize=len(KINDS))
def _unit_shape(kind: Kind) -> _Unit:
    coverage = np.asarray(shape_mask(kind, centre=(32.0, 32.0), radius=24.0, image_size=256), dtype=np.float32)
    x, y, scale = _moments(coverage)
    return _Unit(x=(x / 4 - 32.0) / 24.0, y=(y / 4 - 32.0) / 24.0, scale=scale / 4 / 24.0)


def _best_template(patch: Floats) -> _Template:
    """The template with the smallest squared distance to the patch."""
    templates, table, energies = _template_table()
    return templates[int(np.argmin(energies - 2 * (table @ patch.ravel())))]


@lru_cache(maxsize=1)
def _template_table() -> tuple[list[_Template], Floats, Floats]:
    """All kinds at several scales, shifts and blurs: the templates, their pixels [n, PATCH * PATCH], their energies.

    Moments of a worn shape are a little off, hence scales and shifts; a reconstruction is soft, hence blurs.
    """
    templates, rows = [], []
    offsets = (-0.12, 0.0, 0.12)
    for kind, factor, dx, dy in product(KINDS, (0.9, 1.0, 1.1), offsets, offsets):
        drawn = _draw_template(kind, factor=factor, shift=(dx, dy))
        for blur in (0.0, 1.0, 2.0):
            templates.append(_Template(kind, factor, (dx, dy)))
            rows.append(np.asarray(drawn.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32).ravel())
    table = np.stack(rows) / np.float32(255)
    return templates, table, np.square(table).sum(axis=1)


def _draw_template(kind: Kind, *, factor: float, shift: tuple[float, float]) -> Image.Image:
    """Draw a kind as `_patch` would cut it, its root-mean-square radius `factor` times the one of the patch."""
    unit = _unit_shape(kind)
    pixel_of_scale = 64.0 / (2 * REACH)  # one root-mean-square radius, in the units of `shape_mask`
    radius = factor * pixel_of_scale / unit.scale
    centre = (32.0 + shift[0] * pixel_of_scale - unit.x * radius, 32.0 + shift[1] * pixel_of_scale - unit.y * radius)
    return shape_mask(kind, centre=centre, radius=radius, image_size=PATCH)
