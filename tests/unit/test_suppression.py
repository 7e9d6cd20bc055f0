from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import networks as nets
from unbackdoor import rng, suppression
from unbackdoor.errors import InvalidInputError
from unbackdoor.suppression import Check, Suppressed, Suppression, confusion_of, suppress
from unbackdoor.train import Batch, batches
from unbackdoor.types import LabelledImages

ONE_STEP = Suppression(
    mu=0.05, learning_rate=0.1, momentum=0.0, budget=1, batch_size=64, norm_mode="eval", stop_accuracy=0.0,
    precision="fp32",
)  # fmt: skip


def data(count: int = 40) -> LabelledImages:
    return LabelledImages(nets.images(count, size=8), torch.arange(count) % nets.CLASSES)


def network() -> nn.Module:
    return nets.randomise(nets.SmallConvNet(bias=True))


def run(model: nn.Module, options: Suppression, seed: int = 0) -> Suppressed:
    return suppress(model, data(), options, generator=rng.generator(seed))


class Fixed(nn.Module):
    """Predicts what the first pixel says, times a weight that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot((x[:, 0, 0, 0] * 10).round().long(), 3).float() @ self.weight


def fixed_data(predicted: list[int], true: list[int]) -> LabelledImages:
    images = (torch.tensor(predicted) / 10).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return LabelledImages(images, torch.tensor(true))


def test_confusion_has_true_classes_as_rows() -> None:
    table = confusion_of(Fixed(), fixed_data([0, 2, 2, 2, 1], [0, 0, 0, 1, 1]))
    assert table.tolist() == [[1, 0, 2], [0, 1, 1], [0, 0, 0]]
    assert table.dtype == torch.int64
    check = Check(0, table)
    assert check.accuracy == pytest.approx(2 / 5)
    result = Suppressed(Fixed(), (check,), "budget")
    torch.testing.assert_close(result.class_share, torch.tensor([0.2, 0.2, 0.6]))
    assert list(result.accuracies) == pytest.approx([0.4])


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_one_step_is_ascent_on_the_loss_minus_the_norm_penalty(decay: Literal["weights", "all"]) -> None:
    """Eq. 6 by autograd: theta + eta d/dtheta (CE - mu ||theta||^2), so weight_decay = 2 mu."""
    model = network()
    clean = data()
    result = suppress(model, clean, replace(ONE_STEP, decay=decay), generator=rng.generator(0))
    names, parameters = zip(*model.named_parameters(), strict=True)
    penalised = [p for p in parameters if decay == "all" or p.ndim > 1]
    penalty = torch.stack([p.square().sum() for p in penalised]).sum()
    objective = F.cross_entropy(model(clean.images), clean.labels) - 0.05 * penalty
    gradients = torch.autograd.grad(objective, parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        expected = (parameter + 0.1 * gradient).detach()
        torch.testing.assert_close(result.model.get_parameter(name).detach(), expected, atol=2e-6, rtol=1e-5)
    assert max(float(g.abs().max()) for g in gradients) > 0.01


def test_the_penalty_is_what_distinguishes_mu() -> None:
    model = network()
    with_penalty, without = run(model, ONE_STEP), run(model, replace(ONE_STEP, mu=0.0))
    for name, parameter in model.named_parameters():
        difference = with_penalty.model.get_parameter(name) - without.model.get_parameter(name)
        expected = -0.1 * 2 * 0.05 * parameter if parameter.ndim > 1 else torch.zeros_like(parameter)
        torch.testing.assert_close(difference.detach(), expected.detach(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(("count", "epochs", "checks"), [(40, 2, 2), (40, 3, 5), (33, 2, 2)])
def test_an_epoch_shows_each_image_once_however_often_it_is_checked(
    count: int, epochs: int, checks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    true_batches = batches

    def spy(*given: Any, **options: Any) -> Iterator[Batch]:  # noqa: ANN401
        for batch in true_batches(*given, **options):
            shown.extend(batch.indices.tolist())
            yield batch

    monkeypatch.setattr(suppression, "batches", spy)
    options = replace(
        ONE_STEP, learning_rate=1e-4, batch_size=8, unit="epoch", budget=epochs, checks_per_epoch=checks
    )
    result = suppress(network(), data(count), options, generator=rng.generator(0))
    # A last batch of one image is left out.
    size = count - (count % 8 == 1)
    assert result.checks[-1].step == epochs * (size // 8)
    assert len(shown) == epochs * size
    for start in range(0, len(shown), size):
        assert len(set(shown[start : start + size])) == size


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
def test_the_loss_rises_and_only_train_mode_moves_the_statistics(norm_mode: Literal["train", "eval"]) -> None:
    model = network()
    result = run(model, replace(ONE_STEP, mu=0.0, learning_rate=0.01, budget=10, norm_mode=norm_mode))
    clean = data()
    if norm_mode == "eval":
        before = F.cross_entropy(model(clean.images), clean.labels)
        assert F.cross_entropy(result.model(clean.images), clean.labels) > before + 0.1
    kept = torch.equal(result.model.get_buffer("bn1.running_mean"), model.get_buffer("bn1.running_mean"))
    assert kept == (norm_mode == "eval")


def test_the_input_is_left_as_it_was() -> None:
    model = nets.frozen().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    result = run(model, replace(ONE_STEP, budget=3, norm_mode="train"))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    # A frozen layer is suppressed like all others, and the copy comes in eval mode.
    assert not torch.equal(result.model.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert not any(module.training for module in result.model.modules())


def test_same_generator_same_result() -> None:
    options = replace(ONE_STEP, budget=6, batch_size=16, norm_mode="train", augment=True)
    first, again, other = (run(network(), options, seed) for seed in (0, 0, 1))
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.accuracies == again.accuracies
    weights = [result.model.get_parameter("conv1.weight") for result in (first, other)]
    assert not torch.equal(weights[0], weights[1])


def test_it_stops_once_the_accuracy_is_gone() -> None:
    clean = fixed_data([0, 1, 2] * 8, [0, 1, 2] * 8)
    options = replace(ONE_STEP, learning_rate=1.0, budget=500, batch_size=8, stop_accuracy=0.2)
    result = suppress(Fixed(), clean, options, generator=rng.generator(0))
    assert result.stop_reason == "accuracy"
    assert result.accuracies[0] == 1.0
    assert result.accuracies[-1] <= 0.2 < min(result.accuracies[:-1])
    assert result.checks[-1].step < 500
    torch.testing.assert_close(result.confusion, confusion_of(result.model, clean))


def test_it_stops_when_the_budget_is_spent() -> None:
    options = replace(ONE_STEP, learning_rate=1e-6, budget=5, batch_size=16, checks_per_epoch=3)
    result = run(network(), options)
    assert result.stop_reason == "budget"
    assert [check.step for check in result.checks] == [0, 1, 2, 3, 4, 5]


def test_budgets_count_steps_or_passes() -> None:
    options = replace(ONE_STEP, learning_rate=1e-6, budget=2, batch_size=16, checks_per_epoch=1)
    assert run(network(), options).checks[-1].step == 2
    assert run(network(), replace(options, unit="epoch")).checks[-1].step == 2 * 3


def test_a_stop_accuracy_of_zero_never_stops_early() -> None:
    clean = fixed_data([0, 1, 2] * 8, [0, 1, 2] * 8)
    options = replace(ONE_STEP, learning_rate=1.0, budget=60, batch_size=8, stop_accuracy=0.0)
    result = suppress(Fixed(), clean, options, generator=rng.generator(0))
    assert result.accuracies[-1] == 0.0
    assert (result.stop_reason, result.checks[-1].step) == ("budget", 60)


@pytest.mark.parametrize("norm_mode", ["train", "eval"])
@pytest.mark.parametrize("rate", [1e2, 1e4, 1e12, 1e20, 1e36])
def test_a_diverging_run_returns_the_last_sound_state(
    rate: float, norm_mode: Literal["train", "eval"]
) -> None:
    """Also where weights are finite, yet too large for the norms' statistics or the logits."""
    often = replace(ONE_STEP, budget=60, batch_size=16, checks_per_epoch=3)
    options = replace(often, mu=0.001, learning_rate=rate, norm_mode=norm_mode)
    result = run(network(), options)
    assert result.stop_reason == "not finite"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in result.model.state_dict().values())
    assert bool(torch.isfinite(result.model(data().images)).all())
    torch.testing.assert_close(result.confusion, confusion_of(result.model, data()))


def test_clipping_bounds_the_step() -> None:
    model = network()
    result = run(model, replace(ONE_STEP, mu=0.0, clip_norm=1e-3))
    moved = [result.model.get_parameter(name) - p for name, p in model.named_parameters()]
    length = torch.stack([m.detach().square().sum() for m in moved]).sum().sqrt()
    assert float(length) == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_progress_ends_at_the_budget() -> None:
    calls: list[tuple[str, int, int]] = []
    suppress(
        network(), data(), replace(ONE_STEP, budget=3), generator=rng.generator(0),
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls[-1] == ("clean suppression", 3, 3)


def test_one_image_is_too_few() -> None:
    with pytest.raises(InvalidInputError, match="at least 2"):
        suppress(network(), data(1), ONE_STEP, generator=rng.generator(0))


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"learning_rate": 0.0}, {"batch_size": 1}])
def test_nonsensical_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="suppression needs"):
        Suppression(**wrong)  # type: ignore[arg-type]
