"""Drawing with CogLM: clusters, styles, candidates in the order of their CapLoss, and captions by the same weights."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cogview.errors import ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.published import save_model
from cogview.sampling.cluster_choice import ClusterSampling, CogLMSampling
from cogview.sequences.coglm import CogLMLayout
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.code_clusters import CodeClusters
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from pipelines import caption, cluster_codes, generate_coglm
from pipelines.runtime.jobs import run_job
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import GRID, write_trained_folders

PROMPTS = ("a large red circle on a blue background", "白色背景上的一个大红色圆形")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> generate_coglm.Config:
    """Untrained weights with clusters of their codes."""
    root = tmp_path_factory.mktemp("coglm")
    folders = write_trained_folders(root, is_bilingual=True)
    text, image = TextTokenizer.load(folders.text_tokenizer), load_image_tokenizer(folders.image_tokenizer)
    vocabulary = BilingualVocabulary(num_image_codes=image.num_codes, text=text.ranges)
    layout = CogLMLayout(grid=GRID, max_text=30, image_position=31)
    torch.manual_seed(0)
    shape = GPTConfig(
        vocab_size=vocabulary.size, max_positions=layout.num_positions, num_layers=2, hidden_size=32, num_heads=2
    )
    model = GPT(shape)
    with torch.no_grad():
        model.word_embeddings.weight.mul_(20)
    fingerprints = {
        "text_tokenizer": text.fingerprint,
        "image_tokenizer": image.fingerprint,
        "vocabulary": vocabulary.fingerprint,
    }
    settings = {"task": "coglm", "fingerprints": fingerprints, "layout": asdict(layout), "ends_text": True}
    save_model(model, root / "coglm", settings=settings)
    clustering = cluster_codes.Config(image_tokenizer=folders.image_tokenizer, num_clusters=6)
    done = run_job(cluster_codes.JOB, clustering, root=root / "runs", display=QuietDisplay())
    return generate_coglm.Config(
        checkpoint=root / "coglm",
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        clusters=done.output,
        prompt=PROMPTS,
        candidates=3,
        sampling=CogLMSampling(clusters=ClusterSampling(top_clusters=4)),
        batch_size=4,
    )


def test_codes_are_clustered_once_for_an_image_tokenizer(config: generate_coglm.Config) -> None:
    assert config.clusters is not None
    clusters = CodeClusters.load(
        config.clusters, image_tokenizer=load_image_tokenizer(config.image_tokenizer).fingerprint
    )
    assert clusters.num_clusters == 6
    assert len(clusters.labels_K) == 32
    assert (config.clusters / "clusters.png").is_file()


def test_every_prompt_has_its_candidates_in_the_order_of_cap_loss(
    config: generate_coglm.Config, runs_folder: Path
) -> None:
    root = runs_folder / "drawn"
    done = run_job(generate_coglm.JOB, config, root=root, display=QuietDisplay())
    rows = pq.read_table(done.output / "samples.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    for place in range(2):
        ours = sorted((row for row in rows if row["prompt_index"] == place), key=lambda row: row["rank"])
        assert [row["rank"] for row in ours] == [0, 1, 2]
        assert ours[0]["cap_loss"] <= ours[1]["cap_loss"] <= ours[2]["cap_loss"]
    assert len({tuple(row["codes"]) for row in rows}) > 2
    assert all((done.output / row["path"]).is_file() for row in rows)
    assert (done.output / "grid.png").is_file()
    smaller = run_job(generate_coglm.JOB, replace(config, batch_size=1), root=root, display=QuietDisplay())
    assert smaller.was_done, "the size of a batch decides nothing"


def test_a_style_adds_its_words_for_the_model_and_not_for_the_judge(
    config: generate_coglm.Config, runs_folder: Path
) -> None:
    done = run_job(
        generate_coglm.JOB,
        replace(config, style="oil", candidates=1),
        root=runs_folder / "style",
        display=QuietDisplay(),
    )
    rows = pq.read_table(done.output / "samples.parquet").to_pylist()
    assert {row["style"] for row in rows} == {"oil"}
    assert [row["prompt"] for row in rows] == list(PROMPTS)


def test_the_same_weights_caption_pictures(config: generate_coglm.Config, runs_folder: Path) -> None:
    root = runs_folder / "captioned"
    drawn = run_job(generate_coglm.JOB, config, root=root, display=QuietDisplay())
    asked = caption.Config(
        images=drawn.output,
        captioner=config.checkpoint,
        text_tokenizer=config.text_tokenizer,
        image_tokenizer=config.image_tokenizer,
        method="greedy",
    )
    done = run_job(caption.JOB, asked, root=root, display=QuietDisplay())
    rows = pq.read_table(done.output / "captions.parquet").to_pylist()
    assert len(rows) == 2 * 6
    assert all(np.isfinite(row["prompt_cap_loss"]) for row in rows)


def test_what_is_missing_is_said(config: generate_coglm.Config, runs_folder: Path) -> None:
    for wrong, words in (
        (replace(config, clusters=None), "no-by-clusters"),
        (replace(config, prompt=()), "--prompt"),
        (replace(config, prompt=(" ",)), "asks for nothing"),
        (replace(config, checkpoint=None), "pretrain_coglm"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_job(generate_coglm.JOB, wrong, root=runs_folder / "wrong", display=QuietDisplay())
    with pytest.raises(ConfigError, match="style='cubist'"):
        replace(config, style="cubist")
