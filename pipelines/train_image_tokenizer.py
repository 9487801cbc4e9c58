"""Train the image tokenizer: the paper's VQ-VAE with a moving-average codebook, on the pictures of kept pairs.

Command: python -m pipelines train_image_tokenizer smoke --pairs runs/smoke/filter_pairs/...
Reads:   the tars of filter_pairs
Writes:  image_tokenizer.safetensors, image_tokenizer.json, reconstructions.png, metrics.jsonl, checkpoints/
Time:    smoke: about 2 minutes on two cores
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.evaluation.reconstruction import psnr
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair, Unusable
from cogview.records.tars import read_pairs
from cogview.shards.manifest import read_manifest, shard_name
from cogview.shards.order import SampleOrder
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.pixels import pixel_batch, square_pixels
from cogview.tokenizers.vqvae import SETTINGS_NAME, WEIGHTS_NAME, ImageTokenizer, VQVAEConfig
from cogview.training.loop import LoopConfig, Ranks, StepLoss, WeightedBatch
from cogview.training.optimization import OptimizerConfig
from pipelines.runtime.cluster import usable_cpus
from pipelines.runtime.jobs import Job, JobRun
from pipelines.runtime.workers import PICTURE_KEY, TrainingJob, train_on_ray

PIXELS_NAME = "pixels.npy"  # decoded once, mapped into every worker's memory
SHEET_PICTURES = 24
Pixels = npt.NDArray[np.uint8]


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
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    loop: LoopConfig
    num_workers: int = runtime_field(8)

    def __post_init__(self) -> None:
        stride = 2 ** len(self.model.widths)
        if self.image_size % stride:
            raise ConfigError(
                f"image_size={self.image_size}: it must be a multiple of the tokenizer's stride, {stride}"
            )


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
    # Narrow where the picture is large: the last layer at full resolution costs as much as all others together.
    model=VQVAEConfig(
        widths=(16, 32, 96),
        commitment_weight=1.0,
        codebook=CodebookConfig(num_codes=512, code_dim=32, decay=0.97, start_after=100, revive_below=0.3),
    ),
    loop=LoopConfig(
        num_steps=1200,
        global_batch_size=16,
        optimizer=OptimizerConfig(learning_rate=4e-3, weight_decay=0.0, final_share=0.02, betas=(0.9, 0.95)),
        log_every=25,
        validate_every=400,
        checkpoint_every=400,
    ),
    num_workers=2,
)
PRESETS: dict[str, Config] = {"paper": PAPER, "smoke": SMOKE}


def main(config: Config, run: JobRun) -> None:
    """Decode the pictures once, train on Ray, score and draw pictures that were not trained on."""
    if config.pairs is None:
        raise ConfigError("pairs is not given; name the output folder of filter_pairs with --pairs")
    count = cache_pixels(config.pairs, config=config, run=run)
    held_out = min(config.num_held_out, count // 10)
    if held_out < 1:
        raise ConfigError(f"{config.pairs} has {count} readable pictures; an image tokenizer needs 10 or more")
    settings = TaskSettings(config=config, output=run.output, num_train=count - held_out, num_held_out=held_out)
    job = TrainingJob(
        build=build_task,
        config=settings,
        loop=config.loop,
        identity={"digest": run.digest},
        output=run.output,
        num_workers=config.num_workers,
    )
    last = train_on_ray(job, run=run)
    tokenizer = ImageTokenizer.load(run.output)
    run.scores.update(score_tokenizer(tokenizer, settings.held_out_pixels(), last=last))
    sheet = draw_reconstructions(tokenizer, settings.held_out_pixels()[:SHEET_PICTURES])
    sheet.save(run.output / "reconstructions.png")
    run.tracker.log_image(sheet, "reconstructions.png")
    run.tracker.log_artifact(run.output / SETTINGS_NAME)
    (run.output / PIXELS_NAME).unlink()
    run.say(
        f"PSNR {run.scores['psnr']:.1f} dB on {held_out} held-out pictures, {run.scores['codes_in_use']:.0%} of codes"
    )


def cache_pixels(pairs: Path, *, config: Config, run: JobRun) -> int:
    """Decode up to `max_images` pictures, evenly chosen, into `pixels.npy`, unless it is there; returns how many."""
    path = run.output / PIXELS_NAME
    if path.exists():
        return len(np.load(path, mmap_mode="r"))
    manifest = read_manifest(pairs)
    total = manifest["rows_out"]
    share = min(1.0, config.max_images / max(1, total))
    shards = [pairs / shard_name(entry["shard"], "tar") for entry in manifest["shards"]]
    shape = (min(total, config.max_images), config.image_size, config.image_size, 3)
    pending = path.with_suffix(".pending.npy")
    pixels = np.lib.format.open_memmap(pending, mode="w+", dtype=np.uint8, shape=shape)
    count = 0
    for picture in decoded_pictures(shards, share=share, image_size=config.image_size):
        if count < len(pixels):
            pixels[count] = picture
            count += 1
            run.progress(count, len(pixels), "decoding pictures")
    pixels.flush()
    if count < len(pixels):
        np.save(path, pixels[:count])
        pending.unlink()
    else:
        pending.rename(path)
    return count


def decoded_pictures(shards: Sequence[Path], *, share: float, image_size: int) -> Iterator[Pixels]:
    """Pictures of the pairs whose key falls into the share, in the order of the shards, but for unreadable ones."""

    def decode(pair: TextImagePair) -> Pixels | None:
        image = decode_image(pair.image_bytes, short_side=image_size)
        return None if isinstance(image, Unusable) else square_pixels(image, image_size=image_size)

    def chosen(pair: TextImagePair) -> bool:
        return int(hashlib.sha256(b"pixels" + pair.key.encode()).hexdigest()[:8], 16) < share * 16**8

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for shard in shards:
            yield from (
                picture for picture in pool.map(decode, filter(chosen, read_pairs(shard))) if picture is not None
            )


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What a worker builds its task from. The last pictures of the cache are the held-out ones."""

    config: Config
    output: Path
    num_train: int
    num_held_out: int

    def held_out_pixels(self) -> Pixels:
        """uint8 [num_held_out, H, W, 3], spread over the corpus by a fixed permutation."""
        pixels = np.load(self.output / PIXELS_NAME, mmap_mode="r")
        return np.asarray(pixels[self.rows()[self.num_train :]])

    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of the cache in a fixed random order: first those to train on, then the held-out ones."""
        return np.random.default_rng(self.config.loop.seed).permutation(self.num_train + self.num_held_out)


class TokenizerTask:
    """The image tokenizer as the training loop sees it."""

    def __init__(self, settings: TaskSettings, ranks: Ranks) -> None:
        loop = settings.config.loop
        torch.manual_seed(loop.seed)
        self.tokenizer = ImageTokenizer(settings.config.model)
        self.module: nn.Module = TokenizerLossModule(self.tokenizer)
        self.order = SampleOrder(settings.num_train, loop.global_batch_size, loop.seed)
        self.settings, self.ranks, self.rows = settings, ranks, settings.rows()
        self.pixels = np.load(settings.output / PIXELS_NAME, mmap_mode="r")

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's pictures of a step; the weight is their number."""
        rows = self.rows[ranks.share(self.order.indices(step))]
        return WeightedBatch({"images": pixel_batch(list(self.pixels[rows]))}, float(len(rows)))

    def validate(self, step: int) -> Mapping[str, Any]:
        """PSNR and codebook use on held-out pictures, and a sheet of reconstructions."""
        held_out = self.settings.held_out_pixels()
        name = f"reconstructions/step_{step:08d}.png"
        path = self.settings.output / name
        path.parent.mkdir(exist_ok=True)
        draw_reconstructions(self.tokenizer, held_out[:SHEET_PICTURES]).save(path)
        return {f"validation_{k}": v for k, v in score_tokenizer(self.tokenizer, held_out, last={}).items()} | {
            PICTURE_KEY: name
        }

    def publish(self, output: Path) -> None:
        """Write the tokenizer where its readers look for it."""
        self.tokenizer.save(output)


class TokenizerLossModule(nn.Module):
    """The tokenizer with its loss as a sum over pictures."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> StepLoss:
        """images: float [B, 3, H, W] in [0, 1]."""
        loss = self.tokenizer(images)
        number = torch.tensor(float(len(images)))
        in_use, perplexity = self.tokenizer.codebook.usage()
        reports = {"loss": loss.total, "l2": loss.l2, "mse": loss.mse, "commitment": loss.commitment}
        reports |= {"codes_in_use": in_use, "perplexity": perplexity}
        return StepLoss(
            loss.total * len(images), {k: (v.detach() * number.to(v.device), number) for k, v in reports.items()}
        )


def build_task(settings: TaskSettings, ranks: Ranks) -> TokenizerTask:
    """Runs on each worker."""
    return TokenizerTask(settings, ranks)


@torch.no_grad()
def score_tokenizer(tokenizer: ImageTokenizer, pixels: Pixels, *, last: Mapping[str, float]) -> dict[str, float]:
    """PSNR in dB, the share of codes that these pictures use and their perplexity; and what training logged last."""
    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    ratios, counts_K = [], torch.zeros(tokenizer.num_codes)
    for start in range(0, len(pixels), 32):
        images_BCHW = pixel_batch(list(pixels[start : start + 32])).to(device)
        codes_Bhw = tokenizer.encode(images_BCHW)
        counts_K += torch.bincount(codes_Bhw.flatten().cpu(), minlength=tokenizer.num_codes)
        ratios.append(psnr(tokenizer.decode(codes_Bhw), images_BCHW))
    shares_K = counts_K / counts_K.sum()
    perplexity = torch.exp(-(shares_K * shares_K.clamp_min(1e-12).log()).sum())
    trained = {name: last[name] for name in ("l2", "codes_in_use") if name in last}
    return {"psnr": float(torch.cat(ratios).mean()), "perplexity": float(perplexity), **trained}


def draw_reconstructions(tokenizer: ImageTokenizer, pixels: Pixels) -> Any:
    """A sheet of pictures, each original beside what the tokenizer makes of it."""
    images_BCHW = pixel_batch(list(pixels)).to(next(tokenizer.parameters()).device)
    decoded = to_pictures(tokenizer.decode(tokenizer.encode(images_BCHW)))
    pairs = zip(to_pictures(images_BCHW), decoded, strict=True)
    tiles = [Tile(images=pair) for pair in pairs]
    return draw_sheet(tiles, title="original | reconstruction")


JOB = Job(
    name="train_image_tokenizer", version=1, products=(WEIGHTS_NAME, SETTINGS_NAME, "reconstructions.png"), main=main
)
