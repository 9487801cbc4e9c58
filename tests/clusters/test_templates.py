"""The cluster templates, checked without a cloud: schemas, versions, who may reach them, and no secrets."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

REPOSITORY = Path(__file__).parents[2]
CLUSTERS = REPOSITORY / "clusters"
LAUNCHER = ("aws.yaml", "gcp.yaml", "on_premise.yaml")
RAY_SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
EVERYWHERE = "0.0.0.0"
SECRET = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|AIza[0-9A-Za-z_-]{35}|ghp_[0-9A-Za-z]{36}|password:\s*\S")


def read(name: str) -> Any:
    """A template with one document."""
    return yaml.safe_load((CLUSTERS / name).read_text(encoding="utf-8"))


def ray_cluster(name: str) -> dict[str, Any]:
    """The cluster that a Kubernetes template describes."""
    spec: dict[str, Any] = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(name: str) -> list[dict[str, Any]]:
    """Head and workers of a Kubernetes template."""
    cluster = ray_cluster(name)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


KUBERNETES = ("kuberay/cluster.yaml", "kuberay/pretrain.yaml")


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launchers_templates_fit_rays_own_schema(name: str) -> None:
    schema = json.loads(RAY_SCHEMA.read_text())
    jsonschema.validate(read(name), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**read(name), "max_workerz": 1}, schema)


@pytest.mark.parametrize("name", LAUNCHER[:2])
def test_a_head_is_never_a_spot_machine_and_trains_nothing(name: str) -> None:
    template = read(name)
    types = template["available_node_types"]
    head = types[template["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert not any(word in json.dumps(head) for word in ("spot", "preemptible"))
    for worker in ("fetchers", "trainers"):
        assert any(word in json.dumps(types[worker]) for word in ("spot", "preemptible"))
        assert types[worker]["min_workers"] == 0, "an idle cluster costs a head only"
    assert types["trainers"]["resources"]["CPU"] == 0, "ingestion leaves GPU machines alone"


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launchers_dashboard_listens_on_loopback(name: str) -> None:
    (start,) = [line for line in read(name)["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert EVERYWHERE not in (CLUSTERS / name).read_text()


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_kubernetes_cluster_has_the_fields_that_the_operator_reads(name: str) -> None:
    document = read(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"] == ("RayJob" if "rayClusterSpec" in document["spec"] else "RayCluster")
    known = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
    assert set(ray_cluster(name)) == known
    for group in ray_cluster(name)["workerGroupSpecs"]:
        wanted = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert set(group) == wanted
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(name):
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Kubernetes wants strings"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}


def test_a_job_gives_its_machines_back() -> None:
    spec = read("kuberay/pretrain.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    assert spec["entrypoint"].startswith("python -m pipelines road ")


@pytest.mark.parametrize("name", KUBERNETES)
def test_what_listens_everywhere_asks_for_a_token_and_is_behind_a_policy(name: str) -> None:
    for group in groups(name):
        (container,) = group["template"]["spec"]["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"]
    text = (CLUSTERS / "kuberay" / "network.yaml").read_text()
    guard, fetchers = yaml.safe_load_all(text)
    assert guard["spec"]["policyTypes"] == ["Ingress"]
    assert guard["spec"]["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    (outside,) = [rule["to"][0]["ipBlock"] for rule in fetchers["spec"]["egress"] if "ipBlock" in rule["to"][0]]
    assert {"169.254.0.0/16", "10.0.0.0/8", "127.0.0.0/8"} <= set(outside["except"])


@pytest.mark.parametrize("name", KUBERNETES)
def test_fetchers_hold_no_credentials(name: str) -> None:
    fetchers = ray_cluster(name)["workerGroupSpecs"][0]
    assert fetchers["groupName"] == "fetchers"
    assert fetchers["template"]["spec"]["automountServiceAccountToken"] is False


def test_ray_has_one_version_everywhere() -> None:
    ours = version("ray")
    assert {ray_cluster(name)["rayVersion"] for name in KUBERNETES} == {ours}
    assert f"ray=={ours}" in (REPOSITORY / "constraints.txt").read_text().splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    images = set(re.findall(r"image: (\S+)", "".join(path.read_text() for path in CLUSTERS.rglob("*.yaml"))))
    assert images == {f"REGISTRY/cogview:{project['version']}"}
    assert f"cogview:{project['version']} " in (CLUSTERS / "Dockerfile").read_text()


def test_the_image_installs_what_the_project_says() -> None:
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    copied = " ".join(line for line in lines if line.startswith("COPY"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "cogview", "pipelines"):
        assert name in copied
        assert (REPOSITORY / name).exists()
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"], "nothing runs as root"


def test_templates_hold_no_secrets_and_no_python_objects() -> None:
    for path in [*CLUSTERS.rglob("*.yaml"), CLUSTERS / "Dockerfile", CLUSTERS / "README.md"]:
        text = path.read_text(encoding="utf-8")
        assert not SECRET.search(text), path.name
        assert "!!python" not in text, path.name
