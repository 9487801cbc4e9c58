"""Train a deep narrow GPT at a rate that no model should stand, with and without the paper's two remedies.

Command: python -m pipelines stress_stability smoke (`make stress-stability`)
Reads:   nothing; the rows are scenes of the demo corpus, a caption's bytes and a coarse mosaic of its picture
Writes:  stability.png, by_step.csv, by_layer.csv, arms.json; one MLflow run with four nested ones
Time:    smoke: about a minute on two cores; paper: minutes on a GPU

CogView, section 2.4 and figure 4 (b). Four trainings of the same model on the same rows, with Sandwich-LN, with
PB-relax, with both and with neither. A training ends at the first tensor that half precision cannot hold. With
precision "fp16" that is the real thing. With "fp32", for processors without fast half precision, tensors are cast to
fp16 where an fp16 run would write them (the list stands in `cogview.evaluation.stability`, and is the same for all
four), and at its end each training's model is run once more with all weights and activations in real fp16. Gradients
end no training: to one beyond fp16 the loss scale has an answer.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from cogview.config import require_positive, runtime_field
from cogview.evaluation.stability import HALF_LIMIT, ScaleProbe, is_finite_in_half, watch_scales
from cogview.evaluation.stress_arms import ARMS, ArmTrace, StepRecord
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.sizes import SIZES
from cogview.scenes.scene import Scene, corpus, draw_scene
from cogview.sequences.batch import SequenceBatch, SequenceConfig, build_batch
from cogview.sequences.layout import TASKS
from cogview.shards.manifest import write_json
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.loss_scale import LossScale, LossScaleConfig
from cogview.training.optimization import OptimizerConfig, learning_rate_at
from cogview.training.precision import MasterWeights, Precision
from pipelines.runtime.csv_file import write_csv
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.nested import nested_tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYOUT = TASKS["text_to_image"]
CHANNEL_LEVELS = 4
VOCABULARY = Vocabulary(CHANNEL_LEVELS**3, 256)  # a code is a colour of 4 x 4 x 4, a text piece is a byte
COLOURS = {"neither": "#8a909c", "Sandwich-LN only": "#d98e04", "PB-relax only": "#3b6ea5", "both": "#2c7a5b"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The toy experiment.

    model: its vocabulary, positions, Sandwich-LN, pre-scaled norms and attention are set by rows and arm.
    grid: codes of a row's picture are grid x grid; max_text: bytes of a caption that are kept.
    optimizer: the rate is constant, for its schedule would only calm what is to be stirred up.
    """

    model: GPTConfig
    grid: int
    max_text: int
    num_steps: int
    batch_size: int = 4
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=0.1, warmup_share=0.0, final_share=1.0)
    )
    precision: Precision = "fp32"
    seed: int = 1
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        require_positive(self, "grid", "max_text", "num_steps", "batch_size")

    @property
    def length(self) -> int:
        """Tokens of a full row, before the shift."""
        return self.max_text + self.grid**2 + LAYOUT.overhead()


PAPER = Config(
    model=replace(SIZES["tiny"], num_layers=64, hidden_size=1024, num_heads=16, init_std=0.02),
    grid=32,
    max_text=61,
    num_steps=1000,
    precision="fp16",
    device="cuda",
)
SMOKE = replace(
    PAPER,
    model=replace(PAPER.model, num_layers=32, hidden_size=128, num_heads=2),  # heads of 64, as in the paper
    grid=6,
    max_text=24,
    num_steps=40,
    precision="fp32",
    device="cpu",
)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": SMOKE}


def main(config: Config, run: JobRun) -> None:
    """Train the four arms one after the other; write what was measured, and the plot."""
    torch.set_num_threads(config.threads)
    traces = []
    for name in ARMS:
        with nested_tracker(run, job=JOB.name, name=name, config=arm_model(config, name)) as tracker:
            trace = train_arm(config, name)
            for record in trace.records:
                tracker.log_metrics({"loss": record.loss, **record.maxima()}, step=record.step)
            for layer, value in trace.records[-1].by_layer("residual").items():
                tracker.log_metrics({"last_step/residual_by_layer": value}, step=layer)
            tracker.log_scores(trace.summary())
        traces.append(trace)
        run.say(f"{name}: {trace.verdict}")
        run.progress(len(traces), len(ARMS))
        run.scores.update({f"{name}/{key}": value for key, value in trace.summary().items()})
    write_traces(traces, folder=run.output)
    run.tracker.log_figure(plot_traces(traces), "stability.png")


def train_arm(config: Config, name: str) -> ArmTrace:
    """Train one arm until it has all its steps, or a tensor overflows. Seed and rows are the same for every arm."""
    torch.manual_seed(config.seed)
    gpt = GPT(arm_model(config, name)).to(config.device).train()
    trainer = _Trainer(gpt, config=config)
    records: list[StepRecord] = []
    overflow = None
    with watch_scales(gpt) as probe:
        for step, batch in enumerate(scene_batches(config)):
            probe.clear()
            loss = trainer.forward(batch, probe=probe)
            records.append(StepRecord(step=step, loss=float(loss.detach()), readings=tuple(probe.readings)))
            overflow = probe.overflow
            if overflow is not None:
                break
            trainer.backward(loss, step=step)
    half_is_finite = is_finite_in_half(gpt, batch.ids.to(config.device), batch.positions.to(config.device))
    return ArmTrace(
        name=name, num_steps=config.num_steps, records=records, overflow=overflow, half_is_finite=half_is_finite
    )


def arm_model(config: Config, name: str) -> GPTConfig:
    """The model of an arm."""
    sized = replace(config.model, vocab_size=VOCABULARY.size, max_positions=config.length)
    return ARMS[name].apply(sized)


class _Trainer:
    """A GPT with its optimizer, in either precision."""

    def __init__(self, gpt: GPT, *, config: Config) -> None:
        self.gpt, self.config = gpt, config
        self.weights = MasterWeights(gpt, config=config.optimizer, precision=config.precision)
        initial = LossScaleConfig().initial if config.precision == "fp16" else 1.0
        self.loss_scale = LossScale(LossScaleConfig(initial=initial))

    def forward(self, batch: SequenceBatch, *, probe: ScaleProbe) -> Tensor:
        """The mean loss of a batch's tokens, in fp32; the logits are recorded as coming after the last layer."""
        device, counted_BL = self.config.device, batch.loss_weights > 0
        hidden_BLE = self.gpt(batch.ids.to(device), batch.positions.to(device))
        logits_NV = self.gpt.logits(hidden_BLE[counted_BL.to(device)])
        probe.record("logits", self.gpt.config.num_layers, logits_NV)
        return nn.functional.cross_entropy(logits_NV.float(), batch.labels[counted_BL].to(device))

    def backward(self, loss: Tensor, *, step: int) -> None:
        """Step, unless a gradient is not finite: then only the loss scale falls."""
        scale = self.loss_scale.value
        self.weights.zero_gradients()
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        self.weights.take_gradients(loss_scale=scale)
        norm = self.weights.clip_gradients(self.config.optimizer.clip_norm)
        if not math.isfinite(norm.item()):
            self.loss_scale.overflowed()
            return
        rate = learning_rate_at(step, num_steps=self.config.num_steps, config=self.config.optimizer)
        self.weights.step(learning_rate=rate)
        self.loss_scale.succeeded()


def scene_batches(config: Config) -> Iterator[SequenceBatch]:
    """A batch of new scenes for each step: the caption's bytes, and each cell's colour as a code."""
    scenes = corpus(config.seed, config.num_steps * config.batch_size)
    for _ in range(config.num_steps):
        rows = [next(scenes) for _ in range(config.batch_size)]
        yield build_batch(
            [list(row.english.encode()) for row in rows],
            np.stack([_mosaic(row.scene, grid=config.grid) for row in rows]),
            layout=LAYOUT,
            config=SequenceConfig(length=config.length),
            vocabulary=VOCABULARY,
        )


def write_traces(traces: Sequence[ArmTrace], *, folder: Path) -> None:
    """Write the numbers as tables and the plot as a picture.

    by_step.csv: of each step and point the largest reading over all layers; by_layer.csv: the main branch and the
    scores of each layer and step; arms.json: the arms' summaries.
    """
    write_csv(_step_rows(traces), folder / "by_step.csv")
    write_csv(_layer_rows(traces), folder / "by_layer.csv")
    write_json(folder / "arms.json", {trace.name: trace.summary() for trace in traces})
    plot_traces(traces).savefig(folder / "stability.png", dpi=120)


def plot_traces(traces: Sequence[ArmTrace]) -> "Figure":
    """Three panels: the main branch by layer at each arm's last step, then over steps, and the scores over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_layer, branch, scores = figure.subplots(1, 3)
    for trace in traces:
        last = trace.records[-1].by_layer("residual")
        by_layer.plot(list(last), list(last.values()), color=COLOURS[trace.name], label=trace.name, linewidth=1.8)
        for axes, point in ((branch, "residual"), (scores, "scores")):
            _plot_steps(axes, trace, point)
    by_layer.set(title="Main branch at the last step, by layer", xlabel="layer", ylabel="max |x|")
    branch.set(title="Main branch", xlabel="step")
    scores.set(title="Attention scores as they are written", xlabel="step")
    for axes in (by_layer, branch, scores):
        axes.axhline(HALF_LIMIT, color="#d1495b", linewidth=1, linestyle="--")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e5ea", linewidth=0.8)
    scores.annotate("fp16: 65,504", (1, HALF_LIMIT), (0, 4), ("axes fraction", "data"), "offset points", ha="right")
    by_layer.legend(frameon=False, loc="best")
    return figure


def _plot_steps(axes: "Axes", trace: ArmTrace, point: str) -> None:
    """A point's maxima over the steps, with a cross where it is this point that ended the arm."""
    steps = [record.step for record in trace.records]
    values = [record.maxima()[f"max_{point}"] for record in trace.records]
    axes.plot(steps, values, color=COLOURS[trace.name], linewidth=1.8)
    if trace.overflow is not None and trace.overflow.point == point:
        axes.plot(steps[-1:], values[-1:], "X", color=COLOURS[trace.name], markersize=11, markeredgecolor="#262a32")


def _step_rows(traces: Iterable[ArmTrace]) -> Iterator[dict[str, Any]]:
    for trace in traces:
        for record in trace.records:
            readings = {"loss": record.loss} | {
                name.removeprefix("max_"): value for name, value in record.maxima().items()
            }
            for point, value in readings.items():
                yield {"arm": trace.name, "step": record.step, "point": point, "largest": f"{value:.5g}"}


def _layer_rows(traces: Iterable[ArmTrace]) -> Iterator[dict[str, Any]]:
    for trace in traces:
        for record in trace.records:
            for point in ("residual", "scores"):
                for layer, value in record.by_layer(point).items():
                    place = {"arm": trace.name, "step": record.step, "layer": layer, "point": point}
                    yield place | {"largest": f"{value:.5g}"}


def _mosaic(scene: Scene, *, grid: int) -> npt.NDArray[np.uint16]:
    """A scene as grid x grid colours of 4 x 4 x 4, uint16 [grid * grid]."""
    picture = draw_scene(scene).resize((grid, grid), Image.Resampling.BOX)
    levels_CC3 = np.asarray(picture, dtype=np.uint16) // (256 // CHANNEL_LEVELS)
    codes: npt.NDArray[np.uint16] = levels_CC3 @ np.array([CHANNEL_LEVELS**2, CHANNEL_LEVELS, 1], dtype=np.uint16)
    return codes.reshape(-1)


JOB = Job(
    name="stress_stability",
    version=1,
    products=("stability.png", "by_step.csv", "by_layer.csv", "arms.json"),
    main=main,
)
