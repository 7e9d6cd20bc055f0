from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from unbackdoor.costs import metered, partial_pass
from unbackdoor.testing.subjects import small_network

IMAGES = torch.rand(5, 3, 12, 12)


def test_passes_are_counted_once_an_outermost_call() -> None:
    model = small_network()
    with metered() as cost:
        model(IMAGES).sum().backward()
        with torch.no_grad():
            model(IMAGES[:2])
        functional_call(model, {}, (IMAGES[:3],))
    assert (cost.forward_images, cost.backward_images) == (10, 5)
    assert cost.seconds > 0
    assert cost.cpu_seconds > 0
    model(IMAGES)
    assert cost.forward_images == 10, "nothing counts outside the block"


def test_gradients_of_masks_and_inputs_count_and_two_backward_calls_twice() -> None:
    model = small_network().requires_grad_(requires_grad=False)
    images = IMAGES.clone().requires_grad_()
    with metered() as cost:
        loss = model(images).square().sum()
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        loss.backward()
    assert slope.shape == images.shape
    assert (cost.forward_images, cost.backward_images) == (5, 10)


def test_passes_are_told_apart_by_their_price() -> None:
    model = small_network()
    with metered() as cost:
        model(IMAGES).sum().backward()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(IMAGES[:2])
        model.requires_grad_(requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16):
            model(IMAGES.clone().requires_grad_()).float().sum().backward()
    assert cost.kinds == {
        "forward fp32": 5, "backward fp32 weights": 5, "forward bf16": 7, "backward bf16 frozen": 5,
    }  # fmt: skip


def test_a_failing_call_does_not_confuse_the_count() -> None:
    model = small_network()
    with metered() as cost:
        with pytest.raises(RuntimeError):
            model(torch.rand(2, 5, 12, 12))
        model(IMAGES)
    assert cost.forward_images == 5


def test_parts_and_other_calls() -> None:
    model = small_network()
    with metered() as cost:
        nn.Flatten()(torch.rand(4, 3))  # no images
        nn.Sequential(*list(model)[:3])(IMAGES)
    assert cost.forward_images == 5


def test_memory_is_that_of_the_block() -> None:
    with metered() as small:
        pass
    with metered() as large:
        torch.ones(64, 2**20 // 4 * 4).sum()
    if small.peak_memory_mb is None or large.peak_memory_mb is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert large.peak_memory_mb > small.peak_memory_mb + 200
    assert set(large.describe()) >= {"forward_images", "backward_images", "seconds", "peak_memory_mb"}


def test_a_partial_pass_counts_as_its_share() -> None:
    model = small_network()
    with metered() as cost:
        with torch.no_grad(), partial_pass(0.4):
            model(IMAGES)
        with pytest.raises(RuntimeError), partial_pass(0.4):
            model(torch.rand(2, 5, 12, 12))
        model(IMAGES)
        with partial_pass(1.0):
            model(IMAGES)
    assert cost.forward_images == 12
    assert cost.kinds == {"forward fp32 replayed": 2, "forward fp32": 10}
