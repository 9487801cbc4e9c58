"""The page of the paper's experiments: whose curves stand beside whose, and which references are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogview.errors import ConfigError
from cogview.evaluation.stress_arms import ARMS
from pipelines.reproduce import (
    CURVES,
    PICTURES,
    PLOT_NAME,
    PRESETS,
    REFERENCES,
    build_page,
    experiments,
    numbers,
    plot_curves,
    read_curves,
    read_reference,
    score_rows,
)
from pipelines.runtime.machine import machine
from pipelines.runtime.page import write_page

SCORES = {
    "evaluate": {"attributes/mean": 0.9},
    "rank_candidates": {"candidates": 16.0, "cap_loss_of_one": 1.5, "cap_loss_of_best": 1.0},
    "stress_stability": {f"{arm}/steps": 3.0 + number for number, arm in enumerate(ARMS)},
}


def record(curves: dict[str, Any], scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"preset": "smoke", "date": "2026-01-02", "machine": machine(), "curves": curves, "scores": scores}


@pytest.fixture
def outputs(tmp_path: Path) -> dict[str, Path]:
    """What the jobs leave, as far as the page reads it."""
    folders = {job: tmp_path / job for job in {*CURVES, *PICTURES, *SCORES}}
    for job, folder in folders.items():
        folder.mkdir()
        for name, *_ in PICTURES.get(job, ()):
            Image.new("RGB", (8, 8), "teal").save(folder / name)
        lines = [{"step": step, name: 10.0 / step} for step in (10, 20) for name in CURVES.get(job, ())]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    return folders


def test_curves_are_those_that_the_trainings_logged(outputs: dict[str, Path]) -> None:
    curves = read_curves(outputs)
    assert list(curves) == [f"{job}/{name}" for job, names in CURVES.items() for name in names]
    assert curves["pretrain/text_loss"] == {"steps": [10, 20], "values": [1.0, 0.5]}


def test_a_curve_stands_before_the_reference(outputs: dict[str, Path]) -> None:
    curves = read_curves(outputs)
    old = {name: {"steps": [0, 30], "values": [2.0, 1.0]} for name in curves if name != "pretrain/text_loss"}
    panels = plot_curves(curves, reference=record(old, {})).axes
    for axes, name in zip(panels, curves, strict=False):
        drawn = [line.get_ydata().tolist() for line in axes.get_lines()]
        assert drawn == [*([[2.0, 1.0]] if name in old else []), curves[name]["values"]]
    assert len([axes for axes in panels if axes.get_visible()]) == len(curves)


def test_the_page_holds_every_picture_and_both_scores(outputs: dict[str, Path], tmp_path: Path) -> None:
    curves = read_curves(outputs)
    plot_curves(curves, reference=None).savefig(tmp_path / PLOT_NAME)
    old = record(curves, {"evaluate": {"attributes/mean": 0.875}})
    page = build_page(record(curves, SCORES), reference=old, outputs=outputs, root=tmp_path)
    write_page(page, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png") == 1 + sum(map(len, PICTURES.values()))
    for shown in (
        "90.0%",
        "1.50 → 1.00",
        "neither 3, Sandwich-LN only 4, PB-relax only 5",
        "<strong>6</strong>",
        "0.875",
        "the reference of 2026-01-02",
    ):
        assert shown in text


def test_a_score_without_a_reference_says_so() -> None:
    rows = list(score_rows({"psnr": 20.0, "new_score": 1.0}, old={"psnr": 21.0}))
    assert [row["reference"] for row in rows] == [21.0, "–"]
    assert numbers({"psnr": 20.123456, "parameters": 723_584, "name": "x", "is_done": True}) == {
        "psnr": 20.123,
        "parameters": 723_584,
    }


def test_references_that_are_none_are_refused(tmp_path: Path) -> None:
    assert read_reference(tmp_path / "nothing.json", is_given=False) is None
    with pytest.raises(ConfigError, match=r"reference=.*nothing\.json cannot be read"):
        read_reference(tmp_path / "nothing.json", is_given=True)
    (tmp_path / "other.json").write_text('{"curves": {}}')
    with pytest.raises(ConfigError, match=r"is no reproduction\.json of this command"):
        read_reference(tmp_path / "other.json", is_given=True)


def test_the_committed_reference_has_every_curve_and_every_experiment() -> None:
    found = read_reference(REFERENCES / "smoke.json", is_given=True)
    assert found is not None
    assert found["curves"].keys() == {f"{job}/{name}" for job, names in CURVES.items() for name in names}
    assert all(len(curve["steps"]) == len(curve["values"]) > 0 for curve in found["curves"].values())
    assert {job.name for job, _, _ in experiments(PRESETS["smoke"])} <= found["scores"].keys()
