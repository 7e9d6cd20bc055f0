"""The oracle curve: what a method's order of filters is worth, apart from where it stops.

It is measured with the trigger, which no defender has: it judges an order, and may choose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from unbackdoor.evaluate import evaluate
from unbackdoor.filters import FilterMask, find_filters
from unbackdoor.filters.select import order
from unbackdoor.types import Infected, LabelledImages, as_float

COUNTS = (0, 1, 2, 5, 10, 20, 30, 50, 100)
"""Numbers of filters that are pruned, as far as a method has scored so many."""


def oracle_curve(
    model: nn.Module, scores: Mapping[str, Tensor], infected: Infected, test: LabelledImages
) -> list[dict[str, Any]]:
    """Return CA, ASR and RA of the model without its 0, 1, 2, ... lowest filters, as JSON values.

    All methods are treated alike: equal scores go by layer and index, and a removed filter is silenced.

    Args:
        model: The model before any treatment; left untouched.
        scores: Layer name to ``(filters,)``, of a purifier.
        infected: What the attack left behind.
        test: What is measured on.
    """
    filter_map = find_filters(model, as_float(test.images[:1]))
    full, ranked = FilterMask.full(filter_map), order(scores)
    curve = []
    for count in COUNTS:
        if count <= len(ranked):
            pruned = full.without(ranked[:count]).apply(model, filter_map)
            rates = evaluate(pruned, test, infected.trigger, infected.label_rule)
            curve.append({"removed": count, **rates.describe()})
    return curve
