"""CapLoss against the release's own form, computed the plain way; and the best of n against every choice of n."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.errors import ConfigError, SchemaError
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.reranking import best_of, ranking
from cogview.sampling.captioning import Captioner
from tests.sampling.small_captioner import GRID, small_captioner, some_codes

CAPTIONS = ["a red dot", "a blue dot", "红色圆点", "a red dot", "dots"]
CODES = some_codes(5)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return small_captioner(tmp_path_factory.mktemp("text"), max_text=6)


@torch.inference_mode()
def released_score(captioner: Captioner, caption: str, codes_hw: torch.Tensor) -> tuple[float, int]:
    """The release's post-selection: logits of all ids, image ids set to minus infinity, log p summed after ROI1."""
    command, offset = captioner.vocabulary.command, captioner.vocabulary.text_offset
    text = [piece + offset for piece in captioner.text_tokenizer.encode(caption)]
    ids = [command("BASE"), command("BOI1"), *codes_hw.flatten().tolist(), command("EOI1"), command("ROI1"), *text]
    logits = captioner.model.logits(captioner.model(torch.tensor([ids[:-1]]), torch.arange(len(ids) - 1)[None])[0])
    logits[:, : captioner.vocabulary.image_ids.stop] = -torch.inf
    chances = logits.double().log_softmax(dim=-1)
    roi = 3 + GRID**2  # where ROI1 stands; 1027 in the release
    assert ids[roi] == command("ROI1")
    return sum(float(chances[place, ids[place + 1]]) for place in range(roi, len(ids) - 1)), len(text)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_cap_loss_is_minus_the_mean_of_the_released_sum(captioner: Captioner, batch_size: int) -> None:
    scores = score_pairs(captioner, CAPTIONS, CODES, batch_size=batch_size)
    for caption, codes_hw, score in zip(CAPTIONS, CODES, scores, strict=True):
        total, number = released_score(captioner, caption, codes_hw)
        assert score.num_tokens == number
        assert score.log_probability == pytest.approx(total, abs=1e-6 * number)
        assert score.cap_loss == pytest.approx(-total / number, abs=1e-6)


def test_a_long_caption_is_scored_up_to_the_longest_text(captioner: Captioner) -> None:
    score = score_pairs(captioner, ["a red dot " * 20], CODES[:1])[0]
    assert score.num_tokens == captioner.text_budget


def test_what_cannot_be_scored_is_refused(captioner: Captioner, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token to score"):
        score_pairs(captioner, [" "], CODES[:1])
    with pytest.raises(SchemaError, match="1 captions for 5 images"):
        score_pairs(captioner, ["a"], CODES)


def test_the_best_of_n_is_the_mean_over_all_choices_of_n() -> None:
    rng = np.random.default_rng(0)
    losses, values = rng.random((7, 5)), rng.random((7, 5))
    for n in range(1, 6):
        chosen = [
            values[prompt, min(some, key=lambda candidate: losses[prompt, candidate])]
            for prompt in range(7)
            for some in combinations(range(5), n)
        ]
        assert best_of(losses, values, n=n) == pytest.approx(np.mean(chosen))
    assert best_of(losses, values, n=1) == pytest.approx(values.mean())
    falling = [best_of(losses, losses, n=n) for n in range(1, 6)]
    assert falling == sorted(falling, reverse=True)
    with pytest.raises(ValueError, match="best of 6 among 5"):
        best_of(losses, values, n=6)


def test_candidates_are_ordered_by_their_loss() -> None:
    assert ranking([2.0, 1.0, 3.0, 1.0]) == [1, 3, 0, 2]
