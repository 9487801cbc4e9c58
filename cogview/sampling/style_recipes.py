"""CogView2's styles: words behind the caption, and how boldly codes are drawn for them (its release).

In: a caption and the name of a style. Out: the caption as the model reads it, and settings of sampling. The words are
the release's, in Chinese, since its model was taught styles by Chinese captions; a model of one's own knows the styles
that its captions named.
"""

from dataclasses import dataclass, replace

from cogview.errors import ConfigError
from cogview.sampling.cluster_choice import CogLMSampling


@dataclass(frozen=True, kw_only=True)
class StyleRecipe:
    """words: put behind the caption; temperature: of the first stage's clusters.

    direct_clusters, direct_temperature_inside: clusters kept, and temperature inside one, in direct super-resolution;
    iterative_top_k: of iterative super-resolution, where a style narrows it; 0 leaves the default.
    """

    words: str = ""
    temperature: float = 1.15
    direct_clusters: int = 100
    direct_temperature_inside: float = 0.89
    iterative_top_k: int = 0

    def prompt(self, caption: str) -> str:
        """The caption with the style's words."""
        return f"{caption} {self.words}" if self.words else caption

    def sampling(self, base: CogLMSampling) -> CogLMSampling:
        """The first stage's settings, with the style's temperature for clusters."""
        return replace(base, clusters=replace(base.clusters, temperature=self.temperature))


DRAWN = StyleRecipe(temperature=1.1, direct_clusters=5, direct_temperature_inside=0.4, iterative_top_k=5)
STYLES: dict[str, StyleRecipe] = {
    "none": StyleRecipe(),
    "mainbody": StyleRecipe(words="高清摄影 隔绝"),  # the release's default: a photograph of the thing alone
    "photo": StyleRecipe(words="高清摄影"),
    "flat": replace(DRAWN, words="平面风格"),
    "comics": replace(DRAWN, words="漫画 隔绝"),
    "oil": StyleRecipe(words="油画风格"),
    "sketch": StyleRecipe(words="素描风格", temperature=1.1),
    "isometric": StyleRecipe(words="等距矢量图", temperature=1.1),
    "chinese": StyleRecipe(words="水墨国画", temperature=1.12),
    "watercolor": StyleRecipe(words="水彩画风格"),
}


def style_recipe(name: str) -> StyleRecipe:
    """The recipe of a style. ConfigError for one that there is not."""
    if name not in STYLES:
        raise ConfigError(f"style={name!r}: choose one of {', '.join(STYLES)}")
    return STYLES[name]
