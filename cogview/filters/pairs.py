"""All rules on one pair: bad captions are dropped; a bad image, or no caption left, rejects the pair."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image

from cogview.config import input_field
from cogview.errors import ConfigError
from cogview.filters.caption_keys import distinct_wordings
from cogview.filters.normalisation import normalise_caption
from cogview.filters.personal_data import find_personal_data, redact_personal_data
from cogview.filters.rules import (
    caption_length,
    has_no_listed_word,
    has_words,
    is_no_boilerplate,
    is_no_file_name,
    is_well_encoded,
    max_aspect,
    min_contrast,
    min_side,
    script_share,
)
from cogview.filters.score_limits import read_limit, within_limit
from cogview.filters.scripts import SCRIPTS
from cogview.filters.verdicts import KEPT, Rejected, Verdict, first_rejection
from cogview.filters.word_lists import read_word_list
from cogview.records.images import decode_image
from cogview.records.pair import TextImagePair, Unusable


@dataclass(frozen=True, kw_only=True)
class FilterRules:
    """What is kept.

    min_side: pixels; max_aspect: long side over short side; min_contrast: standard deviation, 0..255; limits: on scores
    that came with the pairs, such as punsafe<=0.5; min_caption, max_caption: characters; scripts: any of latin, han,
    kana, hangul, cyrillic, arabic, other (none: all), of which min_script_share of a caption's letters must be;
    simplify_chinese: write traditional characters as simplified ones; personal_data: e-mail addresses, phone and
    identity numbers are cut out (redact), their captions dropped (reject), or nothing is done (keep); word_list: a file
    of words, one a line, whose pairs go; max_caption_repeats: a wording on more images than this is dropped (0: never),
    max_near_caption_repeats: the same for nearly equal wordings; max_image_copies: an image that is there more often
    goes with all its copies (0: the earliest stays); near_levels: two images are the same if their reduced forms differ
    by no more than this, of 255, anywhere (-1: only equal bytes are the same).
    """

    min_side: int = 128
    max_aspect: float = 3.0
    min_contrast: float = 3.0
    limits: tuple[str, ...] = ()
    min_caption: int = 1
    max_caption: int = 1000
    scripts: tuple[str, ...] = ()
    min_script_share: float = 0.5
    simplify_chinese: bool = True
    personal_data: Literal["redact", "reject", "keep"] = "redact"
    word_list: Path | None = input_field(default=None)
    max_caption_repeats: int = 0
    max_near_caption_repeats: int = 0
    max_image_copies: int = 0
    near_levels: int = 6

    def __post_init__(self) -> None:
        if self.min_caption > self.max_caption or self.min_caption < 1:
            raise ConfigError(f"rules.min_caption={self.min_caption} must lie between 1 and {self.max_caption}")
        if self.max_aspect < 1.0:
            raise ConfigError(f"rules.max_aspect={self.max_aspect} rejects every image; use 1.0 or more")
        for name in ("max_caption_repeats", "max_near_caption_repeats", "max_image_copies"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rules.{name}={getattr(self, name)} is negative; 0 switches it off")
        unknown = sorted(set(self.scripts) - set(SCRIPTS))
        if unknown:
            raise ConfigError(f"rules.scripts: {', '.join(unknown)} is no script; choose of {', '.join(SCRIPTS)}")
        if not 0.0 <= self.min_script_share <= 1.0:
            raise ConfigError(f"rules.min_script_share={self.min_script_share} is no share; use 0 to 1")
        if not -1 <= self.near_levels <= 255:
            raise ConfigError(f"rules.near_levels={self.near_levels} must lie between 0 and 255; -1 switches it off")
        for limit in self.limits:
            read_limit(limit)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A pair with the captions that are left (none if it is rejected), and why others went.

    image: decoded, if it could be; num_redacted: captions that personal data was cut out of.
    """

    pair: TextImagePair
    rejected: Rejected | None
    dropped_captions: tuple[Rejected, ...] = ()
    image: Image.Image | None = None
    num_redacted: int = 0


def judge_pair(pair: TextImagePair, rules: FilterRules) -> Judgement:
    """Apply the rules of image and captions. A pair whose captions all go has the reason of the first that went."""
    image = decode_image(pair.image_bytes)
    if isinstance(image, Unusable):
        return Judgement(pair=pair, rejected=Rejected(image.reason, image.detail, "decode_image"))
    captions = tuple(normalise_caption(caption, simplify=rules.simplify_chinese) for caption in pair.captions)
    captions = distinct_wordings([caption for caption in captions if caption])
    verdict = judge_whole(replace(pair, captions=captions), image, rules)
    if isinstance(verdict, Rejected):
        return Judgement(pair=pair, rejected=verdict, image=image)
    given = captions
    if rules.personal_data == "redact":
        captions = tuple(redact_personal_data(caption) or caption for caption in given)
    verdicts = [judge_caption(caption, rules) for caption in captions]
    dropped = tuple(verdict for verdict in verdicts if isinstance(verdict, Rejected))
    kept = tuple(c for c, verdict in zip(captions, verdicts, strict=True) if not isinstance(verdict, Rejected))
    judged = Judgement(
        pair=replace(pair, captions=kept or pair.captions),
        rejected=None,
        dropped_captions=dropped,
        image=image,
        num_redacted=sum(one != other for one, other in zip(given, captions, strict=True)),
    )
    if kept:
        return judged
    return replace(judged, rejected=dropped[0] if dropped else Rejected("caption_missing", rule="judge_pair"))


def judge_whole(pair: TextImagePair, image: Image.Image, rules: FilterRules) -> Verdict:
    """The first rule that condemns the pair itself: of its image, its scores, or a listed word in any caption."""
    verdict = judge_image(image, rules)
    if isinstance(verdict, Rejected):
        return verdict
    limits = [partial(within_limit, limit=read_limit(limit)) for limit in rules.limits]
    verdict = first_rejection(pair.extra, limits)
    if isinstance(verdict, Rejected) or rules.word_list is None:
        return verdict
    no_listed_word = partial(has_no_listed_word, words=read_word_list(rules.word_list))
    found = (first_rejection(caption, (no_listed_word,)) for caption in pair.captions)
    return next((verdict for verdict in found if isinstance(verdict, Rejected)), KEPT)


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
    """The first rule that a normalised caption breaks, or KEPT."""
    length = partial(caption_length, shortest=rules.min_caption, longest=rules.max_caption)
    scripts = partial(script_share, scripts=rules.scripts, least=rules.min_script_share)
    # Under `redact`, only a caption that is nothing else still has some.
    private = (has_no_personal_data,) if rules.personal_data != "keep" else ()
    wording = (has_words, is_well_encoded, is_no_file_name, is_no_boilerplate)
    return first_rejection(caption, (length, *wording, scripts, *private))


def has_no_personal_data(caption: str) -> Verdict:
    """Reject captions with an e-mail address, a phone or identity number, or an account's name."""
    kinds = find_personal_data(caption)
    return Rejected("caption_personal_data", ", ".join(kinds)) if kinds else KEPT
