"""The notebooks run from top to bottom on a small finished chain, and are kept without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.trained_folders import write_trained_folders

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
JOBS = {
    "train_text_tokenizer": "text_tokenizer",
    "train_image_tokenizer": "image_tokenizer",
    "tokenize_pairs": "tokens",
    "pretrain": "checkpoint",
}


def by_name(path: Path) -> str:
    return path.stem


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text())
    return notebook


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished chain, as far as the notebooks read one."""
    root = tmp_path_factory.mktemp("notebooks") / "runs" / "smoke"
    folders = write_trained_folders(root)
    lines = [{"step": step, "l2": 1.0 / step} for step in range(1, 6)]
    (folders.image_tokenizer / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages = [
        {"job": job, "state": "done", "output": str(getattr(folders, name).relative_to(root))}
        for job, name in JOBS.items()
    ]
    (root / "chain.json").write_text(json.dumps({"state": "done", "started": "", "stages": stages}))
    return root


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.ray
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_runs_from_top_to_bottom(path: Path, chain: Path, tmp_path: Path) -> None:
    code = "\n\n".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code)
    environment = {
        **os.environ,
        "COGVIEW_ROOT": str(chain),
        "COGVIEW_STEPS": "2",
        "COGVIEW_PICTURES_DRAWN": "4",
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
