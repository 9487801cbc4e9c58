"""Whole scenes with their captions, each as codes of two sizes: what CogView2's super-resolution learns in a demo.

In: a number of scenes of the demo corpus, and both tokenizers. Out: a folder of token rows like those of
tokenize_pairs, one for the English and one for the Chinese caption of each scene.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogview.config import require_positive
from cogview.errors import ConfigError
from cogview.scenes.scene import corpus
from cogview.shards.schema import SPLITS
from cogview.shards.writer import TokenRow
from cogview.tokenizers.stored import load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from pipelines.runtime.jobs import JobRun
from pipelines.tasks.origins import origin_of
from pipelines.tasks.scene_squares import SCENES_AT_ONCE, SOURCE, encode_scenes, is_written, write_rows

TOKENS_FOLDER = "tokens"


@dataclass(frozen=True, kw_only=True)
class ScenePictures:
    """num_scenes: of the demo corpus with this seed, none of which shows a held-out combination.

    image_size: side in pixels of the small pictures; validation_share: of the scenes.
    """

    num_scenes: int = 1000
    image_size: int = 64
    validation_share: float = 0.05
    seed: int = 13

    def __post_init__(self) -> None:
        require_positive(self, "num_scenes", "image_size", prefix="scenes.")
        if not 0 < self.num_validation < self.num_scenes:
            raise ConfigError(
                f"scenes.validation_share={self.validation_share} of {self.num_scenes} scenes: both sides need one"
            )

    @property
    def num_validation(self) -> int:
        """How many of the scenes, the last ones, are held out."""
        return round(self.validation_share * self.num_scenes)


def scenes_or_tokens(config: Any, *, folders: Mapping[str, Path], ratio: int, run: JobRun) -> Path:
    """The token rows of a job's config, or those drawn from its scenes. ConfigError when there are neither.

    folders: with both tokenizers.
    """
    if config.tokens is not None:
        given: Path = config.tokens
        return given
    if config.scenes is None:
        raise ConfigError(
            "tokens is not given; give --tokens FOLDER, an output of tokenize_pairs cogview2, or of any other that has "
            f"each picture also at 1/{ratio} of its side"
        )
    folder = run.output / TOKENS_FOLDER
    tokenizers = {name: folders[name] for name in ("text_tokenizer", "image_tokenizer")}
    write_scene_pictures(config.scenes, folder, ratio=ratio, progress=run.progress, **tokenizers)
    return folder


def write_scene_pictures(
    config: ScenePictures,
    folder: Path,
    *,
    ratio: int,
    text_tokenizer: Path,
    image_tokenizer: Path,
    progress: Callable[[float, float, str], None],
) -> None:
    """Write the rows unless they are there: the small picture's codes, and besides those at `ratio` times its side.

    ConfigError for pictures whose side is no multiple of the tokenizer's stride.
    """
    if is_written(folder):
        return
    text, image = TextTokenizer.load(text_tokenizer), load_image_tokenizer(image_tokenizer)
    if config.image_size % image.stride:
        raise ConfigError(f"scenes.image_size={config.image_size}: give a multiple of {image.stride}, a code's pixels")
    grid = config.image_size // image.stride
    scenes = list(corpus(config.seed, config.num_scenes))
    first_held_out = config.num_scenes - config.num_validation
    rows: dict[str, list[TokenRow]] = {split: [] for split in SPLITS}
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        batch = scenes[start : start + SCENES_AT_ONCE]
        codes = encode_scenes(batch, image, image_size=config.image_size, scale=ratio)
        for scene, small_gg, large_GG in zip(batch, *codes, strict=True):
            split = "train" if scene.number < first_held_out else "validation"
            for caption in (scene.english, scene.chinese):
                rows[split].append(
                    TokenRow(
                        key=hashlib.sha256(f"{config.seed}:{scene.number}:{caption}".encode()).hexdigest()[:16],
                        text=caption,
                        text_ids=np.array(text.encode(caption), np.int32),
                        image_codes=small_gg.ravel(),
                        source=SOURCE,
                        other_codes={ratio * grid: large_GG.ravel()},
                    )
                )
        progress(start + len(batch), len(scenes), "drawing scenes")
    write_rows(folder, rows, origin=origin_of(text, image, grid=grid, other_grids=(ratio * grid,)))
