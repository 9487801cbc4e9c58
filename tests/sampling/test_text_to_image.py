"""Model and tokenizers loaded together: they must belong together, and captions of any length can be drawn."""

import json

import pytest
import torch

from cogview.errors import CheckpointError, VocabularyError
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage, require_fingerprints
from tests.pipelines.trained_folders import GRID, write_trained_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_trained_folders(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def painter(folders):
    return load(folders)


def load(folders, **changes):
    paths = {"text_tokenizer": folders.text_tokenizer, "image_tokenizer": folders.image_tokenizer, **changes}
    return TextToImage.load(folders.checkpoint, **paths)


def test_captions_of_any_length_become_pictures(painter):
    captions = ["", "红", "a large red circle on a blue background " * 40]
    codes_Bhw = painter.codes(captions, seeds=[1, 2, 3], sampling=SamplingConfig())
    assert codes_Bhw.shape == (3, GRID, GRID)
    images_BCHW = painter.decode(codes_Bhw)
    assert images_BCHW.shape == (3, 3, painter.image_size, painter.image_size)
    assert 0 <= images_BCHW.min() <= images_BCHW.max() <= 1


def test_what_is_beyond_the_text_budget_changes_nothing(painter):
    # 64 tokens of a row - 16 codes - 4 command tokens leave 44 for the text.
    pieces = painter.text_tokenizer.encode("a large red circle on a blue background " * 40)
    cut = painter.text_tokenizer.decode(pieces[:44])
    long = painter.text_tokenizer.decode(pieces[:60])
    assert painter.text_tokenizer.encode(cut) == pieces[:44]
    drawn = [painter.codes([caption], seeds=[5], sampling=SamplingConfig()) for caption in (cut, long)]
    assert torch.equal(*drawn)


def test_an_altered_checkpoint_is_refused(tmp_path):
    folders = write_trained_folders(tmp_path)
    settings = json.loads((folders.checkpoint / "model.json").read_text())
    settings["fingerprints"]["vocabulary"] = "0" * 64
    (folders.checkpoint / "model.json").write_text(json.dumps(settings))
    with pytest.raises(VocabularyError, match="trained with vocabulary 000000000000"):
        load(folders)
    weights = folders.checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(folders)
    weights.unlink()
    with pytest.raises(CheckpointError, match="give the output folder of pretrain"):
        load(folders)


def test_fingerprints_must_be_recorded_and_equal(tmp_path):
    require_fingerprints({"vocabulary": "a", "text_tokenizer": "b"}, found={"vocabulary": "a"}, where=tmp_path)
    with pytest.raises(VocabularyError, match="text_tokenizer None"):
        require_fingerprints({"vocabulary": "a"}, found={"text_tokenizer": "b"}, where=tmp_path)
