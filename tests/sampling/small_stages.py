"""Published stages of CogView2's super-resolution on the backbone of the small trained folders."""

from dataclasses import asdict
from pathlib import Path

import torch

from cogview.models.local_super_resolution import LocalSuperResolution, LocalSuperResolutionConfig
from cogview.models.published import load_model, save_model
from cogview.models.published_stage import save_stage
from cogview.sampling.hierarchical_magnifier import form_of
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from tests.pipelines.trained_folders import GRID, TrainedFolders

LARGE = 3 * GRID


def publish_stage(folder: Path, folders: TrainedFolders, *, stage: str, grid: int = LARGE) -> Path:
    """An untrained stage on the backbone of the folders: it draws noise, but every file is real."""
    gpt, settings = load_model(folders.checkpoint)
    text, image = TextTokenizer.load(folders.text_tokenizer), load_image_tokenizer(folders.image_tokenizer)
    form, fingerprints = form_of(settings, text=text, image=image)
    torch.manual_seed(len(stage))
    model = LocalSuperResolution(gpt, LocalSuperResolutionConfig(stage=stage, grid=grid, ratio=grid // GRID))
    if stage == "iterative":
        model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})
    save_model(model.gpt, folder, settings={key: settings[key] for key in ("fingerprints", "grid", "length")})
    save_stage(model, folder, settings={"form": asdict(form), "fingerprints": fingerprints})
    return folder
