"""Every kind of image tokenizer goes through the one training task: presets, a few steps, a published folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogview.errors import ConfigError
from cogview.tokenizers.adversarial import AdversarialLossConfig, VQGANTraining
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.discriminator import DiscriminatorConfig
from cogview.tokenizers.multiscale import MultiScaleConfig, MultiScaleTraining
from cogview.tokenizers.residual_blocks import PyramidConfig
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.vqgan import VQGANConfig
from cogview.tokenizers.vqvae import VQVAEConfig
from cogview.training.loop import LoopConfig, train
from cogview.training.ranks import Ranks
from pipelines import train_image_tokenizer as job
from pipelines.runtime.flags import Order, read_config
from pipelines.tasks.image_tokenizer import PIXELS_NAME, TaskSettings, build_task
from pipelines.train_image_tokenizer import PRESETS

CODEBOOK = CodebookConfig(num_codes=16, code_dim=4)
PYRAMID = PyramidConfig(
    channels=4, multipliers=(1, 1, 2), num_res_blocks=1, attention_levels=(2,), latent_channels=4, norm_groups=2
)
DISCRIMINATOR = DiscriminatorConfig(channels=4, num_halvings=2, norm_groups=2)
MODELS: dict[str, VQVAEConfig | VQGANTraining | MultiScaleTraining] = {
    "vqvae": VQVAEConfig(widths=(4, 4), codebook=CODEBOOK),
    "vqgan": VQGANTraining(
        tokenizer=VQGANConfig(pyramid=PYRAMID, codebook=CODEBOOK),
        loss=AdversarialLossConfig(start_after=2, discriminator=DISCRIMINATOR),
    ),
    "multiscale": MultiScaleTraining(
        tokenizer=MultiScaleConfig(pyramid=PYRAMID, codebook=CODEBOOK, num_levels=2), num_scales=2
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_resumes_and_is_read_back(tmp_path: Path, kind: str) -> None:
    loop = LoopConfig(num_steps=4, global_batch_size=2, log_every=1, validate_every=2, checkpoint_every=2)
    pixels = tmp_path / PIXELS_NAME
    np.save(pixels, np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8))
    settings = TaskSettings(model=MODELS[kind], loop=loop, pixels=pixels, output=tmp_path, num_train=8, num_held_out=2)
    ranks = Ranks()
    train(build_task(settings, ranks), config=loop, output=tmp_path, identity={}, ranks=ranks)
    straight = load_image_tokenizer(tmp_path).fingerprint
    (tmp_path / "checkpoints" / "step_00000004").rename(tmp_path / "away")
    train(build_task(settings, ranks), config=loop, output=tmp_path, identity={}, ranks=ranks)
    resumed = load_image_tokenizer(tmp_path)
    assert resumed.fingerprint == straight
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4 + 2


def test_fashion_makes_50_by_50_codes_of_800_pixels() -> None:
    fashion = PRESETS["fashion"]
    assert isinstance(fashion.model, VQGANTraining)
    assert (fashion.image_size, fashion.image_size // fashion.model.stride) == (800, 50)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flag_changes_one_field_of_a_preset(preset: str) -> None:
    codebook = "model.codebook" if isinstance(PRESETS[preset].model, VQVAEConfig) else "model.tokenizer.codebook"
    flag = f"--{codebook}.revive-every"
    order = Order(job="train_image_tokenizer", preset=preset, root=Path("runs"), flags=(flag, "7"), is_verbose=False)
    config = read_config(order, job)
    model = config.model if isinstance(config.model, VQVAEConfig) else config.model.tokenizer
    assert model.codebook.revive_every == 7
    default = PRESETS[preset].model
    kept = default if isinstance(default, VQVAEConfig) else default.tokenizer
    assert replace(model, codebook=kept.codebook) == kept


def test_pictures_must_fit_the_coarsest_level() -> None:
    with pytest.raises(ConfigError, match="stride, 16"):
        replace(PRESETS["fashion"], image_size=808)
