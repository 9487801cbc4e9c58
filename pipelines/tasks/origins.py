"""What token rows were made with, from the tokenizers that made them: every job that writes such rows says it alike."""

from collections.abc import Sequence

from cogview.shards.schema import TokenOrigin
from cogview.tokenizers.stored import AnyImageTokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary


def origin_of(
    text: TextTokenizer, image: AnyImageTokenizer, *, grid: int, other_grids: Sequence[int] = ()
) -> TokenOrigin:
    """grid: image codes along one side of a row's main picture; other_grids: the same of its other sizes."""
    return TokenOrigin(
        text_tokenizer=text.fingerprint,
        image_tokenizer=image.fingerprint,
        vocabulary=Vocabulary(image.num_codes, text.num_pieces).fingerprint,
        num_image_codes=image.num_codes,
        num_text_pieces=text.num_pieces,
        grid=grid,
        other_grids=tuple(other_grids),
    )
