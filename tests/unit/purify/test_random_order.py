from __future__ import annotations

import pytest
import torch

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import clean_accuracy
from unbackdoor.purify import RandomOrder
from unbackdoor.purify.selection import Selection
from unbackdoor.testing import planted_backdoor

PLANTED = planted_backdoor(target_class=3)
CLEAN = PLANTED.clean_data(80, rng.generator(0))


def test_the_order_is_that_of_the_draws_and_no_layer_is_favoured() -> None:
    method = RandomOrder(Selection("count", count=4))
    one, other = (method.purify(PLANTED.model, CLEAN, generator=rng.generator(s)) for s in (1, 2))
    assert one.mask is not None
    assert other.mask is not None
    scores = {(name, j): float(v) for name, values in one.scores.items() for j, v in enumerate(values)}
    lowest = set(sorted(scores, key=lambda place: scores[place])[:4])
    assert set(one.mask.removed()) == lowest
    assert any(not torch.equal(one.mask.keep[name], other.mask.keep[name]) for name in one.mask.keep)
    assert all(0 <= score < 1 for score in scores.values())


def test_the_guard_keeps_what_clean_images_need() -> None:
    result = RandomOrder().purify(PLANTED.model, CLEAN, generator=rng.generator(0))
    assert result.mask is not None
    lost = clean_accuracy(PLANTED.model, CLEAN).value - clean_accuracy(result.model, CLEAN).value
    assert lost <= 0.01


def test_there_is_no_rule_of_its_own() -> None:
    with pytest.raises(InvalidInputError, match="a random order has no rule of its own"):
        RandomOrder(Selection("own"))
