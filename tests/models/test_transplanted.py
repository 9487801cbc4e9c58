"""A model taken over for another image tokenizer: what is kept, what is stretched, what is refused."""

from dataclasses import replace

import pytest
import torch

from cogview.errors import ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.transplanted import TokenPlaces, stretched_positions, transplant

OLD = GPTConfig(vocab_size=70, max_positions=24, num_layers=2, hidden_size=32, num_heads=4, dropout=0.0)
NEW = replace(OLD, vocab_size=100, max_positions=48)
OLD_PLACES = TokenPlaces(image_ids=range(30), num_others=40, first_image=7, grid=4)
NEW_PLACES = TokenPlaces(image_ids=range(60), num_others=40, first_image=11, grid=6)


def models(new: GPTConfig = NEW) -> tuple[GPT, GPT]:
    torch.manual_seed(0)
    return GPT(OLD).eval(), GPT(new).eval()


def test_texts_mean_the_same_as_before() -> None:
    old, new = models()
    transplant(old, new, old_places=OLD_PLACES, new_places=NEW_PLACES)
    pieces, positions = torch.tensor([[3, 17, 39, 0, 8]]), torch.arange(5)[None]
    assert torch.equal(new(60 + pieces, positions), old(30 + pieces, positions))


def test_codes_keep_the_embeddings_of_the_new_model() -> None:
    old, new = models()
    before = new.word_embeddings.weight[:60].clone()
    transplant(old, new, old_places=OLD_PLACES, new_places=NEW_PLACES)
    assert torch.equal(new.word_embeddings.weight[:60], before)
    assert torch.equal(new.word_embeddings.weight[60:100], old.word_embeddings.weight[30:70])


def test_positions_of_the_image_are_stretched_like_a_picture() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    image = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    table = torch.cat([torch.full((7, 2), -1.0), image, torch.full((1, 2), 9.0)])
    stretched = stretched_positions(table, old_places=OLD_PLACES, new_places=NEW_PLACES)
    assert stretched.shape == (11 + 36 + 1, 2)
    assert torch.equal(stretched[:11], torch.full((11, 2), -1.0)), "a longer text has the last row of the old one"
    assert stretched[-1].tolist() == [9.0, 9.0]
    grid = stretched[11:47].view(6, 6, 2)
    assert torch.allclose(grid[:, :, 0], grid[:, :1, 0].expand(-1, 6)), "rows stay rows"
    assert (grid[0, 0].tolist(), grid[5, 5].tolist()) == ([0.0, 0.0], [3.0, 3.0])
    assert bool((grid[1:, 0, 0] >= grid[:-1, 0, 0]).all())


def test_the_same_places_give_the_same_table() -> None:
    table = torch.randn(24, 32)
    assert torch.allclose(stretched_positions(table, old_places=OLD_PLACES, new_places=OLD_PLACES), table)


def test_other_shapes_and_texts_are_refused() -> None:
    old, new = models(replace(NEW, num_layers=3))
    with pytest.raises(ConfigError, match="num_layers=3: the checkpoint has 2"):
        transplant(old, new, old_places=OLD_PLACES, new_places=NEW_PLACES)
    old, new = models()
    with pytest.raises(ConfigError, match="with the text tokenizer of the checkpoint"):
        transplant(old, new, old_places=OLD_PLACES, new_places=replace(NEW_PLACES, num_others=41))
