"""Pairs to token rows, with real tokenizers: accounting, the split, resumption, and what is refused."""

import hashlib
import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cogview.config import config_digest, digest_of
from cogview.errors import ConfigError, ManifestError
from cogview.records.images import decode_image
from cogview.records.pair import Failure, TextImagePair, Unusable
from cogview.shards.manifest import ShardEntry, read_manifest
from cogview.shards.reader import TokenRows, TokenShards
from cogview.shards.schema import SPLITS
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.dvae import DVAEConfig, DVAETokenizer
from cogview.tokenizers.multiscale import MultiScaleConfig, MultiScaleTokenizer
from cogview.tokenizers.pixels import CropConfig, cut_square, pixel_batch, square_pixels
from cogview.tokenizers.residual_blocks import PyramidConfig
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.vqgan import VQGANConfig, VQGANTokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines.runtime.cluster import shutdown_ray
from pipelines.runtime.jobs import Finished, run_job
from pipelines.runtime.shard_jobs import ShardTask
from pipelines.tokenize_pairs import (
    HASH_RANGE,
    JOB,
    PRESETS,
    Config,
    TokenizeShard,
    key_hash,
    require_inputs,
    token_origin,
    validation_threshold,
)
from tests.pipelines.pair_folders import QuietDisplay, make_pairs, png, write_pair_folder

NUM_PAIRS = (17, 9, 14)


@pytest.fixture(scope="module", autouse=True)
def _stop_ray():
    yield
    shutdown_ray()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A config whose inputs are three shards of pairs and two small tokenizers."""
    folder = tmp_path_factory.mktemp("inputs")
    captions = [caption for pair in make_pairs(20) if isinstance(pair, TextImagePair) for caption in pair.captions]
    train_text_tokenizer(
        captions, config=TextTokenizerConfig(num_pieces=100, exact=False), output=folder / "text_tokenizer"
    )
    torch.manual_seed(0)
    codebook = CodebookConfig(num_codes=32, code_dim=8)
    ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=codebook)).save(folder / "image_tokenizer")
    shards = [make_pairs(count, shard=shard) for shard, count in enumerate(NUM_PAIRS)]
    write_pair_folder(folder / "pairs", shards)
    return Config(
        pairs=folder / "pairs",
        text_tokenizer=folder / "text_tokenizer",
        image_tokenizer=folder / "image_tokenizer",
        image_size=32,
        validation_fraction=0.2,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "test"


def run(config: Config, root: Path) -> Finished:
    return run_job(JOB, config, root=root, display=QuietDisplay())


def tokenize_shard(config: Config, output: Path, *, shard: int = 0) -> ShardEntry:
    """One shard's work as a worker does it, in this process."""
    inputs = require_inputs(config)
    work = TokenizeShard(
        config=config,
        inputs=inputs,
        origin=token_origin(inputs, image_sizes=config.image_sizes),
        threshold=int(config.validation_fraction * HASH_RANGE),
        output=output,
    )
    return pickle.loads(pickle.dumps(work))(ShardTask(shard=shard, input_digest="d"))


def shard_rows(output: Path, *, shard: int = 0) -> list[dict[str, object]]:
    files = [output / split / f"shard-{shard:05d}.arrow" for split in SPLITS]
    return [row for file in files for row in pa.ipc.open_file(file).read_all().to_pylist()]


def all_rows(folder: Path, split: str) -> TokenRows:
    shards = TokenShards.open(folder, split=split, deep=True)
    return shards.rows(np.arange(len(shards)))


def arrow_bytes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".arrow", ".parquet") or path.name == "manifest.json"
    }


@pytest.mark.ray
def test_every_caption_becomes_a_row_with_the_tokens_of_its_image(root: Path, inputs: Config) -> None:
    done = run(inputs, root)
    text, image = TextTokenizer.load(inputs.text_tokenizer), ImageTokenizer.load(inputs.image_tokenizer)
    originals = {pair.key: pair for shard, n in enumerate(NUM_PAIRS) for pair in make_pairs(n, shard=shard)}
    seen = []
    for split in ("train", "validation"):
        rows = all_rows(done.output, split)
        for key, caption, ids, codes in zip(rows.keys, rows.texts, rows.text_ids, rows.image_codes, strict=True):
            assert ids.tolist() == text.encode(caption)
            picture = decode_image(originals[key].image_bytes)
            assert not isinstance(picture, Unusable)
            expected = image.encode(pixel_batch([square_pixels(picture, image_size=32)]))
            assert codes.tolist() == expected.flatten().tolist()
            seen.append((key, caption))
    assert sorted(seen) == sorted((key, caption) for key, pair in originals.items() for caption in pair.captions)
    assert done.scores["rows_train"] + done.scores["rows_validation"] == 2 * sum(NUM_PAIRS)
    assert done.scores["image_tokens"] == 2 * sum(NUM_PAIRS) * 16
    assert done.scores["grid"] == 4


@pytest.mark.ray
def test_the_manifest_carries_what_the_rows_were_made_with(root: Path, inputs: Config) -> None:
    manifest = read_manifest(run(inputs, root).output, deep=True)
    text, image = TextTokenizer.load(inputs.text_tokenizer), ImageTokenizer.load(inputs.image_tokenizer)
    extra = manifest["extra"]
    assert extra["text_tokenizer"] == text.fingerprint
    assert extra["image_tokenizer"] == image.fingerprint
    assert extra["vocabulary"] == Vocabulary(32, text.num_pieces).fingerprint
    assert (extra["num_image_codes"], extra["num_text_pieces"], extra["grid"]) == (32, text.num_pieces, 4)
    assert [entry["shard"] for entry in manifest["shards"]] == [0, 1, 2]
    assert manifest["rows_in"] == manifest["rows_out"] == sum(NUM_PAIRS)


@pytest.mark.ray
def test_an_image_is_on_one_side_only_and_always_the_same(root: Path, inputs: Config) -> None:
    done = run(inputs, root)
    sides = {split: set(all_rows(done.output, split).keys) for split in ("train", "validation")}
    assert not sides["train"] & sides["validation"]
    assert sides["validation"] == {
        key for key in sides["train"] | sides["validation"] if key_hash(key) < 0.2 * HASH_RANGE
    }


@pytest.mark.ray
def test_lost_shards_are_made_again_with_the_same_bytes_and_no_others(root: Path, inputs: Config) -> None:
    done = run(inputs, root)
    before = arrow_bytes(done.output)
    kept = done.output / "train" / "shard-00000.arrow"
    changed_at = kept.stat().st_mtime_ns
    (done.output / "train" / "shard-00001.arrow").write_bytes(b"cut")
    (done.output / "_manifest" / "shard-00002.json").unlink()
    again = run(inputs, root)
    assert not again.was_done
    assert arrow_bytes(again.output) == before
    assert kept.stat().st_mtime_ns == changed_at
    assert arrow_bytes(run(inputs, root.parent / "other").output) == before


def test_bad_images_and_captions_are_counted_and_written(tmp_path: Path, inputs: Config) -> None:
    pairs = [pair for pair in make_pairs(8) if isinstance(pair, TextImagePair)]
    pairs[1] = replace(pairs[1], image_bytes=pairs[1].image_bytes[:60])
    pairs[2] = replace(pairs[2], image_bytes=b"<html>403</html>")
    pairs[3] = replace(pairs[3], captions=("\u202e\0", " "))
    pairs[4] = replace(pairs[4], captions=("[ROI1] <s> a\0 red", "[ROI1] <s> a red", "red" + "x" * 5000))
    folder = write_pair_folder(tmp_path / "pairs", [pairs])
    entry = tokenize_shard(replace(inputs, pairs=folder, max_characters=100), tmp_path / "tokens")
    assert (entry.rows_in, entry.rows_out) == (8, 5)
    rejected = pq.read_table(tmp_path / "tokens" / "rejected" / "shard-00000.parquet").to_pylist()
    assert [row["key"] for row in rejected] == [pairs[1].key, pairs[2].key, pairs[3].key]
    assert [row["reason"] for row in rejected] == ["image_truncated", "image_is_html", "caption_missing"]
    assert entry.rejected == {"image_truncated": 1, "image_is_html": 1, "caption_missing": 1}
    rows = shard_rows(tmp_path / "tokens")
    texts = [row["text"] for row in rows if row["key"] == pairs[4].key]
    assert texts == ["[ROI1] <s> a red", "red" + "x" * 97]  # the same caption twice is one row
    assert entry.extra["rows_train"] + entry.extra["rows_validation"] == len(rows) == 4 * 2 + 2


PYRAMID = PyramidConfig(
    channels=4, multipliers=(1, 1, 2), num_res_blocks=1, attention_levels=(), latent_channels=4, norm_groups=2
)
SMALL_CODEBOOK = CodebookConfig(num_codes=16, code_dim=4)
KINDS: dict[str, Callable[[], AnyImageTokenizer]] = {
    "vqvae": lambda: ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=SMALL_CODEBOOK)),
    "vqgan": lambda: VQGANTokenizer(VQGANConfig(pyramid=PYRAMID, codebook=SMALL_CODEBOOK)),
    "multiscale": lambda: MultiScaleTokenizer(
        MultiScaleConfig(pyramid=PYRAMID, codebook=SMALL_CODEBOOK, num_levels=2, main_level=1)
    ),
    "dvae": lambda: DVAETokenizer(DVAEConfig(num_codes=24, width=8, code_channels=6, blocks_per_group=1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_image_tokenizer_makes_its_own_grid_at_every_size(tmp_path: Path, inputs: Config, kind: str) -> None:
    torch.manual_seed(0)
    image = KINDS[kind]().eval()
    image.save(tmp_path / kind)
    config = replace(inputs, image_tokenizer=tmp_path / kind, image_size=64, other_image_sizes=(32,))
    tokenize_shard(config, tmp_path / "tokens")
    rows = shard_rows(tmp_path / "tokens")
    assert len(rows) == 2 * NUM_PAIRS[0]
    (pair,) = [pair for pair in make_pairs(NUM_PAIRS[0]) if pair.key == rows[0]["key"]]
    for size in (64, 32):
        grid = size // image.stride
        codes = rows[0]["image_codes" if size == 64 else f"image_codes_{grid}"]
        pixels = pixel_batch([square_pixels(decode_image(pair.image_bytes), image_size=size)])
        assert codes == image.encode(pixels).flatten().tolist()
        assert len(codes) == grid**2


def test_shards_without_pairs_stay_shards(tmp_path: Path, inputs: Config) -> None:
    failure = Failure(key="00000_00000", source="x", reason="timeout")
    folder = write_pair_folder(tmp_path / "pairs", [[failure]])
    entry = tokenize_shard(replace(inputs, pairs=folder), tmp_path / "tokens")
    assert (entry.rows_in, entry.rows_out, dict(entry.rejected)) == (0, 0, {})
    assert shard_rows(tmp_path / "tokens") == []
    assert sorted(entry.files) == [
        "rejected/shard-00000.parquet",
        "train/shard-00000.arrow",
        "validation/shard-00000.arrow",
    ]


def test_batches_do_not_mix_up_images_and_captions(tmp_path: Path, inputs: Config) -> None:
    """Every batch size, also one that does not divide the shard, gives each key the same codes."""
    rows = []
    for batch_size in (1, 4, 100):
        output = tmp_path / str(batch_size)
        tokenize_shard(replace(inputs, batch_size=batch_size), output, shard=2)
        rows.append({(row["key"], row["text"]): row["image_codes"] for row in shard_rows(output, shard=2)})
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 2 * NUM_PAIRS[2]
    assert len({tuple(codes) for codes in rows[0].values()}) > 1


@pytest.mark.ray
def test_a_picture_at_several_sizes_has_the_codes_of_each(root: Path, inputs: Config) -> None:
    single, several = run(inputs, root), run(replace(inputs, other_image_sizes=(16, 48)), root)
    assert several.output != single.output
    shards = TokenShards.open(several.output, deep=True)
    assert (shards.grid, shards.other_grids) == (4, (2, 6))
    rows = shards.rows(np.arange(len(shards)), other_grids=(2, 6))
    alone = all_rows(single.output, "train")
    assert (rows.keys, rows.texts) == (alone.keys, alone.texts)
    assert np.array_equal(rows.image_codes, alone.image_codes)
    image = ImageTokenizer.load(inputs.image_tokenizer)
    originals = {pair.key: pair for shard, n in enumerate(NUM_PAIRS) for pair in make_pairs(n, shard=shard)}
    for grid, size in ((2, 16), (6, 48)):
        for key, codes in zip(rows.keys, rows.other_codes[grid], strict=True):
            picture = decode_image(originals[key].image_bytes)
            assert not isinstance(picture, Unusable)
            expected = image.encode(pixel_batch([square_pixels(picture, image_size=size)]))
            assert codes.tolist() == expected.flatten().tolist()


def test_settings_that_came_later_leave_older_output_where_it_was(inputs: Config) -> None:
    """The digest of the first release's fields alone; a change means that finished runs tokenize and train again."""
    config = Config(image_size=64, validation_fraction=0.05)
    first = {"class": "Config", "image_size": 64, "validation_fraction": 0.05, "max_characters": 2000, "batch_size": 32}
    assert config_digest(config, inputs={}) == digest_of({"config": first, "inputs": {}})
    for change in ({"other_image_sizes": (32,)}, {"crop": CropConfig(place="random")}):
        assert config_digest(replace(config, **change), inputs={}) != config_digest(config, inputs={})


def test_random_squares_are_the_same_for_a_key_whatever_the_batch_and_the_threads(
    tmp_path: Path, inputs: Config
) -> None:
    noise = Image.effect_noise((70, 50), 120).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG")
    pairs = [replace(pair, image_bytes=buffer.getvalue()) for pair in make_pairs(9) if isinstance(pair, TextImagePair)]
    folder = write_pair_folder(tmp_path / "pairs", [pairs])

    def tokens(name: str, **change: object) -> dict[str, str]:
        crop = CropConfig(place="random", smallest=0.5)
        tokenize_shard(replace(inputs, pairs=folder, **({"crop": crop} | change)), tmp_path / name)
        return arrow_bytes(tmp_path / name)

    once = tokens("once", other_image_sizes=(16,))
    assert once == tokens("again", other_image_sizes=(16,), decode_threads=3, batch_size=7)
    assert once != tokens("seed", other_image_sizes=(16,), crop=CropConfig(place="random", smallest=0.5, seed=1))


def test_a_random_square_is_the_same_part_of_the_picture_at_every_size() -> None:
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    picture = Image.fromarray(
        np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:64, None], (1, 96)), np.zeros((64, 96))], 2).astype(np.uint8)
    )
    crop = CropConfig(place="random", smallest=0.4)
    corners = []
    for number in range(50):
        large, small = (cut_square(picture, image_size=size, crop=crop, key=f"key{number}") for size in (32, 8))
        assert np.abs(large.reshape(8, 4, 8, 4, 3).mean((1, 3)) - small).max() < 4
        corners.append((large[0, 0, 0], large[0, 0, 1], large[0, -1, 0] - int(large[0, 0, 0])))
    across, down, width = np.array(corners, np.int64).T
    assert min(across.std(), down.std(), width.std()) > 15  # places and sides differ
    assert width.max() <= 64 * 255 / 95


@pytest.mark.ray
def test_a_tiny_corpus_holds_out_the_pair_with_the_lowest_hash(tmp_path: Path, root: Path, inputs: Config) -> None:
    folder = write_pair_folder(tmp_path / "pairs", [make_pairs(3), make_pairs(2, shard=1)])
    done = run(replace(inputs, pairs=folder, validation_fraction=1e-6), root)
    keys = set(all_rows(done.output, "train").keys + all_rows(done.output, "validation").keys)
    assert set(all_rows(done.output, "validation").keys) == {min(keys, key=key_hash)}


@pytest.mark.ray
def test_one_pair_is_too_few_for_both_sides(tmp_path: Path, root: Path, inputs: Config) -> None:
    folder = write_pair_folder(tmp_path / "pairs", [make_pairs(1)])
    with pytest.raises(ConfigError, match="rows_train is 0"):
        run(replace(inputs, pairs=folder), root)


def test_in_large_corpora_the_threshold_is_the_fraction_alone() -> None:
    shards = [{"shard": 0, "rows_out": 10**6}]
    assert validation_threshold(Path("nowhere"), shards=shards, fraction=0.001) == int(0.001 * HASH_RANGE)


def test_hashes_of_keys_are_even_and_never_change() -> None:
    share = np.mean([key_hash(f"00000_{row:05d}") < 0.05 * HASH_RANGE for row in range(20_000)])
    assert share == pytest.approx(0.05, abs=0.005)
    assert key_hash("00000_00000") == int(hashlib.sha256(b"00000_00000").hexdigest()[:16], 16)


@pytest.mark.ray
def test_another_tokenizer_makes_another_folder(tmp_path: Path, root: Path, inputs: Config) -> None:
    first = run(inputs, root)
    torch.manual_seed(1)
    other = tmp_path / "image_tokenizer"
    codebook = CodebookConfig(num_codes=32, code_dim=8)
    ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=codebook)).save(other)
    second = run(replace(inputs, image_tokenizer=other), root)
    assert second.output != first.output
    fingerprints = [TokenShards.open(done.output).fingerprints["image_tokenizer"] for done in (first, second)]
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize("name", ["pairs", "text_tokenizer", "image_tokenizer"])
def test_inputs_that_are_not_given_are_named(root: Path, inputs: Config, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not given.*--{name.replace('_', '-')}"):
        run(replace(inputs, **{name: None}), root)


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cluster_without_gpus_is_named_and_nothing_waits_for_one(root: Path, inputs: Config) -> None:
    with pytest.raises(ConfigError, match="device is cuda, but the cluster has no GPU"):
        run(replace(inputs, device="cuda", validation_fraction=0.3), root)


def test_an_image_size_that_does_not_fit_the_tokenizer_is_refused(root: Path, inputs: Config) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of 8"):
        run(replace(inputs, image_size=36), root)


@pytest.mark.parametrize(
    "change",
    [
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"image_size": 0},
        {"batch_size": 0},
        {"device": "tpu"},
        {"other_image_sizes": (16, 16)},
        {"other_image_sizes": (32,)},
        {"other_image_sizes": (0,)},
    ],
)
def test_settings_that_cannot_work_are_refused(inputs: Config, change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(inputs, **change)


@pytest.mark.ray
def test_a_damaged_tar_is_named(tmp_path: Path, root: Path, inputs: Config) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(inputs.pairs, pairs)
    tar = pairs / "shard-00001.tar"
    tar.write_bytes(b"\xff" * tar.stat().st_size)
    with pytest.raises(ManifestError, match=r"shard-00001\.tar is damaged"):
        run(replace(inputs, pairs=pairs), root)


def test_presets_give_the_grids_of_the_paper_and_of_the_smoke_run() -> None:
    assert PRESETS["paper"].image_size // 8 == 32
    assert PRESETS["smoke"].image_size // 8 == 8
    grids = {name: [size // 8 for size in preset.image_sizes] for name, preset in PRESETS.items()}
    assert grids["super_resolution"] == [32, 16]
    assert grids["cogview2"] == [20, 60]
    assert grids["super_resolution_smoke"] == [8, 4]


def test_pixels_are_the_middle_square_scaled_up_or_down() -> None:
    for size in ((40, 32), (32, 40), (8, 16), (300, 200)):
        picture = decode_image(png("red", size=size))
        assert not isinstance(picture, Unusable)
        pixels = square_pixels(picture, image_size=32)
        assert pixels.shape == (32, 32, 3)
        batch_BCHW = pixel_batch([pixels, pixels])
        assert batch_BCHW.shape == (2, 3, 32, 32)
        assert batch_BCHW[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
