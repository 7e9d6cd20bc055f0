from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import find_filters
from unbackdoor.neuron_noise import targets_of
from unbackdoor.purify import ANP, anp
from unbackdoor.purify.selection import Selection
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages, Purified

PLANTED = planted_backdoor()
CLEAN = PLANTED.clean_data(64, rng.generator(0))
QUICK = ANP(iterations=6, batch_size=32, precision="fp32", selection=Selection(amount="own"))


def purify(method: ANP, model: nn.Module = PLANTED.model, clean: LabelledImages = CLEAN) -> Purified:
    return method.purify(model, clean, generator=rng.generator(0))


def bare_network() -> nn.Sequential:
    with rng.isolated(rng.generator(0)):
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
        ).eval()


def normed_network() -> nn.Sequential:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 8),
        )  # fmt: skip
        nn.init.uniform_(model[1].weight, 0.5, 2.0)  # type: ignore[arg-type]
        nn.init.uniform_(model[1].bias, -0.5, 0.5)  # type: ignore[arg-type]
    return model.eval()


def by_hand(state: dict[str, Tensor], images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Write the network out in batch-statistics mode, as a formula."""
    z = F.conv2d(images, state["0.weight"], state["0.bias"])
    mean, variance = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
    y = (z - mean) / (variance + 1e-5).sqrt() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return y.relu().mean((2, 3)) @ state["5.weight"].T + state["5.bias"]


def test_one_step_without_noise_is_plain_gradient_descent_on_the_masks() -> None:
    model = normed_network()
    result = purify(replace(QUICK, eps=0.0, iterations=1, batch_size=64), model)
    state = model.state_dict()
    mask = torch.ones(16, requires_grad=True)
    logits = by_hand(state, CLEAN.floats(), mask * state["1.weight"], state["1.bias"])
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, CLEAN.labels), mask)
    expected = (1 - 0.2 * gradient).clamp(0, 1)
    torch.testing.assert_close(result.scores["0"], expected, rtol=1e-4, atol=1e-6)
    assert float(expected.min()) < 1


def test_one_step_with_noise_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a fixed start: noise goes eps along the sign of the loss's gradient, then the mask descends."""
    model, (eps, alpha) = normed_network(), (0.3, 0.25)
    state, images, labels = model.state_dict(), CLEAN.floats(), CLEAN.labels
    start = [0.3 * torch.rand(16, generator=rng.generator(n)) - 0.15 for n in (1, 2)]
    fixed = dict(zip(("1.weight", "1.bias"), start, strict=True))
    monkeypatch.setattr(anp, "random_noise", lambda *_, **__: {n: v.clone() for n, v in fixed.items()})
    method = replace(QUICK, eps=eps, alpha=alpha, iterations=1, batch_size=64)
    result = purify(method, model)

    def loss(mask: Tensor, delta: Tensor, xi: Tensor) -> Tensor:
        logits = by_hand(state, images, (mask + delta) * state["1.weight"], (1 + xi) * state["1.bias"])
        return F.cross_entropy(logits, labels)

    delta, xi = (each.clone().requires_grad_() for each in start)
    gradients = torch.autograd.grad(loss(torch.ones(16), delta, xi), [delta, xi])
    moved = [n.detach() + eps * g.sign() for n, g in zip((delta, xi), gradients, strict=True)]
    mask, still = torch.ones(16, requires_grad=True), torch.zeros(16)
    mixed = alpha * loss(mask, still, still) + (1 - alpha) * loss(mask, *moved)
    (gradient,) = torch.autograd.grad(mixed, mask)
    torch.testing.assert_close(result.scores["0"], (1 - 0.2 * gradient).clamp(0, 1), rtol=1e-4, atol=1e-6)
    after, before = (float(loss(torch.ones(16), *noise)) for noise in (moved, start))
    assert result.diagnostics["loss_with_noise"] == [pytest.approx(after, rel=1e-4)]
    assert after > before


def test_ascended_noise_raises_the_loss_of_the_same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    still = replace(QUICK, eps=0.4, iterations=8, learning_rate=1e-9)
    ascended = purify(still).diagnostics["loss_with_noise"]
    monkeypatch.setattr(
        anp, "ascended", lambda noise, *_, **__: {name: each.detach() for name, each in noise.items()}
    )
    random = purify(still).diagnostics
    assert all(one > other for one, other in zip(ascended, random["loss_with_noise"], strict=True))
    none = purify(replace(still, eps=0.0)).diagnostics
    assert none["loss_with_noise"] == pytest.approx(none["loss_without_noise"], rel=1e-3)


def test_alpha_weighs_the_two_losses() -> None:
    model = normed_network()
    quiet = purify(replace(QUICK, eps=0.0), model).scores["0"]
    only_plain = purify(replace(QUICK, alpha=1.0), model).scores["0"]
    only_noisy = purify(replace(QUICK, alpha=0.0), model).scores["0"]
    torch.testing.assert_close(only_plain, quiet)
    assert float((only_noisy - quiet).abs().max()) > 1e-3


def test_the_iterations_are_those_asked_for() -> None:
    assert purify(replace(QUICK, iterations=5)).diagnostics["iterations"] == 5


def test_the_papers_rule_and_what_it_clears() -> None:
    result = purify(replace(QUICK, threshold=0.9, eps=0.4, learning_rate=3.0))
    assert result.mask is not None
    scores = torch.cat(list(result.scores.values()))
    assert result.mask.n_removed == int((scores <= 0.9).sum()) > 0
    before, after = PLANTED.model.state_dict(), result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Running statistics must be those of the input, although the masks were learnt in train mode.
    assert changed <= {"norm1.weight", "norm2.weight"}


def test_networks_without_norms_are_masked_at_weight_and_bias() -> None:
    model = bare_network()
    targets = targets_of(find_filters(model, CLEAN.floats()[:1]))
    assert [(t.scales, t.shifts, t.on_norm) for t in targets] == [(("0.weight",), ("0.bias",), False)]
    result = purify(QUICK, model)
    assert result.diagnostics["masks_on"] == "weights"
    assert set(result.scores) == {"0"}


def test_layer_norms_carry_masks_too() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(768, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8)
        ).eval()
    targets = targets_of(find_filters(model, CLEAN.floats()[:1]))
    assert [(t.scales, t.shifts) for t in targets] == [(("2.weight",), ("2.bias",))]
    assert purify(QUICK, model).diagnostics["masks_on"] == "norms"


def test_a_network_of_a_head_alone_is_refused() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8)).eval()
    with pytest.raises(UnsupportedModelError, match="no layer but its head"):
        purify(QUICK, model)


def test_the_paper_has_the_papers_numbers() -> None:
    paper = ANP.paper()
    assert (paper.eps, paper.alpha, paper.steps, paper.learning_rate, paper.momentum) == (
        0.4, 0.2, 1, 0.2, 0.9,
    )  # fmt: skip
    assert (paper.iterations, paper.batch_size, paper.threshold, paper.project_noise) == (
        2000, 128, 0.2, False,
    )  # fmt: skip
    assert paper.prune_mode == "norm_scale"


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="alpha and threshold"):
        ANP(alpha=1.2)
    with pytest.raises(InvalidInputError, match="steps and iterations"):
        ANP(steps=0)
    with pytest.raises(InvalidInputError, match="eps must be"):
        ANP(eps=float("nan"))
