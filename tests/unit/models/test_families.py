"""Architectures beyond ResNets: their shapes, and that filters are found and removed in them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import networks as nets
from unbackdoor.filters import FilterMask, find_filters
from unbackdoor.models import build
from unbackdoor.models.vit import heads_of, positions


def test_a_densenet_has_the_channels_of_its_paper() -> None:
    model = build("densenet40", width=24)
    # 40 layers, growth 12: 24 + 6 * 12 = 96 channels, halved to 48; 120, 60; 132. About 0.18 million weights.
    assert model.get_submodule("linear").in_features == 132
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 18 + 2
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(0.18e6, rel=0.05)


def test_attention_is_that_of_torch() -> None:
    model = nets.randomise(build("vit_small", width=64, num_classes=4))
    block = model.get_submodule("blocks.0")
    tokens = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    reference = torch.nn.MultiheadAttention(64, 2, batch_first=True)
    qkv, out = block.get_submodule("qkv"), block.get_submodule("out")
    weights = {"in_proj_weight": qkv.weight, "in_proj_bias": qkv.bias}
    weights |= {"out_proj.weight": out.weight, "out_proj.bias": out.bias}
    reference.load_state_dict(weights)
    with torch.no_grad():
        normed = block.get_submodule("norm1")(tokens)
        attended = tokens + reference(normed, normed, normed)[0]
        hidden = F.gelu(block.get_submodule("up")(block.get_submodule("norm2")(attended)))
        torch.testing.assert_close(block(tokens), attended + block.get_submodule("down")(hidden))


def test_positions_tell_all_places_apart_and_follow_the_axes() -> None:
    grid = positions(4, 6, 16, like=torch.zeros(1)).view(4, 6, 16)
    assert torch.equal(grid[1, :, :8], grid[1, 0, :8].expand(6, 8))
    assert torch.equal(grid[:, 2, 8:], grid[0, 2, 8:].expand(4, 8))
    flat = grid.flatten(0, 1)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 0.1


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("name", ["densenet40", "vit_small", "vgg16_bn"])
def test_filters_are_found_and_silenced(name: str, size: int) -> None:
    model = nets.randomise(build(name, width=8, num_classes=4))
    images = nets.images(2, size=size)
    found = find_filters(model, images)
    assert found.head is not None
    assert found.head.name in ("linear", "classifier")
    first = found.prunable[0]
    pruned = FilterMask.full(found).without([(first.name, 1)]).apply(model, found)
    seen = nets.watch(pruned, images)[first.weight][0]
    assert not seen[1].any()
    assert seen[0].any()


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (100, 2), (20, 1), (192, 6), (44, 1)])
def test_attention_heads_divide_the_width(width: int, heads: int) -> None:
    assert heads_of(width) == heads
    logits = build("vit_small", width=width, num_classes=4)(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 4)
