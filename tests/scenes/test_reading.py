"""Scene reading: right on drawn scenes, right on worn ones, and calm about anything else."""

import io
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cogview.scenes.reading import ATTRIBUTES, compare, read_scene
from cogview.scenes.scene import BACKGROUND_RGB, BACKGROUNDS, Scene, Shape, corpus, draw_scene

# Wear like that of a reconstruction from tokens: softer, noisier, with colours that bleed or drift.


def blurred(image, *, radius):
    return image.filter(ImageFilter.GaussianBlur(radius))


def compressed(image, *, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def noisy(image, rng, *, sigma):
    noise = rng.normal(0, sigma, (64, 64, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def bled(image, *, share):
    coarse = image.resize((8, 8), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
    return Image.blend(image, coarse, share)


def drifted(image, rng):
    drift = np.asarray(image) * rng.uniform(0.92, 1.05) + rng.uniform(-12, 12, 3)
    return Image.fromarray(np.clip(drift, 0, 255).astype(np.uint8))


def coarsened(image, *, side):
    return image.resize((side, side), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)


def wavy(image, rng):
    """Shift each of the 8x8 token cells by up to a pixel, as a codebook without the exact phase would."""
    pixels = np.asarray(image)
    worn = pixels.copy()
    for y in range(0, 64, 8):
        for x in range(0, 64, 8):
            dy, dx = rng.integers(-1, 2, 2)
            worn[y : y + 8, x : x + 8] = np.roll(pixels, (dy, dx), axis=(0, 1))[y : y + 8, x : x + 8]
    return Image.fromarray(worn)


WEAR = {
    "blur 1.2": lambda image, rng: blurred(image, radius=1.2),
    "blur 1.5": lambda image, rng: blurred(image, radius=1.5),
    "jpeg 30": lambda image, rng: compressed(image, quality=30),
    "noise 12": lambda image, rng: noisy(image, rng, sigma=12),
    "bleeding": lambda image, rng: bled(image, share=0.5),
    "drift": drifted,
    "a third of the resolution": lambda image, rng: coarsened(image, side=21),
    "wavy": wavy,
    "wavy, blurred and noisy": lambda image, rng: noisy(blurred(wavy(image, rng), radius=1.0), rng, sigma=10),
}


def accuracies(scenes, images):
    scores = defaultdict(list)
    for scene, image in zip(scenes, images, strict=True):
        for name, value in compare(scene, read_scene(image)).items():
            scores[name].append(value)
    return {name: np.mean(values) for name, values in scores.items()}


def scene(*, background="white", **shapes):
    return Scene(background=background, shapes=tuple(shapes.values()))


RED_CIRCLE = Shape(kind="circle", colour="red", size="small", position="left")
BLUE_STAR = Shape(kind="star", colour="blue", size="small", position="right")


def test_drawn_scenes_are_read_right():
    scenes = [row.scene for row in corpus(11, 2500, two_shape_share=0.4, held_out_fraction=0.0)]
    scores = accuracies(scenes, [draw_scene(scene) for scene in scenes])
    assert set(scores) == {*ATTRIBUTES, "position", "count"}
    assert min(scores.values()) >= 0.995, scores


@pytest.mark.parametrize("wear", WEAR)
def test_worn_scenes_are_read_right(wear):
    rng = np.random.default_rng(5)
    scenes = [row.scene for row in corpus(12, 400, two_shape_share=0.3)]
    scores = accuracies(scenes, [WEAR[wear](draw_scene(scene), rng) for scene in scenes])
    assert min(scores.values()) >= 0.97, scores


def test_larger_images_are_read_at_their_own_scale():
    scenes = [row.scene for row in corpus(13, 100)]
    for side in (32, 128, 256):
        scores = accuracies(scenes, [draw_scene(scene, image_size=side) for scene in scenes])
        assert min(scores.values()) >= 0.99, (side, scores)


def test_centres_are_found_within_a_pixel():
    for row in corpus(14, 200):
        for drawn, read in zip(row.scene.shapes, read_scene(draw_scene(row.scene)).shapes, strict=True):
            assert np.abs(np.subtract(drawn.centre, read.centre)).max() < 1.0


def test_arrays_read_like_images():
    image = draw_scene(scene(a=RED_CIRCLE, b=BLUE_STAR))
    assert read_scene(np.asarray(image)) == read_scene(image)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_scene_has_no_shapes(background):
    assert read_scene(Image.new("RGB", (64, 64), BACKGROUND_RGB[background])) == Scene(background=background, shapes=())


@pytest.mark.parametrize("shape", [(64, 64, 3), (64, 64), (64, 64, 4), (1, 1, 3), (7, 200, 3), (0, 0, 3), (9, 9, 1)])
def test_noise_is_read_without_complaint(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reading = read_scene(pixels)
    assert reading.background in BACKGROUNDS
    assert len(reading.shapes) <= 6


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "I;16", "F"])
def test_any_mode_of_image_is_read(mode):
    image = Image.new(mode, (50, 70))
    assert read_scene(image).shapes == ()


def test_extreme_patterns_are_read_without_complaint():
    rows, columns = np.indices((64, 64))
    patterns = [(rows + columns) % 2, rows % 2, (rows // 8 + columns // 8) % 2, rows > 31, columns > 3, rows == columns]
    for pattern in patterns:
        reading = read_scene((pattern * 255).astype(np.uint8))
        assert reading.background in BACKGROUNDS


def test_compare_gives_each_attribute_its_own_answer():
    expected = scene(background="gray", a=RED_CIRCLE)
    read = scene(background="white", a=Shape(kind="circle", colour="blue", size="large", position="left"))
    assert compare(expected, read) == {
        "background": 0.0,
        "shape": 1.0,
        "colour": 0.0,
        "size": 0.0,
        "position": 1.0,
        "count": 1.0,
    }


def test_compare_matches_shapes_in_any_order():
    expected, swapped = scene(a=RED_CIRCLE, b=BLUE_STAR), scene(a=BLUE_STAR, b=RED_CIRCLE)
    assert set(compare(expected, swapped).values()) == {1.0}


def test_compare_counts_a_missing_shape_as_wrong():
    scores = compare(scene(a=RED_CIRCLE, b=BLUE_STAR), scene(a=BLUE_STAR))
    assert (scores["shape"], scores["colour"], scores["size"], scores["position"]) == (0.5, 0.5, 0.5, 0.5)
    assert (scores["background"], scores["count"]) == (1.0, 0.0)
    assert compare(scene(a=RED_CIRCLE), scene())["shape"] == 0.0


def test_compare_reports_a_surplus_shape():
    scores = compare(scene(a=RED_CIRCLE), scene(a=RED_CIRCLE, b=BLUE_STAR))
    assert scores["count"] == 0.0
    assert scores["shape"] == 1.0


def test_a_wrong_drawing_scores_by_chance_alone():
    scenes = [row.scene for row in corpus(15, 600, two_shape_share=0.0)]
    others = [row.scene for row in corpus(16, 600, two_shape_share=0.0)]
    scores = accuracies(scenes, [draw_scene(other) for other in others])
    assert scores["shape"] < 1 / 6 + 0.06
    assert scores["colour"] < 1 / 8 + 0.06
    assert scores["background"] < 1 / 4 + 0.07
