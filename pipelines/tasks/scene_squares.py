"""Squares of large scenes with their captions, each as codes of two sizes: what super-resolution learns from in a demo.

In: a number of scenes of the demo corpus, and both tokenizers. Out: a folder of token rows like those of
tokenize_pairs. A model that is to magnify the pictures of the road must see squares of larger ones: scenes are drawn at
twice the size, scaled down to the size of the road, and both are encoded; the same square is then cut from both. It is
cut from the codes, because magnifying also reads its squares from the codes of a whole picture.
"""

# B batch, g G grids of the scaled and of the large picture

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from cogview.config import require_positive
from cogview.errors import ConfigError, ManifestError
from cogview.evaluation.grids import from_pictures
from cogview.sampling.windows import SCALE
from cogview.scenes.scene import CaptionedScene, corpus, draw_scene
from cogview.shards.manifest import ShardEntry, read_manifest, shard_name, write_manifest
from cogview.shards.schema import SPLITS, TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from pipelines.tasks.origins import origin_of

SCENES_AT_ONCE = 32
SOURCE = "demo scenes"


@dataclass(frozen=True, kw_only=True)
class SceneSquares:
    """num_scenes: of the demo corpus with this seed, none of which shows a held-out combination.

    image_size: side in pixels of the pictures that will be magnified; scenes are drawn at twice of it.
    squares_per_scene: cut from each, in turn with an English and a Chinese caption; validation_share: of the scenes.
    """

    num_scenes: int = 2000
    image_size: int = 64
    squares_per_scene: int = 6
    validation_share: float = 0.05
    seed: int = 11

    def __post_init__(self) -> None:
        require_positive(self, "num_scenes", "image_size", "squares_per_scene", prefix="scenes.")
        if not 0 < self.num_validation < self.num_scenes:
            raise ConfigError(
                f"scenes.validation_share={self.validation_share} of {self.num_scenes} scenes: both sides need one"
            )

    @property
    def num_validation(self) -> int:
        """How many of the scenes, the last ones, are held out."""
        return round(self.validation_share * self.num_scenes)


def write_scene_squares(
    config: SceneSquares,
    folder: Path,
    *,
    side: int,
    text_tokenizer: Path,
    image_tokenizer: Path,
    progress: Callable[[float, float, str], None],
) -> None:
    """Write the rows unless they are there: main grid 2 `side`, and `side` besides.

    Raises ConfigError for pictures smaller than such a square, or no multiple of the tokenizer's stride.
    """
    if is_written(folder):
        return
    text, image = TextTokenizer.load(text_tokenizer), load_image_tokenizer(image_tokenizer)
    grid = config.image_size // image.stride
    if config.image_size % image.stride or grid < side:
        raise ConfigError(
            f"scenes.image_size={config.image_size}: with side={side} and {image.stride} pixels to a code, give a "
            f"multiple of {image.stride} from {side * image.stride} on"
        )
    origin = origin_of(text, image, grid=SCALE * side, other_grids=(side,))
    scenes = list(corpus(config.seed, config.num_scenes))
    first_held_out = config.num_scenes - config.num_validation
    rows: dict[str, list[TokenRow]] = {split: [] for split in SPLITS}
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        batch = scenes[start : start + SCENES_AT_ONCE]
        codes = encode_scenes(batch, image, image_size=config.image_size, scale=SCALE)
        for scene, small_gg, large_GG in zip(batch, *codes, strict=True):
            split = "train" if scene.number < first_held_out else "validation"
            rows[split] += cut_squares(scene, small_gg, large_GG, side=side, text=text, config=config)
        progress(start + len(batch), len(scenes), "drawing scenes")
    write_rows(folder, rows, origin=origin)


def encode_scenes(
    scenes: Sequence[CaptionedScene], image: AnyImageTokenizer, *, image_size: int, scale: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Codes of the scenes scaled down to `image_size`, uint16 [B, g, g], and as they were drawn, [B, G, G]."""
    large = [draw_scene(scene.scene, image_size=scale * image_size) for scene in scenes]
    small = [picture.resize((image_size, image_size), Image.Resampling.LANCZOS) for picture in large]
    with torch.inference_mode():
        small_Bgg, large_BGG = (image.encode(from_pictures(pictures)).cpu().numpy() for pictures in (small, large))
    return small_Bgg.astype(np.uint16), large_BGG.astype(np.uint16)


def cut_squares(
    scene: CaptionedScene,
    small_gg: npt.NDArray[np.uint16],
    large_GG: npt.NDArray[np.uint16],
    *,
    side: int,
    text: TextTokenizer,
    config: SceneSquares,
) -> Iterator[TokenRow]:
    """Squares of a scene at places that its number and the seed decide, as rows."""
    places = len(small_gg) - side + 1
    generator = np.random.default_rng([config.seed, scene.number])
    for number, place in enumerate(generator.permutation(places**2)[: config.squares_per_scene].tolist()):
        top, left = divmod(place, places)
        caption = (scene.english, scene.chinese)[number % 2]
        read = small_gg[top : top + side, left : left + side]
        drawn = large_GG[SCALE * top : SCALE * (top + side), SCALE * left : SCALE * (left + side)]
        yield TokenRow(
            key=hashlib.sha256(f"{config.seed}:{scene.number}:{place}".encode()).hexdigest()[:16],
            text=caption,
            text_ids=np.array(text.encode(caption), np.int32),
            image_codes=drawn.ravel(),
            source=SOURCE,
            other_codes={side: read.ravel()},
        )


def is_written(folder: Path) -> bool:
    """Whether rows were written to a folder to the end."""
    try:
        read_manifest(folder)
    except ManifestError:
        return False
    return True


def write_rows(folder: Path, rows: dict[str, list[TokenRow]], *, origin: TokenOrigin) -> None:
    """Write the rows of both splits, and close the folder."""
    names = {split: f"{split}/{shard_name(0, 'arrow')}" for split in SPLITS}
    files = {names[split]: write_token_shard(folder / names[split], rows[split], origin=origin) for split in SPLITS}
    count = sum(map(len, rows.values()))
    entry = ShardEntry(shard=0, rows_in=count, rows_out=count, files=files)
    write_manifest(folder, [entry], extra={**origin.stored, **{f"rows_{split}": len(rows[split]) for split in SPLITS}})
