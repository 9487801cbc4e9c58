"""A new GPT for token rows: as many ids and positions as they need, and embeddings that know the codebook.

In: rows and tokenizers that belong together, and a shape. Out: the config that fits, the model to train, and pictures
that it draws on the way. What pretraining and the fashion model share (CogView, sections 2.3 and 3.4).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.models.gpt import GPT, GPTConfig
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.sequences.batch import SequenceConfig
from cogview.sequences.layout import TASKS
from cogview.tokenizers.dvae import DVAETokenizer
from cogview.training.ranks import Ranks
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.plan import plan_lines
from pipelines.tasks.language_model import Inputs, LanguageModelTask, Parts, TaskConfig, require_inputs

LAYOUT = TASKS["text_to_image"]


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What a worker builds its task from. config: of pretrain, or one with the same fields."""

    config: Any
    output: Path
    inputs: Inputs


def task_around(
    gpt: GPT,
    settings: TaskSettings,
    *,
    parts: Parts,
    ranks: Ranks,
    sampling: SamplingConfig | None = None,
    published: Mapping[str, Any] | None = None,
) -> LanguageModelTask:
    """A task for the training loop. sampling: how pictures are drawn on the way; published: more for `model.json`."""
    config = settings.config
    if config.is_compiled:
        gpt.compile_layers()
    sequence = SequenceConfig(
        length=row_length(parts, max_text=config.max_text),
        text_loss_weight=config.text_loss_weight,
        is_image_fixed=config.is_image_fixed,
    )
    task = TaskConfig(
        layout=LAYOUT,
        sequence=sequence,
        loop=config.loop,
        output=settings.output,
        num_validation_rows=config.num_validation_rows,
        look=partial(draw_samples, number=config.num_samples, sampling=sampling),
        published=published or {},
    )
    return LanguageModelTask(gpt, parts=parts, config=task, ranks=ranks)


def training_plan(config: Any, *, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells; with the inputs given, of the vocabulary and length that they need."""
    model, length = config.model, config.model.max_positions
    if config.tokens and config.text_tokenizer and config.image_tokenizer:
        parts = require_inputs(config).load()
        model, length = fitted(model, parts, max_text=config.max_text), row_length(parts, max_text=config.max_text)
    return plan_lines(model, loop=config.loop, length=length - 1, num_workers=config.num_workers, gpus=gpus)


def fitted(model: GPTConfig, parts: Parts, *, max_text: int) -> GPTConfig:
    """The model's config with the vocabulary and positions that the tokens need."""
    vocabulary = parts.vocabulary
    regions = replace(model.sparse, num_image_ids=len(vocabulary.image_ids), padding_id=vocabulary.command("PAD"))
    length = row_length(parts, max_text=max_text)
    return replace(model, vocab_size=vocabulary.size, max_positions=length, sparse=regions)


def row_length(parts: Parts, *, max_text: int) -> int:
    """Tokens of a full row before the shift: the longest text, the image, and the layout's command tokens."""
    return max_text + parts.train.grid**2 + LAYOUT.overhead()


@torch.no_grad()
def start_from_codebook(gpt: GPT, parts: Parts) -> None:
    """Set the embeddings of image codes to a random projection of their vectors, at the usual scale.

    The codebook's geometry is kept (Johnson and Lindenstrauss), so what is learned of one code is learned of its like.
    """
    if isinstance(parts.image_tokenizer, DVAETokenizer):
        raise ConfigError("embeddings_from_codebook: DALL-E's tokenizer has no codebook; leave this off")
    vectors_KD = parts.image_tokenizer.codebook.codebook_KD
    centred_KD = vectors_KD - vectors_KD.mean(dim=0)
    projected_KE = centred_KD @ torch.randn(vectors_KD.shape[1], gpt.config.hidden_size)
    ids = parts.vocabulary.image_ids
    gpt.word_embeddings.weight[ids.start : ids.stop] = projected_KE / projected_KE.std() * gpt.config.init_std


def draw_samples(
    task: LanguageModelTask, step: int, *, number: int, sampling: SamplingConfig | None = None
) -> Mapping[str, Any]:
    """Pictures for captions spread over the held-out rows, always the same ones with the same seeds."""
    held_out = task.parts.validation
    captions = held_out.rows(task.spread_rows(number)).texts
    painter = TextToImage(
        model=task.gpt,
        text_tokenizer=task.parts.text_tokenizer,
        image_tokenizer=task.parts.image_tokenizer.to(task.ranks.device),
        vocabulary=task.parts.vocabulary,
        grid=held_out.grid,
        length=task.config.sequence.length,
        is_image_fixed=task.config.sequence.is_image_fixed,
    )
    codes_Bhw = painter.codes(captions, seeds=list(range(len(captions))), sampling=sampling or SamplingConfig())
    pictures = to_pictures(painter.decode(codes_Bhw))
    tiles = [Tile(images=(picture,), caption=text) for picture, text in zip(pictures, captions, strict=True)]
    return task.save_sheet(draw_sheet(tiles), step)
