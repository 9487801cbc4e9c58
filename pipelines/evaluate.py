"""Score what a model drew, and the model itself on held-out pairs.

Command: python -m pipelines evaluate smoke --samples FOLDER --checkpoint FOLDER ... (`make pretrain` runs it last)
Reads:   the output folders of generate, pretrain, tokenize_pairs, train_text_tokenizer and train_image_tokenizer
Writes:  scores.json (every score with its n and its source), samples.png, reconstructions.png, curves.png, report.html
Time:    about 15 s for 200 samples and 2,000 held-out rows on two cores
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cogview.config import input_field, runtime_field
from cogview.errors import CheckpointError, ConfigError
from cogview.evaluation.attributes import JudgedPicture, Score, judge, scene_from_json, score_attributes, score_groups
from cogview.evaluation.grids import Tile, draw_sheet
from cogview.evaluation.losses import held_out_losses
from cogview.evaluation.reconstruction import mean_psnr, reconstruct
from cogview.sampling.text_to_image import TextToImage
from cogview.scenes.reading import ATTRIBUTES
from cogview.scenes.scene import draw_scene, held_out_prompts
from cogview.sequences.batch import SequenceBatch, SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.shards.manifest import atomic_file, read_json, write_json
from cogview.shards.reader import TokenShards
from cogview.training.metrics_file import read_metrics
from pipelines.runtime.jobs import COMPLETE_NAME, Job, JobRun
from pipelines.runtime.report import write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES_SHOWN = 48
INPUTS = ("samples", "checkpoint", "tokens", "text_tokenizer", "image_tokenizer")
RECONSTRUCTIONS_SHOWN = 24


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to score.

    samples: output of generate; checkpoint, tokens, text_tokenizer, image_tokenizer: outputs of the stages before it.
    demo: the pairs are scenes of the demo corpus, so that samples and reconstructions can be read back.
    num_reconstructions: unseen scenes to encode and decode; num_loss_rows: held-out rows for the losses, 0 for all.
    """

    samples: Path | None = input_field(default=None)
    checkpoint: Path | None = input_field(default=None)
    tokens: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    demo: bool = True
    num_reconstructions: int = 256
    num_loss_rows: int = 0
    seed: int = 1
    batch_size: int = runtime_field(32)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)


PAPER = Config(demo=False, device="cuda")
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, demo=True, num_loss_rows=2000, device="cpu"),
}


def main(config: Config, run: JobRun) -> None:
    """Score samples, reconstructions and held-out losses; write them, the pictures and the report."""
    torch.set_num_threads(config.threads)
    folders = require_inputs(config)
    painter = TextToImage.load(
        folders["checkpoint"],
        text_tokenizer=folders["text_tokenizer"],
        image_tokenizer=folders["image_tokenizer"],
        device=config.device,
    )
    samples = read_samples(folders["samples"], checkpoint=run.inputs["checkpoint"])
    judged = judge_samples(samples, folder=folders["samples"])
    scores = {
        **attribute_scores(judged, seed=config.seed),
        **(reconstruction_scores(painter, config=config, run=run) if config.demo else {}),
        **loss_scores(painter, folders["tokens"], config=config),
    }
    write_json(
        run.output / "scores.json",
        {"scores": scores, "groups": group_scores(judged, seed=config.seed), "inputs": dict(run.inputs)},
    )
    run.scores.update({name: score["value"] for name, score in scores.items()})
    run.tracker.log_model_scores(run.inputs["checkpoint"], run.scores)
    draw_samples(samples, judged, folder=folders["samples"], run=run)
    draw_curves(folders["checkpoint"], run=run)
    write_report(own_chain(folders, run=run), run.output / "report.html")
    run.tracker.log_artifact(run.output / "report.html")
    run.tracker.log_artifact(run.output / "scores.json")


def require_inputs(config: Config) -> dict[str, Path]:
    """The input folders by name. ConfigError for one that is not given."""
    folders: dict[str, Path] = {}
    for name in INPUTS:
        folder = getattr(config, name)
        if folder is None:
            flag = f"--{name.replace('_', '-')} FOLDER"
            raise ConfigError(f"{name} is not given; `make pretrain` runs this job with all it needs, or give {flag}")
        folders[name] = folder
    return folders


def read_samples(folder: Path, *, checkpoint: str) -> list[dict[str, Any]]:
    """The rows of samples.parquet. CheckpointError if another checkpoint than this one has drawn them."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(folder / "samples.parquet").to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"samples={folder}: no whole samples.parquet ({error}); give the output of generate"
        ) from error
    others = {row["checkpoint"] for row in rows} - {checkpoint}
    if others:
        raise CheckpointError(
            f"samples={folder} were drawn with checkpoint {min(others)[:12]}, not with {checkpoint[:12]}; run generate "
            "with this checkpoint"
        )
    return rows


def judge_samples(samples: Sequence[Mapping[str, Any]], *, folder: Path) -> list[JudgedPicture]:
    """Read back every sample whose scene is known."""
    judged = []
    for row in samples:
        if row["scene"]:
            with Image.open(folder / row["path"]) as picture:
                judged.append(judge(picture, expected=scene_from_json(row["scene"]), language=row["language"]))
    return judged


def draw_samples(
    samples: Sequence[Mapping[str, Any]], judged: Sequence[JudgedPicture], *, folder: Path, run: JobRun
) -> None:
    """Write `samples.png`: the judged samples, each with what the reader found wrong; without judged ones, nothing."""
    rows = [row for row in samples if row["scene"]][:SAMPLES_SHOWN]
    tiles = []
    for row, picture in zip(rows, judged, strict=False):
        wrong = [name for name in ATTRIBUTES if picture.marks[name] < 1]
        note = f"wrong: {', '.join(wrong)}" if wrong else "all right"
        image = Image.open(folder / row["path"]).convert("RGB")
        tiles.append(Tile(images=(image,), caption=row["prompt"], fallback=row["latin_prompt"], note=note))
    if tiles:
        _save_sheet(draw_sheet(tiles), run, "samples.png")


def attribute_scores(judged: Sequence[JudgedPicture], *, seed: int) -> dict[str, dict[str, Any]]:
    """`attributes/mean`, `attributes/shape`, ... of the samples; nothing when no sample's scene is known."""
    source = "samples for captions that the corpus never showed, read back by the scene reader"
    return {f"attributes/{name}": _plain(score, source) for name, score in score_attributes(judged, seed=seed).items()}


def group_scores(judged: Sequence[JudgedPicture], *, seed: int) -> dict[str, dict[str, Any]]:
    """The attribute scores of all samples, by number of shapes, and by language."""
    groups = score_groups(judged, seed=seed)
    return {group: {name: asdict(score) for name, score in scores.items()} for group, scores in groups.items()}


def reconstruction_scores(painter: TextToImage, *, config: Config, run: JobRun) -> dict[str, dict[str, Any]]:
    """Encode and decode unseen scenes; writes `reconstructions.png`, originals beside what became of them."""
    prompts = list(held_out_prompts(config.num_reconstructions, seed=config.seed + 1, two_shape_share=0.25))
    originals = [draw_scene(prompt.scene, image_size=painter.image_size) for prompt in prompts]
    decoded = reconstruct(originals, tokenizer=painter.image_tokenizer, batch_size=config.batch_size)
    judged = [judge(picture, expected=prompt.scene) for picture, prompt in zip(decoded, prompts, strict=True)]
    pairs = list(zip(originals, decoded, strict=True))[:RECONSTRUCTIONS_SHOWN]
    _save_sheet(draw_sheet([Tile(images=pair) for pair in pairs], picture_side=112), run, "reconstructions.png")
    source = "unseen scenes through the image tokenizer and back"
    return {
        "reconstruction/attributes": _plain(score_attributes(judged, seed=config.seed)["mean"], source),
        "reconstruction/psnr": {
            "value": mean_psnr(decoded, originals=originals),
            "n": len(decoded),
            "source": f"{source}, dB",
        },
    }


def loss_scores(painter: TextToImage, tokens: Path, *, config: Config) -> dict[str, dict[str, Any]]:
    """`loss/validation_image` and `loss/validation_text` in nats per token, over the held-out rows."""
    shards = TokenShards.open(tokens, split="validation")
    shards.require(
        text_tokenizer=painter.text_tokenizer.fingerprint,
        image_tokenizer=painter.image_tokenizer.fingerprint,
        vocabulary=painter.vocabulary.fingerprint,
    )
    losses = held_out_losses(painter.model, held_out_batches(shards, painter, config=config))
    return {
        f"loss/validation_{name}": {"value": loss.value, "n": loss.n, "source": "held-out rows, nats per token"}
        for name, loss in losses.items()
    }


def held_out_batches(shards: TokenShards, painter: TextToImage, *, config: Config) -> Iterator[SequenceBatch]:
    """The held-out rows laid out as in training; `num_loss_rows` of them, chosen by the seed, if that is fewer."""
    numbers = np.random.default_rng(config.seed).permutation(len(shards))[: config.num_loss_rows or len(shards)]
    for start in range(0, len(numbers), config.batch_size):
        rows = shards.rows(numbers[start : start + config.batch_size])
        yield build_batch(
            rows.text_ids,
            rows.image_codes,
            layout=TASKS["text_to_image"],
            config=SequenceConfig(length=painter.length, is_image_fixed=painter.is_image_fixed),
            vocabulary=painter.vocabulary,
        )


def draw_curves(checkpoint: Path, *, run: JobRun) -> None:
    """Plot the losses of `metrics.jsonl` over steps to `curves.png`; without that file there is nothing to plot."""
    lines = read_metrics(checkpoint / "metrics.jsonl")
    if not lines:
        return
    figure = plot_losses(lines)
    figure.savefig(run.output / "curves.png", dpi=120)
    run.tracker.log_figure(figure, "curves.png")


def plot_losses(lines: Sequence[Mapping[str, float]]) -> "Figure":
    """Image and text loss side by side: training as a line, held-out rows as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("image", "text"), strict=True):
        trained = [(line["step"], line[f"{name}_loss"]) for line in lines if f"{name}_loss" in line]
        held_out = [(line["step"], line[key]) for line in lines if (key := f"validation_{name}_loss") in line]
        if trained:
            axes.plot(*zip(*trained, strict=True), color="#3b6ea5", linewidth=1.2, label="training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color="#d1495b", markersize=4, linewidth=1, label="held out")
        axes.set(title=f"{name.capitalize()} loss", xlabel="step", ylabel="nats per token")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e5ea", linewidth=0.8)
        if trained or held_out:
            axes.legend(frameon=False)
    return figure


def own_chain(folders: Mapping[str, Path], *, run: JobRun) -> dict[str, Any]:
    """The chain as far as this job sees it: the finished stages that it reads, and itself."""
    stages = [
        {"job": done["job"], "output": str(folder.resolve()), "digest": done["output_digest"], "was_done": True, **done}
        for folder in folders.values()
        if (folder / COMPLETE_NAME).is_file() and (done := read_json(folder / COMPLETE_NAME))
    ]
    own = {"job": JOB.name, "output": str(run.output.resolve()), "digest": run.digest, "scores": run.scores}
    return {"stages": [*reversed(stages), own]}


def _save_sheet(sheet: Image.Image, run: JobRun, name: str) -> None:
    with atomic_file(run.output / name) as file:
        sheet.save(file, format="PNG")
    run.tracker.log_image(sheet, name)


def _plain(score: Score, source: str) -> dict[str, Any]:
    return {**asdict(score), "source": source}


JOB = Job(name="evaluate", version=1, products=("scores.json", "report.html"), main=main)
