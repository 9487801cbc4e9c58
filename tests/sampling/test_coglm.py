"""CogLM at work: what is drawn step by step is what training's rows would give, and nothing that is visible changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview.errors import CheckpointError, ConfigError, SchemaError
from cogview.evaluation.caption_loss import score_pairs
from cogview.models.attention import staged_mask
from cogview.models.published import load_model, save_model
from cogview.sampling.caption_search import BeamConfig, draw_captions, search_captions
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import ClusterSampling, CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.coglm_captioning import CogLMCaptioner
from cogview.sampling.text_to_image import TextToImage
from cogview.sequences.coglm import NO_LABEL, CogLMRow, CogLMTasks, RowMaker
from cogview.sequences.coglm_batch import collate
from cogview.tokenizers.code_clusters import CodeClusters, cluster_codes
from tests.sampling.small_coglm import GRID, TEXTS, small_coglm, some_codes

GREEDY = CogLMSampling(text_bonus=0.0, by_clusters=False, tokens=SamplingConfig(temperature=0.0))
PLAIN = CogLMSampling(text_bonus=0.0, by_clusters=False, tokens=SamplingConfig(top_k=0))


@pytest.fixture(scope="module")
def coglm(tmp_path_factory: pytest.TempPathFactory) -> CogLM:
    return small_coglm(tmp_path_factory.mktemp("text"))


def some_masks() -> torch.Tensor:
    """Of several kinds: a box, a corner with the first code, the last code alone, everything, every second code."""
    hidden = torch.zeros(5, GRID, GRID, dtype=torch.bool)
    hidden[0, 1:3, 1:3] = True
    hidden[1, :2, :2] = True
    hidden[2, -1, -1] = True
    hidden[3] = True
    hidden[4].view(-1)[::2] = True
    return hidden


def likeliest(coglm: CogLM, row: CogLMRow) -> tuple[list[int], list[int]]:
    """What the model predicts at each label of a row as in training, among the ids of the label's kind; the labels."""
    batch = collate([row], pad=coglm.vocabulary.pad, weights={})
    hidden = coglm.model(batch.ids, batch.positions, allowed=staged_mask(batch.stages, batch.groups))[0]
    places = np.flatnonzero(row.labels != NO_LABEL)
    ids = (
        coglm.vocabulary.image_ids
        if row.labels[places[0]] < coglm.vocabulary.text_offset
        else coglm.vocabulary.text_ids
    )
    predicted = coglm.model.logits(hidden[places], ids=ids).argmax(dim=-1) + ids.start
    return predicted.tolist(), row.labels[places].tolist()


def maker(coglm: CogLM) -> RowMaker:
    return RowMaker(vocabulary=coglm.vocabulary, layout=coglm.layout, tasks=CogLMTasks(patch_side=2))


@torch.inference_mode()
def test_what_is_filled_in_is_what_training_rows_predict(coglm: CogLM) -> None:
    codes, hidden = some_codes(5), some_masks()
    filled = coglm.fill(TEXTS, codes, hidden, seeds=range(5), sampling=GREEDY)
    assert torch.equal(filled[~hidden], codes[~hidden])
    for text, one, mask in zip(TEXTS, filled, hidden.numpy(), strict=True):
        pieces, flat = coglm.text_tokenizer.encode(text), one.flatten().numpy().astype(np.uint16)
        predicted, labels = likeliest(coglm, maker(coglm).completion(pieces, flat, hidden_GG=mask))
        assert predicted == labels


@torch.inference_mode()
def test_a_drawing_is_what_training_rows_predict(coglm: CogLM) -> None:
    drawn = coglm.draw([*TEXTS, ""], seeds=range(6), sampling=GREEDY)
    for text, one in zip([*TEXTS, ""], drawn, strict=True):
        pieces, flat = coglm.text_tokenizer.encode(text), one.flatten().numpy().astype(np.uint16)
        predicted, labels = likeliest(coglm, maker(coglm).drawing(pieces, flat))
        assert predicted == labels
    assert len({tuple(one.flatten().tolist()) for one in drawn}) > 1, "other texts, other pictures"
    assert torch.equal(coglm.draw(["", ""], seeds=[0, 1], sampling=GREEDY)[0], drawn[-1])


def test_a_seed_decides_whatever_else_is_in_the_batch(coglm: CogLM) -> None:
    codes, hidden = some_codes(5), some_masks()
    together = coglm.fill(TEXTS, codes, hidden, seeds=range(5), sampling=PLAIN)
    for row in range(5):
        alone = coglm.fill([TEXTS[row]], codes[row : row + 1], hidden[row : row + 1], seeds=[row], sampling=PLAIN)
        assert torch.equal(alone[0], together[row])


def test_every_step_is_told(coglm: CogLM) -> None:
    steps: list[tuple[int, int]] = []
    seen: list[int] = []
    coglm.draw(
        ["a red dot"],
        seeds=[0],
        sampling=PLAIN,
        progress=lambda *step: steps.append(step),
        watch=lambda drawn: seen.append(len(drawn)),
    )
    assert steps[-1] == (GRID**2, GRID**2)
    assert seen == list(range(1, GRID**2 + 1))


def test_nothing_hidden_is_nothing_to_do_and_misfits_are_refused(coglm: CogLM) -> None:
    codes = some_codes(1)
    shown = torch.zeros_like(codes, dtype=torch.bool)
    assert torch.equal(coglm.fill(["a red dot"], codes, shown, seeds=[0], sampling=PLAIN), codes)
    with pytest.raises(SchemaError, match="2 seeds"):
        coglm.fill(["a red dot"], codes, shown, seeds=[0, 1], sampling=PLAIN)
    with pytest.raises(ConfigError, match="4 x 4"):
        coglm.fill(["a red dot"], codes[:, :3], shown[:, :3], seeds=[0], sampling=PLAIN)
    with pytest.raises(ConfigError, match="cluster_codes"):
        coglm.draw(["a red dot"], seeds=[0])


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["fused", "pb_relax", "plain"])
def test_a_bonus_is_added_to_the_scores_of_text(tmp_path: Path, attention: str) -> None:
    """With a bonus beyond all scores an image token sees the text alone; with none the mask decides."""
    coglm = small_coglm(tmp_path, attention=attention)
    drawn = {
        bonus: coglm.draw(TEXTS, seeds=range(5), sampling=replace(PLAIN, text_bonus=bonus))
        for bonus in (0.0, 1.4, 20.0)
    }
    assert not torch.equal(drawn[0.0], drawn[20.0])
    fused = small_coglm(tmp_path).draw(TEXTS, seeds=range(5), sampling=replace(PLAIN, text_bonus=1.4))
    assert torch.equal(drawn[1.4], fused)


@torch.inference_mode()
def test_added_scores_are_the_mask_and_the_bonus(coglm: CogLM) -> None:
    ids, places = torch.tensor([[30, 31, 1, 2]]), torch.tensor([[0, 1, 20, 21]])
    stages = torch.tensor([[0, 0, 1, 2]])
    seen = staged_mask(stages, torch.zeros_like(stages))
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    masked, same = (coglm.model(ids, places, allowed=allowed) for allowed in (seen, added))
    assert torch.allclose(masked, same, atol=1e-5)
    added[..., :2] += 2.0
    other = coglm.model(ids, places, allowed=added)
    assert torch.allclose(other[:, :2], masked[:, :2], atol=1e-4), "the text sees nothing but itself"
    assert not torch.allclose(other[:, 2:], masked[:, 2:], atol=1e-2)


@torch.inference_mode()
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_caption_is_what_training_rows_predict(coglm: CogLM, language: str) -> None:
    captioner, codes = CogLMCaptioner.of(coglm), some_codes(3)
    drawn = draw_captions(captioner, codes, sampling=SamplingConfig(temperature=0.0), seeds=[0] * 3, language=language)
    hidden = np.zeros((GRID, GRID), dtype=bool)
    tongue = {"en": "english", "zh": "chinese"}[language]
    for caption, one in zip(drawn, codes, strict=True):
        assert coglm.vocabulary.tongue_of(caption.pieces) == tongue or language == "zh"
        row = maker(coglm).understanding([caption.pieces], one.flatten().numpy().astype(np.uint16), hidden_GG=hidden)
        batch = collate([row], pad=coglm.vocabulary.pad, weights={})
        start = GRID**2
        batch.ids[0, start] = coglm.vocabulary.start_of_text(tongue)
        states = coglm.model(batch.ids, batch.positions, allowed=staged_mask(batch.stages, batch.groups))[0, start:]
        logits = coglm.model.logits(states, ids=coglm.vocabulary.text_ids)
        allowed = captioner.allowed(language)
        allowed_ids = allowed[:-1].clone()
        allowed_ids[3] = True
        for place, piece in enumerate([*caption.pieces, *([3] if caption.is_whole else [])]):
            scores = logits[place].masked_fill(~allowed_ids, -torch.inf)
            if place == 0:
                scores[3] = -torch.inf
            assert int(scores.argmax()) == piece


def test_beams_and_scores_work_with_the_same_weights(coglm: CogLM) -> None:
    captioner, codes = CogLMCaptioner.of(coglm), some_codes(2)
    found = search_captions(captioner, codes, beams=BeamConfig(width=3), language="en")
    assert len(found) == 2
    for some, code in zip(found, codes, strict=True):
        totals = [caption.log_probability / (len(caption.pieces) + caption.is_whole) for caption in some]
        assert totals == sorted(totals, reverse=True)
        assert all(total < 0 for total in totals)
        assert code.shape == (GRID, GRID)
    losses = [
        score.cap_loss for score in score_pairs(captioner, ["a red dot", "红色圆点", "a red dot"], codes[[0, 0, 1]])
    ]
    assert all(loss > 0 for loss in losses)
    assert losses[0] != losses[2], "another picture"


def test_a_captioner_without_an_end_writes_a_fixed_number_of_tokens(tmp_path: Path) -> None:
    captioner = CogLMCaptioner.of(small_coglm(tmp_path, ends_text=False))
    (caption,) = draw_captions(captioner, some_codes(1), sampling=SamplingConfig(), seeds=[0])
    assert len(caption.pieces) == captioner.max_text == 16
    assert not caption.is_whole


def test_a_published_coglm_is_read_back_with_its_clusters(coglm: CogLM, tmp_path: Path) -> None:
    fingerprint = coglm.image_tokenizer.save(tmp_path / "image")
    coglm.text_tokenizer.save(tmp_path / "text", settings={})
    clusters = cluster_codes(coglm.image_tokenizer.codebook.codebook_KD, num_clusters=5, seed=0)
    CodeClusters(labels_K=clusters.labels_K, image_tokenizer=fingerprint).save(tmp_path / "clusters")
    settings = {
        "task": "coglm",
        "fingerprints": {
            "text_tokenizer": coglm.text_tokenizer.fingerprint,
            "image_tokenizer": fingerprint,
            "vocabulary": coglm.vocabulary.fingerprint,
        },
        "layout": vars(coglm.layout),
        "ends_text": True,
    }
    folders = {"text_tokenizer": tmp_path / "text", "image_tokenizer": tmp_path / "image"}
    save_model(coglm.model, tmp_path / "model", settings=settings)
    again = CogLM.load(tmp_path / "model", clusters=tmp_path / "clusters", **folders)
    sampling = CogLMSampling(clusters=ClusterSampling(top_clusters=2))
    first, second = (again.draw(["a red dot"], seeds=[3], sampling=sampling) for _ in range(2))
    assert torch.equal(first, second)
    save_model(load_model(tmp_path / "model")[0], tmp_path / "other", settings={**settings, "task": "captioning"})
    with pytest.raises(CheckpointError, match="no CogLM"):
        CogLM.load(tmp_path / "other", **folders)
    with pytest.raises(CheckpointError, match="draws with generate_coglm"):
        TextToImage.load(tmp_path / "model", **folders)
