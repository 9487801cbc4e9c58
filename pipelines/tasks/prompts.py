"""What is asked of a trained model: captions of scenes that the demo corpus never showed, and of held-out rows.

In: numbers and a seed. Out: prompts, and an order for each of their candidates.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cogview.errors import ConfigError
from cogview.evaluation.attributes import scene_to_json
from cogview.scenes.scene import Scene, captions, held_out_prompts
from cogview.shards.reader import TokenShards
from pipelines.tasks.drawing import Order, Prompt

MAX_SEED = 2**48  # exact in JSON and in any table


def scene_prompts(number: int, *, seed: int, two_shape_share: float) -> list[Prompt]:
    """Captions of scenes with combinations that the corpus never showed, in both languages."""
    return [
        Prompt(
            text=asked.caption,
            kind="scene",
            language=asked.language,
            scene=scene_to_json(asked.scene),
            latin=f"{asked.language}: {_english(asked.scene)}",
        )
        for asked in held_out_prompts(number, seed=seed, two_shape_share=two_shape_share)
    ]


def validation_prompts(tokens: Path | None, *, number: int, seed: int) -> list[Prompt]:
    """Captions of held-out rows of `tokens`, each of another image and no text twice, chosen by the seed."""
    if not number:
        return []
    if tokens is None:
        raise ConfigError("num_validation_prompts needs token rows; give --tokens, the output folder of tokenize_pairs")
    shards = TokenShards.open(tokens, split="validation")
    chosen: dict[str, str] = {}  # text -> key of its image
    for place in np.random.default_rng(seed).permutation(len(shards)):
        row = shards.rows(np.array([place]))
        if row.texts[0].strip() and row.texts[0] not in chosen and row.keys[0] not in chosen.values():
            chosen[row.texts[0]] = row.keys[0]
        if len(chosen) == number:
            break
    return [Prompt(text=text, kind="validation") for text in chosen]


def place_orders(prompts: Sequence[Prompt], *, seed: int, seeds: Sequence[int] = ()) -> Iterator[Order]:
    """One order for each candidate of each prompt. A picture's seed comes from (seed, prompt, candidate) alone.

    seeds: instead of these, for the candidates of given prompts.
    """
    for index, prompt in enumerate(prompts):
        for candidate in range(prompt.candidates):
            digest = hashlib.sha256(f"sample:{seed}:{index}:{candidate}".encode()).digest()
            own = int.from_bytes(digest[:6], "big")
            is_known = bool(seeds) and prompt.kind == "given"
            yield Order(
                prompt_index=index,
                prompt=prompt,
                candidate=candidate,
                seed=seeds[candidate] if is_known else own,
            )


def _english(scene: Scene) -> str:
    english, _ = captions(scene, rng=random.Random(1))  # draws 0.13: the first, plainest template
    return english
