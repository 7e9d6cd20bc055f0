from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from unbackdoor import rng
from unbackdoor.costs import metered, partial_pass
from unbackdoor.purify import ANP, AWM, FTSAM
from unbackdoor.purify.selection import Selection
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.subjects import small_network
from unbackdoor.train import Recipe
from unbackdoor.types import Purifier

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


def test_masks_on_scales_are_not_booked_as_weights() -> None:
    model = small_network().requires_grad_(requires_grad=False)
    mask = torch.ones(16, requires_grad=True)
    scale, kernel = model.get_parameter("1.weight"), model.get_parameter("0.weight")
    with metered() as cost:
        functional_call(model, {"1.weight": mask * scale}, (IMAGES,)).sum().backward()
    assert cost.kinds == {"forward fp32": 5, "backward fp32 frozen": 5}
    with metered() as cost:
        masked = mask.view(-1, 1, 1, 1) * kernel
        functional_call(model, {"0.weight": masked}, (IMAGES,)).sum().backward()
    assert cost.kinds == {"forward fp32": 5, "backward fp32 weights": 5}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (
            ANP(iterations=2, batch_size=32, precision="fp32", selection=Selection(amount="count", count=1)),
            "frozen",
        ),
        (AWM(rounds=1, passes=1, batch_size=32, precision="fp32"), "weights"),
        (FTSAM(recipe=Recipe(epochs=1, batch_size=32, precision="fp32")), "weights"),
    ],
    ids=["anp", "awm", "ft_sam"],
)
def test_methods_are_booked_by_what_learns(method: Purifier, kind: str) -> None:
    planted = planted_backdoor()
    with metered() as cost:
        method.purify(planted.model, planted.clean_data(32, rng.generator(0)), generator=rng.generator(0))
    other = {"frozen": "weights", "weights": "frozen"}[kind]
    assert cost.kinds[f"backward fp32 {kind}"] >= 64
    # AWM's perturbation climbs with frozen weights.
    assert cost.kinds[f"backward fp32 {other}"] == 0 or method.name == "awm"


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
