import io
import ssl
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.photo_server import LOOPBACK, ROBOTS, photo_server, write_certificate
from benchmarks.scrape import Run, site_figures


@pytest.fixture
def photos(tmp_path: Path) -> list[bytes]:
    """Two photos in a tar, beside a text."""
    pictures = []
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        for number, colour in enumerate(("red", "blue")):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 30), colour).save(buffer, "JPEG")
            pictures.append(buffer.getvalue())
            for name, data in ((f"{number}.jpg", pictures[-1]), (f"{number}.txt", b"a colour")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return pictures


def test_photos_are_served_round_and_round(photos: list[bytes], tmp_path: Path) -> None:
    with photo_server(tmp_path) as port:
        site = f"http://{LOOPBACK}:{port}"
        found = [urllib.request.urlopen(f"{site}/{number:05d}.jpg", timeout=10).read() for number in range(5)]
        robots = urllib.request.urlopen(f"{site}/robots.txt", timeout=10).read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{site}/ai.txt", timeout=10)
    assert found == [photos[0], photos[1], photos[0], photos[1], photos[0]]
    assert robots == ROBOTS


def test_https_is_trusted_by_those_who_know_the_authority(photos: list[bytes], tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path, names=["photos.test"])
    with photo_server(tmp_path, certificate=certificate) as port:
        url = f"https://{LOOPBACK}:{port}/00001.jpg"
        trusting = ssl.create_default_context(cafile=str(certificate.authority))
        assert urllib.request.urlopen(url, timeout=10, context=trusting).read() == photos[1]
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(url, timeout=10, context=ssl.create_default_context())


def test_steady_figures_leave_out_what_does_not_grow() -> None:
    def run(images: int, seconds: float, cpu: float) -> Run:
        return Run(images=images, seconds=seconds, cpu_seconds=cpu, peak_bytes=2**30)

    turn = {
        ("ours", 100): run(100, 11.0, 20.5),  # 10 s to start, 100 images a second
        ("ours", 500): run(500, 15.0, 22.5),
        ("theirs", 100): run(100, 3.0, 1.0),  # 1 s to start, 50 images a second
        ("theirs", 500): run(500, 11.0, 5.0),
    }
    figures = site_figures("http", [turn], few=100, many=500)
    assert figures["http/ours/steady_images_per_second"] == pytest.approx(100)
    assert figures["http/ratio/steady_images_per_second"] == pytest.approx(2)
    assert figures["http/ours/steady_cpu_per_image"] == pytest.approx(5)
    assert figures["http/ratio/cpu_per_image"] == pytest.approx(45 / 10)
    assert figures["http/ratio/images_per_second"] == pytest.approx(11 / 15)
