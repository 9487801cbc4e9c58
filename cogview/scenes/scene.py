"""Captioned procedural scenes: one or two coloured shapes on a plain background.

In: a seed, or any generator with `random()`. Out: `Scene` values, their images, and captions in English and
Chinese. A slice of the (kind, colour, size, background) combinations is held out: the corpus never shows it, the
evaluation asks for it, and so measures composition instead of memory.

Lengths are in units of a 64-pixel image and scale with `image_size`. Radii are sized for a tokenizer that sees 8x8
pixels per token: a small shape must span three tokens or more to survive quantization.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar, get_args

from PIL import Image, ImageDraw

from cogview.errors import ConfigError
from cogview.scenes import wording

T = TypeVar("T")

Kind = Literal["circle", "square", "triangle", "cross", "ring", "star"]
Colour = Literal["red", "orange", "yellow", "green", "cyan", "blue", "purple", "brown"]
Background = Literal["white", "black", "gray", "blue"]
Size = Literal["small", "large"]
Position = Literal["centre", "left", "right", "top", "bottom"]
Language = Literal["en", "zh"]

KINDS: tuple[Kind, ...] = get_args(Kind)
COLOURS: tuple[Colour, ...] = get_args(Colour)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
SIZES: tuple[Size, ...] = get_args(Size)
POSITIONS: tuple[Position, ...] = get_args(Position)

# No two colours that may meet are closer than 100 in RGB, so a blurred or quantized fill still reads as itself.
COLOUR_RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (228, 26, 40),
    "orange": (255, 128, 0),
    "yellow": (255, 232, 32),
    "green": (24, 150, 56),
    "cyan": (0, 214, 208),
    "blue": (32, 64, 224),
    "purple": (160, 48, 190),
    "brown": (124, 70, 24),
}
BACKGROUND_RGB: dict[Background, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (12, 12, 12),
    "gray": (160, 160, 160),
    "blue": (160, 206, 255),  # a sky blue, far from the deep blue of shapes
}

UNIT_SIDE = 64.0  # the side of the image in which the lengths below are given
RADIUS: dict[Size, float] = {"small": 13.0, "large": 24.0}
CENTRE: dict[Position, tuple[float, float]] = {
    "centre": (32.0, 32.0),
    "left": (16.5, 32.0),
    "right": (47.5, 32.0),
    "top": (32.0, 16.5),
    "bottom": (32.0, 47.5),
}
JITTER = (-1.0, 0.0, 1.0)  # whole pixels at 64, so that a tokenizer meets the same edges again and again
MAX_REDRAWS = 100  # for a scene that the corpus does not have yet; there are about 9,300 of one shape
HELD_OUT_FRACTION = 0.1
HELD_OUT_SALT = 280  # chosen so that no kind, colour, size or background is missing from the tenth that is held out
SUPERSAMPLING = 4
PAIRS: tuple[tuple[Position, Position], ...] = (("left", "right"), ("top", "bottom"))


def _regular(corners: int, *, radii: tuple[float, ...], shift: float) -> tuple[tuple[float, float], ...]:
    """Corners clockwise from the top at `radii` in turn, moved down by `shift` so that the box is centred."""
    turn = 2 * math.pi / corners
    reach = [radii[corner % len(radii)] for corner in range(corners)]
    return tuple((r * math.sin(turn * i), shift - r * math.cos(turn * i)) for i, r in enumerate(reach))


# Outlines in units of the radius. They reach a little past it where they are thin, so that all kinds look equally big.
RING_HOLE = 0.52
POLYGONS: dict[Kind, tuple[tuple[float, float], ...]] = {
    "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": _regular(3, radii=(1.18,), shift=0.295),
    "star": _regular(10, radii=(1.14, 0.46), shift=0.11),
    "cross": tuple(
        (0.34 * u, 0.34 * v)
        for u, v in (
            *((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)),
            *((1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)),
        )
    ),
}


class UniformSource(Protocol):
    """What this module asks of a generator; `random.Random` and `numpy.random.Generator` both fit."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One filled shape. `jitter` is its (x, y) offset from its position, in 64ths of the image side."""

    kind: Kind
    colour: Colour
    size: Size
    position: Position
    jitter: tuple[float, float] = (0.0, 0.0)

    @property
    def centre(self) -> tuple[float, float]:
        """The (x, y) centre in 64ths of the image side, jitter included."""
        x, y = CENTRE[self.position]
        return x + self.jitter[0], y + self.jitter[1]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and its shapes, in reading order: left before right, top before bottom."""

    background: Background
    shapes: tuple[Shape, ...]


class CaptionedScene(NamedTuple):
    """A row of the corpus; its `number` and the seed of the corpus determine the rest."""

    number: int
    scene: Scene
    english: str
    chinese: str


class Prompt(NamedTuple):
    """A caption to draw, and the scene that a right drawing shows."""

    scene: Scene
    caption: str
    language: Language


def corpus(
    seed: int, count: int, *, two_shape_share: float = 0.25, held_out_fraction: float = HELD_OUT_FRACTION
) -> Iterator[CaptionedScene]:
    """Yield `count` captioned scenes, all different, none with a held-out combination; longer ones begin alike.

    Raises ConfigError if a share is not in [0, 1], or if no combination is left to draw.
    """
    _check_share("held_out_fraction", held_out_fraction)
    if held_out_fraction > 0.9:
        raise ConfigError(f"held_out_fraction={held_out_fraction} leaves hardly a scene to train on; use at most 0.9")
    seen: set[Scene] = set()
    for index in range(count):
        rng = random.Random(f"scene:{seed}:{index}")
        scene, redraws = random_scene(rng, two_shape_share=two_shape_share), 0
        while is_held_out(scene, fraction=held_out_fraction) or (scene in seen and redraws < MAX_REDRAWS):
            # The number of shapes stays, or the share would drift as scenes of one shape run out.
            scene = random_scene(rng, two_shape_share=float(len(scene.shapes) == 2))
            redraws += 1
        seen.add(scene)
        english, chinese = captions(scene, rng=rng)
        yield CaptionedScene(index, scene, english, chinese)


def held_out_prompts(
    n: int, *, seed: int, two_shape_share: float = 0.0, held_out_fraction: float = HELD_OUT_FRACTION
) -> Iterator[Prompt]:
    """Yield `n` prompts, English and Chinese in turn, whose first shape is a combination that the corpus lacks.

    Raises ConfigError if a share is not in [0, 1], or if nothing is held out.
    """
    _check_share("held_out_fraction", held_out_fraction)
    if held_out_fraction < 0.02:
        raise ConfigError(f"held_out_fraction={held_out_fraction} holds out hardly a combination; use at least 0.02")
    for index in range(n):
        rng = random.Random(f"prompt:{seed}:{index}")
        scene = random_scene(rng, two_shape_share=two_shape_share)
        while not _combination_held_out(scene.shapes[0], scene.background, fraction=held_out_fraction):
            # The number of shapes stays: two small shapes meet a held-out combination at another rate than one.
            scene = random_scene(rng, two_shape_share=float(len(scene.shapes) == 2))
        english, chinese = captions(scene, rng=rng)
        yield Prompt(scene, english, "en") if index % 2 == 0 else Prompt(scene, chinese, "zh")


def is_held_out(scene: Scene, *, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether any shape of the scene is a held-out (kind, colour, size, background) combination.

    The choice is a hash of the names: the same on every machine, and a larger fraction holds out a superset.
    """
    return any(_combination_held_out(shape, scene.background, fraction=fraction) for shape in scene.shapes)


def random_scene(rng: UniformSource, *, two_shape_share: float = 0.25) -> Scene:
    """Draw a scene; a share of `two_shape_share` has two small shapes that differ in kind and colour.

    Raises ConfigError if the share is not in [0, 1].
    """
    _check_share("two_shape_share", two_shape_share)
    background = _choose(rng, BACKGROUNDS)
    if rng.random() < two_shape_share:
        return Scene(background=background, shapes=_two_shapes(rng))
    size = _choose(rng, SIZES)
    position = _choose(rng, POSITIONS) if size == "small" else "centre"
    return Scene(
        background=background,
        shapes=(_shape(rng, kind=_choose(rng, KINDS), colour=_choose(rng, COLOURS), size=size, position=position),),
    )


def draw_scene(scene: Scene, *, image_size: int = 64) -> Image.Image:
    """Draw a scene as an antialiased RGB image of `image_size` pixels a side.

    Raises ConfigError if `image_size` is below 8.
    """
    if image_size < 8:
        raise ConfigError(f"image_size={image_size} cannot show a scene; use at least 8, better 64")
    image = Image.new("RGB", (image_size, image_size), BACKGROUND_RGB[scene.background])
    for shape in scene.shapes:
        mask = shape_mask(shape.kind, centre=shape.centre, radius=RADIUS[shape.size], image_size=image_size)
        image.paste(COLOUR_RGB[shape.colour], (0, 0), mask)
    return image


def shape_mask(kind: Kind, *, centre: tuple[float, float], radius: float, image_size: int = 64) -> Image.Image:
    """Return the coverage of a shape as an `L` image, 255 inside; `centre` and `radius` in 64ths of the side."""
    scale = SUPERSAMPLING * image_size / UNIT_SIDE
    x, y, r = centre[0] * scale, centre[1] * scale, radius * scale
    mask = Image.new("L", (SUPERSAMPLING * image_size, SUPERSAMPLING * image_size), 0)
    draw = ImageDraw.Draw(mask)
    if kind in ("circle", "ring"):
        draw.ellipse(_disc(x, y, r), fill=255)
        if kind == "ring":
            draw.ellipse(_disc(x, y, RING_HOLE * r), fill=0)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in POLYGONS[kind]], fill=255)
    return mask.reduce(SUPERSAMPLING)


def _disc(x: float, y: float, r: float) -> tuple[float, float, float, float]:
    # The ellipse of Pillow includes its far edge.
    return x - r, y - r, x + r - 1, y + r - 1


def captions(scene: Scene, *, rng: UniformSource) -> tuple[str, str]:
    """Return an English and a Chinese caption, each from a random template.

    Every caption names the size, colour and kind of each shape and the background. With two shapes it also says which
    is where; with one, some templates do (`names_position`).
    """
    english_templates, chinese_templates = _templates(scene)
    english = _choose(rng, english_templates).format(
        a=_english_name(scene.shapes[0]),
        b=_english_name(scene.shapes[-1]),
        background=scene.background,
        position=wording.ENGLISH[scene.shapes[0].position],
    )
    chinese = _choose(rng, chinese_templates).format(
        a=_chinese_name(scene.shapes[0]),
        b=_chinese_name(scene.shapes[-1]),
        background=wording.CHINESE[scene.background],
        position=wording.CHINESE[scene.shapes[0].position],
    )
    return english, chinese


def names_position(caption: str) -> bool:
    """Whether a caption of this module says where the shapes are."""
    return any(words in caption for words in wording.POSITION_WORDS)


def _templates(scene: Scene) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if len(scene.shapes) == 1:
        return wording.ENGLISH_ONE, wording.CHINESE_ONE
    if scene.shapes[0].position == "left":
        return wording.ENGLISH_BESIDE, wording.CHINESE_BESIDE
    return wording.ENGLISH_ABOVE, wording.CHINESE_ABOVE


def _english_name(shape: Shape) -> str:
    return f"{shape.size} {shape.colour} {shape.kind}"


def _chinese_name(shape: Shape) -> str:
    return "".join(wording.CHINESE[word] for word in (shape.size, shape.colour, shape.kind))


def _two_shapes(rng: UniformSource) -> tuple[Shape, Shape]:
    first_position, second_position = _choose(rng, PAIRS)
    first_kind, first_colour = _choose(rng, KINDS), _choose(rng, COLOURS)
    second_kind, second_colour = first_kind, first_colour
    while second_kind == first_kind and second_colour == first_colour:
        second_kind, second_colour = _choose(rng, KINDS), _choose(rng, COLOURS)
    return (
        _shape(rng, kind=first_kind, colour=first_colour, size="small", position=first_position),
        _shape(rng, kind=second_kind, colour=second_colour, size="small", position=second_position),
    )


def _shape(rng: UniformSource, *, kind: Kind, colour: Colour, size: Size, position: Position) -> Shape:
    jitter = (_choose(rng, JITTER), _choose(rng, JITTER))
    return Shape(kind=kind, colour=colour, size=size, position=position, jitter=jitter)


def _combination_held_out(shape: Shape, background: Background, *, fraction: float) -> bool:
    name = f"{HELD_OUT_SALT}: {shape.kind} {shape.colour} {shape.size} {background}"
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _choose(rng: UniformSource, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name}={value} is not a share; use a number from 0 to 1")
