"""The machine that a number was measured on; nothing here needs Ray, MLflow or torch."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("cogview", "torch", "ray", "mlflow", "numpy", "pyarrow", "pillow")


def machine() -> dict[str, Any]:
    """What figures depend on: processor, the cores that we may use, memory, system, Python, packages."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": dict(_versions()),
    }


def machine_words(facts: dict[str, Any]) -> str:
    """The same as a sentence."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return f"{facts['cpu']} ({facts['cores']} cores, {facts['memory_gib']} GiB), Python {facts['python']}, {packages}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # the library alone needs neither Ray nor MLflow
            continue


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
