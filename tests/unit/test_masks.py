from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import networks as nets
from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import FilterMap, find_filters
from unbackdoor.filters.magnitude import magnitudes
from unbackdoor.masks import LearntMasks, MaskTraining, learn_masks
from unbackdoor.types import LabelledImages

PLAIN = MaskTraining(
    learning_rate=0.1, momentum=0.0, epochs=3, tolerance=0.0, batch_size=16, precision="fp32"
)


def data(count: int = 48) -> LabelledImages:
    return LabelledImages(nets.images(count, size=8), torch.arange(count) % nets.CLASSES)


def network() -> tuple[nn.Module, FilterMap]:
    model = nets.randomise(nets.SmallConvNet(bias=True))
    return model, find_filters(model, nets.images())


def constant_network() -> tuple[nn.Module, FilterMap]:
    """Its logits do not depend on the image, hence not on any mask: the cross-entropy has no say."""
    model, found = network()
    nn.init.zeros_(model.get_parameter("fc.weight"))
    return model, found


def constant(found: FilterMap, value: float) -> dict[str, Tensor]:
    return {g.name: torch.full((g.filters,), value) for g in found.prunable}


def learn(
    model: nn.Module,
    found: FilterMap,
    options: MaskTraining,
    penalty: dict[str, Tensor],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> LearntMasks:
    return learn_masks(
        model, data(), found, options, penalty=penalty, bounds=bounds, generator=rng.generator(seed)
    )


def flat(learnt: LearntMasks) -> Tensor:
    return torch.cat(list(learnt.masks.values()))


@pytest.mark.parametrize("target", ["filter", "norm_scale"])
def test_same_generator_same_masks(target: Literal["filter", "norm_scale"]) -> None:
    model, found = network()
    options = replace(PLAIN, target=target)
    first = learn(model, found, options, constant(found, 0.01))
    again = learn(model, found, options, constant(found, 0.01))
    other = learn(model, found, options, constant(found, 0.01), seed=1)
    assert torch.equal(flat(first), flat(again))
    assert first.losses == again.losses
    assert not torch.equal(flat(first), flat(other))


def test_global_randomness_has_no_part_and_is_not_consumed() -> None:
    model = nets.randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, nets.CLASSES))
    )
    found = find_filters(model, nets.images(size=8))
    options = replace(PLAIN, norm_mode="train", epochs=1)
    state = torch.get_rng_state()
    first = learn(model, found, options, constant(found, 0.0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(flat(learn(model, found, options, constant(found, 0.0))), flat(first))


def test_masks_stay_within_their_bounds_and_reach_them() -> None:
    model, found = network()
    options = replace(PLAIN, learning_rate=5.0)
    low = flat(learn(model, found, options, constant(found, 0.05), bounds=(0.25, 1.0)))
    assert (float(low.min()), float(low.max())) == (0.25, 1.0)
    high = flat(learn(model, found, options, constant(found, -0.05), bounds=(1.0, 1.5)))
    assert (float(high.min()), float(high.max())) == (1.0, 1.5)


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
def test_the_model_is_left_as_it_was(norm_mode: Literal["train", "eval"]) -> None:
    model, found = network()
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn(model, found, replace(PLAIN, norm_mode=norm_mode), constant(found, 0.1))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_without_a_say_of_the_loss_masks_fall_by_rate_times_penalty_a_step() -> None:
    model, found = constant_network()
    weights = {name: 0.01 * w for name, w in magnitudes(model, found).items()}
    learnt = learn(model, found, PLAIN, weights)
    assert learnt.steps == 9
    for name, mask in learnt.masks.items():
        torch.testing.assert_close(mask, 1 - 9 * 0.1 * weights[name], atol=1e-6, rtol=0)
    assert learnt.clipped == 0.0


def test_momentum_speeds_the_fall_up_as_sgd_defines_it() -> None:
    model, found = constant_network()
    learnt = learn(model, found, replace(PLAIN, momentum=0.9, epochs=1), constant(found, 0.01))
    moved = 0.1 * 0.01 * (1 + 1.9 + (1 + 0.9 * 1.9))
    torch.testing.assert_close(flat(learnt), torch.full((16,), 1 - moved), atol=1e-6, rtol=0)


def test_negative_penalties_raise_masks() -> None:
    model, found = constant_network()
    learnt = learn(model, found, replace(PLAIN, epochs=1), constant(found, -0.01), bounds=(1.0, 2.0))
    torch.testing.assert_close(flat(learnt), torch.full((16,), 1 + 3 * 0.001), atol=1e-6, rtol=0)


def test_masks_on_filters_are_blind_in_train_mode() -> None:
    """Batch norm undoes any scaling of a filter, so only the penalty moves the masks.

    With equal penalties of opposite sign, as MNP has them, both drifts cancel: the score M1 + M2 is 2 for
    every filter and ranks nothing. In eval mode it does rank.
    """
    model, found = network()
    weights = {name: 0.01 * w for name, w in magnitudes(model, found).items()}
    rewards = {name: -w for name, w in weights.items()}

    def spread_of_scores(options: MaskTraining) -> tuple[float, Tensor]:
        m1 = flat(learn(model, found, options, weights, bounds=(0.0, 1.0)))
        m2 = flat(learn(model, found, options, rewards, bounds=(1.0, 2.0)))
        return float((m1 + m2 - 2).abs().max()), m1

    blind, m1 = spread_of_scores(replace(PLAIN, norm_mode="train"))
    drift = torch.cat([0.1 * 9 * w for w in weights.values()])
    torch.testing.assert_close(m1, 1 - drift, atol=1e-3, rtol=0)
    seeing, _ = spread_of_scores(PLAIN)
    assert blind < 1e-3
    assert seeing > 30 * blind


def test_in_eval_mode_a_step_is_the_gradient_of_the_masked_loss() -> None:
    model, found = network()
    options = replace(PLAIN, epochs=1, batch_size=48, learning_rate=0.01)
    learnt = learn(model, found, options, constant(found, 0.0), bounds=(0.0, 2.0))
    clean = data()
    loss = nn.functional.cross_entropy(model(clean.images), clean.labels)
    assert list(learnt.losses) == pytest.approx([float(loss.detach())], abs=1e-5)
    for name, mask in learnt.masks.items():
        # With masks at 1, dL/dm_j = <dL/dW_j, W_j>.
        weight = model.get_parameter(f"{name}.weight")
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        expected = 1 - 0.01 * (gradient * weight).detach().flatten(1).sum(1)
        torch.testing.assert_close(mask, expected, atol=1e-5, rtol=0)
        assert (expected - 1).abs().max() > 1e-4


def test_masks_on_norm_scales_are_the_gradient_of_the_scale() -> None:
    model, found = network()
    options = replace(PLAIN, epochs=1, batch_size=48, learning_rate=0.01, target="norm_scale")
    learnt = learn(model, found, options, constant(found, 0.0), bounds=(0.0, 2.0))
    clean = data()
    loss = nn.functional.cross_entropy(model(clean.images), clean.labels)
    for layer, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        scale = model.get_parameter(f"{norm}.weight")
        (gradient,) = torch.autograd.grad(loss, scale, retain_graph=True)
        torch.testing.assert_close(
            learnt.masks[layer], 1 - 0.01 * (gradient * scale).detach(), atol=1e-5, rtol=0
        )


def test_norm_scale_leaves_layers_without_a_norm_at_one() -> None:
    model = nets.randomise(nets.vgg_with_bias())
    found = find_filters(model, nets.images())
    clean = LabelledImages(nets.images(16), torch.arange(16) % nets.CLASSES)
    options = replace(PLAIN, target="norm_scale", epochs=1)
    penalty = constant(found, 0.5)
    learnt = learn_masks(
        model, clean, found, options, penalty=penalty, bounds=(0.0, 1.0), generator=rng.generator(0)
    )
    assert set(learnt.masks) == {"0", "4", "9"}
    assert torch.equal(learnt.masks["9"], torch.ones(16))
    assert float(learnt.masks["0"].max()) < 1.0


def test_norm_scale_without_norms_is_an_error() -> None:
    model = nets.randomise(nets.ConvNeXt())
    found = find_filters(model, nets.images())
    with pytest.raises(UnsupportedModelError, match="use masks on filters"):
        learn(model, found, replace(PLAIN, target="norm_scale"), constant(found, 0.0))


def test_it_stops_once_the_masks_stand_still() -> None:
    model, found = constant_network()
    calls: list[tuple[str, int, int]] = []
    learnt = learn_masks(
        model, data(), found, replace(PLAIN, epochs=9, tolerance=1e-3),
        penalty=constant(found, 0.001), bounds=(0.0, 1.0), generator=rng.generator(0),
        stage="both", progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert (learnt.steps, len(learnt.losses)) == (3, 1)
    assert calls == [("both", 1, 9), ("both", 9, 9)]


def test_clipped_is_the_share_of_masks_on_a_bound() -> None:
    model, found = constant_network()
    penalty = {"conv1": torch.tensor([100.0] * 6 + [1e-3] * 2), "conv2": torch.full((8,), 1e-3)}
    learnt = learn(model, found, replace(PLAIN, epochs=1), penalty)
    assert learnt.clipped == pytest.approx(6 / 16)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"learning_rate": 0.0}, {"batch_size": 1}])
def test_nonsensical_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="mask training needs"):
        MaskTraining(**wrong)  # type: ignore[arg-type]
