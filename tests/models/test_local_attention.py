"""Local attention: the rule against slow obvious loops, and both fast forms against the rule, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogview.errors import ConfigError
from cogview.models.local_attention import local_attention, reference_attention, tiled_attention
from cogview.models.local_flex import _block_mask, _places, flex_local_attention
from cogview.models.local_rules import LocalRule, Window, allowed_mask, square_window

THREE = Window(height=3, width=3)
CASES = {
    "direct": (LocalRule(height=24, width=24, ratio=3), 0),
    "iterative": (LocalRule(height=20, width=20), 7),
    "both": (LocalRule(height=12, width=18, ratio=3), 5),
    "ratio 2, not square": (LocalRule(height=10, width=34, ratio=2, window=THREE, coarse_window=THREE), 0),
    "causal": (LocalRule(height=17, width=19, window=square_window(5, is_causal=True)), 0),
    "causal over a coarse grid": (LocalRule(height=9, width=9, ratio=3, window=square_window(3, is_causal=True)), 2),
    "smaller than the window": (LocalRule(height=2, width=3), 1),
    "one code": (LocalRule(height=1, width=1), 0),
    "one row": (LocalRule(height=1, width=40, window=Window(height=1, width=5)), 0),
    "as fine as the coarse grid": (LocalRule(height=5, width=11, ratio=1), 0),
    "a tile of one coarse code": (LocalRule(height=22, width=22, ratio=11, coarse_window=THREE), 0),
}


def tensors(rule: LocalRule, num_context: int, *, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_context + rule.num_coarse + rule.num_fine
    shapes = (rule.num_fine, num_keys, num_keys)
    return [torch.randn(batch, 2, length, 16, generator=generator).requires_grad_() for length in shapes]


def some_of(num_context: int, *, batch: int = 2) -> Tensor | None:
    """A context of which each row may see another part."""
    if not num_context:
        return None
    return torch.rand(batch, num_context, generator=torch.Generator().manual_seed(9)) < 0.6


@pytest.mark.parametrize(("rule", "_context"), CASES.values(), ids=CASES.keys())
def test_the_rule_is_the_obvious_one(rule: LocalRule, _context: int) -> None:
    mask = allowed_mask(rule)
    coarse_height, coarse_width = rule.coarse_sides
    fine, coarse = rule.window, rule.coarse_window
    assert mask.shape == (rule.num_fine, rule.num_coarse + rule.num_fine)
    for query, row in enumerate(mask.tolist()):
        y, x = divmod(query, rule.width)
        expected = set()
        if rule.ratio:
            for dy in range(-(coarse.height - 1) // 2, (coarse.height - 1) // 2 + 1):
                for dx in range(-(coarse.width - 1) // 2, (coarse.width - 1) // 2 + 1):
                    j, i = y // rule.ratio + dy, x // rule.ratio + dx
                    if 0 <= j < coarse_height and 0 <= i < coarse_width:
                        expected.add(j * coarse_width + i)
        for j in range(rule.height):
            for i in range(rule.width):
                is_in = 2 * abs(j - y) < fine.height and 2 * abs(i - x) < fine.width
                if is_in and not (fine.is_causal and (j, i) > (y, x)):
                    expected.add(rule.num_coarse + j * rule.width + i)
        assert {key for key, is_allowed in enumerate(row) if is_allowed} == expected


def test_windows_are_cogview2s() -> None:
    rule = LocalRule(height=60, width=60, ratio=3)
    seen = allowed_mask(rule).sum(dim=1).view(60, 60)
    assert (rule.coarse_sides, rule.num_coarse, rule.num_fine) == ((20, 20), 400, 3600)
    assert int(seen[30, 30]) == 5 * 5 + 9 * 5
    assert int(seen[0, 0]) == 3 * 3 + 5 * 3
    assert square_window(5) == Window(height=9, width=5)


@pytest.mark.parametrize(("rule", "num_context"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("is_masked", [False, True])
def test_tiles_give_the_rules_output_and_gradients(rule: LocalRule, num_context: int, is_masked: bool) -> None:
    inputs = tensors(rule, num_context)
    context_BC = some_of(num_context) if is_masked else None
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    found = tiled_attention(*inputs, rule=rule, context_BC=context_BC)
    expected = reference_attention(*inputs, rule=rule, context_BC=context_BC)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found_gradients = torch.autograd.grad((found * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, other in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["both", "causal over a coarse grid", "one row", "smaller than the window"])
def test_the_form_for_gpus_gives_the_rules_output(name: str) -> None:
    rule, num_context = CASES[name]
    inputs, context_BC = [tensor.detach() for tensor in tensors(rule, num_context)], some_of(num_context)
    found = flex_local_attention(*inputs, rule=rule, context_BC=context_BC, is_compiled=False)
    expected = reference_attention(*inputs, rule=rule, context_BC=context_BC)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("rule", "num_context"), CASES.values(), ids=CASES.keys())
def test_the_kernel_visits_every_block_in_which_somebody_looks(rule: LocalRule, num_context: int) -> None:
    """The uncompiled form above does not leave out any block, so which ones are visited is compared here."""
    places = _places(rule, num_context, torch.device("cpu"))
    context_BC = torch.ones(1, max(1, num_context), dtype=torch.bool)
    mask = torch.nn.functional.pad(allowed_mask(rule), (num_context, 1, 0, 1))  # and a place for what is no code
    mask[: rule.num_fine, :num_context] = True
    sorted_PP = mask[places.queries_P][:, places.keys_P]
    looks_GK = sorted_PP.unflatten(1, (-1, 128)).any(2).unflatten(0, (-1, 128)).any(1)
    visited_GK = _block_mask(rule, places, context_BC).to_dense()[0, 0].bool()
    assert bool((visited_GK | ~looks_GK).all())
    assert rule.window.is_causal or torch.equal(visited_GK, looks_GK)


@settings(max_examples=40, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ratio=st.integers(0, 4),
    window=st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()),
    coarse=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    num_context=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_grid_window_and_ratio(
    sides: tuple[int, int],
    ratio: int,
    window: tuple[int, int, bool],
    coarse: tuple[int, int],
    num_context: int,
    seed: int,
) -> None:
    rule = LocalRule(
        height=sides[0] * max(1, ratio),
        width=sides[1] * max(1, ratio),
        window=Window(height=2 * window[0] + 1, width=2 * window[1] + 1, is_causal=window[2]),
        ratio=ratio,
        coarse_window=Window(height=2 * coarse[0] + 1, width=2 * coarse[1] + 1),
    )
    inputs = tensors(rule, num_context, batch=1, seed=seed)
    expected = reference_attention(*inputs, rule=rule)
    torch.testing.assert_close(tiled_attention(*inputs, rule=rule), expected, atol=1e-5, rtol=0)


def test_the_kernel_visits_only_blocks_near_a_tile() -> None:
    rule = LocalRule(height=128, width=128)
    places = _places(rule, 0, torch.device("cpu"))
    mask = _block_mask(rule, places, torch.ones(1, 1, dtype=torch.bool))
    assert len(places.queries_P) == 128 * 128
    assert int(mask.kv_num_blocks.max()) == 9  # of 128: its own tile and its eight neighbours


def test_padding_of_a_tile_sends_no_gradient_astray() -> None:
    rule = LocalRule(height=9, width=9)  # one code beyond a tile
    inputs = tensors(rule, 0, batch=1)
    tiled_attention(*inputs, rule=rule).sum().backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in inputs if tensor.grad is not None)


def test_a_cpu_takes_tiles() -> None:
    rule = LocalRule(height=9, width=6, ratio=3)
    inputs = tensors(rule, 3)
    assert torch.equal(local_attention(*inputs, rule=rule), tiled_attention(*inputs, rule=rule))


def test_what_has_no_middle_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="window of 4 x 5 codes has no middle"):
        Window(height=4, width=5)
    with pytest.raises(ConfigError, match="10 x 9 codes does not lie on one of 1/3"):
        LocalRule(height=10, width=9, ratio=3)
    with pytest.raises(ConfigError, match="coarse_window is causal"):
        LocalRule(height=9, width=9, ratio=3, coarse_window=square_window(3, is_causal=True))
    with pytest.raises(ConfigError, match="give 1 code or more"):
        LocalRule(height=0, width=9)
    rule = LocalRule(height=9, width=9, ratio=3)
    queries = torch.zeros(1, 1, 81, 4)
    with pytest.raises(ConfigError, match="81 keys for 9 coarse codes"):
        local_attention(queries, queries, queries, rule=rule)
