"""What the benchmarks of captions share: the captioner of a finished chain, and held-out scenes as image codes.

In: the root of a chain. Out: the folders of its models, a captioner finetuned from them with the smoke preset (or found
finished), and scenes with combinations that the corpus never showed.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.chains import model_folders, run_job
from cogview.evaluation.grids import from_pictures
from cogview.sampling.captioning import Captioner
from cogview.scenes.scene import Prompt, draw_scene, held_out_prompts
from pipelines.runtime.chain import latest_output

TWO_SHAPE_SHARE = 0.25  # as in the corpus
BATCH = 100


def finetuned(root: Path, flags: Sequence[str]) -> Path:
    """The output of finetune_captioning under this root, trained now if it is not there yet."""
    run_job("finetune_captioning", *flags, root=root)
    return latest_output("finetune_captioning", flag="--captioner", root=root)


def load_captioner(root: Path, flags: Sequence[str]) -> Captioner:
    """The captioner of the chain under this root."""
    folders = model_folders(root)
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
