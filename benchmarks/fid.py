"""Is the Frechet distance right, in order, and flat in memory?

Command: make verify NAME=fid [ARGS="--pictures 200 --rows 100000 --dim 2048"]
On photographs, with the extractor that needs no weights: a set is at no distance from itself; the stronger the blur or
the noise, the larger the distance; the value is that of the textbook's formula with scipy's root. Then means and
covariances of features as wide as Inception's are streamed from files, for ten thousand rows and for all, and the
memory of the process is read from the kernel. The photographs lie beside the checkout, in ../shared/data/photos.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.processes import high_water_mark
from cogview.evaluation.blur import RADII, pixels_of
from cogview.evaluation.feature_rows import FeatureRows, Features
from cogview.evaluation.features import SeededExtractor
from cogview.evaluation.frechet import frechet_distance, frechet_estimate, moments_of
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair, Unusable
from cogview.records.tars import read_foreign_tar
from cogview.tokenizers.pixels import square_pixels

BARS = (
    Bar(figure="distance of a set from itself", op="<=", value=1e-6),
    Bar(figure="steps of blur at which it grows", op="==", value=1.0),
    Bar(figure="steps of noise at which it grows", op="==", value=1.0),
    Bar(figure="relative difference from the textbook", op="<=", value=1e-3),
    Bar(figure="memory of all rows / of 10,000", op="<=", value=1.1),
)
DATA = Path("../shared/data/photos")
NOISES = (2, 4, 8, 16, 32)
IMAGE_SIZE = 128
BATCH = 50
PART_ROWS = 2000
FEW_ROWS = 10_000


def measure(*, data: Path, pictures: int, rows: int, dim: int, seed: int) -> Figures:
    """Memory first, while the process is small; then the photographs."""
    torch.set_num_threads(1)
    figures: dict[str, float | int | str] = dict(memory_figures(rows=rows, dim=dim, seed=seed))
    photos = list(itertools.islice(read_photos(data), pictures))
    figures |= {"photographs": len(photos), "pixels": IMAGE_SIZE}
    clean = extract(photos)
    figures["extractor"] = SeededExtractor().facts.name
    figures["distance of a set from itself"] = frechet_distance(moments_of(clean), moments_of(clean))
    blurs = {radius: extract(photos, radius=radius) for radius in RADII[1:]}
    noises = {strength: extract(photos, noise=strength, seed=seed) for strength in NOISES}
    for name, sets in (("blur", blurs), ("noise", noises)):
        distances = {level: frechet_distance(moments_of(changed), moments_of(clean)) for level, changed in sets.items()}
        say(f"{name}: {distances}")
        figures |= {f"distance at {name} {level}": distance for level, distance in distances.items()}
        grows = [after > before for before, after in itertools.pairwise([0.0, *distances.values()])]
        figures[f"steps of {name} at which it grows"] = sum(grows) / len(grows)
    estimate = frechet_estimate(blurs[1], clean, seed=seed)
    figures |= {"interval at blur 1, low": estimate.low, "interval at blur 1, high": estimate.high}
    figures["relative difference from the textbook"] = relative_difference(blurs[4], clean)
    halves = [FeatureRows([part]) for part in np.array_split(shuffled(clean, seed=seed), 2)]
    figures["distance between two halves"] = frechet_distance(*map(moments_of, halves))
    return figures


def memory_figures(*, rows: int, dim: int, seed: int) -> Iterator[tuple[str, float]]:
    """The high-water mark after 10,000 rows and after all of them, and the time that all take."""
    with tempfile.TemporaryDirectory(prefix="cogview-fid-") as name:
        paths = list(write_features(Path(name), rows=rows, dim=dim, seed=seed))
        for _ in range(2):  # what is kept for the next batch is part of what a batch takes
            moments_of(FeatureRows(paths[: FEW_ROWS // PART_ROWS]))
        few = high_water_mark()
        say(f"{FEW_ROWS} rows: {few / 2**20:.0f} MiB")
        started = time.monotonic()
        moments = moments_of(FeatureRows(paths))
        seconds = time.monotonic() - started
        yield "rows streamed", moments.count
        yield "features of a row", dim
        yield "MiB on disk", sum(path.stat().st_size for path in paths) / 2**20
        yield "MiB of memory", high_water_mark() / 2**20
        yield "memory of all rows / of 10,000", high_water_mark() / few if few else 0.0
        yield "seconds for all rows", seconds


def write_features(folder: Path, *, rows: int, dim: int, seed: int) -> Iterator[Path]:
    """Files of random features, as shards of an evaluation leave them."""
    generator = np.random.default_rng(seed)
    for number in range(-(-rows // PART_ROWS)):
        path = folder / f"{number:05d}.npy"
        np.save(path, generator.standard_normal((min(PART_ROWS, rows - number * PART_ROWS), dim), dtype=np.float32))
        yield path


def read_photos(data: Path) -> Iterator[Image.Image]:
    """Middle squares of the photographs. UnmeasuredError where there are none."""
    tars = sorted(data.glob("*.tar"))
    if not tars:
        raise UnmeasuredError(f"{data} holds no tars of photographs; name a folder that does with --data")
    for tar in tars:
        for sample in read_foreign_tar(tar):
            image = decode_image(sample.image_bytes) if isinstance(sample, TextImagePair) else None
            if image is not None and not isinstance(image, Unusable):
                yield Image.fromarray(square_pixels(image, image_size=IMAGE_SIZE))


def extract(photos: Sequence[Image.Image], *, radius: float = 0, noise: float = 0, seed: int = 0) -> FeatureRows:
    """Features of all photographs under a blur, or with noise of this deviation."""
    extractor, parts = SeededExtractor(), []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(photos), BATCH):
        pixels = pixels_of(photos[start : start + BATCH], radius=radius)
        parts.append(extractor(with_noise(pixels, noise, generator=generator)).features_BD)
    return FeatureRows(parts)


def with_noise(pixels: Tensor, strength: float, *, generator: torch.Generator) -> Tensor:
    """Pixels with Gaussian noise of this deviation, in steps of 255."""
    if not strength:
        return pixels
    noise = torch.randn(pixels.shape, generator=generator) * strength
    return (pixels.float() + noise).round().clamp(0, 255).to(torch.uint8)


def shuffled(rows: FeatureRows, *, seed: int) -> Features:
    """All rows in a random order: the data come sorted by what they show."""
    return rows.take(np.random.default_rng(seed).permutation(len(rows)))


def relative_difference(rows: FeatureRows, reference: FeatureRows) -> float:
    """Of our distance from the formula with the root of the product of both covariances, as FID's first code has it."""
    first, second = (np.concatenate(list(side.batches())).astype(np.float64) for side in (rows, reference))
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    means = float(np.square(first.mean(axis=0) - second.mean(axis=0)).sum())
    textbook = means + float(np.trace(one) + np.trace(other) - 2 * np.trace(scipy.linalg.sqrtm(one @ other).real))
    ours = frechet_distance(moments_of(rows), moments_of(reference))
    return abs(ours - textbook) / textbook


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help=f"tars of photographs (default: {DATA})")
    parser.add_argument("--pictures", type=int, default=200, help="photographs (default: 200)")
    parser.add_argument("--rows", type=int, default=100_000, help="rows to stream (default: 100,000)")
    parser.add_argument("--dim", type=int, default=2048, help="features of a row (default: 2048, Inception's)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    return verify(
        "fid",
        lambda: measure(data=flags.data, pictures=flags.pictures, rows=flags.rows, dim=flags.dim, seed=flags.seed),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
