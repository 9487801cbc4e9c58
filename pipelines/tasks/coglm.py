"""CogLM as a training task: token rows as batches of its kinds, held-out losses, pictures, published weights.

In: the output folders of tokenize_pairs, of a bilingual text tokenizer and of an image tokenizer, and a GPT. Out: a
task for the training loop (CogView2). What kind of row a pair becomes, and what is hidden of it, is drawn from
the seed, the step and the row's number alone, so it is the same on any number of workers and after a resume.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.models.gpt import GPT
from cogview.models.published import save_model
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import TASK, CogLM
from cogview.sequences.coglm import CogLMLayout, CogLMTasks, RowMaker
from cogview.sequences.coglm_batch import CogLMBatch, collate
from cogview.sequences.layout import IdSequence
from cogview.shards.order import SampleOrder
from cogview.shards.reader import TokenRows, TokenShards
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.training.coglm import CogLMLoss
from cogview.training.language_model import weighted
from cogview.training.loop import LoopConfig, WeightedBatch
from cogview.training.ranks import Ranks
from pipelines.runtime.workers import PICTURE_KEY
from pipelines.tasks.language_model import Parts

Numbers = npt.NDArray[np.int64]
VALIDATION_ROWS_AT_ONCE = 32
DRAWN_PLAINLY = CogLMSampling(text_bonus=0.0, by_clusters=False, tokens=SamplingConfig())


@dataclass(frozen=True, kw_only=True)
class CogLMTaskConfig:
    """What a task does with rows and weights. text_loss_weight: of the labels of texts, beside 1 of image codes."""

    layout: CogLMLayout
    tasks: CogLMTasks
    text_loss_weight: float
    loop: LoopConfig
    output: Path
    num_validation_rows: int
    num_samples: int


class CogLMTask:
    """CogLM as the training loop sees it."""

    def __init__(self, gpt: GPT, *, parts: Parts, config: CogLMTaskConfig, ranks: Ranks) -> None:
        self.gpt, self.parts, self.config, self.ranks = gpt, parts, config, ranks
        self.vocabulary = vocabulary_of(parts)
        self.maker = RowMaker(vocabulary=self.vocabulary, layout=config.layout, tasks=config.tasks)
        self.module: nn.Module = CogLMLoss(gpt)
        self.order = SampleOrder(len(parts.train), config.loop.global_batch_size, config.loop.seed)

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's rows of a step."""
        return weighted(self.lay_out(self.parts.train, ranks.share(self.order.indices(step)), step=step))

    def lay_out(self, shards: TokenShards, numbers: Numbers, *, step: int) -> CogLMBatch:
        """Rows of a split as the model reads them; their numbers and the step decide what is drawn for each.

        A caption of the same picture in the other language comes along, where it is the row before or behind.
        """
        around = np.clip(numbers[:, None] + np.array([0, -1, 1]), 0, len(shards) - 1)
        rows, made = shards.rows(around.ravel(), with_texts=False), []
        for place, number in enumerate(numbers.tolist()):
            own = len(around[0]) * place
            generator = np.random.default_rng([self.config.loop.seed, step, number])
            texts = self._captions(rows, own, neighbours=range(own + 1, own + len(around[0])))
            made.append(self.maker.row(texts, rows.image_codes[own], generator=generator))
        weights = {tongue: self.config.text_loss_weight for tongue in ("english", "chinese")}
        return collate(made, pad=self.vocabulary.pad, weights=weights)

    def validate(self, step: int) -> Mapping[str, Any]:
        """The losses on held-out rows, always hidden in the same way, and pictures for captions of some of them.

        No worker of a sharded run has the whole model to draw with.
        """
        sums: dict[str, torch.Tensor] = {}
        for batch in self.held_out_batches():
            on_device = {name: tensor.to(self.ranks.device) for name, tensor in weighted(batch).tensors.items()}
            for name, (total, weight) in self.module(**on_device).reports.items():
                if name.endswith("_loss"):
                    pair = torch.stack([total.double().cpu(), weight.double().cpu()])
                    sums[name] = sums[name] + pair if name in sums else pair
        losses = {f"validation_{name}": (pair[0] / pair[1]).item() for name, pair in sums.items() if pair[1] > 0}
        is_whole = self.config.loop.sharding == "none" and self.config.num_samples > 0
        return {**losses, **(self._draw_samples(step) if is_whole else {})}

    def publish(self, output: Path) -> None:
        """Write the weights with what they were trained with."""
        fingerprints = {**self.parts.fingerprints, "vocabulary": self.vocabulary.fingerprint}
        settings = {
            "task": TASK,
            "fingerprints": fingerprints,
            "grid": self.config.layout.grid,
            "layout": asdict(self.config.layout),
            "ends_text": self.config.tasks.ends_text,
            "num_steps": self.config.loop.num_steps,
        }
        save_model(self.gpt, output, settings=settings)

    def held_out_batches(self) -> Iterator[CogLMBatch]:
        """The first held-out rows, a few at a time."""
        number = min(self.config.num_validation_rows, len(self.parts.validation))
        for start in range(0, number, VALIDATION_ROWS_AT_ONCE):
            indices = np.arange(start, min(start + VALIDATION_ROWS_AT_ONCE, number))
            yield self.lay_out(self.parts.validation, indices, step=0)

    def painter(self) -> CogLM:
        """The model as it is, to draw and to write with."""
        return CogLM(
            model=self.gpt.eval(),
            text_tokenizer=self.parts.text_tokenizer,
            image_tokenizer=self.parts.image_tokenizer.to(self.ranks.device),
            vocabulary=self.vocabulary,
            layout=self.config.layout,
            ends_text=self.config.tasks.ends_text,
        )

    def _captions(self, rows: TokenRows, own: int, *, neighbours: range) -> list[IdSequence]:
        """The caption of a row, and the first one of the same picture in another language among its neighbours."""
        texts: list[IdSequence] = [rows.text_ids[own]]
        tongue = self.vocabulary.tongue_of(rows.text_ids[own].tolist())
        for other in neighbours:
            is_same = np.array_equal(rows.image_codes[own], rows.image_codes[other])
            if is_same and self.vocabulary.tongue_of(rows.text_ids[other].tolist()) != tongue:
                return [*texts, rows.text_ids[other]]
        return texts

    def _draw_samples(self, step: int) -> dict[str, str]:
        held_out = self.parts.validation
        places = np.linspace(0, len(held_out) - 1, min(self.config.num_samples, len(held_out))).astype(np.int64)
        captions, painter = held_out.rows(places).texts, self.painter()
        codes_Bhw = painter.draw(captions, seeds=list(range(len(captions))), sampling=DRAWN_PLAINLY)
        pictures = to_pictures(painter.decode(codes_Bhw))
        sheet = draw_sheet([Tile(images=(one,), caption=text) for one, text in zip(pictures, captions, strict=True)])
        name = f"samples/step_{step:08d}.png"
        (self.config.output / name).parent.mkdir(exist_ok=True)
        sheet.save(self.config.output / name)
        return {PICTURE_KEY: name}


def vocabulary_of(parts: Parts) -> BilingualVocabulary:
    """CogLM's vocabulary of these tokenizers. VocabularyError unless the text tokenizer's pieces are in its order."""
    return BilingualVocabulary(num_image_codes=parts.image_tokenizer.num_codes, text=parts.text_tokenizer.ranges)
