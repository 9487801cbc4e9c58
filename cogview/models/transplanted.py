"""A trained GPT taken over for another image tokenizer: what it knows of words and of pictures goes on in a new model.

In: trained weights, and a new GPT of the same width and depth with its own vocabulary, grid and positions. Out: the
new GPT with the blocks, the embeddings of text and command tokens, and the positions of the old one. Image codes have
other meanings now, so their embeddings stay those of the new one. (CogView, section 3.4, trains its fashion model on
codes of a VQGAN; the released pretraining had those of a VQ-VAE.)
"""

# P positions, E hidden, g G codes along a side before and after

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.models.gpt import GPT, GPTConfig


@dataclass(frozen=True, kw_only=True)
class TokenPlaces:
    """Where tokens lie in a model. image_ids: of codes; num_others: ids of text and commands, which follow them.

    first_image: the position of the first code behind a full text; grid: codes along a side.
    """

    image_ids: range
    num_others: int
    first_image: int
    grid: int


def require_kin(old: GPTConfig, new: GPTConfig, *, old_places: TokenPlaces, new_places: TokenPlaces) -> None:
    """ConfigError when blocks differ in shape or other text pieces are read, so that nothing can be taken over."""
    for name in ("num_layers", "hidden_size", "num_heads", "sandwich_ln"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ConfigError(
                f"model.{name}={after}: the checkpoint has {before}; take the checkpoint's, or start from new weights"
            )
    if old_places.num_others != new_places.num_others:
        raise ConfigError(
            f"the checkpoint has {old_places.num_others} text pieces and commands, and the rows have "
            f"{new_places.num_others}; make the rows with the text tokenizer of the checkpoint"
        )


@torch.no_grad()
def transplant(old: GPT, new: GPT, *, old_places: TokenPlaces, new_places: TokenPlaces) -> None:
    """Give the new model what the old one has learned, in place. ConfigError: see `require_kin`."""
    require_kin(old.config, new.config, old_places=old_places, new_places=new_places)
    new.transformer.layers.load_state_dict(old.transformer.layers.state_dict())
    new.transformer.final_layernorm.load_state_dict(old.transformer.final_layernorm.state_dict())
    before, after = old_places.image_ids.stop, new_places.image_ids.stop
    number = old_places.num_others
    new.word_embeddings.weight[after : after + number] = old.word_embeddings.weight[before : before + number]
    table_PE = stretched_positions(
        old.transformer.position_embeddings.weight, old_places=old_places, new_places=new_places
    )
    new.transformer.position_embeddings.weight.copy_(table_PE[: new.config.max_positions])


def stretched_positions(positions_PE: Tensor, *, old_places: TokenPlaces, new_places: TokenPlaces) -> Tensor:
    """A table for another text length and grid: the text's rows as they are, the image's stretched like a picture."""
    text_PE = positions_PE[: old_places.first_image]
    missing = max(0, new_places.first_image - len(text_PE))
    text_PE = torch.cat([text_PE, text_PE[-1:].expand(missing, -1)])[: new_places.first_image]
    end = old_places.first_image + old_places.grid**2
    image_1Egg = positions_PE[old_places.first_image : end].T.reshape(1, -1, old_places.grid, old_places.grid)
    side = (new_places.grid, new_places.grid)
    image_1EGG = nn.functional.interpolate(image_1Egg.float(), size=side, mode="bilinear", align_corners=False)
    after_PE = positions_PE[end:] if len(positions_PE) > end else positions_PE[-1:]
    return torch.cat([text_PE, image_1EGG.flatten(2)[0].T.to(positions_PE.dtype), after_PE])
