"""What the finetunes of CogView2's super-resolution share: a backbone, rows of two sizes, masked codes to predict.

In: published weights of a model that draws, token rows that have each picture as `grid / ratio` and as `grid` codes
along a side, and what is masked. Out: a folder that `load_stage` reads. The direct stage learns with all codes masked
and leaves the backbone as it was; the iterative one with shares of them, and all weights learn.
"""

# B batch, N codes of a large picture, g G grids of the small and the large picture, P masked places, K codes

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.models.continued import continued
from cogview.models.gpt import GPT
from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME, load_model, save_model
from cogview.models.published_stage import save_stage
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.hierarchical_magnifier import form_of
from cogview.sampling.hierarchy import LoPARConfig, StageModel, chooser, draw_directly, refine
from cogview.sampling.text_to_image import require_fingerprints
from cogview.sequences.picture_context import ContextForm, build_context
from cogview.shards.order import SampleOrder
from cogview.shards.reader import TokenRows
from cogview.training.loop import LoopConfig, WeightedBatch
from cogview.training.loss_scale import LossScaleConfig
from cogview.training.masked_codes import MaskedCodesLoss
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.jobs import COMPLETE_NAME, JobRun
from pipelines.runtime.workers import PICTURE_KEY, train_and_score
from pipelines.tasks.finetuning import SOURCES
from pipelines.tasks.language_model import Inputs, Parts

SCORES = ("loss", "validation_loss", "validation_codes_right", "skipped_steps")
VALIDATION_ROWS_AT_ONCE = 16
SHOWN = 12
COGLM_JOB = "pretrain_coglm"
PRODUCERS = {name: job for name, job in SOURCES.items() if name != "tokens"}

# 20,000 steps are those of the iterative stage; those of the direct one were not published, nor were batch and rate.
# The rate is a tenth of that of the pretraining.
PAPER_LOOP = LoopConfig(
    num_steps=20_000,
    global_batch_size=256,
    micro_batch_size=4,
    optimizer=OptimizerConfig(learning_rate=1e-5),
    precision="fp16",
    loss_scale=LossScaleConfig(initial=2.0**16),
    checkpoint_every=1000,
    validate_every=1000,
)
SMOKE_LOOP = LoopConfig(
    num_steps=400,
    global_batch_size=8,
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, warmup_share=0.05, final_share=0.02),
    log_every=10,
    validate_every=200,
    checkpoint_every=100,
)


def fill_backbone(config: Any, *, root: Path) -> Any:
    """A config with the folders that are not given: the CogLM made last under `root`, or else the chain's model."""
    has_coglm = any((root / COGLM_JOB).glob(f"*/{COMPLETE_NAME}"))
    if config.checkpoint is None and has_coglm:
        config = replace(config, checkpoint=latest_output(COGLM_JOB, flag="--checkpoint", root=root))
    return fill_from_chain(config, PRODUCERS, root=root)


@dataclass(frozen=True, kw_only=True)
class StageFinetuning:
    """What a worker builds a finetune from.

    checkpoint: the backbone; model: the stage, its grid and windows; max_text: text tokens that are read, longer
    captions are cut, 0 for as many as in pretraining. mask_shares: of the codes, one of them for each row and step.
    """

    checkpoint: Path
    inputs: Inputs
    model: LocalSuperResolutionConfig
    loop: LoopConfig
    output: Path
    max_text: int = 0
    mask_shares: tuple[float, ...] = (1.0,)
    num_validation_rows: int = 128
    model_changes: Mapping[str, Any] = field(default_factory=dict)

    def start(self) -> "Started":
        """The backbone, the rows, and how captions and small pictures are read.

        Raises VocabularyError if rows or tokenizers are not those of the backbone, ConfigError for rows of other grids.
        """
        if self.loop.sharding != "none":
            raise ConfigError(f"loop.sharding={self.loop.sharding!r}: this model is not spread over GPUs; choose none")
        parts = self.inputs.load()
        gpt, settings = load_model(self.checkpoint)
        form, found = form_of(settings, text=parts.text_tokenizer, image=parts.image_tokenizer)
        require_fingerprints(settings["fingerprints"], found=found, where=self.checkpoint)
        self._require_grids(parts, trained_on=int(settings["grid"]))
        return Started(gpt=gpt, settings=settings, parts=parts, form=self._shortened(form))

    def build(self, started: "Started") -> LocalSuperResolution:
        """The model to train, on a copy of the backbone in fp32."""
        torch.manual_seed(self.loop.seed)
        gpt = continued(started.gpt, min_positions=0, changes=self.model_changes)
        model = LocalSuperResolution(gpt, self.model)
        model.start_from_backbone(first_position=started.form.first_position)
        return model

    def _shortened(self, form: ContextForm) -> ContextForm:
        if self.max_text > form.max_text:
            raise ConfigError(f"max_text={self.max_text}: the backbone reads {form.max_text} text tokens at most")
        if self.max_text and self.model.is_direct:
            raise ConfigError(f"max_text={self.max_text}: with the small picture a text is as long as in pretraining")
        return replace(form, max_text=self.max_text, image_position=form.first_position) if self.max_text else form

    def _require_grids(self, parts: Parts, *, trained_on: int) -> None:
        """ConfigError unless the rows have the grids that are read and drawn, and the backbone knows the smaller."""
        small, large = self.model.small_grid, self.model.grid
        if trained_on != small:
            raise ConfigError(
                f"model.grid={large}, model.ratio={self.model.ratio}: the small pictures have {small} x {small} codes, "
                f"but the checkpoint draws {trained_on} x {trained_on}; choose grid = ratio x {trained_on}"
            )
        found = {parts.train.grid, *parts.train.other_grids}
        missing = {large, small} - found if self.model.is_direct else {large} - found
        if missing:
            side = min(missing)
            raise ConfigError(
                f"tokens: {self.inputs.tokens} has pictures of {sorted(found)} codes along a side, and {side} are "
                "needed too; make them with tokenize_pairs and --other-image-sizes"
            )


@dataclass(frozen=True, kw_only=True)
class Started:
    """A finetune before its first step: the backbone as published, with its settings, and what it learns from."""

    gpt: GPT
    settings: dict[str, Any]
    parts: Parts
    form: ContextForm


def finetune_stage(settings: StageFinetuning, *, run: JobRun, num_workers: int) -> None:
    """Train on Ray to the end, and set the scores of the run."""
    started = settings.start()  # before Ray starts: whatever does not fit together is said now
    with torch.device("meta"):
        model = LocalSuperResolution(GPT(started.gpt.config), settings.model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    run.tracker.log_inputs({"tokens": run.inputs.get("tokens", ""), "checkpoint": run.inputs.get("checkpoint", "")})
    run.say(
        f"{settings.model.stage} super-resolution to {settings.model.grid} x {settings.model.grid} codes: "
        f"{len(started.parts.train):,} rows, {weights:,} parameters, {trained:,} of them trained"
    )
    train_and_score(
        build_stage,
        settings,
        loop=settings.loop,
        num_workers=num_workers,
        run=run,
        scores=SCORES,
        started_from={"started_from": started.settings["sha256"]},
    )
    run.scores.update(parameters=weights, trained_parameters=trained)


def build_stage(settings: StageFinetuning, ranks: Ranks) -> "StageTask":
    """Runs on each worker."""
    return StageTask(settings, ranks=ranks)


class StageTask:
    """A stage as the training loop sees it."""

    def __init__(self, settings: StageFinetuning, *, ranks: Ranks) -> None:
        self.settings, self.ranks, self.started = settings, ranks, settings.start()
        self.model = settings.build(self.started)
        self.parts, self.form = self.started.parts, self.started.form
        image_ids = self.parts.vocabulary.image_ids
        self.module: nn.Module = MaskedCodesLoss(self.model, image_ids=image_ids, mask_id=self.form.mask_id)
        self.stage = StageModel(model=self.model, form=self.form, image_ids=image_ids)
        self.order = SampleOrder(len(self.parts.train), settings.loop.global_batch_size, settings.loop.seed)

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's rows of a step; what is masked follows from the step and the row."""
        indices = ranks.share(self.order.indices(step))
        rows = self.parts.train.rows(indices, with_texts=False, other_grids=self._other_grids())
        tensors = self.lay_out(rows, [(self.settings.loop.seed, step, int(index)) for index in indices])
        return WeightedBatch(tensors, float(tensors["is_masked"].sum()))

    def validate(self, step: int) -> Mapping[str, Any]:
        """The loss of masked codes of held-out rows, the share that the likeliest code gets right, and pictures."""
        total, right, count = 0.0, 0, 0
        for tensors in self.held_out_batches():
            labels_P = tensors["codes"][tensors["is_masked"]]
            logits_PK = self.masked_logits(tensors)
            total += float(nn.functional.cross_entropy(logits_PK.float(), labels_P, reduction="sum"))
            right += int((logits_PK.argmax(dim=-1) == labels_P).sum())
            count += len(labels_P)
        return {"validation_loss": total / count, "validation_codes_right": right / count, **self.look(step)}

    def publish(self, output: Path) -> None:
        """Write the backbone, or a copy of the one that stayed as it was, and what the stage has besides."""
        stored = {key: value for key, value in self.started.settings.items() if key not in ("config", "sha256")}
        started_from = self.started.settings["sha256"]
        name = f"{self.settings.model.stage}_super_resolution"
        if self.settings.model.is_direct:
            for file in (WEIGHTS_NAME, SETTINGS_NAME):
                shutil.copyfile(self.settings.checkpoint / file, output / file)
        else:
            save_model(self.model.gpt, output, settings={**stored, "task": name, "started_from": started_from})
        settings = {
            "task": name,
            "fingerprints": self.started.settings["fingerprints"],
            "form": asdict(self.form),
            "started_from": started_from,
            "num_steps": self.settings.loop.num_steps,
        }
        save_stage(self.model, output, settings=settings)

    def lay_out(self, rows: TokenRows, seeds: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Rows as the loss takes them; seeds: of what is masked in each."""
        config = self.settings.model
        small = self._codes(rows, config.small_grid) if config.is_direct else None
        context = build_context(rows.text_ids, small, form=self.form)
        masks = [mask_of(config.grid**2, shares=self.settings.mask_shares, seed=seed) for seed in seeds]
        return {
            "context_ids": context.ids,
            "context_positions": context.positions,
            "context_allowed": context.allowed,
            "context_seen": context.seen,
            "codes": torch.from_numpy(self._codes(rows, config.grid).astype(np.int64)),
            "is_masked": torch.from_numpy(np.stack(masks)),
        }

    def held_out_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The first held-out rows, a few at a time, always with the same masks."""
        number = min(self.settings.num_validation_rows, len(self.parts.validation))
        for start in range(0, number, VALIDATION_ROWS_AT_ONCE):
            indices = np.arange(start, min(start + VALIDATION_ROWS_AT_ONCE, number))
            rows = self.parts.validation.rows(indices, with_texts=False, other_grids=self._other_grids())
            tensors = self.lay_out(rows, [(0, int(index)) for index in indices])
            yield {name: tensor.to(self.ranks.device) for name, tensor in tensors.items()}

    def masked_logits(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores of all codes at the masked places of a batch, [P, codes]."""
        ids_BN = torch.where(tensors["is_masked"], self.form.mask_id, tensors["codes"])
        hidden_BNE = self.model(
            tensors["context_ids"],
            tensors["context_positions"],
            context_allowed_BCC=tensors["context_allowed"],
            context_seen_BC=tensors["context_seen"],
            grid_ids_BN=ids_BN,
        )
        return self.model.gpt.logits(hidden_BNE[tensors["is_masked"]], ids=self.parts.vocabulary.image_ids)

    def look(self, step: int) -> Mapping[str, Any]:
        """A picture of held-out rows: what is read, enlarged; what is drawn; what should have been drawn."""
        held_out, config = self.parts.validation, self.settings.model
        indices = np.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).astype(np.int64)
        rows = held_out.rows(indices, other_grids=self._other_grids())
        tokenizer = self.parts.image_tokenizer.to(self.ranks.device)
        right_BGG = self._grid(rows, config.grid)
        seeds = list(range(len(rows)))
        if config.is_direct:
            small_Bgg = self._grid(rows, config.small_grid)
            drawn = draw_directly(
                self.stage, rows.text_ids, small_Bgg, seeds=seeds, choose=chooser(SamplingConfig(temperature=0))
            )
            shown = [small_Bgg, drawn, right_BGG]
        else:
            shown = [refine(self.stage, rows.text_ids, right_BGG, seeds=seeds, config=LoPARConfig()), right_BGG]
        pictures = [to_pictures(tokenizer.decode(codes)) for codes in shown]
        tiles = [
            Tile(images=images, caption=text)
            for images, text in zip(zip(*pictures, strict=True), rows.texts, strict=True)
        ]
        title = "read | drawn | right" if config.is_direct else "drawn again | right"
        name = f"samples/step_{step:08d}.png"
        (self.settings.output / name).parent.mkdir(exist_ok=True)
        draw_sheet(tiles, title=title).save(self.settings.output / name)
        return {PICTURE_KEY: name}

    def _other_grids(self) -> tuple[int, ...]:
        config, main = self.settings.model, self.parts.train.grid
        wanted = {config.grid, config.small_grid} if config.is_direct else {config.grid}
        return tuple(sorted(wanted - {main}))

    def _codes(self, rows: TokenRows, grid: int) -> npt.NDArray[np.uint16]:
        return rows.image_codes if grid == self.parts.train.grid else rows.other_codes[grid]

    def _grid(self, rows: TokenRows, grid: int) -> torch.Tensor:
        codes = torch.from_numpy(self._codes(rows, grid).astype(np.int64))
        return codes.view(-1, grid, grid).to(self.ranks.device)


def mask_of(length: int, *, shares: tuple[float, ...], seed: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """bool [length], of which one of the shares, drawn with the seed, is True; at least one place is."""
    generator = np.random.default_rng(seed)
    count = max(1, round(shares[generator.integers(len(shares))] * length))
    is_masked = np.zeros(length, dtype=bool)
    is_masked[generator.permutation(length)[:count]] = True
    return is_masked
