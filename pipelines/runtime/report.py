"""The report of a chain: one HTML file that holds everything, to open without a server or a network.

In: the chain as `chain.json` tells it (its stages and their output folders). Out: `report.html` with the stages and
their times, what was fetched and rejected, reconstructions, loss curves, samples under their captions, scores and
digests. A stage that has not run leaves its section out.

Captions and sources come from the web, so every text is escaped, pictures are embedded as data, and a content security
policy forbids scripts and remote content altogether.
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from cogview.shards.manifest import MANIFEST_NAME, read_json, read_sealed
from pipelines.runtime.html import image_url, write_html

TEMPLATE = "report.html"
FACTS = ("preset", "data", "state", "started", "error")
FUNNEL_JOBS = ("scrape_pairs", "import_pairs", "filter_pairs", "tokenize_pairs")
PICTURES = {
    "Image tokenizer": (
        ("train_image_tokenizer", "reconstructions.png", "While training: originals and reconstructions"),
        ("evaluate", "reconstructions.png", "Unseen scenes, original left and reconstruction right"),
    ),
    "Loss": (("evaluate", "curves.png", "Training and held-out loss in nats per token"),),
    "While learning": (("pretrain", "samples/step_*.png", "Samples for held-out captions"),),
}
GROUPS = ("all", "one shape", "two shapes", "English", "Chinese")  # JSON on disk is sorted by name, a table is not
ATTRIBUTES = ("mean", "shape", "colour", "size", "background", "position", "count")
MAX_SAMPLES = 96
MAX_STEPS_SHOWN = 4
MAX_PICTURE_SIDE = 256  # of a sample, so that a report of large pictures stays small enough to send
REASON_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A finished stage of the chain; `folder` is its output."""

    job: str
    folder: Path
    digest: str
    seconds: float
    was_done: bool
    scores: Mapping[str, Any]


def write_report(chain: Mapping[str, Any], output: Path, *, root: Path = Path()) -> Path:
    """Write the report of a chain to `output`, and return that path.

    chain: what `chain.json` holds: a few facts and `stages`, each with `job`, `output`, `digest`, `seconds`, `was_done`
    and `scores`; stages without an output are left out. root: the folder that outputs are relative to. ManifestError
    for a damaged file of a stage.
    """
    stages = [_stage(entry, root=root) for entry in chain["stages"] if "output" in entry]
    scores = _evaluation(stages)
    values = {
        "title": "CogView",
        "facts": {name: chain[name] for name in FACTS if chain.get(name)},
        "stages": stages,
        "total_seconds": sum(stage.seconds for stage in stages),
        "funnel": _funnel(stages),
        "pictures": {name: shown for name, wanted in PICTURES.items() if (shown := _pictures(stages, wanted))},
        "samples": _samples(stages),
        "headline": _headline(scores),
        "scores": scores.get("scores", {}),
        "groups": _groups(scores),
        "configs": _configs(stages),
    }
    write_html(output, template=TEMPLATE, values=values)
    return output


def _stage(entry: Mapping[str, Any], *, root: Path) -> Stage:
    return Stage(
        job=str(entry["job"]),
        folder=root / str(entry["output"]),
        digest=str(entry.get("digest", "")),
        seconds=float(entry.get("seconds", 0.0)),
        was_done=bool(entry.get("was_done", False)),
        scores={key: value for key, value in dict(entry.get("scores", {})).items() if isinstance(value, (int, float))},
    )


def _funnel(stages: Iterable[Stage]) -> list[dict[str, Any]]:
    """For each stage that keeps or rejects: rows in, rows out, and the reasons by weight."""
    funnel = []
    for stage in stages:
        if stage.job in FUNNEL_JOBS and (stage.folder / MANIFEST_NAME).exists():
            manifest = read_sealed(stage.folder / MANIFEST_NAME)
            reasons = sorted(manifest["rejected"].items(), key=lambda item: (-item[1], item[0]))
            funnel.append(
                {
                    "job": stage.job,
                    "rows_in": manifest["rows_in"],
                    "rows_out": manifest["rows_out"],
                    "reasons": reasons[:REASON_ROWS],
                }
            )
    return funnel


def _pictures(stages: Iterable[Stage], wanted: Iterable[tuple[str, str, str]]) -> list[dict[str, str]]:
    """The pictures that are there; of a pattern of steps the last few."""
    folders = {stage.job: stage.folder for stage in stages}
    return [
        {"title": f"{title}, {path.stem}" if "*" in pattern else title, "data": image_url(path.read_bytes())}
        for job, pattern, title in wanted
        if job in folders
        for path in sorted(folders[job].glob(pattern))[-MAX_STEPS_SHOWN:]
    ]


def _samples(stages: Iterable[Stage]) -> list[dict[str, Any]]:
    """Each prompt with its candidates as embedded pictures; Chinese captions are drawn by the reader's browser."""
    folder = next((stage.folder for stage in stages if stage.job == "generate"), None)
    if folder is None or not (folder / "samples.parquet").is_file():
        return []
    prompts: dict[int, dict[str, Any]] = {}
    for row in pq.read_table(folder / "samples.parquet").slice(0, MAX_SAMPLES).to_pylist():
        prompt = prompts.setdefault(row["prompt_index"], {"prompt": row["prompt"], "pictures": []})
        prompt["pictures"].append({"data": _picture_url(folder / row["path"]), "seed": row["seed"]})
    return list(prompts.values())


def _evaluation(stages: Iterable[Stage]) -> dict[str, Any]:
    folder = next((stage.folder for stage in stages if stage.job == "evaluate"), None)
    if folder is None or not (folder / "scores.json").is_file():
        return {}
    return dict(read_json(folder / "scores.json"))


def _groups(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups = evaluation.get("groups", {})
    return {
        group: {name: groups[group][name] for name in ATTRIBUTES if name in groups[group]}
        for group in GROUPS
        if group in groups
    }


def _headline(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """The three or four numbers that a reader looks for first."""
    scores = evaluation.get("scores", {})
    shown = []
    if "attributes/mean" in scores:
        mean = scores["attributes/mean"]
        shown.append({"label": "attributes right in samples", "value": f"{100 * mean['value']:.1f} %", "n": mean["n"]})
    if "reconstruction/attributes" in scores:
        mean = scores["reconstruction/attributes"]
        shown.append(
            {"label": "attributes right in reconstructions", "value": f"{100 * mean['value']:.1f} %", "n": mean["n"]}
        )
    for name, label in (("image", "held-out image loss"), ("text", "held-out text loss")):
        if f"loss/validation_{name}" in scores:
            loss = scores[f"loss/validation_{name}"]
            shown.append({"label": f"{label}, nats per token", "value": f"{loss['value']:.3f}", "n": loss["n"]})
    return shown


def _configs(stages: Iterable[Stage]) -> list[dict[str, str]]:
    return [
        {"job": stage.job, "text": (stage.folder / "config.json").read_text()}
        for stage in stages
        if (stage.folder / "config.json").is_file()
    ]


def _picture_url(path: Path) -> str:
    with Image.open(path) as picture:
        if max(picture.size) <= MAX_PICTURE_SIDE:
            return image_url(path.read_bytes())
        smaller = picture.convert("RGB")
    smaller.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    buffer = io.BytesIO()
    smaller.save(buffer, format="PNG")
    return image_url(buffer.getvalue())
