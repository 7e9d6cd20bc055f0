from __future__ import annotations

import pytest
import torch
from torch import nn

from unbackdoor import rng


def test_generators_follow_their_seed() -> None:
    assert rng.draw_seed(rng.generator(1)) == rng.draw_seed(rng.generator(1))
    assert rng.draw_seed(rng.generator(1)) != rng.draw_seed(rng.generator(2))


def test_spawned_generators_are_independent_and_reproducible() -> None:
    parent, twin = rng.generator(0), rng.generator(0)
    first, second = rng.spawn(parent), rng.spawn(parent)
    assert first.initial_seed() != second.initial_seed()
    assert rng.spawn(twin).initial_seed() == first.initial_seed()
    # What a child draws leaves the parent alone.
    torch.rand(100, generator=first)
    rng.spawn(twin)
    assert torch.equal(parent.get_state(), twin.get_state())


def test_generators_for_a_purpose_have_nothing_in_common_with_those_seeded_alike() -> None:
    seeds = {
        rng.spawn(rng.generator(0)).initial_seed(),
        rng.spawn_for(rng.generator(0), "attack").initial_seed(),
        rng.spawn_for(rng.generator(0), "defence").initial_seed(),
        rng.spawn_for(rng.generator(1), "defence").initial_seed(),
    }
    assert len(seeds) == 4
    again = rng.spawn_for(rng.generator(0), "defence").initial_seed()
    assert again in seeds


def test_isolated_seeds_inside_and_restores_outside() -> None:
    before = torch.get_rng_state()
    with rng.isolated(rng.generator(7)):
        one = nn.Linear(3, 3).weight.detach().clone()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    with rng.isolated(rng.generator(7)):
        other = nn.Linear(3, 3).weight.detach().clone()
    assert torch.equal(one, other)


def test_isolated_restores_after_an_error() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with rng.isolated(rng.generator(7)):
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_isolated_advances_its_parent() -> None:
    parent = rng.generator(7)
    with rng.isolated(parent):
        one = torch.rand(3)
    with rng.isolated(parent):
        other = torch.rand(3)
    assert not torch.equal(one, other)
