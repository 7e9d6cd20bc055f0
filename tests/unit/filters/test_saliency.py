from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import networks as nets
from unbackdoor import rng
from unbackdoor.compute import mode
from unbackdoor.filters import find_filters
from unbackdoor.filters.saliency import clean_loss, exact_saliency, spearman, taylor_saliency
from unbackdoor.types import LabelledImages


def data(count: int = 20, *, size: int = 8) -> LabelledImages:
    labels = torch.arange(count) % nets.CLASSES
    return LabelledImages(nets.images(count, size=size), labels)


def test_two_layers_by_hand() -> None:
    """The backward pass of a two-layer network, written out without autograd."""
    model = nets.randomise(nets.TwoLayers())
    clean = data(10, size=2)
    found = find_filters(model, clean.images)
    w1, b1, w2, b2 = (p.detach() for p in model.parameters())
    x = clean.images.flatten(1)
    pre = x @ w1.t() + b1
    hidden = pre.clamp_min(0)
    probabilities = (hidden @ w2.t() + b2).softmax(1)
    error = (probabilities - F.one_hot(clean.labels, nets.CLASSES)) / len(clean)
    grad_w1 = ((error @ w2) * (pre > 0)).t() @ x
    result = taylor_saliency(model, clean, found, head=True)
    torch.testing.assert_close(result["first"], -(grad_w1 * w1).sum(1))
    torch.testing.assert_close(result["second"], -((error.t() @ hidden) * w2).sum(1))
    assert set(taylor_saliency(model, clean, found)) == {"first"}


def test_batch_size_changes_nothing() -> None:
    model = nets.randomise(nets.SmallConvNet())
    found = find_filters(model, nets.images())
    whole = taylor_saliency(model, data(), found)
    for batch_size in (1, 7, 20):
        parts = taylor_saliency(model, data(), found, batch_size=batch_size)
        for name, values in whole.items():
            torch.testing.assert_close(parts[name], values, atol=1e-6, rtol=1e-4)


def test_it_is_the_exact_value_to_first_order() -> None:
    """The estimate for ``epsilon * W_j`` leaves an error of order epsilon^2."""
    model = nets.randomise(nets.TwoLayers(bias=False)).double()
    inputs, labels = nets.images(10, size=2).double(), torch.zeros(10, dtype=torch.int64)
    weight = model.get_parameter("first.weight")
    nn.init.ones_(weight)  # on one side of the ReLU's kink for every image
    errors = []
    for scale in (1e-1, 1e-2):
        with torch.no_grad():
            weight[0] *= scale / weight[0].norm()
        loss = F.cross_entropy(model(inputs), labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        estimate = -float((gradient[0] * weight[0]).sum().detach())
        with torch.no_grad():
            saved = weight[0].clone()
            weight[0] = 0
            errors.append(abs(float(F.cross_entropy(model(inputs), labels) - loss) - estimate))
            assert errors[-1] < abs(estimate)
            weight[0] = saved
    assert errors[1] < errors[0] / 30


def test_small_filters_agree_with_the_exact_change() -> None:
    model = nets.randomise(nets.TwoLayers(bias=False))
    with torch.no_grad():
        model.get_parameter("first.weight").mul_(0.05)
    clean = LabelledImages(nets.images(40, size=2), torch.zeros(40, dtype=torch.int64))
    found = find_filters(model, clean.images)
    estimate = taylor_saliency(model, clean, found)["first"]
    exact = torch.tensor(exact_saliency(model, clean, found, [("first", j) for j in range(6)]))
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(estimate, exact, rtol=0.1, atol=1e-4)


def test_exact_saliency_is_the_difference_of_two_losses_and_follows_the_mode() -> None:
    model = nets.randomise(nets.SmallConvNet())
    clean = data()
    found = find_filters(model, clean.images)
    before = clean_loss(model, clean)
    with torch.no_grad():
        weight = model.get_parameter("conv2.weight")
        saved = weight[4].clone()
        weight[4] = 0
        expected = clean_loss(model, clean) - before
        weight[4] = saved
    assert exact_saliency(model, clean, found, [("conv2", 4)], prune_mode="weight") == [
        pytest.approx(expected, abs=1e-6)
    ]
    silenced = exact_saliency(model, clean, found, [("conv2", 4)])
    assert silenced[0] != pytest.approx(expected, abs=1e-4)


def test_in_train_mode_the_first_order_term_vanishes() -> None:
    """Batch norm makes the loss invariant to the scale of a filter: the reason for eval mode."""
    model = nets.randomise(nets.SmallConvNet())
    clean = data(64)
    found = find_filters(model, clean.images)
    evaluated = taylor_saliency(model, clean, found)
    with mode(model, training=True):
        loss = F.cross_entropy(model(clean.images), clean.labels)
    for name, values in evaluated.items():
        weight = model.get_parameter(f"{name}.weight")
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        naive = (gradient * weight).detach().flatten(1).sum(1)
        assert naive.abs().max() < 1e-3 * values.abs().max()


def test_the_model_is_left_as_it_was() -> None:
    model = nets.frozen().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    found = find_filters(model, nets.images())
    with torch.no_grad():
        result = taylor_saliency(model, data(), found)
    exact_saliency(model, data(), found, [("0", 1)])
    assert result["0"].abs().max() > 0  # the frozen layer has one too
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_uint8_and_float_images_give_the_same() -> None:
    model = nets.randomise(nets.SmallConvNet())
    stored = (nets.images(12, size=8) * 255).to(torch.uint8)
    labels = torch.arange(12) % nets.CLASSES
    found = find_filters(model, nets.images())
    as_bytes = taylor_saliency(model, LabelledImages(stored, labels), found)
    as_floats = taylor_saliency(model, LabelledImages(stored.float() / 255, labels), found)
    for name, values in as_bytes.items():
        torch.testing.assert_close(values, as_floats[name])


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_spearman_agrees_with_scipy_with_and_without_ties(levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = rng.generator(levels)
    a = torch.randint(levels, (60,), generator=generator).float()
    b = a + torch.randint(levels, (60,), generator=generator).float()
    expected = float(stats.spearmanr(a.numpy(), b.numpy()).statistic)
    assert spearman(a, b) == pytest.approx(expected, abs=1e-9)
    assert spearman(a, -b) == pytest.approx(-expected, abs=1e-9)


def test_spearman_by_hand() -> None:
    a = torch.tensor([1.0, 2.0, 2.0, 4.0])
    b = torch.tensor([1.0, 3.0, 2.0, 4.0])
    ranks = np.array([[1, 2.5, 2.5, 4], [1, 3, 2, 4]])
    assert spearman(a, b) == pytest.approx(float(np.corrcoef(ranks)[0, 1]))
    assert spearman(a.exp(), b**3) == pytest.approx(spearman(a, b))


def test_spearman_of_a_constant_is_undefined() -> None:
    assert math.isnan(spearman(torch.ones(5), torch.arange(5.0)))
    assert math.isnan(spearman(torch.arange(5.0), torch.zeros(5)))
