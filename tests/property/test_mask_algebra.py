"""Laws of the mask algebra, for any masks over any subset of the layers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import networks as nets
from unbackdoor.filters import FilterMask, find_filters

MODEL = nets.randomise(nets.SmallConvNet(4, bias=True))
FOUND = find_filters(MODEL, nets.images())
LAYERS = [(group.name, group.filters) for group in FOUND.prunable]


@st.composite
def masks(draw: st.DrawFn) -> FilterMask:
    """Draw a mask; layers may be absent, which means that they are kept whole."""
    keep = {}
    for name, filters in LAYERS:
        if draw(st.booleans()):
            keep[name] = torch.tensor(draw(st.lists(st.booleans(), min_size=filters, max_size=filters)))
    return FilterMask(keep)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@given(masks(), masks())
def test_and_or_commute(a: FilterMask, b: FilterMask) -> None:
    assert (a & b).equals(b & a)
    assert (a | b).equals(b | a)


@given(masks(), masks(), masks())
def test_and_or_associate_and_distribute(a: FilterMask, b: FilterMask, c: FilterMask) -> None:
    assert ((a & b) & c).equals(a & (b & c))
    assert ((a | b) | c).equals(a | (b | c))
    assert (a & (b | c)).equals((a & b) | (a & c))
    assert (a | (b & c)).equals((a | b) & (a | c))


@given(masks(), masks())
def test_idempotence_and_absorption(a: FilterMask, b: FilterMask) -> None:
    assert (a & a).equals(a)
    assert (a | a).equals(a)
    assert (a & (a | b)).equals(a)
    assert (a | (a & b)).equals(a)


@given(masks())
def test_the_full_mask_is_neutral_for_and_and_absorbing_for_or(a: FilterMask) -> None:
    full = FilterMask.full(FOUND)
    assert (a & full).equals(a)
    assert (a | full).equals(full)


@given(masks(), masks())
def test_removed_counts(a: FilterMask, b: FilterMask) -> None:
    both, either = a & b, a | b
    assert max(a.n_removed, b.n_removed) <= both.n_removed <= a.n_removed + b.n_removed
    assert both.n_removed + either.n_removed == a.n_removed + b.n_removed
    assert set(both.removed()) == set(a.removed()) | set(b.removed())
    assert set(either.removed()) == set(a.removed()) & set(b.removed())
    assert len(a.removed()) == a.n_removed <= a.n_filters


@given(masks(), masks())
def test_without_is_and(a: FilterMask, b: FilterMask) -> None:
    full = FilterMask.full(FOUND)
    assert (full & a).without(b.removed()).equals(a & b)


@settings(max_examples=30, deadline=None)
@given(masks(), masks(), st.sampled_from(["silence", "weight", "norm_scale", "norm"]))
def test_application_is_idempotent_and_follows_and(a: FilterMask, b: FilterMask, prune_mode: str) -> None:
    once = a.apply(MODEL, FOUND, prune_mode=prune_mode)  # type: ignore[arg-type]
    assert same(a.apply(once, FOUND, prune_mode=prune_mode), once)  # type: ignore[arg-type]
    then = b.apply(once, FOUND, prune_mode=prune_mode)  # type: ignore[arg-type]
    assert same((a & b).apply(MODEL, FOUND, prune_mode=prune_mode), then)  # type: ignore[arg-type]
