"""Train an image tokenizer on the pictures of kept pairs: the paper's VQ-VAE, or the VQGAN of its fashion model.

Command: python -m pipelines train_image_tokenizer smoke --pairs runs/smoke/filter_pairs/...
Reads:   the tars of filter_pairs
Writes:  image_tokenizer.safetensors, image_tokenizer.json, reconstructions.png, metrics.jsonl, checkpoints/
Time:    smoke: about 2 minutes on two cores; fashion_smoke: about 4
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.tokenizers.adversarial import AdversarialLossConfig, VQGANTraining
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.discriminator import DiscriminatorConfig
from cogview.tokenizers.multiscale import MultiScaleTraining
from cogview.tokenizers.residual_blocks import PyramidConfig
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.tokenizer_files import SETTINGS_NAME, WEIGHTS_NAME
from cogview.tokenizers.vqgan import VQGANConfig
from cogview.tokenizers.vqvae import VQVAEConfig
from cogview.training.loop import LoopConfig
from cogview.training.optimization import OptimizerConfig
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.workers import TrainingJob, train_on_ray
from pipelines.tasks.image_tokenizer import (
    PIXELS_NAME,
    QUICK_OPTIMIZER,
    SHEET_PICTURES,
    SMALL_MODEL,
    TaskSettings,
    build_task,
    cache_pixels,
    check_image_size,
    draw_reconstructions,
    held_out_count,
    score_tokenizer,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """pairs: the output of filter_pairs.

    image_size: side in pixels of the squares that are trained on; max_images: at most so many are decoded and kept at
    hand (192 KiB each at 256 pixels); num_held_out: pictures that are not trained on, for PSNR and the sheet.
    """

    pairs: Path | None = input_field(default=None)
    image_size: int = 256
    max_images: int = 200_000
    num_held_out: int = 256
    model: VQVAEConfig | VQGANTraining | MultiScaleTraining = field(default_factory=VQVAEConfig)
    loop: LoopConfig
    num_workers: int = runtime_field(8)

    def __post_init__(self) -> None:
        check_image_size(self.image_size, model=self.model)


# The paper gives the architecture and about 25,000 iterations; its learning rate and batch are not published.
PAPER = Config(
    loop=LoopConfig(
        num_steps=25_000,
        global_batch_size=256,
        optimizer=OptimizerConfig(learning_rate=3e-4, weight_decay=0.0),
        log_every=50,
        validate_every=1000,
        checkpoint_every=1000,
    )
)
SMOKE = replace(
    PAPER,
    image_size=64,
    num_held_out=200,
    model=SMALL_MODEL,
    loop=LoopConfig(
        num_steps=1000,
        global_batch_size=16,
        optimizer=QUICK_OPTIMIZER,
        log_every=25,
        validate_every=500,
        checkpoint_every=500,
    ),
    num_workers=2,
)
# The paper gives the compression and the picture size; the networks, rates and losses are the VQGAN paper's.
FASHION = replace(
    PAPER,
    image_size=800,
    max_images=20_000,  # 1.9 MB each
    model=VQGANTraining(),
    loop=LoopConfig(
        num_steps=100_000,
        global_batch_size=32,  # 4 per step x 8 GPUs
        # 32 x 4.5e-6; without clipping, since one norm over both networks would let the one throttle the other
        optimizer=OptimizerConfig(learning_rate=1.4e-4, weight_decay=0.0, betas=(0.5, 0.9), clip_norm=0.0),
        precision="bf16",
        log_every=50,
        validate_every=1000,
        checkpoint_every=1000,
    ),
)
FASHION_SMOKE = replace(
    FASHION,
    image_size=64,
    num_held_out=200,
    model=VQGANTraining(
        tokenizer=VQGANConfig(
            pyramid=PyramidConfig(
                channels=16, multipliers=(1, 1, 2, 2, 4), num_res_blocks=1, latent_channels=64, norm_groups=4
            ),
            codebook=CodebookConfig(num_codes=256, code_dim=32, decay=0.97, start_after=50, revive_below=0.3),
        ),
        loss=AdversarialLossConfig(
            start_after=300, discriminator=DiscriminatorConfig(channels=16, num_halvings=2, norm_groups=4)
        ),
    ),
    loop=LoopConfig(
        num_steps=600,
        global_batch_size=8,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, betas=(0.5, 0.9), clip_norm=0.0),
        log_every=25,
        validate_every=200,
        checkpoint_every=200,
    ),
    num_workers=2,
)
# icetk's three compressions; sizes of its networks, rates and steps are not published, and are the VQGAN paper's here.
COGVIEW2 = replace(FASHION, image_size=256, model=MultiScaleTraining())
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": SMOKE,
    "fashion": FASHION,
    "fashion_smoke": FASHION_SMOKE,
    "cogview2": COGVIEW2,
}


def main(config: Config, run: JobRun) -> None:
    """Decode the pictures once, train on Ray, score and draw pictures that were not trained on."""
    if config.pairs is None:
        raise ConfigError("pairs is not given; name the output folder of filter_pairs with --pairs")
    count = cache_pixels(config.pairs, image_size=config.image_size, max_images=config.max_images, run=run)
    held_out = held_out_count(count, wanted=config.num_held_out, pairs=config.pairs)
    settings = TaskSettings(
        model=config.model,
        loop=config.loop,
        pixels=run.output / PIXELS_NAME,
        output=run.output,
        num_train=count - held_out,
        num_held_out=held_out,
    )
    job = TrainingJob(
        build=build_task,
        config=settings,
        loop=config.loop,
        identity={"digest": run.digest},
        output=run.output,
        num_workers=config.num_workers,
    )
    last = train_on_ray(job, run=run)
    tokenizer = load_image_tokenizer(run.output)
    run.scores.update(score_tokenizer(tokenizer, settings.held_out_pixels()))
    run.scores.update({name: last[name] for name in ("l2", "codes_in_use") if name in last})
    sheet = draw_reconstructions(tokenizer, settings.held_out_pixels()[:SHEET_PICTURES])
    sheet.save(run.output / "reconstructions.png")
    run.tracker.log_image(sheet, "reconstructions.png")
    run.tracker.log_artifact(run.output / SETTINGS_NAME)
    (run.output / PIXELS_NAME).unlink()
    run.say(
        f"PSNR {run.scores['psnr']:.1f} dB on {held_out} held-out pictures, {run.scores['codes_in_use']:.0%} of codes"
    )


JOB = Job(
    name="train_image_tokenizer", version=2, products=(WEIGHTS_NAME, SETTINGS_NAME, "reconstructions.png"), main=main
)
