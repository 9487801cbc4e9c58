"""Any image tokenizer from its folder: the settings say which kind it is."""

from collections.abc import Callable
from pathlib import Path

from cogview.errors import CheckpointError
from cogview.tokenizers import dvae, icetk_image, multiscale, vqgan
from cogview.tokenizers.dvae import DVAETokenizer
from cogview.tokenizers.icetk_image import IcetkImageTokenizer
from cogview.tokenizers.multiscale import MultiScaleTokenizer
from cogview.tokenizers.tokenizer_files import FIRST_KIND, SETTINGS_NAME, read_settings
from cogview.tokenizers.vqgan import VQGANTokenizer
from cogview.tokenizers.vqvae import ImageTokenizer

AnyImageTokenizer = ImageTokenizer | VQGANTokenizer | MultiScaleTokenizer | DVAETokenizer | IcetkImageTokenizer
LOADERS: dict[str, Callable[[Path], AnyImageTokenizer]] = {
    FIRST_KIND: ImageTokenizer.load,
    vqgan.KIND: VQGANTokenizer.load,
    multiscale.KIND: MultiScaleTokenizer.load,
    dvae.KIND: DVAETokenizer.load,
    icetk_image.KIND: IcetkImageTokenizer.load,
}


def load_image_tokenizer(folder: Path) -> AnyImageTokenizer:
    """The tokenizer that was saved in `folder`, ready to encode. CheckpointError where there is none that is sound."""
    kind = read_settings(folder).get("kind", FIRST_KIND)
    if kind not in LOADERS:
        raise CheckpointError(f"{folder / SETTINGS_NAME} is of kind {kind!r}; known are {', '.join(sorted(LOADERS))}")
    return LOADERS[kind](folder)
