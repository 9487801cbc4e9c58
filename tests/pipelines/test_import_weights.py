"""Released files to folders of ours: a whole import draws the pictures of the model that was released."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.published import load_model
from cogview.models.released import save_released_gpt
from cogview.sampling.autoregressive import generate_codes
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.scenes.scene import corpus
from cogview.shards.manifest import read_manifest
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.dvae import DVAEConfig, DVAETokenizer
from cogview.tokenizers.released import save_released_vqvae
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.taming import load_taming
from cogview.tokenizers.text import MODEL_NAME, TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from pipelines import generate
from pipelines.import_weights import JOB, PRESETS, Config, main
from pipelines.runtime.jobs import run_job
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import QuietDisplay
from tests.tokenizers.taming_layout import make_weights

NUM_CODES, GRID, LENGTH = 32, 4, 64
PROMPTS = ("a large red circle on a blue background", "白色背景上的一个大红色圆形")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, GPT]:
    """A user's files, and the model that is in them."""
    folder = tmp_path_factory.mktemp("released")
    captions = [caption for scene in corpus(0, 60) for caption in (scene.english, scene.chinese)]
    text = train_text_tokenizer(captions, config=TextTokenizerConfig(num_pieces=200, exact=False), output=folder)
    torch.manual_seed(0)
    image = VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=NUM_CODES, code_dim=8))
    save_released_vqvae(ImageTokenizer(image), folder / "vqvae.pt")
    gpt = GPT(
        GPTConfig(
            vocab_size=Vocabulary(NUM_CODES, text.num_pieces, 2).size,
            max_positions=LENGTH,
            num_layers=2,
            hidden_size=128,
            num_heads=2,
            embedding_gradient=1.0,
        )
    )
    with torch.no_grad():
        gpt.word_embeddings.weight.mul_(6)  # sharp enough that captions matter, not so sharp that they repeat a code
    save_released_gpt(gpt, folder / "cogview-base", iteration=20, num_ranks=2)
    config = Config(
        gpt=folder / "cogview-base",
        image_tokenizer=folder / "vqvae.pt",
        text_tokenizer=folder / MODEL_NAME,
        grid=GRID,
    )
    return config, gpt.eval()


def test_imported_weights_draw_what_the_released_model_draws(released, runs_folder: Path) -> None:
    config, gpt = released
    root, display = runs_folder / "imported", QuietDisplay()
    done = run_job(JOB, config, root=root, display=display)
    assert run_job(JOB, config, root=root, display=QuietDisplay()).was_done
    assert f"--checkpoint {done.output / 'gpt'}" in display.lines[-1]
    drawing = generate.Config(
        checkpoint=done.output / "gpt",
        text_tokenizer=done.output / "text_tokenizer",
        image_tokenizer=done.output / "image_tokenizer",
        prompt=PROMPTS,
        candidates=2,
    )
    drawn = run_job(generate.JOB, drawing, root=root, display=QuietDisplay())
    rows = pq.read_table(drawn.output / "samples.parquet").to_pylist()
    text = TextTokenizer.load(done.output / "text_tokenizer")
    vocabulary = Vocabulary(NUM_CODES, text.num_pieces)
    commands = [vocabulary.command(name) for name in ("ROI1", "BASE", "BOI1")]
    prompts = [
        [commands[0], *(vocabulary.text_offset + piece for piece in text.encode(row["prompt"])), *commands[1:]]
        for row in rows
    ]
    seeds = [row["seed"] for row in rows]
    codes = generate_codes(gpt, prompts, vocabulary=vocabulary, grid=GRID, sampling=SamplingConfig(), seeds=seeds)
    assert [row["codes"] for row in rows] == codes.flatten(1).tolist()
    assert len({tuple(row["codes"]) for row in rows}) == 4


def test_what_is_written_is_verified_and_says_where_it_comes_from(released, tmp_path: Path) -> None:
    config, gpt = released
    run = open_run(tmp_path)
    main(replace(config, precision="fp16"), run)
    manifest = read_manifest(tmp_path, deep=True)
    files = {name for entry in manifest["shards"] for name in entry["files"]}
    assert {"gpt/model.safetensors", "image_tokenizer/image_tokenizer.json", f"text_tokenizer/{MODEL_NAME}"} <= files
    model, settings = load_model(tmp_path / "gpt")
    assert model.word_embeddings.weight.dtype == torch.float16
    assert torch.equal(model.word_embeddings.weight, gpt.word_embeddings.weight.half())
    assert (settings["grid"], settings["length"], settings["iteration"]) == (GRID, LENGTH, 20)
    assert set(settings["sources"]) == {"mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"}
    assert run.scores["model_parallel_ranks"] == 2


def test_a_tokenizer_can_be_imported_alone(released, tmp_path: Path) -> None:
    config, _ = released
    main(replace(config, gpt=None, text_tokenizer=None), open_run(tmp_path))
    assert (
        sorted(path.name for path in tmp_path.iterdir() if path.is_dir() and path.name[0] != "_")[0]
        == "image_tokenizer"
    )
    assert ImageTokenizer.load(tmp_path / "image_tokenizer").num_codes == NUM_CODES


def test_a_folder_of_encoder_and_decoder_is_dalls_dvae(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = DVAETokenizer(DVAEConfig(num_codes=16, width=8, code_channels=4, blocks_per_group=1))
    (tmp_path / "dvae").mkdir()
    for part in ("encoder", "decoder"):
        state = tokenizer.get_submodule(part).state_dict()
        names = {name: f"blocks.{name.removesuffix('eight').removesuffix('ias')}" for name in state}
        torch.save({names[name]: tensor for name, tensor in state.items()}, tmp_path / "dvae" / f"{part}.pkl")
    main(Config(image_tokenizer=tmp_path / "dvae"), open_run(tmp_path / "out"))
    images = torch.rand(2, 3, 16, 16)
    loaded = DVAETokenizer.load(tmp_path / "out" / "image_tokenizer")
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    (tmp_path / "dvae" / "encoder.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"0 files encoder\.\*"):
        main(Config(image_tokenizer=tmp_path / "dvae"), open_run(tmp_path / "out"))


def test_a_file_with_a_vqgans_codebook_is_tamings(tmp_path: Path) -> None:
    torch.save({"state_dict": make_weights(), "epoch": 3}, tmp_path / "last.ckpt")
    main(Config(image_tokenizer=tmp_path / "last.ckpt"), open_run(tmp_path / "out"))
    tokenizer = load_image_tokenizer(tmp_path / "out" / "image_tokenizer")
    pictures = torch.rand(2, 3, 32, 32)
    assert torch.equal(tokenizer.encode(pictures), load_taming(tmp_path / "last.ckpt").encode(pictures))
    with pytest.raises(CheckpointError, match="has the sha256"):
        main(Config(image_tokenizer=tmp_path / "last.ckpt", image_sha256="0" * 64), open_run(tmp_path / "other"))


def test_tensors_beside_the_gpt_are_kept(released, tmp_path: Path) -> None:
    config, gpt = released
    state = {**gpt.state_dict(), "mixins.extra_position_embedding.position_embeddings.weight": torch.ones(9, 128)}
    torch.save({"module": state}, tmp_path / "pytorch_model.bin")
    run = open_run(tmp_path / "out")
    main(replace(config, gpt=tmp_path), run)
    extras = load_file(tmp_path / "out" / "gpt" / "extras.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in extras.items()} == {
        "mixins.extra_position_embedding.position_embeddings.weight": (9, 128)
    }
    assert any("no part of a GPT" in line for line in run.lines)


def test_what_does_not_go_together_is_refused(released, tmp_path: Path) -> None:
    config, _ = released
    run = open_run(tmp_path)
    with pytest.raises(ConfigError, match="text_tokenizer and image_tokenizer and gpt: not given"):
        main(Config(), run)
    with pytest.raises(ConfigError, match=r"image_tokenizer: not given, but .* --image-tokenizer"):
        main(replace(config, image_tokenizer=None), run)
    with pytest.raises(ConfigError, match="leave -4 for the text"):
        main(replace(config, grid=8), run)
    with pytest.raises(CheckpointError, match="sha256"):
        main(replace(config, image_sha256="0" * 64), run)
    captions = [scene.english for scene in corpus(0, 60)]
    train_text_tokenizer(captions, config=TextTokenizerConfig(num_pieces=900, exact=False), output=tmp_path / "other")
    other = ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=900, code_dim=8)))
    save_released_vqvae(other, tmp_path / "other.pt")
    with pytest.raises(VocabularyError, match="embedding rows; 900 image codes"):
        main(replace(config, image_tokenizer=tmp_path / "other.pt"), run)
    with pytest.raises(ConfigError, match="precision='int8'"):
        Config(precision="int8")


def test_a_coglm_in_sats_naming_draws_as_it_did(tmp_path: Path) -> None:
    captions = [caption for scene in corpus(0, 60) for caption in (scene.english, scene.chinese)]
    bilingual = TextTokenizerConfig(num_pieces=200, exact=False, is_bilingual=True)
    text = train_text_tokenizer(captions, config=bilingual, output=tmp_path / "text")
    torch.manual_seed(0)
    image = ImageTokenizer(
        VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=NUM_CODES, code_dim=8))
    ).eval()
    image.save(tmp_path / "image")
    vocabulary = BilingualVocabulary(num_image_codes=NUM_CODES, text=text.ranges)
    shape = GPTConfig(vocab_size=vocabulary.size, max_positions=1024, num_layers=2, hidden_size=128, num_heads=2)
    gpt = GPT(shape).eval()
    with torch.no_grad():
        gpt.word_embeddings.weight.mul_(6)
    state = {
        f"transformer.{name}" if name == "word_embeddings.weight" else name: x for name, x in gpt.state_dict().items()
    }
    state["mixins.extra_position_embedding.position_embeddings.weight"] = torch.ones(9, 128)
    (tmp_path / "coglm" / "300000").mkdir(parents=True)
    torch.save({"module": state}, tmp_path / "coglm" / "300000" / "mp_rank_00_model_states.pt")
    (tmp_path / "coglm" / "latest").write_text("300000")
    config = replace(
        PRESETS["coglm"],
        gpt=tmp_path / "coglm",
        image_tokenizer=tmp_path / "image",
        text_tokenizer=tmp_path / "text" / MODEL_NAME,
        grid=GRID,
    )
    main(config, open_run(tmp_path / "out"))
    folders = {"text_tokenizer": tmp_path / "out/text_tokenizer", "image_tokenizer": tmp_path / "out/image_tokenizer"}
    coglm = CogLM.load(tmp_path / "out" / "gpt", **folders)
    assert (coglm.layout.image_position, coglm.layout.max_text, coglm.ends_text) == (512, 111, False)
    assert (tmp_path / "out" / "gpt" / "extras.safetensors").is_file()
    sampling = CogLMSampling(by_clusters=False)
    drawn = coglm.draw(PROMPTS, seeds=[0, 1], sampling=sampling)
    assert torch.equal(drawn, replace(coglm, model=gpt).draw(PROMPTS, seeds=[0, 1], sampling=sampling))
    with pytest.raises(ConfigError, match="1024 positions"):
        main(replace(config, grid=32), open_run(tmp_path / "large"))
    more = ImageTokenizer(VQVAEConfig(widths=(8, 8, 8), codebook=CodebookConfig(num_codes=900, code_dim=8)))
    more.save(tmp_path / "more")
    with pytest.raises(VocabularyError, match="900 image codes"):
        main(replace(config, image_tokenizer=tmp_path / "more"), open_run(tmp_path / "wrong"))
    with pytest.raises(ConfigError, match="kind='dalle'"):
        replace(config, kind="dalle")


def test_the_papers_preset_draws_pictures_of_256_pixels() -> None:
    assert PRESETS["paper"].grid * 8 == 256
