from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.purify import AWM
from unbackdoor.purify.awm import within
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages, Purified

PLANTED = planted_backdoor()
CLEAN = PLANTED.clean_data(64, rng.generator(0))
QUICK = AWM(rounds=2, passes=1, batch_size=32, learning_rate=0.01, precision="fp32")


def purify(method: AWM, model: nn.Module = PLANTED.model, clean: LabelledImages = CLEAN) -> Purified:
    return method.purify(model, clean, generator=rng.generator(0))


def test_large_perturbations_are_scaled_to_the_bound() -> None:
    delta = torch.tensor([3.0, -1.0, 0.0]).view(1, 3, 1, 1)
    bound = 1000 * 3 / 3072
    scaled = within(delta, 1000.0)
    assert float(scaled.abs().sum()) == pytest.approx(bound)
    torch.testing.assert_close(scaled, delta * bound / 4)
    assert torch.equal(within(delta / 10, 1000.0), delta / 10)
    assert torch.equal(within(delta * 0, 1000.0), delta * 0)


def test_the_first_step_of_adam_by_hand() -> None:
    # With alpha = 1 the perturbation plays no part; Adam's first step is the rate times the sign.
    method = replace(QUICK, alpha=1.0, gamma=0.0, rounds=1, batch_size=64)
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
        ).eval()
    result = purify(method, model)
    weight = dict(model.named_parameters())["0.weight"]
    loss = F.cross_entropy(model(CLEAN.floats()), CLEAN.labels)
    (gradient,) = torch.autograd.grad(loss, weight)
    gradient = gradient * weight.detach()
    clear = gradient.abs() > 1e-5
    mask = (result.model.state_dict()["0.weight"] / weight.detach())[clear]
    expected = torch.where(gradient[clear] > 0, 0.99, 1.0)
    torch.testing.assert_close(mask, expected, rtol=1e-3, atol=1e-3)
    assert 0 < int((expected < 1).sum()) < len(expected)


def test_the_robust_term_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fixed delta, alpha and gamma: where the signs differ, the perturbed images decide."""
    delta = torch.linspace(-0.9, 0.9, 768).view(1, 3, 16, 16)
    monkeypatch.setattr(AWM, "_perturb", lambda *_: delta)
    method = replace(QUICK, alpha=0.3, gamma=1e-4, rounds=1, batch_size=64)
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
        ).eval()
    result = purify(method, model)
    weight = dict(model.named_parameters())["0.weight"]
    images = CLEAN.floats()
    slopes = [
        torch.autograd.grad(F.cross_entropy(model(shown), CLEAN.labels), weight)[0] * weight.detach()
        for shown in (images, (images + delta).clamp(0, 1))
    ]
    plain = slopes[0]
    mixed = 0.3 * plain + 0.7 * slopes[1] + 1e-4
    clear = mixed.abs() > 1e-5
    mask = result.model.state_dict()["0.weight"] / weight.detach()
    expected = torch.where(mixed > 0, 0.99, 1.0)
    torch.testing.assert_close(mask[clear], expected[clear], rtol=1e-3, atol=1e-3)
    # The clean loss alone would have decided otherwise in many places, as would each wrong weighing.
    unclipped = torch.autograd.grad(F.cross_entropy(model(images + delta), CLEAN.labels), weight)[0]
    for other in (
        plain + 1e-4,
        slopes[1] + 1e-4,
        0.7 * plain + 0.3 * slopes[1] + 1e-4,
        0.3 * plain + 0.7 * slopes[1],
        0.3 * plain + 0.7 * unclipped * weight.detach() + 1e-4,
    ):
        assert int(((other > 0) != (mixed > 0))[clear].sum()) > 3
    means = result.diagnostics["rounds"][0]
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(model(x), CLEAN.labels)) for x in (images, (images + delta).clamp(0, 1))
        ]
    assert [means["loss"], means["loss_perturbed"]] == pytest.approx(losses, rel=1e-4)


def test_masks_are_soft_and_only_convolutions_change() -> None:
    result = purify(QUICK)
    before, after = PLANTED.model.state_dict(), result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"conv1.weight", "conv2.weight"}
    assert result.mask is None
    ratio = (after["conv2.weight"] / before["conv2.weight"]).flatten()
    assert float(ratio.min()) >= 0
    assert float(ratio.max()) <= 1 + 1e-6
    assert 0.5 < float(ratio.mean()) < 1
    assert int(((ratio > 0.01) & (ratio < 0.9999)).sum()) > 0


def test_fewer_images_than_a_batch_are_still_learnt_from() -> None:
    result = purify(replace(QUICK, batch_size=128))
    assert result.diagnostics["masks"]["conv2.weight"]["mean"] < 1


def test_the_perturbation_hurts_and_is_bounded() -> None:
    rounds = purify(replace(QUICK, tau=200.0, learning_rate=1e-6, passes=3)).diagnostics["rounds"]
    for one in rounds:
        assert one["perturbation_l1"] <= 200 * 768 / 3072 * (1 + 1e-5)
        assert one["loss_perturbed"] > one["loss"]


def test_a_strong_penalty_shrinks_the_masks() -> None:
    weak, strong = (purify(replace(QUICK, gamma=gamma)).diagnostics["masks"] for gamma in (0.0, 10.0))
    assert strong["conv2.weight"]["mean"] < weak["conv2.weight"]["mean"]


def test_the_rate_falls_from_round_to_round() -> None:
    rounds = purify(replace(QUICK, rounds=3, decay=0.5)).diagnostics["rounds"]
    assert [one["learning_rate"] for one in rounds] == [0.01, 0.005, 0.0025]


def test_linear_layers_on_request() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    with pytest.raises(UnsupportedModelError, match="layers = 'all'"):
        purify(QUICK, model)
    result = purify(replace(QUICK, layers="all"), model)
    after = result.model.state_dict()
    assert not torch.equal(after["1.weight"], model.state_dict()["1.weight"])
    assert torch.equal(after["3.weight"], model.state_dict()["3.weight"])


def test_the_paper_has_the_authors_numbers() -> None:
    paper = AWM.paper()
    assert (paper.rounds, paper.passes, paper.alpha, paper.gamma, paper.tau) == (20, 5, 0.9, 1e-8, 1000.0)
    assert (paper.learning_rate, paper.perturbation_rate, paper.batch_size) == (0.01, 10.0, 128)
    assert paper.decay == 0.9
    assert (AWM.paper(one_shot=True).alpha, AWM.paper(one_shot=True).tau) == (0.99, 100.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 2.0}, "alpha must lie"),
        ({"rounds": 0}, "rounds, passes"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"decay": 0.0}, "decay must lie"),
        ({"layers": "head"}, "layers must be"),
    ],
)
def test_options_are_checked(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        AWM(**options)  # type: ignore[arg-type]
