"""The models behind the server: one draws and, where they were finetuned, one captions and one magnifies.

In: orders. Out: pictures as PNG files with what is needed to draw them again. Only the worker's thread comes here.
"""

# B pictures, h w grid

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import to_pictures
from cogview.evaluation.reranking import ranking
from cogview.sampling.caption_search import BeamConfig, search_captions
from cogview.sampling.captioning import Captioner, Language
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.completion import Completer, CompletionConfig
from cogview.sampling.hierarchical_magnifier import HierarchicalSampling
from cogview.sampling.super_resolution import Magnifier
from cogview.sampling.text_to_image import TextToImage
from cogview.tokenizers.pixels import pixel_batch
from pipelines.serving.orders import CaptionOrder, CompleteOrder, DrawOrder, MagnifyOrder, seeds_from

CAPTION_LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture. codes: row by row; cap_loss, rank among the candidates: only where there is a captioner."""

    png: bytes
    seed: int
    codes: tuple[int, ...]
    cap_loss: float | None = None
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Studio:
    """magnify_sampling: of super-resolution; completion, hierarchical: of the completer's square and stages;
    completions: drawn for an order, of which the best is finished. What draws is sampled as each order says."""

    painter: TextToImage
    captioner: Captioner | None = None
    magnifier: Magnifier | None = None
    completer: Completer | None = None
    completion: CompletionConfig = field(default_factory=CompletionConfig)
    hierarchical: HierarchicalSampling = field(default_factory=HierarchicalSampling)
    completions: int = 1
    magnify_sampling: SamplingConfig

    def draw(
        self, orders: Sequence[DrawOrder], *, watch: Callable[[Sequence[Tensor]], None] | None = None
    ) -> list[list[Picture]]:
        """The pictures of each order, all drawn in one batch; the orders must agree in their sampling."""
        prompts = [order.prompt for order in orders for _ in order.seeds]
        seeds = [seed for order in orders for seed in order.seeds]
        codes_Bhw = self.painter.codes(prompts, seeds=seeds, sampling=orders[0].sampling, watch=watch)
        losses = self._losses(prompts, codes_Bhw)
        drawn = to_pictures(self.painter.decode(codes_Bhw))
        flat = codes_Bhw.flatten(1).tolist()
        finished, start = [], 0
        for order in orders:
            rows = range(start, start + len(order.seeds))
            start = rows.stop
            ranks = _ranks([losses[row] for row in rows])
            finished.append(
                [
                    Picture(
                        png=to_png(drawn[row], facts=_facts(order.prompt, seeds[row], order.sampling)),
                        seed=seeds[row],
                        codes=tuple(flat[row]),
                        cap_loss=losses[row],
                        rank=ranks[row - rows.start],
                    )
                    for row in rows
                ]
            )
        return finished

    def unfinished(self, codes_Bhw: Tensor) -> list[bytes]:
        """The upper part of pictures whose first h rows of codes are drawn, as PNGs of the width of the whole."""
        return [to_png(picture) for picture in to_pictures(self.painter.decode(codes_Bhw))]

    def magnify(self, order: MagnifyOrder, *, progress: Callable[[int, int], None] | None = None) -> Picture:
        """A picture at twice the size."""
        assert self.magnifier is not None, "the server offers this only with a magnifier"
        codes_1hw = torch.from_numpy(order.codes_hw.astype(np.int64))[None]
        large_1hw = self.magnifier.magnify(
            [order.prompt], codes_1hw, seeds=[order.seed], sampling=self.magnify_sampling, progress=progress
        )
        picture = to_pictures(self.magnifier.decode(large_1hw))[0]
        facts = _facts(order.prompt, order.seed, self.magnify_sampling)
        return Picture(png=to_png(picture, facts=facts), seed=order.seed, codes=tuple(large_1hw.flatten().tolist()))

    def complete(self, order: CompleteOrder, *, progress: Callable[[int, int], None] | None = None) -> Picture:
        """A picture with a part of it drawn anew: of several drawings the one whose caption can be read off it best."""
        assert self.completer is not None, "the server offers this only with a completer"
        height, width, _ = order.pixels_HWC.shape
        drawn = self.completer.complete(
            torch.from_numpy(order.pixels_HWC.copy()).permute(2, 0, 1),
            order.box.mask(height, width),
            caption=order.prompt,
            seeds=seeds_from(order.seed, self.completions),
            config=self.completion,
            sampling=self.hierarchical,
            only_best=True,
            progress=progress,
        )
        picture = Image.fromarray(drawn.pictures_BCHW[0].permute(1, 2, 0).numpy())
        facts = {"prompt": order.prompt.encode("utf-8", "replace").decode(), "seed": str(order.seed)}
        return Picture(png=to_png(picture, facts=facts), seed=order.seed, codes=())

    def caption(self, order: CaptionOrder) -> dict[Language, str]:
        """The likeliest caption of a picture in each language."""
        assert self.captioner is not None, "the server offers this only with a captioner"
        pixels_1CHW = pixel_batch([order.pixels_HWC], device=str(self.captioner.model.word_embeddings.weight.device))
        with torch.inference_mode():
            codes_1hw = self.captioner.image_tokenizer.encode(pixels_1CHW)
        best: dict[Language, str] = {}
        for language in CAPTION_LANGUAGES:
            (captions,) = search_captions(self.captioner, codes_1hw, beams=BeamConfig(), language=language)
            if captions:
                best[language] = captions[0].text
        return best

    def _losses(self, prompts: Sequence[str], codes_Bhw: Tensor) -> list[float | None]:
        losses: list[float | None] = [None] * len(prompts)
        if self.captioner is not None:  # a prompt that no token stands for has no score
            written = [row for row, text in enumerate(prompts) if self.captioner.text_tokenizer.encode(text)]
            scores = score_pairs(self.captioner, [prompts[row] for row in written], codes_Bhw[written])
            for row, score in zip(written, scores, strict=True):
                losses[row] = score.cap_loss
        return losses


def to_png(picture: Image.Image, *, facts: dict[str, str] | None = None) -> bytes:
    """The bytes of a PNG that carries `facts` as its text."""
    info = PngInfo()
    for name, value in (facts or {}).items():
        info.add_itxt(name, value)
    file = io.BytesIO()
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def _facts(prompt: str, seed: int, sampling: SamplingConfig) -> dict[str, str]:
    """What is needed to draw a picture again."""
    how = f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}"
    return {"prompt": prompt.encode("utf-8", "replace").decode(), "seed": str(seed), "sampling": how}


def _ranks(losses: Sequence[float | None]) -> list[int | None]:
    """The place of each candidate, 0 for the best; none where there is no loss."""
    known = [loss for loss in losses if loss is not None]
    ranks: list[int | None] = [None] * len(losses)
    if len(known) == len(losses):
        for rank, number in enumerate(ranking(known)):
            ranks[number] = rank
    return ranks
