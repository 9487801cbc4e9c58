"""What CogLM hides of a row: patches of a picture, a box of it, spans of a text (CogView2).

In: sizes and a generator. Out: bool arrays, True where a token is hidden from the context. Hidden tokens are not
replaced: they stay in the row, and the attention keeps them from being seen too soon.
"""

# G rows and columns of codes, L tokens of a text

from typing import Literal

import numpy as np
import numpy.typing as npt

from cogview.errors import ConfigError

Hidden = npt.NDArray[np.bool_]
PatchRule = Literal["released", "paper"]


def hidden_patches(
    grid: int, *, side: int, rule: PatchRule, share: float, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Squares of side x side codes, bool [G, G].

    "released": floor(share G^2 / side^2) squares at places that differ; they may overlap, so that they hide less than
    `share` (0.8) of the picture. "paper": squares until `share` (0.75) of it is hidden. The release never draws the
    last row and column of places; here all are drawn from. ConfigError for a patch that is larger than the picture.
    """
    if not 1 <= side <= grid:
        raise ConfigError(f"patch_side={side}: a picture of {grid} x {grid} codes takes patches of 1 to {grid}")
    hidden_GG = np.zeros((grid, grid), dtype=bool)
    places = grid - side + 1
    order = generator.permutation(places * places)
    number = min(len(order), int(share * grid**2 / side**2))
    for count, place in enumerate(order.tolist()):
        is_enough = count >= number if rule == "released" else hidden_GG.mean() >= share
        if is_enough:
            break
        top, left = divmod(place, places)
        hidden_GG[top : top + side, left : left + side] = True
    return hidden_GG


def hidden_box(grid: int, *, shares: tuple[float, float], generator: np.random.Generator) -> Hidden:
    """One rectangle, bool [G, G], whose sides are drawn between these shares of the picture's."""
    smallest, largest = (max(1, round(share * grid)) for share in shares)
    height, width = generator.integers(smallest, largest + 1, size=2).tolist()
    top, left = generator.integers(grid - height + 1), generator.integers(grid - width + 1)
    hidden_GG = np.zeros((grid, grid), dtype=bool)
    hidden_GG[top : top + height, left : left + width] = True
    return hidden_GG


def hidden_spans(length: int, *, mean: float, share: float, generator: np.random.Generator) -> Hidden:
    """Spans of a text, bool [L]: lengths from a Poisson distribution (1 at least), up to `share` of the tokens.

    Each is led by one hidden token more, which is never predicted, as the first code of a hidden row is not. A text of
    two tokens or more has one predicted token at least, which the release does not promise to short ones.
    """
    hidden_L = np.zeros(length, dtype=bool)
    budget = max(1, int(share * length)) if length > 1 else 0
    lengths: list[int] = []
    while sum(lengths) < budget:
        span = min(max(1, int(generator.poisson(mean))), budget if not lengths else length)
        needed = sum(lengths) + span + 2 * len(lengths) + 1  # a leader for each, and a token between them
        if sum(lengths) + span > budget or needed > length:
            break
        lengths.append(span)
    room = length - sum(lengths) - len(lengths) + 1
    starts = sorted(generator.choice(room, size=len(lengths), replace=False).tolist())
    before = 0
    for start, span in zip(starts, lengths, strict=True):
        first = start + before
        hidden_L[first : first + span + 1] = True
        before += span + 1
    return hidden_L


def runs(hidden_N: Hidden) -> list[tuple[int, int]]:
    """(first, end) of each run of hidden places in a flat order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], hidden_N.ravel(), [False]]).astype(np.int8)))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]
