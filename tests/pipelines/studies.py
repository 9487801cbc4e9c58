"""A small study of real files: two systems that name their pictures in their own ways, ours, and the truth."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cogview.evaluation.attributes import scene_to_json
from cogview.scenes.scene import draw_scene, held_out_prompts
from pipelines.judging.ballots import Ballots, Evaluator, Share
from pipelines.judging.study import Study, StudyConfig, prepare
from tests.pipelines.job_runs import open_run
from tests.pipelines.trained_folders import write_trained_folders

NUMBER = 8
SCORES = {"overall": 7, "clarity": 4, "texture": 3, "relevance": 5}
SHARE = Share(measured=4, repeated=1, planted=1)


@dataclass(frozen=True, kw_only=True)
class Systems:
    """ours: as `generate` writes; named: pictures named by their captions; listed: with .txt files."""

    ours: Path
    named: Path
    listed: Path
    image_tokenizer: Path
    captions: tuple[str, ...]


def write_systems(root: Path, *, number: int = NUMBER) -> Systems:
    prompts = list(held_out_prompts(number, seed=0))
    systems = Systems(
        ours=root / "ours",
        named=root / "named",
        listed=root / "listed",
        image_tokenizer=write_trained_folders(root).image_tokenizer,
        captions=tuple(prompt.caption for prompt in prompts),
    )
    for folder in (systems.ours / "samples", systems.named, systems.listed / "deeper"):
        folder.mkdir(parents=True)
    rows = []
    for place, prompt in enumerate(prompts):
        for candidate in range(2):
            picture, path = (
                Image.new("RGB", (48, 48), (10 * place, 100 * candidate, 40)),
                f"samples/{place}{candidate}.png",
            )
            picture.save(systems.ours / path)
            row = {"prompt": prompt.caption, "path": path, "candidate": candidate, "rank": 1 - candidate}
            rows.append({**row, "scene": scene_to_json(prompt.scene)})
        own = draw_scene(prompt.scene, image_size=32)
        own.save(systems.named / f"{prompt.caption.replace(' ', '_').replace('，', '_')}.png")
        Image.new("RGB", (60, 40), "gray").save(systems.listed / "deeper" / f"{place}.jpg")
        (systems.listed / "deeper" / f"{place}.txt").write_text(f"{prompt.caption.upper()}\nanother caption\n")
    pq.write_table(pa.Table.from_pylist(rows), systems.ours / "samples.parquet")
    return systems


def study_config(systems: Systems, **changes: object) -> StudyConfig:
    values = {
        "names": ("ours", "named", "listed"),
        "folders": (systems.ours, systems.named, systems.listed),
        "contents": ("a", "b", "c"),
        "image_tokenizer": systems.image_tokenizer,
        "num_planted": 3,
        "image_size": 32,
    }
    return StudyConfig(**{**values, **changes})  # type: ignore[arg-type]


def write_study(root: Path) -> Study:
    """Prepared by the code of the job, in `root / study`."""
    run = open_run(root / "study")
    prepare(study_config(write_systems(root)), run)
    return Study.open(run.output)


def open_ballots(folder: Path, study: Study, share: Share = SHARE) -> Ballots:
    return Ballots(folder / "votes.db", study=study, share=share)


def judge_all(ballots: Ballots, name: str, *, best: str = "") -> Evaluator:
    """Join and judge to the end, every picture alike; best: the model to choose where it is there."""
    evaluator = ballots.join(name)
    while (ballot := ballots.next_ballot(evaluator)) is not None:
        chosen = ballot.models.index(best) if best in ballot.models else 0
        ballots.vote(evaluator, place=ballot.place, best=chosen, scores=[SCORES] * len(ballot.models), seconds=1)
    return evaluator
