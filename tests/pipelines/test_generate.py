"""Captions to pictures with a small real model: what is written, what decides a picture, and what is refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cogview.errors import ConfigError, VocabularyError
from cogview.evaluation.attributes import scene_from_json
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.word_replacing import read_lexicon
from cogview.scenes.scene import is_held_out
from cogview.shards.manifest import write_json
from cogview.shards.reader import TokenShards
from cogview.tokenizers.vqvae import ImageTokenizer
from pipelines.generate import JOB, PRESETS, Config, collect_prompts, resolve, rewritten
from pipelines.runtime.jobs import digest_input, run_job
from pipelines.tasks.prompts import place_orders
from tests.pipelines.pair_folders import QuietDisplay
from tests.pipelines.trained_folders import GRID, write_trained_folders

PROMPTS = ("a large red circle on a blue background", "白色背景上的一个大红色圆形")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def config(folders):
    return Config(**asdict(folders), prompt=PROMPTS, candidates=2, num_scenes=5, num_validation_prompts=3, batch_size=4)


def draw(config, root):
    done = run_job(JOB, config, root=root, display=QuietDisplay())
    return done, pq.read_table(done.output / "samples.parquet").to_pylist()


@pytest.fixture(scope="module")
def drawn(config, runs_folder):
    return draw(config, runs_folder / "generate")


def test_every_prompt_has_its_pictures(config, drawn):
    done, rows = drawn
    assert [row["index"] for row in rows] == list(range(2 * 2 + 5 + 3))
    assert [row["kind"] for row in rows] == ["given"] * 4 + ["scene"] * 5 + ["validation"] * 3
    assert [row["prompt"] for row in rows[:4]] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert json.loads((done.output / "prompts.json").read_text())[:2] == list(PROMPTS)
    for row in rows:
        assert Image.open(done.output / row["path"]).size == (8 * GRID, 8 * GRID)
        assert row["checkpoint"] == digest_input(config.checkpoint, field_name="checkpoint")
    assert Image.open(done.output / "grid.png").width > 2 * 160


def test_pictures_are_the_recorded_codes(config, drawn):
    done, rows = drawn
    tokenizer = ImageTokenizer.load(config.image_tokenizer)
    codes_Bhw = torch.tensor([row["codes"] for row in rows]).view(-1, GRID, GRID)
    images_BHWC = (tokenizer.decode(codes_Bhw) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    for row, image_HWC in zip(rows, images_BHWC, strict=True):
        assert np.array_equal(np.asarray(Image.open(done.output / row["path"])), image_HWC)


def test_scene_prompts_ask_for_what_the_corpus_never_showed(drawn):
    _, rows = drawn
    scenes = [row for row in rows if row["kind"] == "scene"]
    assert all(is_held_out(scene_from_json(row["scene"])) for row in scenes)
    assert {row["language"] for row in scenes} == {"en", "zh"}
    assert not any(row["scene"] for row in rows if row["kind"] != "scene")


def test_validation_prompts_are_captions_of_different_held_out_images(config, drawn):
    _, rows = drawn
    shards = TokenShards.open(config.tokens, split="validation")
    held_out = shards.rows(np.arange(len(shards)))
    keys = dict(zip(held_out.texts, held_out.keys, strict=True))
    chosen = [keys[row["prompt"]] for row in rows if row["kind"] == "validation"]
    assert len(set(chosen)) == 3


def test_a_picture_is_decided_by_its_seed_and_not_by_its_batch(config, drawn, run_root):
    _, rows = drawn
    assert len({row["seed"] for row in rows}) == len(rows)
    _, one_by_one = draw(replace(config, batch_size=1), run_root)
    assert [(row["seed"], row["codes"]) for row in one_by_one] == [(row["seed"], row["codes"]) for row in rows]
    assert len({tuple(row["codes"]) for row in rows}) > 1


def test_another_seed_draws_other_pictures(config, drawn, run_root):
    _, rows = drawn
    _, others = draw(replace(config, seed=1, num_scenes=0, num_validation_prompts=0), run_root)
    assert all(row["codes"] != other["codes"] for row, other in zip(rows[:4], others, strict=True))


def test_scenes_are_drawn_by_their_own_sampling(config, drawn, run_root):
    _, rows = drawn
    _, cool = draw(replace(config, scene_sampling=SamplingConfig(temperature=0.0)), run_root)
    changed = {kind: [] for kind in ("given", "scene", "validation")}
    for row, other in zip(rows, cool, strict=True):
        changed[row["kind"]].append(row["codes"] != other["codes"])
    assert all(changed["scene"])
    assert not any(changed["given"] + changed["validation"])


def test_a_finished_drawing_is_not_drawn_again(config, runs_folder, drawn):
    done, _ = drawn
    before = (done.output / "samples/000000.png").stat().st_mtime_ns
    again, _ = draw(replace(config, batch_size=2, threads=1), runs_folder / "generate")
    assert again.was_done
    assert again.output == done.output
    assert (done.output / "samples/000000.png").stat().st_mtime_ns == before


def test_tokenizers_of_another_training_are_refused(config, tmp_path, run_root):
    other = write_trained_folders(tmp_path, seed=1)
    with pytest.raises(VocabularyError, match="was trained with image_tokenizer"):
        draw(replace(config, image_tokenizer=other.image_tokenizer), run_root)
    with pytest.raises(VocabularyError, match="was trained with text_tokenizer"):
        draw(replace(config, text_tokenizer=other.text_tokenizer), run_root)


def test_prompts_come_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  一个红色圆形  \n", encoding="utf-8")
    prompts = collect_prompts(Config(prompts_file=path))
    assert [prompt.text for prompt in prompts] == ["a red circle", "一个红色圆形"]
    path.write_bytes("rouge foncé".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        collect_prompts(Config(prompts_file=path))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no caption"):
        collect_prompts(Config(prompts_file=path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to draw"),
        ({"prompt": ("a circle", " ")}, "empty caption"),
        ({"num_validation_prompts": 3}, "give --tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        collect_prompts(Config(**settings))


@pytest.mark.parametrize("settings", [{"candidates": 0}, {"batch_size": 0}, {"num_scenes": -1}])
def test_senseless_numbers_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Config(**settings)


def test_missing_folders_name_their_flag(config, run_root):
    with pytest.raises(ConfigError, match="--image-tokenizer FOLDER"):
        draw(replace(config, image_tokenizer=None), run_root)


def test_seeds_are_those_of_prompt_and_candidate():
    prompts = collect_prompts(Config(prompt=("one", "two"), candidates=3))
    orders = list(place_orders(prompts, seed=7))
    assert [(order.prompt.text, order.candidate) for order in orders][:4] == [
        ("one", 0),
        ("one", 1),
        ("one", 2),
        ("two", 0),
    ]
    fewer = list(place_orders(collect_prompts(Config(prompt=("one", "two"), candidates=1)), seed=7))
    assert [order.seed for order in fewer] == [orders[0].seed, orders[3].seed]
    assert all(0 <= order.seed < 2**48 for order in orders)


def test_the_last_chain_fills_in_what_is_not_given(folders, tmp_path):
    jobs = {
        "pretrain": folders.checkpoint,
        "train_text_tokenizer": folders.text_tokenizer,
        "train_image_tokenizer": folders.image_tokenizer,
    }
    stages = [{"job": job, "state": "done", "output": str(folder)} for job, folder in jobs.items()]
    chain = {"state": "done", "started": "2026-01-01", "stages": [*stages, {"job": "generate", "state": "waiting"}]}
    write_json(tmp_path / "chain.json", chain)
    resolved = resolve(replace(PRESETS["smoke"], prompt=("a red circle",)), root=tmp_path)
    assert (resolved.checkpoint, resolved.text_tokenizer) == (folders.checkpoint, folders.text_tokenizer)
    assert resolved.image_tokenizer == folders.image_tokenizer
    assert [prompt.text for prompt in collect_prompts(resolved)] == ["a red circle"]
    given = resolve(Config(prompt=("x",), checkpoint=tmp_path), root=tmp_path)
    assert given.checkpoint == tmp_path


def test_without_a_chain_the_remedy_is_to_run_one(tmp_path):
    with pytest.raises(ConfigError, match="make pretrain"):
        resolve(Config(prompt=("a red circle",)), root=tmp_path)
    stages = [{"job": "pretrain", "state": "running", "output": "pretrain/abc"}]
    write_json(tmp_path / "chain.json", {"state": "running", "started": "2026-01-01", "stages": stages})
    with pytest.raises(ConfigError, match="no pretrain is done; run `make pretrain` first"):
        resolve(Config(prompt=("a red circle",)), root=tmp_path)


def test_an_imported_model_comes_with_the_tokenizers_beside_it(tmp_path):
    for name in ("gpt", "text_tokenizer", "image_tokenizer"):
        (tmp_path / "imported" / name).mkdir(parents=True)
    resolved = resolve(Config(prompt=("一只猫",), checkpoint=tmp_path / "imported" / "gpt"), root=tmp_path)
    assert resolved.text_tokenizer == tmp_path / "imported" / "text_tokenizer"
    assert resolved.image_tokenizer == tmp_path / "imported" / "image_tokenizer"
    own = resolve(replace(resolved, text_tokenizer=tmp_path), root=tmp_path)
    assert own.text_tokenizer == tmp_path


LEXICON = """
[[rules]]
name = "circles"
words = ["circle"]
choices = { red = 1, green = 1, blue = 1 }
"""


def test_a_lexicon_decides_what_a_prompt_leaves_open(config, tmp_path, run_root):
    (tmp_path / "lexicon.toml").write_text(LEXICON)
    prompts = ("a small circle on a white background", "a small red circle on a white background")
    asked = replace(config, prompt=prompts, num_scenes=0, num_validation_prompts=0, candidates=12)
    done, rows = draw(replace(asked, lexicon=tmp_path / "lexicon.toml"), run_root)
    drawn = {row["drawn_prompt"] for row in rows[:12]}
    assert drawn == {f"a small {colour} circle on a white background" for colour in ("red", "green", "blue")}
    assert {row["drawn_prompt"] for row in rows[12:]} == {prompts[1]}
    assert [row["prompt"] for row in rows] == [prompts[0]] * 12 + [prompts[1]] * 12
    assert done.scores["rewritten"] == 12
    _, plain = draw(replace(asked, prompt=(rows[0]["drawn_prompt"],), candidates=1, seeds=(rows[0]["seed"],)), run_root)
    assert plain[0]["codes"] == rows[0]["codes"]
    assert "drawn_prompt" not in plain[0]


def test_where_a_captioner_chooses_all_candidates_share_the_draw(tmp_path):
    (tmp_path / "lexicon.toml").write_text(LEXICON)
    orders = list(place_orders(collect_prompts(Config(prompt=("a circle", "two of a circle"), candidates=20)), seed=1))
    lexicon = read_lexicon(tmp_path / "lexicon.toml")
    alone = [order.text for order in rewritten(orders, lexicon, is_ranked=False)]
    shared = [order.text for order in rewritten(orders, lexicon, is_ranked=True)]
    assert len(set(alone[:20])) == 3
    assert len(set(shared[:20])) == len(set(shared[20:])) == 1
    assert (shared[0], shared[20]) == (alone[0], alone[20])
