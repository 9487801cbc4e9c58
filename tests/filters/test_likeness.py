import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from cogview.filters.likeness import HASH_BITS, SIGNATURE_BYTES, likeness, reduce_image
from cogview.filters.pairs import FilterRules
from cogview.filters.repetition import NEAR_BITS
from cogview.records.images import decode_image
from cogview.records.pair import Unusable
from tests.records.test_images import RED_TO_BLUE


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def looks_same(one: Image.Image, other: Image.Image) -> bool:
    looks = likeness([reduce_image(one), reduce_image(other)])
    bits = int(np.bitwise_count(looks.hashes_N[0] ^ looks.hashes_N[1]))
    levels = np.abs(np.diff(looks.signatures_NS.astype(np.int16), axis=0)).max()
    return bits <= NEAR_BITS and levels <= FilterRules().near_levels


def images_of(tar: Path, names: tuple[str, ...]) -> list[Image.Image]:
    with tarfile.open(tar) as archive:
        members = {member.name.partition(".")[0]: member for member in archive if not member.name.endswith(".json")}
        data = [archive.extractfile(members[name]) for name in names]
        images = [decode_image(file.read()) for file in data if file is not None]
    return [image for image in images if not isinstance(image, Unusable)]


def test_hashes_and_signatures_have_their_sizes() -> None:
    looks = likeness([reduce_image(RED_TO_BLUE)] * 300)
    assert looks.hashes_N.shape == (300,)
    assert looks.hashes_N.max() < 1 << HASH_BITS
    assert looks.signatures_NS.shape == (300, SIGNATURE_BYTES)
    assert (looks.signatures_NS == looks.signatures_NS[0]).all()
    assert likeness([]).signatures_NS.shape == (0, SIGNATURE_BYTES)


def test_a_picture_is_the_same_in_another_quality_or_size(shared_data: Path) -> None:
    photos = images_of(shared_data / "photos" / "000002.tar", _first(shared_data / "photos" / "000002.tar", 40))
    assert all(looks_same(photo, encoded(photo, 50)) for photo in photos)
    larger = [photo.resize((photo.width * 3 // 2, photo.height * 3 // 2), Image.Resampling.BICUBIC) for photo in photos]
    assert sum(map(looks_same, photos, larger)) >= 30  # sharp edges move a little
    assert not any(itertools.starmap(looks_same, itertools.pairwise(photos)))


TWO_PICTURES = (
    ("1f47f_noto", "1f608_noto"),  # an angry and a smiling face
    ("2764_noto", "1f49c_noto"),  # a red and a purple heart
    ("1f468-200d-1f680_fluent_3d", "1f9d1-200d-1f680_fluent_3d"),  # two astronauts
)


def test_pictures_that_differ_a_little_are_two(shared_data: Path) -> None:
    found: dict[str, Image.Image] = {}
    wanted = {name for pair in TWO_PICTURES for name in pair}
    for tar in sorted((shared_data / "emoji").glob("*.tar")):
        names = tuple(name for name in _first(tar, 500) if name in wanted)
        found.update(zip(names, images_of(tar, names), strict=True))
    for one, other in TWO_PICTURES:
        assert not looks_same(found[one], found[other]), one


def _first(tar: Path, count: int) -> tuple[str, ...]:
    with tarfile.open(tar) as archive:
        names = [name.partition(".")[0] for name in archive.getnames() if not name.endswith(".json")]
    return tuple(names[:count])
