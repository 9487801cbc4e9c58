from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.filters.translation import TranslationSettings, Translator

pytest.importorskip("ctranslate2")
from tests.filters.translation_model import write_translation_model

SETTINGS = TranslationSettings(max_pieces=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_translation_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_captions_are_translated_each_by_itself(model: Path, beam_size: int) -> None:
    translator = Translator(model, TranslationSettings(max_pieces=8, beam_size=beam_size))
    assert translator.translate(["a red dog", "black cat", "a"]) == ["一只红色的狗", "黑色的猫", "一只"]


def test_what_cannot_be_translated_is_empty(model: Path) -> None:
    translator = Translator(model, SETTINGS)
    assert translator.translate(["", "a zebra", "dog " * 9, "dog"]) == ["", "", "", "狗"]
    assert translator.translate([]) == []


def test_a_folder_that_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks model\.bin, config\.json"):
        Translator(tmp_path, SETTINGS)
    for name in ("model.bin", "config.json", "source.spm", "target.spm"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Translator(tmp_path, SETTINGS)


def test_more_pieces_than_the_model_has_places_for_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="max_pieces=100: the model refuses"):
        Translator(model, TranslationSettings(max_pieces=100)).translate(["dog " * 40])
    with pytest.raises(ConfigError, match="beam_size=0"):
        TranslationSettings(beam_size=0)
