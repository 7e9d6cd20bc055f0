from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import networks as nets
from unbackdoor.filters import find_filters
from unbackdoor.filters.magnitude import layer_normalised, magnitudes


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_magnitudes_agree_with_numpy(p: float) -> None:
    model = nets.randomise(nets.SmallConvNet())
    found = find_filters(model, nets.images())
    result = magnitudes(model, found, p=p)
    assert list(result) == ["conv1", "conv2"]
    for name, values in result.items():
        rows = model.get_parameter(f"{name}.weight").detach().numpy().reshape(8, -1)
        expected = np.array([np.linalg.norm(row, ord=p) for row in rows])
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)
        assert not values.requires_grad


def test_the_head_is_measured_only_when_asked_for() -> None:
    model = nets.randomise(nets.SmallConvNet())
    found = find_filters(model, nets.images())
    assert "fc" not in magnitudes(model, found)
    expected = model.get_parameter("fc.weight").norm(dim=1)
    torch.testing.assert_close(magnitudes(model, found, head=True)["fc"], expected)


def test_folded_magnitudes_are_those_of_the_folded_convolution() -> None:
    model = nets.randomise(nets.vgg_with_bias())
    with torch.no_grad():
        model.get_parameter("1.weight")[2] *= -1  # a negative scale must not make a negative norm
    found = find_filters(model, nets.images())
    plain, folded = magnitudes(model, found), magnitudes(model, found, folded=True)
    convolution, norm = model.get_submodule("0"), model.get_submodule("1")
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    fused = nn.utils.fuse_conv_bn_eval(convolution, norm)
    torch.testing.assert_close(folded["0"], fused.weight.flatten(1).norm(dim=1))
    assert not torch.allclose(folded["0"], plain["0"])
    torch.testing.assert_close(folded["9"], plain["9"])  # a linear layer without a norm


def test_norms_that_cannot_be_folded_are_left_out() -> None:
    model = nets.randomise(nets.relu_before_norm())
    found = find_filters(model, nets.images())
    plain, folded = magnitudes(model, found), magnitudes(model, found, folded=True)
    assert all(torch.equal(plain[name], folded[name]) for name in plain)


def test_layer_normalisation_makes_unit_vectors_and_keeps_zeros() -> None:
    values = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(3), "c": torch.tensor([-1e-20, 0.0])}
    result = layer_normalised(values)
    torch.testing.assert_close(result["a"], torch.tensor([0.6, 0.8]))
    assert torch.equal(result["b"], torch.zeros(3))
    assert bool(torch.isfinite(result["c"]).all())
    torch.testing.assert_close(values["a"], torch.tensor([3.0, 4.0]))
