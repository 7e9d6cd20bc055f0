from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import networks as nets
from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import FilterMap, FilterMask, find_filters
from unbackdoor.filters.mask import PruneMode, cleared_tensors, masked_tensors


def conv_net(*, bias: bool = False) -> tuple[nn.Module, FilterMap]:
    model = nets.randomise(nets.SmallConvNet(bias=bias))
    return model, find_filters(model, nets.images())


def test_a_full_mask_covers_the_prunable_layers_and_removes_nothing() -> None:
    model, found = conv_net()
    full = FilterMask.full(found)
    assert list(full.keep) == ["conv1", "conv2"]
    assert (full.n_filters, full.n_removed, full.removed()) == (16, 0, [])
    pruned = full.apply(model, found)
    assert all(torch.equal(t, pruned.state_dict()[name]) for name, t in model.state_dict().items())


def test_removed_lists_what_without_was_given_in_layer_order() -> None:
    _, found = conv_net()
    mask = FilterMask.full(found).without([("conv2", 5), ("conv1", 7), ("conv1", 2), ("conv2", 5)])
    assert mask.removed() == [("conv1", 2), ("conv1", 7), ("conv2", 5)]
    assert mask.n_removed == 3


def test_without_leaves_the_mask_it_starts_from() -> None:
    _, found = conv_net()
    full = FilterMask.full(found)
    full.without([("conv1", 0)])
    assert full.n_removed == 0


@pytest.mark.parametrize("place", [("conv1", 8), ("conv1", -1), ("fc", 0), ("nowhere", 0)])
def test_a_filter_that_does_not_exist_cannot_be_removed(place: tuple[str, int]) -> None:
    _, found = conv_net()
    with pytest.raises(InvalidInputError, match="no filter"):
        FilterMask.full(found).without([place])


@pytest.mark.parametrize("kept", [torch.ones(3), torch.ones(2, 2, dtype=torch.bool)])
def test_masks_must_be_boolean_vectors(kept: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="must be bool"):
        FilterMask({"conv1": kept})


def test_masks_of_different_models_cannot_be_combined() -> None:
    a = FilterMask({"conv1": torch.ones(3, dtype=torch.bool)})
    b = FilterMask({"conv1": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(InvalidInputError, match="3 filters in one mask and 4 in the other"):
        a & b


def test_a_mask_that_does_not_fit_the_model_is_refused() -> None:
    model, found = conv_net()
    with pytest.raises(InvalidInputError, match="9 filters for layer 'conv1', the model 8"):
        FilterMask({"conv1": torch.ones(9, dtype=torch.bool)}).apply(model, found)
    with pytest.raises(UnsupportedModelError, match="no layer 'other'"):
        FilterMask({"other": torch.ones(9, dtype=torch.bool)}).apply(model, found)


MODES: dict[PruneMode, set[str]] = {
    "silence": {"conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"},
    "weight": {"conv1.weight", "conv1.bias"},
    "norm_scale": {"bn1.weight"},
    "norm": {"bn1.weight", "bn1.bias"},
}


@pytest.mark.parametrize("prune_mode", MODES)
def test_each_mode_clears_the_entries_it_documents_and_no_others(prune_mode: PruneMode) -> None:
    model, found = conv_net(bias=True)
    pruned = FilterMask.full(found).without([("conv1", 3)]).apply(model, found, prune_mode=prune_mode)
    for name, old in model.state_dict().items():
        new = pruned.state_dict()[name]
        expected = old.clone()
        if name in MODES[prune_mode]:
            expected[3] = 0
        assert torch.equal(new, expected), name


def test_what_remains_of_the_channel_after_each_mode() -> None:
    model, found = conv_net()
    state = model.state_dict()
    constant = state["bn1.bias"] - state["bn1.weight"] * state["bn1.running_mean"] / torch.sqrt(
        state["bn1.running_var"] + 1e-5
    )
    expected = {"silence": 0.0, "weight": constant[3], "norm_scale": state["bn1.bias"][3], "norm": 0.0}
    mask = FilterMask.full(found).without([("conv1", 3)])
    for prune_mode in MODES:
        pruned = mask.apply(model, found, prune_mode=prune_mode)
        output = nets.watch(pruned, nets.images())["bn1.weight"][0][3]
        torch.testing.assert_close(output, torch.full_like(output, float(expected[prune_mode])))


@pytest.mark.parametrize("prune_mode", MODES)
def test_filters_without_a_norm_are_cleared_in_every_mode(prune_mode: PruneMode) -> None:
    found = find_filters(nets.TwoLayers(), nets.images(size=2))
    assert cleared_tensors(found.group("first"), prune_mode) == ["first.weight", "first.bias"]


def test_a_norm_without_scale_is_silenced_at_its_mean() -> None:
    model = nets.norm_without_affine()
    found = find_filters(model, nets.images())
    assert cleared_tensors(found.group("0"), "silence") == ["0.weight", "0.bias", "1.running_mean"]


def test_applying_keeps_frozen_parameters_frozen_and_the_mode() -> None:
    model = nets.frozen().train()
    found = find_filters(model, nets.images())
    pruned = FilterMask.full(found).without([("0", 1)]).apply(model, found)
    assert pruned.training
    assert [p.requires_grad for p in pruned.parameters()] == [p.requires_grad for p in model.parameters()]


def random_masks(found: FilterMap, seed: int = 3) -> dict[str, Tensor]:
    generator = rng.generator(seed)
    return {g.name: 2 * torch.rand(g.filters, generator=generator) for g in found.prunable}


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "conv without bias": nets.SmallConvNet,
    "conv with bias": lambda: nets.SmallConvNet(bias=True),
    "vgg": nets.vgg_with_bias,
    "linear": nets.mlp,
    "mobilenet": nets.MobileNet,
    "densenet": nets.DenseNet,
    "second reader": nets.FixedKernel,
    "relu first": nets.relu_before_norm,
    "shared conv": nets.SharedConv,
    "functional": nets.Functional,
    "convnext": nets.ConvNeXt,
    "batch statistics": nets.BatchStatistics,
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_masks_into_norms_equals_multiplying_weights(name: str) -> None:
    model = nets.randomise(FOLDED[name]())
    found = find_filters(model, nets.images())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    masks = {n: m.requires_grad_() for n, m in random_masks(found).items()}
    results = []
    for fold in (True, False):
        replaced = masked_tensors(tensors, found, masks, fold=fold)
        output = functional_call(model, replaced, (nets.images(),))
        gradients = torch.autograd.grad(output.square().sum(), list(masks.values()))
        results.append((output, gradients))
    (folded, folded_gradients), (plain, plain_gradients) = results
    assert (plain - model(nets.images())).abs().max() > 1e-3, "the masks must matter"
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(folded_gradients, plain_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1.0)


def test_folding_touches_norms_only_and_not_folding_weights_only() -> None:
    model, found = conv_net(bias=True)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    masks = random_masks(found)
    folded = masked_tensors(tensors, found, masks)
    plain = masked_tensors(tensors, found, masks, fold=False)
    assert set(folded) == {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
    assert set(plain) == {"conv1.weight", "conv2.weight"}
    expected = masks["conv1"].view(-1, 1, 1, 1) * tensors["conv1.weight"]
    assert torch.equal(plain["conv1.weight"], expected)


def test_masks_of_ones_change_nothing() -> None:
    model, found = conv_net()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ones = {g.name: torch.ones(g.filters) for g in found.prunable}
    replaced = masked_tensors(tensors, found, ones)
    assert all(torch.equal(value, tensors[name]) for name, value in replaced.items())
