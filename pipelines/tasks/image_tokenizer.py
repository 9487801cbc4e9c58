"""The image tokenizer as a training task: pictures decoded once, a task for the loop, scores and sheets.

In: the tars of filter_pairs, and the config of a tokenizer. Out: `pixels.npy`, which every worker maps into its memory,
and a task that trains on it (CogView, section 2.2). Some of the pictures are held out of training, for scores.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.evaluation.reconstruction import code_perplexity, psnr
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair, Unusable
from cogview.records.tars import read_pairs
from cogview.shards.manifest import read_manifest, shard_name
from cogview.shards.order import SampleOrder
from cogview.tokenizers.adversarial import VQGANObjective, VQGANTraining
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.multiscale import MultiScaleObjective, MultiScaleTokenizer, MultiScaleTraining
from cogview.tokenizers.pixels import pixel_batch, square_pixels
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.vqgan import VQGANTokenizer
from cogview.tokenizers.vqvae import ImageTokenizer, TokenizerLoss, VQVAEConfig
from cogview.training.loop import LoopConfig, StepLoss, WeightedBatch
from cogview.training.optimization import OptimizerConfig
from cogview.training.ranks import Ranks
from pipelines.runtime.cluster import usable_cpus
from pipelines.runtime.jobs import JobRun
from pipelines.runtime.workers import PICTURE_KEY

PIXELS_NAME = "pixels.npy"
SHEET_PICTURES = 24
MAX_SCORED_AT_ONCE, PIXELS_AT_ONCE = 32, 2**21  # 2**21 pixels are 32 pictures of 256 x 256, or 3 of 800 x 800
MIN_PICTURES = 10
# A tokenizer for pictures of 64 pixels, and rates that bring it far in a thousand steps. It is narrow where the picture
# is large: the last layer at full resolution costs as much as all others together.
SMALL_MODEL = VQVAEConfig(
    widths=(16, 32, 96),
    commitment_weight=1.0,
    codebook=CodebookConfig(num_codes=512, code_dim=32, decay=0.97, start_after=100, revive_below=0.3),
)
QUICK_OPTIMIZER = OptimizerConfig(learning_rate=4e-3, weight_decay=0.0, final_share=0.02, betas=(0.9, 0.95))
Pixels = npt.NDArray[np.uint8]
Model = VQVAEConfig | VQGANTraining | MultiScaleTraining
Objective = ImageTokenizer | VQGANObjective | MultiScaleObjective
TrainedTokenizer = ImageTokenizer | VQGANTokenizer | MultiScaleTokenizer
Score = Callable[[AnyImageTokenizer, Pixels], Mapping[str, float]]


def pixels_per_code(model: Model) -> int:
    """The tokenizer's stride, before there is a tokenizer."""
    return int(2 ** len(model.widths)) if isinstance(model, VQVAEConfig) else model.stride


def check_image_size(image_size: int, *, model: Model) -> None:
    """ConfigError unless the squares that are trained on are a whole number of codes wide."""
    if image_size % pixels_per_code(model):
        raise ConfigError(
            f"image_size={image_size}: it must be a multiple of the tokenizer's stride, {pixels_per_code(model)}"
        )


def held_out_count(count: int, *, wanted: int, pairs: Path) -> int:
    """How many of `count` pictures to hold out: as wanted, but a tenth at most. ConfigError when that is none."""
    held_out = min(wanted, count // MIN_PICTURES)
    if held_out < 1:
        raise ConfigError(f"{pairs} has {count} readable pictures; an image tokenizer needs {MIN_PICTURES} or more")
    return held_out


def cache_pixels(pairs: Path, *, image_size: int, max_images: int, run: JobRun) -> int:
    """Decode up to `max_images` pictures of the pairs, evenly chosen, as squares of `image_size` pixels.

    They go into `pixels.npy` in the run's output, unless that is there; returns how many they are.
    """
    path = run.output / PIXELS_NAME
    if path.exists():
        return len(np.load(path, mmap_mode="r"))
    manifest = read_manifest(pairs)
    total = manifest["rows_out"]
    share = min(1.0, max_images / max(1, total))
    shards = [pairs / shard_name(entry["shard"], "tar") for entry in manifest["shards"]]
    shape = (min(total, max_images), image_size, image_size, 3)
    pending = path.with_suffix(".pending.npy")
    pixels = np.lib.format.open_memmap(pending, mode="w+", dtype=np.uint8, shape=shape)
    count = 0
    for picture in decoded_pictures(shards, share=share, image_size=image_size):
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
    """What a worker builds its task from.

    pixels: the cache of pictures, of which `num_train` are trained on and `num_held_out` are not; output: where the
    tokenizer and its sheets go.
    """

    model: Model
    loop: LoopConfig
    pixels: Path
    output: Path
    num_train: int
    num_held_out: int

    def held_out_pixels(self) -> Pixels:
        """uint8 [num_held_out, H, W, 3], spread over the corpus by a fixed permutation."""
        pixels = np.load(self.pixels, mmap_mode="r")
        return np.asarray(pixels[self.rows()[self.num_train :]])

    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of the cache in a fixed random order: first those to train on, then the held-out ones."""
        return np.random.default_rng(self.loop.seed).permutation(self.num_train + self.num_held_out)


class TokenizerTask:
    """The image tokenizer as the training loop sees it. score: of the tokenizer on held-out pictures."""

    def __init__(self, settings: TaskSettings, ranks: Ranks, *, score: Score) -> None:
        loop = settings.loop
        if loop.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size={loop.micro_batch_size}: a codebook learns from whole batches; "
                "choose a smaller global_batch_size or more workers"
            )
        torch.manual_seed(loop.seed)
        objective = build_objective(settings.model)
        self.tokenizer = tokenizer_of(objective)
        self.module: nn.Module = TokenizerLossModule(objective)
        self.order = SampleOrder(settings.num_train, loop.global_batch_size, loop.seed)
        self.settings, self.score, self.rows = settings, score, settings.rows()
        self.pixels = np.load(settings.pixels, mmap_mode="r")

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """This worker's pictures of a step; the weight is their number."""
        rows = self.rows[ranks.share(self.order.indices(step))]
        return WeightedBatch({"images": pixel_batch(list(self.pixels[rows]))}, float(len(rows)))

    def validate(self, step: int) -> Mapping[str, Any]:
        """Scores on held-out pictures, and a sheet of their reconstructions."""
        held_out = self.settings.held_out_pixels()
        name = f"reconstructions/step_{step:08d}.png"
        path = self.settings.output / name
        path.parent.mkdir(exist_ok=True)
        draw_reconstructions(self.tokenizer, held_out[:SHEET_PICTURES]).save(path)
        scores = self.score(self.tokenizer, held_out)
        return {f"validation_{name}": value for name, value in scores.items()} | {PICTURE_KEY: name}

    def publish(self, output: Path) -> None:
        """Write the tokenizer where its readers look for it."""
        self.tokenizer.save(output)


def build_objective(model: Model) -> Objective:
    """A new tokenizer with its loss."""
    if isinstance(model, VQGANTraining):
        return VQGANObjective(model)
    return MultiScaleObjective(model) if isinstance(model, MultiScaleTraining) else ImageTokenizer(model)


def tokenizer_of(objective: Objective) -> TrainedTokenizer:
    """The tokenizer alone; the VQ-VAE brings its loss with it."""
    return objective if isinstance(objective, ImageTokenizer) else objective.tokenizer


class TokenizerLossModule(nn.Module):
    """A tokenizer's loss as a sum over pictures."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor) -> StepLoss:
        """images: float [B, 3, H, W] in [0, 1]."""
        loss = self.objective(images)
        number = torch.tensor(float(len(images)))
        in_use, perplexity = tokenizer_of(self.objective).codebook.usage()
        reports = {"loss": loss.total, **loss.parts, "codes_in_use": in_use, "perplexity": perplexity}
        if isinstance(loss, TokenizerLoss):
            reports |= {"l2": loss.l2, "mse": loss.mse}
        return StepLoss(
            loss.total * len(images), {k: (v.detach() * number.to(v.device), number) for k, v in reports.items()}
        )


def build_task(settings: TaskSettings, ranks: Ranks) -> TokenizerTask:
    """Runs on each worker."""
    return TokenizerTask(settings, ranks, score=score_tokenizer)


@torch.no_grad()
def score_tokenizer(tokenizer: AnyImageTokenizer, pixels: Pixels) -> dict[str, float]:
    """PSNR in dB of these pictures, and the perplexity of the codes that they use."""
    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    ratios, counts_K = [], torch.zeros(tokenizer.num_codes)
    for images_BCHW in in_batches(pixels, device=device):
        codes_Bhw = tokenizer.encode(images_BCHW)
        counts_K += torch.bincount(codes_Bhw.flatten().cpu(), minlength=tokenizer.num_codes)
        ratios.append(psnr(tokenizer.decode(codes_Bhw), images_BCHW))
    return {"psnr": float(torch.cat(ratios).mean()), "perplexity": code_perplexity(counts_K)}


def in_batches(pixels: Pixels, *, device: torch.device) -> Iterator[Tensor]:
    """Pictures as float batches [B, 3, H, W], few at a time where they are large."""
    size = max(1, min(MAX_SCORED_AT_ONCE, PIXELS_AT_ONCE // (pixels.shape[1] * pixels.shape[2])))
    for start in range(0, len(pixels), size):
        yield pixel_batch(list(pixels[start : start + size])).to(device)


def draw_reconstructions(tokenizer: AnyImageTokenizer, pixels: Pixels) -> Any:
    """A sheet of pictures, each original beside what the tokenizer makes of it."""
    tiles: list[Tile] = []
    for images_BCHW in in_batches(pixels, device=next(tokenizer.parameters()).device):
        decoded_BCHW = tokenizer.decode(tokenizer.encode(images_BCHW))
        pairs = zip(to_pictures(images_BCHW), to_pictures(decoded_BCHW), strict=True)
        tiles += [Tile(images=pair) for pair in pairs]
    return draw_sheet(tiles, title="original | reconstruction")
