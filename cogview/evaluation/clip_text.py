"""CLIP's text tokens: byte pairs of lower-case words, from the `vocab.json` and `merges.txt` beside its weights.

In: captions. Out: ids of one length, each caption between the start and the end token, and padded with the end token.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cogview.errors import CheckpointError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
_CLITIC = re.compile(r"'(?:s|t|re|ve|m|ll|d)")


class ClipText:
    """The tokenizer of one folder."""

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], *, length: int) -> None:
        """length: of every row of ids, 77 in the published models."""
        self._ids = vocabulary
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._length = length
        self._pieces: dict[str, list[int]] = {}

    @classmethod
    def load(cls, folder: Path, *, length: int) -> "ClipText":
        """Read both files. CheckpointError if they are not there, or not CLIP's."""
        try:
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [(first, second) for first, second in (line.split() for line in lines if _is_merge(line))]
            start, end = vocabulary[START], vocabulary[END]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder} has no vocab.json and merges.txt of CLIP ({error}); give a folder as transformers saves it"
            ) from error
        assert isinstance(start, int), "JSON's whole numbers are int"
        assert isinstance(end, int), "JSON's whole numbers are int"
        return cls(vocabulary, merges, length=length)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids, int64 [captions, length]; what does not fit is cut before the end token."""
        end = self._ids[END]
        ids = torch.full((len(captions), self._length), end, dtype=torch.int64)
        for number, caption in enumerate(captions):
            row = [self._ids[START], *self.encode(caption)[: self._length - 2], end]
            ids[number, : len(row)] = torch.tensor(row)
        return ids

    def encode(self, caption: str) -> list[int]:
        """The ids of a caption without start and end."""
        text = " ".join(unicodedata.normalize("NFC", caption).split()).lower()
        return [piece for word in split_words(text) for piece in self._word(word)]

    def _word(self, word: str) -> list[int]:
        if word not in self._pieces:
            letters = [_byte_letters()[byte] for byte in word.encode()]
            merged = self._merge([*letters[:-1], letters[-1] + WORD_END])
            self._pieces[word] = [self._ids.get(piece, self._ids[END]) for piece in merged]
        return self._pieces[word]

    def _merge(self, pieces: list[str]) -> list[str]:
        """Merge the pair that was learned first, everywhere, until no known pair is left."""
        while len(pieces) > 1:
            pairs = set(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == best:
                    merged[-1] = "".join(best)
                else:
                    merged.append(piece)
            pieces = merged
        return pieces


def split_words(text: str) -> Iterator[str]:
    """Runs of letters, single digits, runs of anything else that is no space, and English clitics such as 's."""
    place = 0
    while place < len(text):
        clitic = _CLITIC.match(text, place)
        if clitic:
            yield clitic.group()
            place = clitic.end()
            continue
        kind, stop = _kind(text[place]), place + 1
        if kind in "LO":
            while stop < len(text) and _kind(text[stop]) == kind:
                stop += 1
        if kind != " ":
            yield text[place:stop]
        place = stop


def _kind(character: str) -> str:
    """`L` letter, `N` number, a space, or `O` for anything else."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def _is_merge(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#version")


@cache
def _byte_letters() -> dict[int, str]:
    """A printable letter for every byte: itself if it has one, else one from beyond Latin-1, in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + place) for place, byte in enumerate(others)}}
