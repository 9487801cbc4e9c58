"""What many tests share: who runs beside whom, one Ray for a session, folders for runs, a quiet display, real data."""

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runtime.cluster import ensure_ray, shutdown_ray
from pipelines.runtime.display import PlainDisplay

# A shell starts what runs in the background deaf to Ctrl-C, and what that starts as well; here it is heard again.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, one has all tests that start Ray, and a file's tests are never apart."""
    for item in items:
        has_ray = item.get_closest_marker("ray") is not None or "ray_session" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if has_ray else item.nodeid.partition("::")[0]))


@pytest.fixture(autouse=True)
def own_ctrl_c() -> Iterator[None]:
    """Gives Ctrl-C back after each test: Ray Train, started in the main thread, keeps it for its controller."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def ray_ends() -> Iterator[None]:
    """Ends Ray after the last test, whoever started it."""
    yield
    shutdown_ray()


@pytest.fixture(scope="module")
def ray_session(ray_ends: None) -> None:
    """Ray with two CPUs, started once for all tests that ask for it, and again where another file has ended it."""
    ensure_ray(num_cpus=2)


@pytest.fixture
def quiet_display() -> PlainDisplay:
    """A display that writes into memory; its lines are `quiet_display.stream.getvalue()`."""
    return PlainDisplay([], stream=io.StringIO())


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, and so one MLflow database, for the session: making a database takes seconds."""
    return tmp_path_factory.mktemp("session") / "runs"


@pytest.fixture
def run_root(runs_folder: Path, tmp_path: Path) -> Path:
    """An empty root for a run of this test alone."""
    return runs_folder / tmp_path.name


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data: {SHARED_DATA} does not exist")
    return SHARED_DATA
