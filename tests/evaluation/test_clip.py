"""CLIP from a folder: its words, its weights, its score, and folders that are none."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tiny_clip import LENGTH, clip_vocabulary, write_clip
from cogview.errors import CheckpointError
from cogview.evaluation.clip_network import ClipScorer
from cogview.evaluation.clip_text import END, START, ClipText, split_words


@pytest.fixture(scope="module")
def vocabulary():
    return clip_vocabulary()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


def pictures(count):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]


def test_words_are_letters_single_digits_and_the_rest():
    assert list(split_words("it's 2021!! 红色x")) == ["it", "'s", "2", "0", "2", "1", "!!", "红色x"]
    assert list(split_words("you'll don't x_y  ")) == ["you", "'ll", "don", "'t", "x", "_", "y"]


def test_pieces_are_merged_in_the_order_in_which_they_were_learned(folder, vocabulary):
    text = ClipText.load(folder, length=LENGTH)
    pieces = ["the</w>", "cat</w>", "do", "t</w>"]
    assert text.encode("The  CAT dot") == [vocabulary[piece] for piece in pieces]
    ids = text(["The cat", "the cat dot " * 9])
    assert ids.shape == (2, LENGTH)
    assert ids[0].tolist() == [vocabulary[START], *text.encode("the cat"), *[vocabulary[END]] * 9]
    assert ids[1, -1] == vocabulary[END]
    assert vocabulary[END] not in ids[1, :-1]


def test_the_score_is_a_hundred_times_the_cosine_and_never_below_zero(folder):
    scorer = ClipScorer(folder)
    assert scorer.name == "tiny-clip"
    assert len(scorer.sha256) == 64
    captions = ["the cat", "a dot", "one", "two cats", "red", "a blue square"]
    scores = scorer(pictures(6), captions)
    with torch.inference_mode():
        images = scorer._network.see(scorer.pixels(pictures(6)))
        texts = scorer._network.read(scorer._text(captions))
    cosines = torch.nn.functional.cosine_similarity(images, texts)
    assert scores == pytest.approx([max(0.0, 100 * float(cosine)) for cosine in cosines], abs=1e-4)
    assert any(scores)


def test_what_follows_the_end_of_a_caption_changes_nothing(folder):
    scorer = ClipScorer(folder)
    ids = scorer._text(["the cat"])
    other = ids.clone()
    other[0, 4:] = 3
    with torch.inference_mode():
        assert torch.allclose(scorer._network.read(ids), scorer._network.read(other), atol=1e-6)


def test_it_is_the_clip_of_transformers(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    scorer = ClipScorer(folder)
    captions = ["the cat", "It's a dot, 3 of 4!", "CAFÉ naïve 红色", "you'll see 😀"]
    assert [tokenizer(caption)["input_ids"][1:-1] for caption in captions] == [
        scorer._text.encode(caption) for caption in captions
    ]
    ids, pixels = scorer._text(captions), scorer.pixels(pictures(4))
    with torch.inference_mode():
        expected = theirs(input_ids=ids, pixel_values=pixels)
        images, texts = scorer._network.see(pixels), scorer._network.read(ids)
    for found, wanted in ((images, expected.image_embeds), (texts, expected.text_embeds)):
        assert torch.allclose(torch.nn.functional.normalize(found, dim=-1), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{}", "no config of CLIP"),
        ("vocab.json", "{}", "vocab.json and merges.txt"),
        ("model.safetensors", None, "pytorch_model.bin"),
    ],
)
def test_other_folders_are_refused(folder, tmp_path, name, content, expected):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=expected):
        ClipScorer(tmp_path)


def test_weights_of_other_sizes_are_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["projection_dim"] = 9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"text_projection.weight \[8, 16\] instead of \[9, 16\]"):
        ClipScorer(tmp_path)
