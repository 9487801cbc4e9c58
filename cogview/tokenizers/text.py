"""Captions as SentencePiece ids.

In: text of any origin. Out: ids from 0 to `num_pieces - 1`, without the vocabulary's offset and without begin or end
marks, as CogView uses them. Command tokens are added by id in the sequences' room and by nothing else: a caption that
says `[ROI1]` or `</s>` is plain text here.

CogView's own settings are the defaults of `TextTokenizerConfig`: byte-pair encoding, 50,000 pieces, coverage 0.9995,
the user-defined symbol `<n>`, NFKC folding, no fallback to bytes (what is not covered becomes `<unk>`).
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from cogview.config import later_field
from cogview.errors import ConfigError, VocabularyError
from cogview.tokenizers.bilingual import ordered_model, ranges_of
from cogview.tokenizers.bilingual_vocabulary import PAD_PIECE, TextRanges

MODEL_NAME = "text.model"
SETTINGS_NAME = "text.json"
NEWLINE_PIECE = "<n>"
NORMALIZER = "nmt_nfkc"
NUM_RESERVED = 4  # <unk>, <s>, </s> and <n> have the ids 0 to 3
MAX_TRAINING_CHARACTERS = 1000  # of one text; SentencePiece passes over texts of more than 4,192 bytes
MAX_MODEL_BYTES = 64 * 2**20  # the released model has 1 MB
BORDER = "\u241f"  # the sign for a unit separator, which no caption needs
CHINESE_CHARACTER = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
ERRORS_ONLY = 2  # SentencePiece's minloglevel


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """How to train a text tokenizer; the defaults are the released settings.

    num_pieces: size of the vocabulary, specials included. exact: raise if the corpus cannot give exactly that. If not
    exact, the size follows the corpus: fewer pieces if it has no more to merge, more if the covered characters need
    them (then twice as many pieces as characters, so that words are not spelled out).
    character_coverage: share of all characters in the corpus that get a piece of their own.
    split_chinese: no piece has more than one Chinese character. A small corpus repeats its phrases, and without spaces
    between them BPE would learn whole phrases by heart; a large one teaches words, as the released model shows.
    max_texts: the rest of a larger corpus is not read.
    is_bilingual: CogView2's form: with `<pad>`, and the pieces ordered by language as icetk's are. model_type:
    CogView's "bpe", or icetk's "unigram", which on a small corpus cannot learn a word that has one form only.
    """

    num_pieces: int = 50_000
    exact: bool = True
    character_coverage: float = 0.9995
    split_chinese: bool = False
    max_texts: int = 5_000_000
    is_bilingual: bool = later_field(False)
    model_type: Literal["bpe", "unigram"] = later_field("bpe")

    def __post_init__(self) -> None:
        if self.num_pieces <= NUM_RESERVED:
            raise ConfigError(f"num_pieces is {self.num_pieces}; {NUM_RESERVED} are reserved, so give more")
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ConfigError(f"character_coverage is {self.character_coverage}; it must be from 0.9 to 1.0")
        if self.model_type not in ("bpe", "unigram"):
            raise ConfigError(f"model_type is {self.model_type!r}; choose bpe or unigram")
        if self.max_texts < 1:
            raise ConfigError(f"max_texts is {self.max_texts}; it must be at least 1")


class TextTokenizer:
    """A SentencePiece model. It can be pickled, and encodes from several threads at once."""

    def __init__(self, model: bytes) -> None:
        """Take a serialized model. VocabularyError if it is none."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise VocabularyError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Load a `.model` file, or the folder of `train_text_tokenizer`, where the fingerprint is compared as well.

        Raises VocabularyError for a file that is missing, no SentencePiece model, or not the one its folder names.
        """
        file = path / MODEL_NAME if path.is_dir() else path
        try:
            model = _read_model(file)
            tokenizer = cls(model)
        except (OSError, VocabularyError) as error:
            raise VocabularyError(
                f"{file}: {error}; give a SentencePiece .model file or the output of train_text_tokenizer"
            ) from error
        _check_fingerprint(tokenizer, settings_path=path / SETTINGS_NAME)
        return tokenizer

    def save(self, folder: Path, *, settings: dict[str, Any]) -> None:
        """Write `text.model` and `text.json` (the settings, `num_pieces`, `fingerprint`)."""
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"settings": settings, "num_pieces": self.num_pieces, "fingerprint": self.fingerprint}
        (folder / MODEL_NAME).write_bytes(self._model)
        (folder / SETTINGS_NAME).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def num_pieces(self) -> int:
        """How many ids there are, specials included."""
        return int(self._processor.get_piece_size())

    @property
    def unknown_id(self) -> int:
        """The id of what no piece covers."""
        return int(self._processor.unk_id())

    @property
    def ranges(self) -> TextRanges:
        """How many pieces there are of each language. VocabularyError unless they are ordered so (see `bilingual`)."""
        return ranges_of(self._model)

    @property
    def fingerprint(self) -> str:
        """sha256 of the model file."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text: possibly none, never one outside [0, num_pieces)."""
        ids: list[int] = self._processor.encode(encodable(text))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, several times as quick."""
        ids: list[list[int]] = self._processor.encode([encodable(text) for text in texts], num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, as the normalizer left it. VocabularyError for an id outside [0, num_pieces)."""
        outside = [token for token in ids if not 0 <= token < self.num_pieces]
        if outside:
            raise VocabularyError(f"id {outside[0]} is not in this text tokenizer, which has {self.num_pieces} pieces")
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def pieces(self, text: str) -> list[str]:
        """How a text is cut, for people; the mark `▁` stands for a space."""
        pieces: list[str] = self._processor.encode(encodable(text), out_type=str)
        return pieces

    def written_pieces(self) -> list[str]:
        """What every id stands for, `▁` for a space; empty for those that no text is made of (unknown, begin, end)."""
        ids, processor = range(self.num_pieces), self._processor
        pieces: list[str] = processor.id_to_piece(list(ids))
        return [
            "" if processor.is_unknown(token) or processor.is_control(token) else piece
            for token, piece in zip(ids, pieces, strict=True)
        ]

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[bytes]]:
        return TextTokenizer, (self._model,)


def train_text_tokenizer(texts: Iterable[str], *, config: TextTokenizerConfig, output: Path) -> TextTokenizer:
    """Train on captions and write `text.model` and `text.json` to the folder `output`.

    The same texts in the same order give the same bytes. Raises ConfigError if there is no text, or if `config.exact`
    asks for a size that the corpus cannot give.
    """
    corpus = [encodable(text)[:MAX_TRAINING_CHARACTERS] for text in islice(texts, config.max_texts) if text.strip()]
    reserved = NUM_RESERVED + config.is_bilingual
    needed = reserved + count_characters(corpus, coverage=config.character_coverage)
    if needed == reserved:
        raise ConfigError("there is no text to train a text tokenizer on; the captions are empty")
    if config.exact and needed > config.num_pieces:
        raise ConfigError(
            f"num_pieces is {config.num_pieces}, but the characters of these captions need {needed} alone; raise "
            "num_pieces, lower character_coverage, or set exact to False"
        )
    fits = config.num_pieces >= needed or config.exact
    num_pieces = config.num_pieces if fits else 2 * needed
    tokenizer = TextTokenizer(_trained_model(corpus, num_pieces=num_pieces, config=config))
    if config.exact and tokenizer.num_pieces != config.num_pieces:
        raise ConfigError(
            f"num_pieces is {config.num_pieces}, but {len(corpus)} captions give {tokenizer.num_pieces} at most; set "
            "num_pieces to that, set exact to False, or train on more captions"
        )
    tokenizer.save(output, settings={**_stored(config), "texts": len(corpus), "origin": "trained"})
    return tokenizer


def _stored(config: TextTokenizerConfig) -> dict[str, Any]:
    """The config's fields; those that came later only where they say something."""
    later = {field.name for field in fields(config) if field.metadata and getattr(config, field.name) == field.default}
    return {name: value for name, value in asdict(config).items() if name not in later}


def encodable(text: str) -> str:
    """The text as UTF-8 can hold it: surrogate pairs are joined, lone ones become U+FFFD, and NUL goes away."""
    if text.isascii():
        return text.replace("\0", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")


def count_characters(texts: Iterable[str], *, coverage: float) -> int:
    """How many characters SentencePiece gives a piece of their own: the commonest ones that make up `coverage`."""
    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=NORMALIZER)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize(text))  # with `▁` before each word, as in training
    covered, needed = 0, 0
    for _, count in counts.most_common():
        if covered >= coverage * counts.total():
            break
        covered, needed = covered + count, needed + 1
    return needed


def _trained_model(corpus: list[str], *, num_pieces: int, config: TextTokenizerConfig) -> bytes:
    model = io.BytesIO()
    sentences = map(_with_borders, corpus) if config.split_chinese else iter(corpus)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=config.model_type,
            pad_id=PAD_PIECE if config.is_bilingual else -1,
            vocab_size=num_pieces,
            hard_vocab_limit=False,  # fewer pieces are judged by the caller
            character_coverage=config.character_coverage,
            pretokenization_delimiter=BORDER if config.split_chinese else "",
            user_defined_symbols=[NEWLINE_PIECE],
            normalization_rule_name=NORMALIZER,
            byte_fallback=False,
            num_threads=1,  # the model file names it
            minloglevel=ERRORS_ONLY,
        )
    except RuntimeError as error:
        raise ConfigError(f"num_pieces {num_pieces}: SentencePiece cannot train on these captions: {error}") from error
    return ordered_model(model.getvalue()) if config.is_bilingual else model.getvalue()


def _with_borders(text: str) -> str:
    """The text with a border on both sides of every Chinese character, which no learned piece crosses."""
    return CHINESE_CHARACTER.sub(rf"{BORDER}\g<0>{BORDER}", text).replace(BORDER + BORDER, BORDER)


def _read_model(file: Path) -> bytes:
    size = file.stat().st_size
    if size > MAX_MODEL_BYTES:
        raise VocabularyError(f"{size} bytes are too many for a SentencePiece model")
    return file.read_bytes()


def _check_fingerprint(tokenizer: TextTokenizer, *, settings_path: Path) -> None:
    if not settings_path.is_file():
        return
    try:
        wanted = json.loads(settings_path.read_bytes())["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise VocabularyError(f"{settings_path} is damaged ({error}); run train_text_tokenizer again") from error
    if wanted != tokenizer.fingerprint:
        raise VocabularyError(
            f"{settings_path} names the model {wanted}, but {MODEL_NAME} is {tokenizer.fingerprint}; the file was "
            "changed, run train_text_tokenizer again"
        )
