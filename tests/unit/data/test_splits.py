from __future__ import annotations

import pytest
import torch

from unbackdoor.data.splits import balanced_order, draw_balanced, proportional_order, some_of, split, spread
from unbackdoor.errors import InvalidInputError
from unbackdoor.rng import generator
from unbackdoor.types import LabelledImages

UNEVEN = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


def data(labels: torch.Tensor) -> LabelledImages:
    # The image of a sample is its index, so that subsets can be traced.
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return LabelledImages(images, labels, ("a", "b", "c"))


def test_balanced_order_is_a_permutation_with_balanced_prefixes() -> None:
    order = balanced_order(UNEVEN, generator(0))
    assert sorted(order.tolist()) == list(range(100))
    assert UNEVEN[order[:30]].bincount().tolist() == [10, 10, 10]
    # Class 2 is used up after 30; the others go on alternating.
    assert UNEVEN[order[:50]].bincount().tolist() == [20, 20, 10]


def test_proportional_order_has_proportional_prefixes() -> None:
    order = proportional_order(UNEVEN, generator(0))
    assert sorted(order.tolist()) == list(range(100))
    for length in (10, 50, 90):
        counts = UNEVEN[order[:length]].bincount(minlength=3)
        expected = torch.tensor([0.6, 0.3, 0.1]) * length
        assert float((counts - expected).abs().max()) <= 1


def test_orders_follow_the_generator_alone() -> None:
    first, again, other = (balanced_order(UNEVEN, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_may_skip_classes() -> None:
    labels = torch.tensor([5, 5, 2, 2])
    assert sorted(labels[balanced_order(labels, generator(0))[:2]].tolist()) == [2, 5]


def test_draw_balanced_returns_all_where_there_are_fewer() -> None:
    drawn = draw_balanced(data(UNEVEN), 1000, generator(0))
    assert sorted(drawn.images.flatten().tolist()) == list(range(100))
    assert drawn.class_names == ("a", "b", "c")


@pytest.mark.parametrize("count", [0, -1])
def test_draw_balanced_needs_a_positive_count(count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"cannot draw {count} images out of 100"):
        draw_balanced(data(UNEVEN), count, generator(0))


def test_draw_balanced_needs_images() -> None:
    with pytest.raises(InvalidInputError, match="out of 0"):
        draw_balanced(data(UNEVEN[:0]), 3, generator(0))


def test_split_parts_are_disjoint_complete_and_in_proportion() -> None:
    rest, held_out = split(data(UNEVEN), 0.2, generator(0))
    assert held_out.labels.bincount().tolist() == [12, 6, 2]
    assert rest.labels.bincount().tolist() == [48, 24, 8]
    together = torch.cat([rest.images, held_out.images]).flatten()
    assert sorted(together.tolist()) == list(range(100))
    assert torch.equal(UNEVEN[held_out.images.flatten().long()], held_out.labels)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.999, 1.0])
def test_split_refuses_empty_parts(fraction: float) -> None:
    with pytest.raises(InvalidInputError, match="both parts need some"):
        split(data(UNEVEN), fraction, generator(0))


def test_spread_takes_each_class_in_proportion() -> None:
    rows = spread(UNEVEN, 20)
    assert UNEVEN[rows].bincount().tolist() == [12, 6, 2]
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_spread_is_not_fooled_by_alternating_classes() -> None:
    labels = torch.arange(100) % 10
    assert labels[spread(labels, 10)].bincount().tolist() == [1] * 10


@pytest.mark.parametrize("limit", [None, 100, 101])
def test_spread_without_effect(limit: int | None) -> None:
    assert torch.equal(spread(UNEVEN, limit), torch.arange(100))


def test_some_of_sorted_data_are_of_all_classes() -> None:
    data = LabelledImages(torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(40) // 10)
    some = some_of(data, 8)
    assert some.labels.bincount().tolist() == [2, 2, 2, 2]
    assert torch.equal(some.images, some_of(data, 8).images)
    assert len(some_of(data, 100)) == 40
