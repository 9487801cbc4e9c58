"""The release's ten styles, and what they change."""

import pytest

from cogview.errors import ConfigError
from cogview.sampling.cluster_choice import ClusterSampling, CogLMSampling
from cogview.sampling.style_recipes import STYLES, style_recipe


def test_a_style_adds_its_words_and_its_temperature() -> None:
    base = CogLMSampling(clusters=ClusterSampling(temperature=1.15, top_clusters=16))
    flat = style_recipe("flat")
    assert flat.prompt("一只猫") == "一只猫 平面风格"
    assert flat.sampling(base).clusters == ClusterSampling(temperature=1.1, top_clusters=16)
    assert style_recipe("none").prompt("a cat") == "a cat"
    assert style_recipe("none").sampling(base) == base


def test_all_styles_of_the_release_are_there() -> None:
    assert len(STYLES) == 10
    assert [name for name in STYLES if STYLES[name].temperature != 1.15] == [
        *("flat", "comics", "sketch", "isometric", "chinese"),
    ]
    with pytest.raises(ConfigError, match="choose one of none, mainbody"):
        style_recipe("cubist")
