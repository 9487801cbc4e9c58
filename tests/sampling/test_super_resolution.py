"""Magnifying: prompts of the release, known codes kept, and the codes of a full recomputation window by window."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.published import save_model
from cogview.sampling.choice import SamplingConfig, choose, uniform_draws
from cogview.sampling.filling import fill_codes
from cogview.sampling.super_resolution import Magnifier
from cogview.sampling.windows import new_codes, plan_windows
from cogview.sequences.layout import TASKS
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.vqvae import ImageTokenizer
from tests.pipelines.trained_folders import TrainedFolders, write_trained_folders

SIDE, GRID = 2, 4
CAPTIONS = ["a red circle", "蓝色背景上的一个大红色圆形", "a large red circle on a blue background " * 9]
SAMPLING = SamplingConfig(top_k=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> TrainedFolders:
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def magnifier(folders: TrainedFolders) -> Magnifier:
    text, image = TextTokenizer.load(folders.text_tokenizer), ImageTokenizer.load(folders.image_tokenizer)
    vocabulary = Vocabulary(image.num_codes, text.num_pieces)
    return Magnifier(
        model=small_model(vocabulary),
        text_tokenizer=text,
        image_tokenizer=image,
        vocabulary=vocabulary,
        layout=TASKS["super_resolution"],
        side=SIDE,
        text_budget=20,
    )


def small_model(vocabulary: Vocabulary, *, max_positions: int = 60) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=vocabulary.size,
        max_positions=max_positions,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        dropout=0.0,
        init_std=0.3,
    )
    return GPT(config).eval()


def small_codes(batch: int, *, height: int = 3, width: int = 5) -> Tensor:
    return torch.randint(32, (batch, height, width), generator=torch.Generator().manual_seed(batch))


def by_recomputation(magnifier: Magnifier, caption: str, codes_hw: Tensor, *, seed: int, order: str) -> Tensor:
    """The same windows without a cache: the whole sequence is read for each code."""
    height, width = codes_hw.shape
    windows = plan_windows(height, width, side=SIDE, order=order)
    large_HW = torch.zeros(2 * height, 2 * width, dtype=torch.int64)
    draws = iter(uniform_draws([seed], length=4 * height * width, device=torch.device("cpu"))[0])
    for window, is_new in zip(windows, new_codes(windows, height=height, width=width), strict=True):
        rows, columns = window.drawn
        text = magnifier.text_tokenizer.encode(caption)
        [prompt], [places] = magnifier.prompts([text], codes_hw[None], window=window)
        flat = large_HW[rows, columns].flatten()
        for token in np.flatnonzero(is_new).tolist():
            ids = torch.tensor([*prompt, *flat[:token].tolist()])[None]
            positions = torch.tensor([*places, *range(places[-1] + 1, places[-1] + 1 + token)])[None]
            with torch.no_grad():
                hidden = magnifier.model(ids, positions)[:, -1]
                logits = magnifier.model.logits(hidden, ids=magnifier.vocabulary.image_ids)
            flat[token] = choose(logits, next(draws)[None], config=SAMPLING)[0]
        large_HW[rows, columns] = flat.view(is_new.shape)
    return large_HW


@pytest.mark.parametrize("order", ["centre", "raster"])
def test_the_cache_draws_the_codes_of_a_full_recomputation(magnifier: Magnifier, order: str) -> None:
    codes_Bhw = small_codes(3)
    drawn = magnifier.magnify(CAPTIONS, codes_Bhw, seeds=[5, 6, 7], sampling=SAMPLING, order=order)
    assert drawn.shape == (3, 6, 10)
    for row, caption in enumerate(CAPTIONS):
        expected = by_recomputation(magnifier, caption, codes_Bhw[row], seed=5 + row, order=order)
        assert torch.equal(drawn[row], expected)


def test_a_picture_is_decided_by_its_seed_and_not_by_its_batch(magnifier: Magnifier) -> None:
    codes_Bhw = small_codes(3)
    together = magnifier.magnify(CAPTIONS, codes_Bhw, seeds=[1, 2, 3], sampling=SAMPLING)
    for row, caption in enumerate(CAPTIONS):
        alone = magnifier.magnify([caption], codes_Bhw[row : row + 1], seeds=[row + 1], sampling=SAMPLING)
        assert torch.equal(alone[0], together[row])
    others = magnifier.magnify(CAPTIONS, codes_Bhw, seeds=[4, 5, 6], sampling=SAMPLING)
    assert not torch.equal(others, together)


def test_known_codes_are_kept_and_a_run_of_them_is_read_at_once(magnifier: Magnifier) -> None:
    is_new_T = np.array([False, False, False, True, True, False, False, True, False])
    codes_BT = torch.arange(9).repeat(2, 1)
    window = plan_windows(SIDE, SIDE, side=SIDE)[0]
    prompts, positions = magnifier.prompts([[1, 2], [3]], small_codes(2, height=SIDE, width=SIDE), window=window)
    read: list[tuple[int, ...]] = []
    watch = magnifier.model.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape)))
    filled_BT = fill_codes(
        magnifier.model,
        prompts,
        codes_BT,
        is_new_T=is_new_T,
        prompts_positions=positions,
        draws_BN=torch.full((2, 3), 0.999, dtype=torch.float64),
        vocabulary=magnifier.vocabulary,
        sampling=SamplingConfig(top_k=0),
    )
    watch.remove()
    assert torch.equal(filled_BT[:, ~is_new_T], codes_BT[:, ~is_new_T])
    assert not torch.equal(filled_BT[:, is_new_T], codes_BT[:, is_new_T])
    assert read[1:] == [(2, 3), (2, 1), (2, 3)]  # the code behind the last drawn one is not read


def test_a_prompt_is_that_of_the_release(folders: TrainedFolders) -> None:
    """Word for word the release's line: ROI1 text BASE BOI1, 16 x 16 codes, EOI1 ROI2 POS0 BASE BOI2."""
    text, image = TextTokenizer.load(folders.text_tokenizer), ImageTokenizer.load(folders.image_tokenizer)
    released = Magnifier(
        model=small_model(Vocabulary(image.num_codes, text.num_pieces)),
        text_tokenizer=text,
        image_tokenizer=image,
        vocabulary=Vocabulary(),
        layout=TASKS["super_resolution_released"],
        side=16,
        text_budget=56,
    )
    picture_1hw = torch.arange(32 * 32).view(1, 32, 32)
    for window in plan_windows(32, 32, side=16):
        [prompt], [places] = released.prompts([[7, 8]], picture_1hw, window=window)
        square = [32 * (window.top + y) + window.left + x for y in range(16) for x in range(16)]
        assert prompt == [58199, 8199, 8200, 58208, 58193, *square, 58196, 58200, 58210, 58208, 58194]
        assert places == [*range(262), 0, 1, 2, 3]
        _, [quirk] = replace(released, keeps_position=True).prompts([[7, 8]], picture_1hw, window=window)
        assert quirk == [*range(262), 262, 1, 2, 3]  # ROI2 alone keeps its place in the sequence


def test_positions_beyond_the_table_take_its_last_row(magnifier: Magnifier) -> None:
    short = small_model(magnifier.vocabulary, max_positions=12)
    longer = small_model(magnifier.vocabulary, max_positions=12)
    table = short.transformer.position_embeddings.weight
    longer.transformer.position_embeddings = torch.nn.Embedding.from_pretrained(
        torch.cat([table, table[-1:].expand(48, -1)]).detach()
    )
    longer.config = replace(longer.config, max_positions=60)
    drawn = [
        replace(magnifier, model=model).magnify(CAPTIONS[:1], small_codes(1), seeds=[1], sampling=SAMPLING)
        for model in (short, longer)
    ]
    assert torch.equal(*drawn)


def test_progress_counts_windows(magnifier: Magnifier) -> None:
    seen: list[tuple[int, int]] = []
    magnifier.magnify(CAPTIONS[:1], small_codes(1), seeds=[1], progress=lambda done, all: seen.append((done, all)))
    assert seen == [(number, 8) for number in range(1, 9)]


def test_what_does_not_fit_together_is_refused(magnifier: Magnifier) -> None:
    with pytest.raises(ConfigError, match="2 captions and 1 seeds for 1 pictures"):
        magnifier.magnify(CAPTIONS[:2], small_codes(1), seeds=[1])
    with pytest.raises(ConfigError, match="smaller than the 2 x 2"):
        magnifier.magnify(CAPTIONS[:1], small_codes(1, height=1), seeds=[1])


def test_weights_say_what_they_were_trained_for(folders: TrainedFolders, magnifier: Magnifier, tmp_path: Path) -> None:
    tokenizers = {"text_tokenizer": folders.text_tokenizer, "image_tokenizer": folders.image_tokenizer}
    with pytest.raises(CheckpointError, match="trained for text_to_image, not for super-resolution"):
        Magnifier.load(folders.checkpoint, **tokenizers)
    imported = Magnifier.load(folders.checkpoint, **tokenizers, layout="super_resolution_released")
    assert (imported.side, imported.text_budget) == (2, 44)
    fingerprints = {
        "text_tokenizer": magnifier.text_tokenizer.fingerprint,
        "image_tokenizer": magnifier.image_tokenizer.fingerprint,
        "vocabulary": magnifier.vocabulary.fingerprint,
    }
    settings = {"fingerprints": fingerprints, "grid": GRID, "length": 48, "task": "super_resolution"}
    save_model(magnifier.model, tmp_path, settings=settings)
    loaded = Magnifier.load(tmp_path, **tokenizers)
    assert (loaded.side, loaded.text_budget, loaded.layout) == (2, 48 - 8 - 4 - 16, TASKS["super_resolution"])
    with pytest.raises(CheckpointError, match="in the layout super_resolution_released"):
        Magnifier.load(tmp_path, **tokenizers, layout="super_resolution_released")
