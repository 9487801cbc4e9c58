"""Text-guided completion: a part of a picture drawn anew as a caption says (CogView2).

In: a picture of any size, a mask of its pixels, a caption, seeds. Out: the picture with the masked part drawn, once for
each seed. A square around the mask becomes codes; those under the mask are drawn by a model that sees the others
(`Fill`, CogLM's own way). Where the square has more pixels than those codes show, both super-resolution stages draw the
part at their size, between the codes of the picture itself; then it is scaled back and pasted. Where there is
a judge of the small pictures, candidates can be compared, or only the best one be finished.

Pixels outside of the mask stay bit by bit as they are, but for a seam of some pixels around it, in which the new
picture fades into the old one. The release instead passes the whole picture through its tokenizer once more, which
hides seams and changes every pixel. What the mask hides still shines through the tokenizer's encoder into the codes
beside it: use a mask larger than the object.
"""

# B candidates, C channels, H W height and width of the picture, S side of the square, g G grids of codes

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.sampling.hierarchical_magnifier import HierarchicalMagnifier, HierarchicalSampling
from cogview.sampling.masks import Square, fading, hidden_codes, square_around
from cogview.tokenizers.stored import AnyImageTokenizer


class Fill(Protocol):
    """Draws hidden codes by captions: codes int64 [B, g, g], bool masks [B, g, g] -> codes, visible ones unchanged."""

    def __call__(
        self, captions: Sequence[str], codes_Bhw: Tensor, hidden_Bhw: Tensor, *, seeds: Sequence[int]
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """context: side of the square that is read beside the mask's longer side (the release: 20 to 14).

    seam: pixels around the mask in which new and old are mixed.
    """

    context: float = 20 / 14
    seam: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.context <= 100:
            raise ConfigError(f"context={self.context}: the square is at least as long as the mask; choose 1 to 100")
        if self.seam < 0:
            raise ConfigError(f"seam={self.seam}: give 0 pixels or more")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Candidates. pictures_BCHW: uint8 [B, 3, H, W]; cap_losses: of the caption for each, none without a judge."""

    pictures_BCHW: Tensor
    cap_losses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Completer:
    """fill: draws the small picture's codes, `grid` along a side; magnifier: both stages, or None to leave it small.

    judge: CapLoss of a caption for each of the small pictures, codes [B, g, g]; None to do without.
    """

    fill: Fill
    image_tokenizer: AnyImageTokenizer
    grid: int
    magnifier: HierarchicalMagnifier | None = None
    judge: Callable[[str, Tensor], Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.magnifier is not None and self.magnifier.side != self.grid:
            raise ConfigError(
                f"the super-resolution stages read {self.magnifier.side} codes along a side, and {self.grid} are "
                "drawn; give stages that were trained on this model"
            )

    @property
    def small_side(self) -> int:
        """Pixels along a side of the small picture."""
        return self.grid * self.image_tokenizer.stride

    @torch.inference_mode()
    def complete(
        self,
        picture_CHW: Tensor,
        mask_HW: Tensor,
        *,
        caption: str,
        seeds: Sequence[int],
        config: CompletionConfig,
        sampling: HierarchicalSampling,
        only_best: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Completion:
        """A candidate for each seed, of one picture uint8 [3, H, W] and a bool mask of it.

        only_best: finish only the one that the judge likes best (CogView2's post-selection); without a judge, the
        first. progress: called with (calls of the super-resolution stages done, calls). ConfigError for an empty mask,
        one of another size than the picture, or no seeds.
        """
        if picture_CHW.dtype != torch.uint8 or picture_CHW.shape != (3, *mask_HW.shape):
            raise ConfigError(
                f"a picture {picture_CHW.dtype} {tuple(picture_CHW.shape)} and a mask {tuple(mask_HW.shape)}: give "
                "bytes [3, height, width], and a mask of the same height and width"
            )
        if not len(seeds):
            raise ConfigError("no seeds: give one for each picture that is to be drawn")
        square = square_around(mask_HW, context=config.context, smallest=self.small_side)
        pixels_CSS, mask_SS = square.cut(picture_CHW.float() / 255), _cut_mask(mask_HW, square)
        codes_Bgg = self._filled(pixels_CSS, mask_SS, caption=caption, seeds=seeds)
        losses = tuple(self.judge(caption, codes_Bgg)) if self.judge is not None else ()
        if only_best:
            best = losses.index(min(losses)) if losses else 0
            codes_Bgg, seeds, losses = codes_Bgg[best : best + 1], [seeds[best]], losses[best : best + 1]
        drawn_BCSS = self._finished(
            codes_Bgg, pixels_CSS, mask_SS, caption=caption, seeds=seeds, sampling=sampling, progress=progress
        )
        strength_HW = fading(mask_HW, seam=config.seam)
        pictures_BCHW = paste(drawn_BCSS, picture_CHW, square=square, strength_HW=strength_HW)
        return Completion(pictures_BCHW=pictures_BCHW, cap_losses=losses)

    def _filled(self, pixels_CSS: Tensor, mask_SS: Tensor, *, caption: str, seeds: Sequence[int]) -> Tensor:
        """Codes int64 [B, g, g] of the square at the small size, with what is masked drawn."""
        batch, hidden_gg = len(seeds), hidden_codes(mask_SS, grid=self.grid)
        codes_1gg = self._encode(pixels_CSS, side=self.small_side)
        hidden_Bgg = hidden_gg.to(codes_1gg.device).repeat(batch, 1, 1)
        return self.fill([caption] * batch, codes_1gg.repeat(batch, 1, 1), hidden_Bgg, seeds=seeds)

    def _finished(
        self,
        codes_Bgg: Tensor,
        pixels_CSS: Tensor,
        mask_SS: Tensor,
        *,
        caption: str,
        seeds: Sequence[int],
        sampling: HierarchicalSampling,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """The square at its own size, float [B, 3, S, S] in [0, 1]; what is not masked is as the tokenizer has it."""
        batch, side = len(seeds), pixels_CSS.shape[-1]
        if self.magnifier is None or side <= self.small_side:
            return _scaled(self.image_tokenizer.decode(codes_Bgg).cpu(), side=side)
        large = self.grid * self.magnifier.scale
        known_1GG = self._encode(pixels_CSS, side=large * self.image_tokenizer.stride)
        inside_GG = hidden_codes(mask_SS, grid=large)
        drawn_BGG = self.magnifier.magnify(
            [caption] * batch,
            codes_Bgg,
            seeds=seeds,
            sampling=sampling,
            known_BGG=known_1GG.repeat(batch, 1, 1),
            inside_BGG=inside_GG.repeat(batch, 1, 1),
            progress=progress,
        )
        return _scaled(self.magnifier.decode(drawn_BGG).cpu(), side=side)

    def _encode(self, pixels_CSS: Tensor, *, side: int) -> Tensor:
        """Codes int64 [1, g, g] of a square, scaled to `side` pixels."""
        weight = next(self.image_tokenizer.parameters())
        return self.image_tokenizer.encode(_scaled(pixels_CSS[None], side=side).to(weight.device))


def paste(drawn_BCSS: Tensor, picture_CHW: Tensor, *, square: Square, strength_HW: Tensor) -> Tensor:
    """Pictures uint8 [B, 3, H, W]: each drawn square where `strength_HW` is 1, the picture where it is 0, both between.

    Where it is 0 the picture's bytes are taken as they are.
    """
    old_CHW, pasted = picture_CHW.float(), []
    for drawn_CSS in drawn_BCSS:
        new_CHW = square.put_back(drawn_CSS.float().clamp(0, 1) * 255, onto_CHW=old_CHW)
        mixed_CHW = (strength_HW * new_CHW + (1 - strength_HW) * old_CHW).round().to(torch.uint8)
        pasted.append(torch.where(strength_HW > 0, mixed_CHW, picture_CHW))
    return torch.stack(pasted)


def _cut_mask(mask_HW: Tensor, square: Square) -> Tensor:
    """The mask in the square; beyond the picture nothing is masked but what continues its edge."""
    return square.cut(mask_HW[None].float())[0] > 0


def _scaled(images_BCHW: Tensor, *, side: int) -> Tensor:
    """Square pictures at another size, in [0, 1]."""
    if images_BCHW.shape[-1] == side:
        return images_BCHW
    scaled = nn.functional.interpolate(
        images_BCHW.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return scaled.clamp(0, 1)
