"""Pictures that kill or hang their decoder cost their own rows: in every job, with processes that really die."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cogview.records import containment
from cogview.records.images import EncodedImage, ImageSettings, store_image
from cogview.records.pair import TextImagePair
from cogview.records.tars import read_foreign_tar
from tests.pipelines.pair_folders import png
from tests.pipelines.poison import plant
from tests.pipelines.poisoned_jobs import OUTCOMES, PAIRS_IN_SHARD

ROOT = Path(__file__).parents[2]


def python(arguments: list[str], planted: Path, *, seconds: float) -> subprocess.CompletedProcess[str]:
    plant(planted)
    environment = {**os.environ, "PYTHONPATH": f"{planted}:{ROOT}"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("poisoned")
    done = python(["-m", "tests.pipelines.poisoned_jobs", str(folder)], folder, seconds=400)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / OUTCOMES).read_text())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("job", "rejected"),
    [
        ("scraped", {"decoder_died": 1, "decoder_hung": 1}),
        ("imported", {"decoder_died": 2}),
        ("filtered", {"decoder_died": 1, "decoder_hung": 1}),
        ("tokenized", {"decoder_died": 2, "decoder_hung": 1}),
    ],
)
def test_a_picture_that_kills_or_hangs_its_decoder_costs_its_own_row(
    outcomes: dict[str, Any], job: str, rejected: dict[str, int]
) -> None:
    found = outcomes[job]
    by_decoder = [{name: n for name, n in shard.items() if name != "image_duplicate"} for shard in found["rejected"]]
    assert by_decoder == [rejected, {}]  # which pictures are copies of others is for the filters' own tests
    left = [PAIRS_IN_SHARD - sum(shard.values()) for shard in found["rejected"]]
    assert found["rows"] == left
    assert found["left"] == []


def contained(tmp_path: Path, body: str, *, apart: bool) -> subprocess.CompletedProcess[str]:
    """A process that has pictures decoded inside `contained`."""
    program = f"""
import sys
from cogview.records import containment
from cogview.records import containment
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair
from cogview.records.tars import read_foreign_tar
from tests.pipelines.pair_folders import png
from tests.pipelines.poison import CRASH, EXIT, HANG
containment.LIMIT_S = 1.0
with containment.contained(apart={apart}):
    {body}
"""
    return python(["-c", program], tmp_path, seconds=60)


def test_apart_a_picture_has_a_reason_and_the_next_one_its_pixels(tmp_path: Path) -> None:
    body = "print([decode_image(data, short_side=8) for data in (EXIT, CRASH, HANG, b'<html>')])"
    done = contained(tmp_path, body, apart=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(
        [
            "Unusable(reason='decoder_died', detail='exit code 7')",
            "Unusable(reason='decoder_died', detail='SIGSEGV')",
            "Unusable(reason='decoder_hung', detail='1 s')",
            "Unusable(reason='image_is_html', detail='')",
        ]
    ).replace('"', "")


def test_a_hanging_decoder_ends_its_worker_even_where_it_keeps_pythons_lock(tmp_path: Path) -> None:
    done = contained(tmp_path, "decode_image(HANG)", apart=False)
    assert done.returncode == -14  # SIGALRM


def test_time_between_pictures_does_not_count(tmp_path: Path) -> None:
    body = "[(decode_image(png('red')), __import__('time').sleep(0.7)) for _ in range(3)]"
    assert contained(tmp_path, body, apart=False).returncode == 0


def test_pictures_have_the_same_bytes_wherever_they_are_decoded(shared_data: Path, tmp_path: Path) -> None:
    photos = islice(read_foreign_tar(shared_data / "photos" / "000000.tar"), 6)
    pictures = [png("blue"), *(photo.image_bytes for photo in photos if isinstance(photo, TextImagePair))]
    settings = ImageSettings(image_size=64)
    here = [store_image(data, settings) for data in pictures]
    with containment.contained(apart=True):
        assert [store_image(data, settings) for data in pictures] == here
    assert sum(isinstance(image, EncodedImage) for image in here) > 3
