"""Images per second from a web server to tars of 256 px, beside img2dataset, over HTTP and HTTPS, to equal pixels.

Command: make verify NAME=scrape; a quick look is `python -m benchmarks.scrape --images 1000 --turns 1`
Real photos from ../shared/data/photos, served again and again by a process of its own on the loopback address under
100 host names. Ours is the job scrape_pairs as users run it: Ray's start, MLflow, robots.txt, ai.txt, tdmrep.json,
address and content checks, sha256 and manifests included; only its pace for these hosts is raised. img2dataset runs at
its best: two processes of 64 threads, no EXIF, the SSL context made once. Both scale down to a short side of 256, store
JPEG q95 and make ten shards. They take turns; a ratio is the median of those within a turn. `steady` is the slope
between a fifth of the images and all of them, so that starting and ending do not count. The photos are small, a tenth
of a megapixel; `large` is half as many over HTTP, enlarged to the 1.6 megapixels of a photo on the web, without a bar.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from benchmarks.photo_server import LOOPBACK, Certificate, photo_server, read_photos, write_certificate
from benchmarks.processes import ProcessWatch
from benchmarks.rivals import installed
from cogview.records.images import encode_image

PHOTOS = REPOSITORY / "../shared/data/photos"
SIZE = 256
HOSTS = tuple(f"host{number:02d}.photos.test" for number in range(100))
PORTS = {"http": 80, "https": 443}
# Name, scheme, and times that each side of the photos is longer. The pixels of the last are compared.
KINDS = (("large", "http", 4), ("http", "http", 1), ("https", "https", 1))
SHARDS = 10
COMPARED = 300  # pictures whose pixels are compared
WARM_UP = 40
LIMIT_S = 900
PACE = ("--fetch.host-rate", "5000", "--fetch.host-connections", "64")  # nobody's server but our own
RIVALS = (
    *("img2dataset==1.47.0", "opencv-python-headless==4.14.0.94", "albumentations==1.4.24", "albucore==0.0.23"),
    *("simsimd==6.5.16", "stringzilla==5.3.2", "exifread-nocycle==3.0.1", "fire==0.7.1", "termcolor==3.3.0"),
    *("webdataset==0.2.111", "pandas==2.3.3", "pytz==2026.6", "wandb==0.31.0", "platformdirs==4.14.7", "tqdm==4.70.1"),
    "xxhash==4.1.0",
)
# `cache`: Python 3.11 would read the authorities' file again for every single request over HTTPS.
THEIRS = """
import functools, ssl, sys
from img2dataset import download

ssl._create_default_https_context = functools.cache(ssl._create_default_https_context)
if __name__ == "__main__":
    download(
        url_list=sys.argv[1], output_folder=sys.argv[2], number_sample_per_shard=int(sys.argv[3]), image_size={size},
        input_format="parquet", url_col="url", caption_col="caption", output_format="webdataset", processes_count=2,
        thread_count=64, resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=95, extract_exif=False,
    )
"""
BARS = (
    *(Bar(figure=f"{scheme}/ratio/images_per_second", op=">=", value=1.4) for scheme in PORTS),
    *(Bar(figure=f"{scheme}/ratio/steady_images_per_second", op=">=", value=1.8) for scheme in PORTS),
    *(Bar(figure=f"{scheme}/ratio/cpu_per_image", op="<=", value=0.65) for scheme in PORTS),
    *(Bar(figure=f"{scheme}/ours/peak_gib", op="<=", value=1.5) for scheme in PORTS),
    Bar(figure="psnr_db/ours", op=">=", value=44),
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A server that runs: how it is reached, where the two sides write, and with what environment they are started.

    name: before its figures.
    """

    name: str
    scheme: str
    port: int
    folder: Path
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one command cost."""

    images: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


Side = Callable[[Site, Path, int, int], list[str]]  # (site, folder, images, shard size) -> command


def measure(*, images: int, turns: int) -> Figures:
    """Both sides in turns, by scheme; then the pixels of both."""
    if not PHOTOS.is_dir():
        raise UnmeasuredError(f"{PHOTOS} does not exist; put tars of photos there")
    rivals = installed(RIVALS)
    figures: dict[str, float | int | str] = {}
    with tempfile.TemporaryDirectory(prefix="cogview-scrape-") as name:
        folder = Path(name)
        (folder / "theirs.py").write_text(THEIRS.format(size=SIZE))
        for kind, scheme, enlarge in KINDS:
            certificate = write_certificate(folder, names=HOSTS) if scheme == "https" else None
            with photo_server(PHOTOS, certificate=certificate, enlarge=enlarge) as port:
                environment = side_environment(rivals, certificate)
                site = Site(name=kind, scheme=scheme, port=port, folder=folder, environment=environment)
                figures |= measure_site(site, images=images if enlarge == 1 else images // 2, turns=turns)
        figures |= compare_pixels(folder, images=min(images, COMPARED))
    return {**figures, "images": images, "turns": turns, **photo_figures()}


def side_environment(rivals: Path, certificate: Certificate | None) -> dict[str, str]:
    """For the commands of both sides: where img2dataset lies (ours does not look there), and whom to trust."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    trusted = {"SSL_CERT_FILE": str(certificate.authority)} if certificate is not None else {}
    return {**kept, "RIVALS": str(rivals), "NO_ALBUMENTATIONS_UPDATE": "1", **trusted}


def measure_site(site: Site, *, images: int, turns: int) -> dict[str, float]:
    """A warm-up of both sides, then in each turn both with few and with all images."""
    sides: dict[str, Side] = {"ours": our_command, "theirs": their_command}
    for name, side in sides.items():
        say(f"{site.name}, {name}: warming up")
        run_side(site, name, side, images=WARM_UP, shard_size=WARM_UP)
    runs: list[dict[tuple[str, int], Run]] = []
    counts = (images // 5, images)
    for turn in range(turns):
        done = {}
        for count in counts:
            for name, side in sides.items():
                run = run_side(site, name, side, images=count, shard_size=max(1, images // SHARDS))
                done[name, count] = run
                say(f"{site.name}, turn {turn + 1} of {turns}, {name}: {count} images in {run.seconds:.1f} s")
        runs.append(done)
    return site_figures(site.name, runs, few=counts[0], many=counts[1])


def site_figures(site: str, runs: Sequence[Mapping[tuple[str, int], Run]], *, few: int, many: int) -> dict[str, float]:
    """Medians of each side over the turns, and the medians of the ratios within a turn."""
    rates: dict[str, dict[str, list[float]]] = {}
    for side in ("ours", "theirs"):
        pairs = [(done[side, few], done[side, many]) for done in runs]
        rates[side] = {
            "images_per_second": [many / large.seconds for _, large in pairs],
            "steady_images_per_second": [
                (many - few) / max(1e-9, large.seconds - small.seconds) for small, large in pairs
            ],
            "cpu_per_image": [1000 * large.cpu_seconds / many for _, large in pairs],
            "steady_cpu_per_image": [
                1000 * (large.cpu_seconds - small.cpu_seconds) / (many - few) for small, large in pairs
            ],
            "peak_gib": [large.peak_bytes / 2**30 for _, large in pairs],
        }
    figures = {}
    for name, ours in rates["ours"].items():
        theirs = rates["theirs"][name]
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        figures[f"{site}/ratio/{name}"] = statistics.median(ratios)
        figures |= {f"{site}/ours/{name}": statistics.median(ours)}
        figures |= {f"{site}/theirs/{name}": statistics.median(theirs)}
    return figures


def run_side(site: Site, name: str, side: Side, *, images: int, shard_size: int) -> Run:
    """Run one side under watch in a folder of its own. UnmeasuredError unless every image was stored."""
    folder = site.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = side(site, folder, images, shard_size)
    environment = dict(site.environment)
    if name == "theirs":
        environment["PYTHONPATH"] = environment["RIVALS"]
    with ProcessWatch(environment) as watch, open(folder / "log.txt", "wb") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=watch.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            code = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            code = -1
        seconds = time.monotonic() - started
        if code:
            watch.end_all()
    stored = len(list(stored_images(folder)))
    if code or stored != images:
        words = (folder / "log.txt").read_text(errors="replace").strip()[-500:]
        raise UnmeasuredError(f"{name}, {site.name}: {stored} of {images} images stored, exit code {code}: {words}")
    return Run(images=images, seconds=seconds, cpu_seconds=watch.cpu_seconds, peak_bytes=watch.peak_bytes)


def our_command(site: Site, folder: Path, images: int, shard_size: int) -> list[str]:
    """The job, with the hosts' names resolved to the server; MLflow's files stay from run to run, as a user's do."""
    hosts = [HOSTS[(number * 37) % len(HOSTS)] for number in range(images)]
    write_table(folder / "urls.parquet", [f"{site.scheme}://{host}" for host in hosts])
    endpoints = [word for host in HOSTS for word in (f"{host}:{PORTS[site.scheme]}", f"{LOOPBACK}:{site.port}")]
    root = site.folder / "root"
    shutil.rmtree(root / "scrape_pairs", ignore_errors=True)
    (folder / "output").symlink_to(root / "scrape_pairs")
    settings = ("--table", str(folder / "urls.parquet"), "--root", str(root), "--shard-size", str(shard_size))
    job = ("scrape_pairs", "paper", *settings, "--image.image-size", str(SIZE), *PACE)
    return [sys.executable, "-m", "pipelines", *job, "--fetch.policy.resolve", *endpoints]


def their_command(site: Site, folder: Path, images: int, shard_size: int) -> list[str]:
    """img2dataset asks the loopback address itself: it would otherwise have to resolve names."""
    write_table(folder / "urls.parquet", [f"{site.scheme}://{LOOPBACK}:{site.port}"] * images)
    script = str(site.folder / "theirs.py")
    return [sys.executable, script, str(folder / "urls.parquet"), str(folder / "output"), str(shard_size)]


def write_table(path: Path, origins: Sequence[str]) -> None:
    """URLs and captions: photo 0, 1, 2... of these origins."""
    urls = [f"{origin}/{number:05d}.jpg" for number, origin in enumerate(origins)]
    pq.write_table(pa.table({"url": urls, "caption": [f"photo number {number}" for number in range(len(urls))]}), path)


def stored_images(folder: Path) -> list[Path]:
    """One line for each stored image: the tar and its member."""
    found = []
    for path in sorted((folder / "output").resolve().rglob("*.tar")):
        with tarfile.open(path) as tar:
            found += [path / member.name for member in tar if member.name.endswith((".jpg", ".png"))]
    return found


def compare_pixels(folder: Path, *, images: int) -> dict[str, float]:
    """PSNR over all pixels against Pillow's own Lanczos of the whole photo, of the pictures that lie in the tars.

    psnr_db/ours: against the reference encoded as ours is, so that only the decoding and scaling differ; `stored`:
    against the reference itself, with what JPEG costs.
    """
    photos = read_photos(PHOTOS)
    errors: dict[str, list[float]] = {"ours": [], "ours_stored": [], "theirs_stored": []}
    ours, theirs = (read_stored(folder / side, count=images) for side in ("ours", "theirs"))
    for number in sorted(ours.keys() & theirs.keys()):
        whole = Image.open(io.BytesIO(photos[number % len(photos)])).convert("RGB")
        if min(whole.size) <= SIZE:
            continue  # nothing is scaled
        reference = whole.resize(ours[number].size, Image.Resampling.LANCZOS)
        encoded = Image.open(io.BytesIO(encode_image(reference).data)).convert("RGB")
        errors["ours"].append(squared_error(ours[number], encoded))
        errors["ours_stored"].append(squared_error(ours[number], reference))
        if theirs[number].size == reference.size:
            errors["theirs_stored"].append(squared_error(theirs[number], reference))
    if not errors["ours"] or not errors["theirs_stored"]:
        raise UnmeasuredError("no picture of both sides could be compared")
    return {
        f"psnr_db/{name}": float(10 * np.log10(255**2 / max(1e-9, statistics.fmean(values))))
        for name, values in errors.items()
    }


def read_stored(side: Path, *, count: int) -> dict[int, Image.Image]:
    """Photo number -> picture, from the first shards of a side."""
    pictures: dict[int, Image.Image] = {}
    for path in sorted((side / "output").resolve().rglob("*.tar")):
        members: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                members[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for name in [name for name in members if name.endswith(".json")]:
            document = json.loads(members[name])
            url = document["url"] if "url" in document else document["source"]
            stem = name.removesuffix(".json")
            picture = next(members[stem + suffix] for suffix in (".jpg", ".png") if stem + suffix in members)
            pictures[int(url.rpartition("/")[2].removesuffix(".jpg"))] = Image.open(io.BytesIO(picture)).convert("RGB")
        if len(pictures) >= count:
            break
    return pictures


def squared_error(picture: Image.Image, reference: Image.Image) -> float:
    """The mean squared difference of two pictures of one size."""
    difference = np.asarray(picture).astype(np.float64) - np.asarray(reference)
    return float(np.mean(difference**2))


def photo_figures() -> dict[str, float]:
    """How large the photos are."""
    photos = read_photos(PHOTOS)
    sizes = [Image.open(io.BytesIO(photo)).size for photo in photos]
    return {
        "photos/distinct": len(photos),
        "photos/megapixels": statistics.fmean(width * height for width, height in sizes) / 1e6,
        "photos/kib": statistics.fmean(map(len, photos)) / 1024,
        "cores": len(psutil.Process().cpu_affinity() or ()),
    }


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="images in the larger runs (default: 10000)")
    parser.add_argument("--turns", type=int, default=3, help="turns of both sides, by scheme (default: 3)")
    flags = parser.parse_args()
    return verify("scrape", lambda: measure(images=flags.images, turns=flags.turns), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
