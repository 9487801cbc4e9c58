"""All rules on one pair: bad captions are dropped; a bad image, or no caption left, rejects the pair."""

from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from cogview.filters.rules import (
    caption_length,
    has_words,
    is_no_boilerplate,
    is_no_file_name,
    is_well_encoded,
    max_aspect,
    min_contrast,
    min_side,
)
from cogview.filters.verdicts import Rejected, Verdict, first_rejection
from cogview.records.captions import clean_captions
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair, Unusable


@dataclass(frozen=True, kw_only=True)
class FilterRules:
    """Thresholds. min_side: pixels; max_aspect: long side over short side; min_contrast: standard deviation, 0..255;
    min_caption, max_caption: characters; max_caption_repeats: a caption on more images than this is dropped (0: never).
    """

    min_side: int = 128
    max_aspect: float = 3.0
    min_contrast: float = 3.0
    min_caption: int = 1
    max_caption: int = 1000
    max_caption_repeats: int = 0


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A pair with the captions that are left (none if it is rejected), and why others went."""

    pair: TextImagePair
    rejected: Rejected | None
    dropped_captions: tuple[Rejected, ...] = ()


def judge_pair(pair: TextImagePair, rules: FilterRules) -> Judgement:
    """Apply the rules of image and captions. A pair whose captions all go has the reason of the first that went."""
    image = decode_image(pair.image_bytes)
    if isinstance(image, Unusable):
        return Judgement(pair=pair, rejected=Rejected(image.reason, image.detail, "decode_image"))
    verdict = judge_image(image, rules)
    if isinstance(verdict, Rejected):
        return Judgement(pair=pair, rejected=verdict)
    captions = clean_captions(pair.captions)
    verdicts = [judge_caption(caption, rules) for caption in captions]
    dropped = tuple(verdict for verdict in verdicts if isinstance(verdict, Rejected))
    kept = tuple(c for c, verdict in zip(captions, verdicts, strict=True) if not isinstance(verdict, Rejected))
    if kept:
        return Judgement(pair=replace(pair, captions=kept), rejected=None, dropped_captions=dropped)
    reason = dropped[0] if dropped else Rejected("caption_missing", rule="judge_pair")
    return Judgement(pair=pair, rejected=reason, dropped_captions=dropped)


def judge_image(image: Image.Image, rules: FilterRules) -> Verdict:
    """The first rule that an RGB image breaks, or KEPT."""
    return first_rejection(
        image,
        (
            partial(min_side, pixels=rules.min_side),
            partial(max_aspect, ratio=rules.max_aspect),
            partial(min_contrast, deviation=rules.min_contrast),
        ),
    )


def judge_caption(caption: str, rules: FilterRules) -> Verdict:
    """The first rule that a cleaned caption breaks, or KEPT."""
    length = partial(caption_length, shortest=rules.min_caption, longest=rules.max_caption)
    return first_rejection(caption, (length, has_words, is_well_encoded, is_no_file_name, is_no_boilerplate))
