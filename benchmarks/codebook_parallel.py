"""Data-parallel training of the codebook: two workers with b pictures each end where one with 2b does.

Command: make verify NAME=codebook_parallel
Trains the smoke tokenizer on the demo's scenes with the training loop of `train_image_tokenizer`, 20 steps under each
rule, once in one process and once in two that talk over gloo, from the same start and on the same pictures. The steps
hold a start from encoder outputs and revivals of dead codes. Reports the largest difference of any number of the
codebook, and how far each rule had moved it: the distance from the fixed one, which had the same start.

The bar is for networks that compute in fp64, so that what is compared is the division of labour. In fp32 the two
orders of summation round differently: gradients drift by some 1e-5, and where a choice hangs on a comparison (which
encoder output starts a code, or revives one) the moving average may choose differently and go on with others. These
figures, and how many codes are apart, are reported beside the others, without a bar.
"""

import itertools
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.scenes.scene import draw_scene, random_scene
from cogview.tokenizers.codebook import CodebookConfig
from cogview.tokenizers.vqvae import ImageTokenizer, VQVAEConfig
from cogview.training.loop import train
from cogview.training.ranks import Ranks
from pipelines.tasks.image_tokenizer import PIXELS_NAME, TaskSettings, build_task
from pipelines.train_image_tokenizer import SMOKE

NUM_STEPS = 20
NUM_PICTURES = 256
NUM_HELD_OUT = 16
SECONDS_PER_WORKER = 1800
MAX_APART = 1e-5
BOOK = CodebookConfig(num_codes=128, code_dim=32, decay=0.9, start_after=3, revive_below=0.2, revive_every=4)
GUMBEL = replace(BOOK, rule="gumbel", temperature_start=8.0, temperature_end=2.0, temperature_steps=NUM_STEPS)
BOOKS: Mapping[str, CodebookConfig] = {
    "moving_average": BOOK,
    "straight_through": replace(BOOK, rule="straight_through"),
    "gumbel_hard": replace(GUMBEL, kl_weight=1e-3),
    "gumbel_soft": replace(GUMBEL, gumbel_hard=False),
    "fixed": replace(BOOK, rule="fixed"),
}
NETWORKS = {"fp64": torch.float64, "fp32": torch.float32}
BARS = (
    *(Bar(figure=f"{name}/largest_difference", op="<=", value=MAX_APART) for name in BOOKS),
    *(Bar(figure=f"{name}/moved_by", op=">", value=1e-2) for name in BOOKS if name != "fixed"),  # there was training
)


def measure() -> Figures:
    """Train all rules in one process and in two, and compare."""
    with tempfile.TemporaryDirectory(prefix="cogview-codebook-") as folder:
        root = Path(folder)
        rng = random.Random(1)
        scenes = [draw_scene(random_scene(rng), image_size=SMOKE.image_size) for _ in range(NUM_PICTURES)]
        np.save(root / PIXELS_NAME, np.stack([np.asarray(scene) for scene in scenes]))
        for world in (1, 2):
            say(f"training {len(BOOKS)} codebooks with {world} worker{'s' if world > 1 else ''}")
            run_workers(root, world=world)
        figures: dict[str, float | int | str] = {}
        for name in BOOKS:
            for precision, suffix in (("fp64", ""), ("fp32", "_fp32")):
                alone_KD, shared_KD = (trained_codes(root, name, precision, world=world) for world in (1, 2))
                apart_K = (shared_KD - alone_KD).abs().amax(dim=1)
                figures[f"{name}/largest_difference{suffix}"] = float(apart_K.max())
                figures[f"{name}/codes_apart{suffix}"] = int((apart_K > MAX_APART).sum())
            moved_KD = trained_codes(root, name, "fp64", world=1) - trained_codes(root, "fixed", "fp64", world=1)
            figures[f"{name}/moved_by"] = float(moved_KD.abs().max())
    return figures


def trained_codes(root: Path, name: str, precision: str, *, world: int) -> Tensor:
    """The codebook that so many workers made, fp32 [K, D]."""
    return ImageTokenizer.load(output_folder(root, name, precision, world=world)).codebook.codebook_KD.detach()


def output_folder(root: Path, name: str, precision: str, *, world: int) -> Path:
    """Where so many workers write what they trained under this name."""
    return root / f"{name}_{precision}_{world}"


def run_workers(root: Path, *, world: int) -> None:
    """Start the workers as processes of their own and wait for them."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=train_all, args=(root, Ranks(rank=rank, world=world))) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS_PER_WORKER)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    if codes != [0] * world:  # None where one had to be killed
        raise UnmeasuredError(f"workers ended with {codes}; what they wrote stands above")


def train_all(root: Path, ranks: Ranks) -> None:
    """One worker: train under each rule."""
    torch.set_num_threads(1)
    if ranks.world > 1:
        meeting = f"file://{root / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=ranks.rank, world_size=ranks.world)
    for (name, book), (precision, dtype) in itertools.product(BOOKS.items(), NETWORKS.items()):
        output = output_folder(root, name, precision, world=ranks.world)
        output.mkdir(exist_ok=True)
        settings = task_settings(book, pixels=root / PIXELS_NAME, output=output)
        task = build_task(settings, ranks)
        task.module.to(dtype)
        train(task, config=settings.loop, output=output, identity={}, ranks=ranks)
    if ranks.world > 1:
        dist.destroy_process_group()


def task_settings(book: CodebookConfig, *, pixels: Path, output: Path) -> TaskSettings:
    """The smoke preset with another codebook and few steps."""
    loop = replace(SMOKE.loop, num_steps=NUM_STEPS, validate_every=NUM_STEPS, checkpoint_every=NUM_STEPS)
    return TaskSettings(
        model=replace(cast(VQVAEConfig, SMOKE.model), codebook=book),
        loop=loop,
        pixels=pixels,
        output=output,
        num_train=NUM_PICTURES - NUM_HELD_OUT,
        num_held_out=NUM_HELD_OUT,
    )


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    return verify("codebook_parallel", measure, bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
