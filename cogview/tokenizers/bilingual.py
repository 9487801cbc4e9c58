"""A text tokenizer whose pieces are ordered by language, as icetk's are (CogView2).

In: a SentencePiece model, as bytes. Out: the same model with common pieces first, then English, Chinese and rare ones,
so that an id tells the language of its piece; and the number of each kind in a model that is ordered so. Ids change,
and nothing else: how a text is cut depends on the pieces' scores.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal, get_args

import sentencepiece

from cogview.errors import VocabularyError
from cogview.tokenizers.bilingual_vocabulary import ICETK_RANGES, PAD_PIECE, TextRanges

PieceKind = Literal["common", "english", "chinese", "rare"]
KINDS: tuple[PieceKind, ...] = get_args(PieceKind)  # in the order of their ids
PAD = "<pad>"
PIECES_FIELD = 1  # of SentencePiece's ModelProto, a message for each piece
VARINT, EIGHT_BYTES, LENGTH_DELIMITED, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


def kind_of(piece: str) -> PieceKind:
    """Chinese with any Chinese character, English if all letters are Latin, common without a letter, else rare."""
    if CHINESE.search(piece):
        return "chinese"
    letters = [character for character in piece if character.isalpha()]
    if not letters:
        return "common"
    return "english" if all(LATIN.match(letter) for letter in letters) else "rare"


def ordered_model(model: bytes) -> bytes:
    """The model with its pieces in the order of their kinds, and in their own order within each; specials are common.

    VocabularyError if the bytes are no SentencePiece model.
    """
    kinds = _kinds(_processor(model))
    fields = list(_fields(model))
    pieces = [raw for number, raw in fields if number == PIECES_FIELD]
    others = [raw for number, raw in fields if number != PIECES_FIELD]
    order = sorted(range(len(pieces)), key=lambda piece: KINDS.index(kinds[piece]))
    return b"".join([*(pieces[piece] for piece in order), *others])


def ranges_of(model: bytes) -> TextRanges:
    """How many pieces of each kind a model has. VocabularyError unless they are in order, with `<pad>` at its place.

    icetk's own model, known by its number of pieces, keeps the borders of the release wherever its pieces lie.
    """
    processor = _processor(model)
    kinds = _kinds(processor)
    if len(kinds) <= PAD_PIECE or processor.id_to_piece(PAD_PIECE) != PAD:
        raise VocabularyError(
            f"piece {PAD_PIECE} of this text tokenizer is not {PAD}; train one with --tokenizer.is-bilingual, or give "
            "icetk's ice_text.model"
        )
    found = [(kind, len(list(some))) for kind, some in groupby(kinds)]
    places = [KINDS.index(kind) for kind, _ in found]
    if places == sorted(places):
        return TextRanges(**{**dict.fromkeys(KINDS, 0), **dict(found)})
    if len(kinds) == ICETK_RANGES.num_pieces:
        return ICETK_RANGES
    raise VocabularyError(
        "the pieces of this text tokenizer are not ordered by language; train one with --tokenizer.is-bilingual"
    )


def _kinds(processor: sentencepiece.SentencePieceProcessor) -> Sequence[PieceKind]:
    ids = list(range(processor.get_piece_size()))
    pieces: list[str] = processor.id_to_piece(ids)
    return ["common" if _is_special(processor, token) else kind_of(pieces[token]) for token in ids]


def _is_special(processor: sentencepiece.SentencePieceProcessor, token: int) -> bool:
    is_mark = processor.is_unknown(token) or processor.is_control(token)
    return bool(is_mark or re.fullmatch("<.+>", processor.id_to_piece(token)))  # <n> is a piece for a newline


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise VocabularyError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
    return processor


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, raw bytes with their tag) of each field of a protobuf message."""
    place = 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        if tag & 7 == LENGTH_DELIMITED:
            length, place = _varint(message, place)
            place += length
        elif tag & 7 == VARINT:
            _, place = _varint(message, place)
        elif tag & 7 in (EIGHT_BYTES, FOUR_BYTES):
            place += 8 if tag & 7 == EIGHT_BYTES else 4
        else:
            raise VocabularyError(f"a field of the SentencePiece model has the unknown wire type {tag & 7}")
        yield tag >> 3, message[start:place]


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number in base 128, and where it ends."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
