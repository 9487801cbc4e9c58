"""Captions into another language by a model on disk: about half of the paper's captions were English once.

In: a folder that CTranslate2 reads (`model.bin`, `config.json`, vocabularies; its converters make one of OPUS-MT, NLLB
and others) with the SentencePiece models of both languages, `source.spm` and `target.spm`. Out: a translation for each
caption, or nothing where the model finds no end. Weights and vocabularies are plain data; no code is loaded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from cogview.errors import ConfigError
from cogview.records.captions import clean_caption

FILES = ("model.bin", "config.json", "source.spm", "target.spm")
UNKNOWN = "\u2047"  # how SentencePiece writes a piece that it does not know
_SPACE_IN_CHINESE = re.compile(
    r"(?<=[\u3000-\u303f\u3400-\u9fff\uff00-\uffef]) (?=[\u3000-\u303f\u3400-\u9fff\uff00-\uffef])"
)


@dataclass(frozen=True, kw_only=True)
class TranslationSettings:
    """How to translate. beam_size: 1 is greedy; max_pieces: longer captions, and outputs without an end, are left out;
    batch_pieces: of captions translated at once; source_prefix, target_prefix: pieces such as NLLB's language tags.
    """

    beam_size: int = 2
    max_pieces: int = 128
    batch_pieces: int = 2048
    source_prefix: tuple[str, ...] = ()
    target_prefix: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("beam_size", "max_pieces", "batch_pieces"):
            if getattr(self, name) < 1:
                raise ConfigError(f"translation.{name}={getattr(self, name)} translates nothing; use 1 or more")


class Translator:
    """A loaded model. The same captions in the same batches give the same translations on the same machine."""

    def __init__(self, folder: Path, settings: TranslationSettings, *, device: str = "cpu", threads: int = 1) -> None:
        """ConfigError if ctranslate2 is not installed, or the folder holds no such model."""
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"model: {folder} lacks {', '.join(missing)}; give a folder that CTranslate2 has converted"
            )
        try:
            import ctranslate2
        except ImportError as error:
            raise ConfigError("model: translating needs ctranslate2; pip install 'cogview[translate]'") from error
        try:
            self._model: Any = ctranslate2.Translator(str(folder), device=device, intra_threads=threads)
            self._source, self._target = (
                sentencepiece.SentencePieceProcessor(model_file=str(folder / name)) for name in FILES[2:]
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"model: {folder} cannot be loaded ({error}); convert it anew") from error
        self._settings = settings

    def translate(self, captions: Sequence[str]) -> list[str]:
        """A translation for each caption; empty where it is too long, has unknown pieces, or comes to no end."""
        settings = self._settings
        pieces = [[*settings.source_prefix, *self._source.encode(caption, out_type=str)] for caption in captions]
        fitting = [index for index, own in enumerate(pieces) if 0 < len(own) <= settings.max_pieces]
        prefix = [list(settings.target_prefix)] * len(fitting) if settings.target_prefix else None
        try:
            results = self._model.translate_batch(
                [pieces[index] for index in fitting],
                target_prefix=prefix,
                beam_size=settings.beam_size,
                max_batch_size=settings.batch_pieces,
                batch_type="tokens",
                max_decoding_length=2 * settings.max_pieces,
            )
        except RuntimeError as error:  # such as a position that the model does not have
            raise ConfigError(
                f"translation.max_pieces={settings.max_pieces}: the model refuses ({error}); try fewer"
            ) from error
        translations = [""] * len(captions)
        for index, result in zip(fitting, results, strict=True):
            found = result.hypotheses[0][len(settings.target_prefix) :]
            if len(found) < 2 * settings.max_pieces - len(settings.target_prefix):
                text = clean_caption(self._target.decode(found))
                translations[index] = "" if UNKNOWN in text else _SPACE_IN_CHINESE.sub("", text)
        return translations
