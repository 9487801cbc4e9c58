"""What finetunes share: where they start, how long their rows are, and what they refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogview.errors import VocabularyError
from cogview.models.published import load_model, save_model
from cogview.sequences.layout import TASKS
from cogview.training.loop import LoopConfig, train
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.runtime.gpus import UNKNOWN
from pipelines.tasks.finetuning import Finetuning, build_task, finetuning_plan
from pipelines.tasks.language_model import Inputs
from tests.pipelines.trained_folders import GRID, LENGTH, TrainedFolders, write_trained_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def settings(folders: TrainedFolders, tmp_path: Path) -> Finetuning:
    return Finetuning(
        checkpoint=folders.checkpoint,
        inputs=Inputs(
            tokens=folders.tokens, text_tokenizer=folders.text_tokenizer, image_tokenizer=folders.image_tokenizer
        ),
        task="captioning",
        loop=LoopConfig(
            num_steps=8,
            global_batch_size=4,
            log_every=4,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_share=0.0),
        ),
        output=tmp_path,
        num_validation_rows=4,
    )


def test_a_finetune_goes_on_from_the_weights_and_says_so(settings: Finetuning, folders: TrainedFolders) -> None:
    before, stored = load_model(folders.checkpoint)
    task = build_task(settings, Ranks())
    for name, value in before.state_dict().items():
        assert torch.equal(task.gpt.state_dict()[name][: len(value)], value), name
    losses = [task.validate(0)["validation_text_loss"]]
    train(task, config=settings.loop, output=settings.output, identity={}, ranks=Ranks())
    losses.append(task.validate(8)["validation_text_loss"])
    assert losses[1] < losses[0]
    _, published = load_model(settings.output)
    assert published["task"] == "captioning"
    assert published["started_from"] == stored["sha256"]
    assert published["fingerprints"] == stored["fingerprints"]


def test_rows_have_room_for_the_texts_of_pretraining(settings: Finetuning) -> None:
    task = build_task(settings, Ranks())
    text_to_image, captioning = TASKS["text_to_image"], TASKS["captioning"]
    budget = text_to_image.text_budget(length=LENGTH, num_image_tokens=GRID**2)
    length = task.config.sequence.length
    assert captioning.text_budget(length=length, num_image_tokens=GRID**2) == budget
    longer = build_task(replace(settings, length=LENGTH + 9), Ranks())
    assert longer.gpt.config.max_positions == LENGTH + 8
    again = Finetuning.row_length(settings, {"task": "captioning", "length": length, "grid": GRID}, grid=GRID)
    assert again == length


def test_only_labels_of_the_text_have_a_loss_in_captioning(settings: Finetuning) -> None:
    task = build_task(settings, Ranks())
    batch = task.batch(0, Ranks()).tensors
    vocabulary = task.parts.vocabulary
    counted = set(batch["labels"][batch["loss_weights"] > 0].tolist())
    assert counted <= {*vocabulary.text_ids, vocabulary.command("ROI1"), vocabulary.command("SEP")}
    assert "validation_image_loss" not in task.validate(0)


def test_weights_of_other_tokenizers_are_refused(settings: Finetuning, tmp_path: Path) -> None:
    others = write_trained_folders(tmp_path / "others", seed=1)
    with pytest.raises(VocabularyError, match="was trained with text_tokenizer"):
        replace(settings, checkpoint=others.checkpoint).start()
    mixed = replace(settings.inputs, image_tokenizer=others.image_tokenizer)
    with pytest.raises(VocabularyError, match="made with image_tokenizer"):
        replace(settings, inputs=mixed).start()


def test_a_plan_needs_no_weights(settings: Finetuning) -> None:
    lines = list(finetuning_plan(settings, num_workers=1, gpus=UNKNOWN))
    assert any(line.startswith("steps: 8 of 4 rows") for line in lines)


def test_an_imported_model_in_half_precision_is_a_start_too(settings: Finetuning, tmp_path: Path) -> None:
    model, stored = load_model(settings.checkpoint)
    imported = {**stored, "sources": {"mp_rank_00_model_states.pt": "0" * 64}, "is_image_fixed": False}
    save_model(model.half(), tmp_path / "imported", settings=imported)
    half = replace(settings, checkpoint=tmp_path / "imported")
    started = half.start()
    gpt, config = half.model(started), started.config
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    assert config.sequence.length == LENGTH + 1  # one command token more than in pretraining: SEP
    assert gpt.config.max_positions == LENGTH, "the last token of a row is only a label"
