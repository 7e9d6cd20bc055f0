"""What the core method does to a network whose guilty filters are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from unbackdoor import rng
from unbackdoor.compute import predictions_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.evaluate import evaluate
from unbackdoor.filters import FilterMask, find_filters
from unbackdoor.models.checkpoint import write_tensors
from unbackdoor.models.loading import load_model
from unbackdoor.purify import MNP
from unbackdoor.testing import PlantedBackdoor, planted_backdoor


def rates(planted: PlantedBackdoor, model: torch.nn.Module) -> tuple[float, float]:
    test = planted.clean_data(400, rng.generator(99))
    metrics = evaluate(model, test, planted.trigger, planted.label_rule)
    return metrics.clean_accuracy.value, metrics.attack_success.value


@pytest.mark.parametrize("classes", [4, 5, 8])
@pytest.mark.parametrize("target", [0, 3])
def test_planted_network_is_what_it_claims(classes: int, target: int) -> None:
    planted = planted_backdoor(classes=classes, target_class=target, seed=classes)
    assert rates(planted, planted.model) == (1.0, 1.0)
    filters = find_filters(planted.model, planted.clean_data(1, rng.generator(0)).floats())
    assert [group.name for group in filters.prunable] == ["conv1", "conv2"]
    # Without the guilty filters of either layer the trigger does nothing.
    for layer in ("conv1", "conv2"):
        mask = FilterMask.full(filters).without([place for place in planted.guilty if place[0] == layer])
        assert rates(planted, mask.apply(planted.model, filters)) == (1.0, 0.0)


def test_planted_network_has_a_clean_twin_and_is_deterministic() -> None:
    twin = planted_backdoor(infected=False)
    assert twin.guilty == frozenset()
    assert rates(twin, twin.model) == (1.0, 0.0)
    one, other = (planted_backdoor(seed=4).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [{"classes": 3}, {"classes": 9}, {"classes": 4, "target_class": 4}])
def test_planted_network_refuses_impossible_classes(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="classes must lie in"):
        planted_backdoor(**options)


def test_planted_network_loads_as_a_user_factory(tmp_path: Path) -> None:
    planted = planted_backdoor(classes=5)
    write_tensors(planted.model.state_dict(), tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", "unbackdoor.testing:planted_network", num_classes=5)
    data = planted.clean_data(20, rng.generator(1))
    assert torch.equal(predictions_of(loaded.model, data.images), data.labels)


@pytest.mark.statistical
def test_mnp_removes_planted_filters() -> None:
    # Not always: two guilty filters can be enough for the suppressed copy, and then the others stay.
    assert sum(mnp_removes_planted_filters(seed) for seed in range(6)) >= 5


def mnp_removes_planted_filters(seed: int) -> bool:
    planted = planted_backdoor(seed=seed, target_class=seed)
    clean = planted.clean_data(200, rng.generator(1000 + seed))
    # By inversion no class of this network is suspicious; it would only take its time.
    purified = MNP(("suppression",)).purify(planted.model, clean, generator=rng.generator(100 + seed))
    accuracy, success = rates(planted, purified.model)
    assert accuracy >= 0.98
    assert purified.mask is not None
    removed = set(purified.mask.removed())
    return success <= 0.1 and any(
        {place for place in planted.guilty if place[0] == layer} <= removed for layer in ("conv1", "conv2")
    )
