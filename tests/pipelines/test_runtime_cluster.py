"""Ray starts once, small and quiet; an error of ours comes back from a worker as itself."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cogview.errors import ConfigError
from pipelines.runtime.cluster import ensure_ray, ray_logs, usable_cpus
from pipelines.runtime.failures import find_cause, first_line

pytestmark = pytest.mark.ray


def workers() -> list[psutil.Process]:
    """The worker processes that run or wait for tasks."""
    return [child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::IDLE")]


def test_ray_has_two_cpus_at_least_and_its_logs_in_the_session_folder(ray_session: None) -> None:
    import ray

    assert ray.cluster_resources()["CPU"] >= 2
    logs = ray_logs()
    assert logs is not None
    assert (logs / "raylet.out").is_file()
    assert usable_cpus() >= 1


def test_a_second_start_changes_nothing(ray_session: None) -> None:
    import ray

    before = ray.get_runtime_context().get_node_id()
    ensure_ray(num_cpus=7)
    assert ray.get_runtime_context().get_node_id() == before
    assert ray.cluster_resources()["CPU"] == 2


def test_workers_import_the_project_and_give_their_memory_back_when_idle(ray_session: None) -> None:
    import ray

    @ray.remote
    def where() -> str:
        import cogview

        return str(Path(cogview.__file__).parent)

    import cogview

    assert ray.get(where.remote()) == str(Path(cogview.__file__).parent)
    assert workers()
    deadline = time.monotonic() + 180
    while workers() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert workers() == []


def test_an_error_of_ours_comes_back_from_a_task_and_from_ray_data_with_its_own_words(ray_session: None) -> None:
    import ray

    def refuse(row: dict[str, int]) -> dict[str, int]:
        raise ConfigError(f"num_steps={row['id']}: give 1 or more")

    with pytest.raises(Exception) as raised:
        ray.get(ray.remote(refuse).remote({"id": 7}))
    cause = find_cause(raised.value)
    assert type(cause) is ConfigError
    assert str(cause) == "num_steps=7: give 1 or more"
    with pytest.raises(Exception) as raised:
        ray.data.range(1).map(refuse).materialize()
    assert first_line(raised.value) == "num_steps=0: give 1 or more"


SCRIPT = """
import os, signal, time
from pipelines.runtime.cluster import ensure_ray, shutdown_ray
signal.signal(signal.SIGTERM, lambda number, frame: print("asked to end", flush=True))
ensure_ray()
import ray
@ray.remote
def talk():
    print("from the worker")
    return 1
print(ray.get(talk.remote()), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
shutdown_ray()
shutdown_ray()
"""


def test_ray_says_nothing_on_standard_output_and_leaves_sigterm_to_us() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
        env=environment,
        cwd="/",
    )
    assert answer.stdout == "1\nasked to end\n"
    assert "from the worker" not in answer.stderr


def test_an_address_where_no_ray_answers_is_a_clear_error() -> None:
    code = "from pipelines.runtime.cluster import ensure_ray; ensure_ray(address='127.0.0.1:9')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 1
    assert "ConfigError: RAY_ADDRESS=127.0.0.1:9: no Ray answers there" in answer.stderr
