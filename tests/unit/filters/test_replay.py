from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import networks as nets
from unbackdoor.compute import logits_of
from unbackdoor.costs import metered
from unbackdoor.filters import find_filters
from unbackdoor.filters.mask import cleared_tensors
from unbackdoor.filters.replay import Replay
from unbackdoor.models import build

IMAGES = nets.images(5)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: build("resnet18", width=8, num_classes=4),
    "torchvision": lambda: build("resnet18", width=8, num_classes=4, layout="torchvision", stem="7x7"),
    "preactresnet18": lambda: build("preactresnet18", width=8, num_classes=4),
    "vgg11": lambda: build("vgg11", width=8, num_classes=4),
    "mobilenet": nets.MobileNet,
    "shufflenet": nets.ShuffleNet,
    "densenet": nets.DenseNet,
    "convnext": nets.ConvNeXt,
    "vit": nets.VisionTransformer,
    "shared_conv": nets.SharedConv,
    "shared_norm": nets.SharedNorm,
    "in_place": nets.InPlace,
    "functional": nets.Functional,
    "edited": nets.computed_weights,
    "control_flow": nets.ControlFlow,
    "squeeze": nets.network_in_network,
}


class TiedEarly(nn.Module):
    """Uses the weight of its last layer before that layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.second.weight.sum()
        logits: Tensor = self.head(self.second(x).relu().mean((2, 3)))
        return logits


class Swapping(nn.Module):
    """Runs two layers in an order that depends on what the first one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.right(self.left(x)) if x.mean() > 0 else self.left(self.right(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("name", NETWORKS)
def test_a_replay_from_any_layer_gives_the_bits_of_a_full_pass(name: str) -> None:
    model = nets.randomise(NETWORKS[name]())
    replay = Replay(model, IMAGES, batch_size=3)
    assert torch.equal(replay.record(), logits_of(model, IMAGES, batch_size=3))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in find_filters(model, IMAGES[:1]).prunable:
        changed = cleared_tensors(group, "silence")
        for index in (0, group.filters - 1):  # the second one is answered without the comparison
            before = {each: tensors[each].detach()[index].clone() for each in changed}
            for each in changed:
                tensors[each].detach()[index] = 0.0
            assert torch.equal(replay.logits_after(changed), logits_of(model, IMAGES, batch_size=3))
            for each, value in before.items():
                tensors[each].detach()[index] = value
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_kept_is_what_a_full_pass_would_have_recorded(name: str) -> None:
    model = nets.randomise(NETWORKS[name]())
    replay = Replay(model, IMAGES, batch_size=3)
    replay.record()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    groups = find_filters(model, IMAGES[:1]).prunable
    for group in groups[len(groups) // 2 :] + groups[: len(groups) // 2]:
        changed = cleared_tensors(group, "silence")
        for each in changed:
            tensors[each].detach()[0] = 0.0
        replay.logits_after(changed)
        replay.keep(changed)
        last = cleared_tensors(groups[-1], "silence")
        assert torch.equal(replay.logits_after(last), logits_of(model, IMAGES, batch_size=3))


def test_keeping_runs_from_the_changed_layer() -> None:
    model = nets.randomise(build("resnet18", width=8, num_classes=4))
    replay = Replay(model, IMAGES)
    replay.record()
    replay.logits_after(["layer3.1.conv2.weight"])
    with metered() as cost:
        replay.keep(["layer3.1.conv2.weight"])
    assert "forward fp32" not in cost.kinds
    assert 0 < cost.kinds["forward fp32 replayed"] < len(IMAGES)


def test_keeping_notices_that_modules_run_in_another_order() -> None:
    model = nets.randomise(Swapping())
    with torch.no_grad():
        model.get_parameter("first.weight").zero_()
    replay = Replay(model, IMAGES)
    replay.record()
    replay.logits_after(["right.weight"])  # compared with a full pass now, and not again
    with torch.no_grad():
        model.get_parameter("first.bias").fill_(-1.0)
    replay.logits_after(["first.weight", "first.bias"])
    replay.keep(["first.weight", "first.bias"])
    with torch.no_grad():
        model.get_parameter("right.weight").mul_(2)
    assert torch.equal(replay.logits_after(["right.weight"]), logits_of(model, IMAGES))


def test_work_before_the_changed_layer_is_not_done_again() -> None:
    model = nets.randomise(build("resnet18", width=8, num_classes=4))
    replay = Replay(model, IMAGES)
    replay.record()
    ran: list[str] = []
    for name in ("conv1", "layer1.0.conv1", "layer3.1.conv2", "layer4.1.conv2"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    replay.logits_after(["layer3.1.conv2.weight"])  # compares with a full pass
    ran.clear()
    replay.logits_after(["layer3.1.conv2.weight"])
    assert "layer1.0.conv1" not in ran
    assert {"layer3.1.conv2", "layer4.1.conv2"} <= set(ran)


def test_only_few_images_are_compared_with_a_full_pass() -> None:
    model = nets.randomise(build("resnet18", width=8, num_classes=4))
    replay = Replay(model, nets.images(50))
    replay.record()
    with metered() as cost:
        replay.logits_after(["layer3.1.conv2.weight"])
    assert cost.kinds["forward fp32"] == 32
    assert 0 < cost.kinds["forward fp32 replayed"] < 50


def test_recording_again_takes_changes_for_good() -> None:
    model = nets.randomise(build("resnet18", width=8, num_classes=4))
    replay = Replay(model, IMAGES)
    replay.record()
    with torch.no_grad():
        model.get_parameter("conv1.weight")[0] = 0
    replay.record()
    with torch.no_grad():
        model.get_parameter("layer4.1.conv2.weight")[0] = 0
    for _ in range(2):
        assert torch.equal(replay.logits_after(["layer4.1.conv2.weight"]), logits_of(model, IMAGES))


def test_weights_used_before_their_layer_are_noticed() -> None:
    model = nets.randomise(TiedEarly())
    replay = Replay(model, IMAGES)
    replay.record()
    for index in range(3):
        with torch.no_grad():
            model.get_parameter("second.weight")[index] = 0
        assert torch.equal(replay.logits_after(["second.weight"]), logits_of(model, IMAGES))


def test_what_does_not_fit_into_memory_runs_in_full() -> None:
    model = nets.randomise(build("resnet18", width=8, num_classes=4))
    replay = Replay(model, IMAGES, batch_size=2, memory=1000)
    replay.record()
    with torch.no_grad():
        model.get_parameter("layer4.1.conv2.weight")[0] = 0
    assert torch.equal(replay.logits_after(["layer4.1.conv2.weight"]), logits_of(model, IMAGES, batch_size=2))


def test_modes_are_restored() -> None:
    model = nets.randomise(build("resnet18", width=8, num_classes=4)).train()
    model.get_submodule("layer1").eval()
    replay = Replay(model, IMAGES)
    replay.record()
    replay.logits_after(["layer2.0.conv1.weight"])
    assert model.training
    assert not model.get_submodule("layer1.0.bn1").training


class Halves(nn.Module):
    """Two convolutions with equally many multiply-adds, in blocks, and a head of a few."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x)).mean((2, 3)))
        return logits


def test_a_pass_costs_what_it_does_again() -> None:
    model = Halves()
    images = torch.rand(100, 3, 8, 8)
    replay = Replay(model, images)
    with metered() as recorded:
        replay.record()
    assert recorded.kinds == {"forward fp32": 100}
    for layer, share in (("first.0", 1.0), ("second.0", 0.5), ("head", 0.0)):
        replay.logits_after([f"{layer}.weight"])  # compares with a full pass
        with metered() as cost:
            replay.logits_after([f"{layer}.weight"])
        assert cost.forward_images == pytest.approx(100 * share, abs=1), layer
        assert list(cost.kinds) == ["forward fp32" if share == 1 else "forward fp32 replayed"], layer
