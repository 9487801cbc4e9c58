"""What the benchmarks of captions share: the captioner of a finished chain, and held-out scenes as image codes.

In: the root of a chain. Out: the folders of its models, a captioner finetuned from them with the smoke preset (or found
finished), and scenes with combinations that the corpus never showed.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import REPOSITORY, UnmeasuredError
from cogview.evaluation.grids import from_pictures
from cogview.sampling.captioning import Captioner
from cogview.scenes.scene import Prompt, draw_scene, held_out_prompts
from cogview.shards.manifest import read_json
from pipelines.runtime.chain import latest_output

JOBS = {
    "checkpoint": "pretrain",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
}
TWO_SHAPE_SHARE = 0.25  # as in the corpus
BATCH = 100


def chain_folders(root: Path) -> dict[str, Path]:
    """The folders of a finished chain's models, by field. UnmeasuredError when there is none."""
    if not (root / "chain.json").is_file():
        raise UnmeasuredError(f"{root} holds no chain; run `make pretrain` first, or name another with --root")
    outputs = {stage["job"]: root / stage["output"] for stage in read_json(root / "chain.json")["stages"]}
    missing = [job for job in JOBS.values() if job not in outputs]
    if missing:
        raise UnmeasuredError(f"{root}: the chain has not come to {', '.join(missing)}; run `make pretrain`")
    return {name: outputs[job] for name, job in JOBS.items()}


def finetuned(root: Path, flags: Sequence[str]) -> Path:
    """The output of finetune_captioning under this root, trained now if it is not there yet."""
    command = [sys.executable, "-m", "pipelines", "finetune_captioning", "smoke", "--root", str(root), *flags]
    done = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode:
        raise UnmeasuredError(f"finetune_captioning ended with {done.returncode}")
    return latest_output("finetune_captioning", flag="--captioner", root=root)


def load_captioner(root: Path, flags: Sequence[str]) -> Captioner:
    """The captioner of the chain under this root."""
    folders = chain_folders(root)
    return Captioner.load(
        finetuned(root, flags),
        text_tokenizer=folders["text_tokenizer"],
        image_tokenizer=folders["image_tokenizer"],
    )


def held_out_scenes(number: int, *, seed: int) -> list[Prompt]:
    """Scenes whose first shape is a combination of kind, colour, size and background that the corpus never showed."""
    return list(held_out_prompts(number, seed=seed, two_shape_share=TWO_SHAPE_SHARE))


@torch.inference_mode()
def scene_codes(scenes: Sequence[Prompt], *, captioner: Captioner) -> Tensor:
    """Image codes of drawn scenes, int64 [scenes, grid, grid]."""
    found = []
    for start in range(0, len(scenes), BATCH):
        pictures = [
            draw_scene(prompt.scene, image_size=captioner.image_size) for prompt in scenes[start : start + BATCH]
        ]
        found.append(captioner.image_tokenizer.encode(from_pictures(pictures)))
    return torch.cat(found)
