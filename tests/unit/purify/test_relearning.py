from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.compute import logits_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.mask import FilterMask
from unbackdoor.inversion import InvertedTrigger
from unbackdoor.purify.relearning import Relearning, between, relearn
from unbackdoor.testing import planted_backdoor
from unbackdoor.train import Recipe
from unbackdoor.types import LabelledImages

PLANTED = planted_backdoor()
CLEAN = PLANTED.clean_data(32, rng.generator(0))
FIRM = replace(Relearning().recipe, epochs=10, learning_rate=0.03)


def lit(target_class: int) -> InvertedTrigger:
    """Return a trigger that turns all pixels white."""
    size = CLEAN.images.shape[-1]
    ones = torch.ones(1, size, size)
    return InvertedTrigger(target_class, ones, torch.ones(3, size, size), float(ones.sum()), 1.0, True, 0)


class Brightness(nn.Module):
    """Two logits that lean on the mean brightness, by a factor that may be learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.lean = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = self.lean * x.mean((1, 2, 3))
        return torch.stack([bright, -bright], dim=1)


def test_a_network_between_two_has_weights_and_statistics_in_between() -> None:
    one, other = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    one.running_mean = torch.tensor([1.0, -2.0])
    other.running_mean = torch.tensor([3.0, 2.0])
    nn.init.constant_(other.weight, 5.0)
    middle = between(one, other, 0.25)
    assert middle.state_dict()["running_mean"].tolist() == [1.5, -1.0]
    assert middle.state_dict()["weight"].tolist() == [2.0, 2.0]
    assert middle.state_dict()["num_batches_tracked"] == 0
    assert one.weight.tolist() == [1.0, 1.0]
    assert other.weight.tolist() == [5.0, 5.0]


def test_tied_weights_and_unsaved_buffers_go_as_far_as_the_others() -> None:
    def tied(value: float) -> nn.Module:
        layer = nn.Linear(2, 2)
        nn.init.constant_(layer.weight, value)
        layer.register_buffer("unsaved", torch.full((2,), value), persistent=False)
        return nn.Sequential(layer, layer)

    middle = between(tied(0.0), tied(1.0), 0.5)
    assert middle[0].weight is middle[1].weight  # type: ignore[index]
    assert middle[0].weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]  # type: ignore[index]
    assert middle[0].unsaved.tolist() == [0.5, 0.5]  # type: ignore[index]


def test_the_loss_is_the_divergence_from_the_answers_without_the_trigger() -> None:
    images = torch.full((4, 3, 16, 16), 0.2)
    data = LabelledImages(images, torch.zeros(4, dtype=torch.int64))
    white = InvertedTrigger(1, torch.ones(1, 16, 16), torch.ones(3, 16, 16), 256.0, 1.0, True, 0)
    recipe = Recipe(
        epochs=1, batch_size=4, learning_rate=1e-9, schedule="constant", crop_padding=0, flip=False,
        precision="fp32",
    )  # fmt: skip
    model = Brightness()
    _, record = relearn(model, model, data, [white], Relearning(recipe), generator=rng.generator(0))
    # Half of the batch is white: its answers should be those of brightness 0.2, not of brightness 1.
    answer = F.softmax(torch.tensor([0.2, -0.2]), 0)
    white_answer = F.log_softmax(torch.tensor([1.0, -1.0]), 0)
    expected = 0.5 * float((answer * (answer.log() - white_answer)).sum())
    assert record.losses[0] == pytest.approx(expected, rel=1e-4)


def test_images_are_cropped_and_mirrored_before_the_suspect_is_asked_and_triggers_are_stamped() -> None:
    asked: list[torch.Tensor] = []

    class Asked(Brightness):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            asked.append(x.clone())
            return super().forward(x)

    images = torch.rand(8, 3, 16, 16, generator=rng.generator(0))
    data = LabelledImages(images, torch.zeros(8, dtype=torch.int64))
    recipe = Recipe(epochs=1, batch_size=8, learning_rate=1e-9, crop_padding=2, flip=True, precision="fp32")
    tuned: list[torch.Tensor] = []

    class Tuned(Brightness):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tuned.append(x.clone())
            return super().forward(x)

    corner = torch.zeros(1, 16, 16)
    corner[:, -1, -1] = 1
    dot = InvertedTrigger(1, corner, torch.full((3, 16, 16), 0.5), 1.0, 1.0, True, 0)
    relearn(Tuned(), Asked(), data, [dot], Relearning(recipe), generator=rng.generator(0))
    # Each got the same moved images, half of them then with the dot in its own place.
    assert not any((moved == image).all() for moved in asked[0] for image in images)
    changed = (asked[0] != tuned[-1]).any(1)
    assert changed[:, -1, -1].sum() == 4
    assert changed.sum() == 4
    assert (tuned[-1][changed[:, -1, -1]][:, :, -1, -1] == 0.5).all()


def test_labels_are_not_used() -> None:
    wrong = LabelledImages(CLEAN.images, (CLEAN.labels + 1) % 8)
    one, other = (
        relearn(PLANTED.model, PLANTED.model, data, [lit(0)], Relearning(), generator=rng.generator(0))[0]
        for data in (CLEAN, wrong)
    )
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_removed_filters_stay_removed() -> None:
    filter_map = find_filters(PLANTED.model, CLEAN.floats()[:1])
    first = filter_map.prunable[0]
    mask = FilterMask.full(filter_map).without([(first.name, 0), (first.name, 3)])
    model = mask.apply(PLANTED.model, filter_map)
    relearnt, _ = relearn(
        model, PLANTED.model, CLEAN, [lit(0)], Relearning(FIRM),
        restrain=lambda network: mask.clear(network, filter_map), generator=rng.generator(0),
    )  # fmt: skip
    changed = False
    for (name, mine), before in zip(relearnt.named_parameters(), model.parameters(), strict=True):
        changed |= not torch.equal(mine, before)
        if name == first.weight:
            assert not mine[[0, 3]].any()
    assert changed
    torch.testing.assert_close(
        logits_of(relearnt, CLEAN.images), logits_of(mask.apply(relearnt, filter_map), CLEAN.images)
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stamped_fraction": 0.0}, "stamped_fraction must lie"),
        ({"stamped_fraction": 1.1}, "stamped_fraction must lie"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        Relearning(**options)


def test_the_gradient_is_taken_on_the_way_back_and_the_step_where_the_survivors_are() -> None:
    data = LabelledImages(torch.full((4, 3, 16, 16), 0.2), torch.zeros(4, dtype=torch.int64))
    white = InvertedTrigger(1, torch.ones(1, 16, 16), torch.ones(3, 16, 16), 256.0, 1.0, True, 0)
    recipe = Recipe(
        epochs=1, batch_size=4, learning_rate=0.1, schedule="constant", crop_padding=0, flip=False,
        momentum=0.0, weight_decay=0.0, precision="fp32",
    )  # fmt: skip
    model, suspect = Brightness(), Brightness()
    with torch.no_grad():
        suspect.lean.fill_(3.0)

    def loss_at(lean: torch.Tensor) -> torch.Tensor:
        answer = F.softmax(torch.tensor([0.6, -0.6]), 0)
        parts = [F.log_softmax(torch.stack([lean * b, -lean * b]), 0) for b in (1.0, 0.2)]
        return 0.5 * sum(((answer * (answer.log() - part)).sum() for part in parts), torch.zeros(()))

    for radius in (0.0, 0.5):
        options = Relearning(recipe, path_radius=radius)
        relearnt, record = relearn(model, suspect, data, [white], options, generator=rng.generator(0))
        # A radius of 0.5 on the way from 1 to 3.
        there = torch.tensor(1.0 + radius, requires_grad=True)
        loss = loss_at(there)
        (slope,) = torch.autograd.grad(loss, there)
        assert record.losses[0] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert float(relearnt.get_parameter("lean").detach()) == pytest.approx(
            1.0 - 0.1 * float(slope), rel=1e-4
        )


def test_where_nothing_was_changed_there_is_no_way_back() -> None:
    brief = replace(FIRM, epochs=1, batch_size=64)
    one, other = (
        relearn(
            PLANTED.model, PLANTED.model, CLEAN, [], Relearning(brief, path_radius=radius),
            generator=rng.generator(0),
        )[0]
        for radius in (0.0, 0.5)
    )  # fmt: skip
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf")])
def test_odd_radii_are_refused(radius: float) -> None:
    with pytest.raises(InvalidInputError, match="path_radius must be at least 0 and finite"):
        Relearning(path_radius=radius)
