from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

import networks as nets
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters import find_filters
from unbackdoor.filters.ablation import MEMORY, Pass, Recorder, ablate, bytes_an_image
from unbackdoor.filters.mask import FilterMask, PruneMode, cleared_tensors
from unbackdoor.filters.saliency import clean_loss
from unbackdoor.models import build
from unbackdoor.models.resnet import PreActResNet
from unbackdoor.types import LabelledImages

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet10": lambda: build("resnet10", width=4, num_classes=4, layout="torchvision", stem="7x7"),
    "preactresnet": lambda: PreActResNet((1, 1, 1, 1), width=4, num_classes=4),
    "vgg": nets.vgg_with_bias,
    "mobilenet": nets.MobileNet,
    "shufflenet": nets.ShuffleNet,
    "densenet": nets.DenseNet,
    "convnext": nets.ConvNeXt,
    "vit": nets.VisionTransformer,
    "shared_conv": nets.SharedConv,
    "in_place": nets.InPlace,
    "edited": nets.computed_weights,
    "squeeze": nets.network_in_network,
    "bare_norm": nets.norm_without_affine,
}


class _Ran(TorchDispatchMode):
    """Lists the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def data(count: int, *, size: int = 16) -> LabelledImages:
    return LabelledImages(nets.images(count, size=size), torch.arange(count) % nets.CLASSES)


def check(
    model: nn.Module, clean: LabelledImages, prune_mode: PruneMode = "silence", memory: int = MEMORY
) -> None:
    """Compare the first and the last filter of each layer with a pass over a pruned copy."""
    found = find_filters(model, clean.images[:1])
    chosen = [(group.name, index) for group in found.prunable for index in {0, group.filters - 1}]
    ablations = ablate(model, clean, found, chosen, prune_mode=prune_mode, memory=memory)
    assert ablations.base == pytest.approx(clean_loss(model, clean), abs=1e-6)
    for layer, index in chosen:
        pruned = FilterMask.full(found).without([(layer, index)]).apply(model, found, prune_mode=prune_mode)
        expected = clean_loss(pruned, clean)
        assert float(ablations.losses[layer][index]) == pytest.approx(expected, rel=2e-6, abs=1e-6), (
            layer,
            index,
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_are_those_of_pruned_copies_in_any_network(name: str) -> None:
    check(nets.randomise(NETWORKS[name]()), data(2))


@pytest.mark.parametrize("prune_mode", ["weight", "norm_scale"])
def test_all_ways_of_removing_are_followed(prune_mode: PruneMode) -> None:
    check(nets.randomise(nets.MobileNet()), data(2), prune_mode)


def test_batches_that_fit_into_memory_add_up() -> None:
    model = nets.randomise(nets.SmallConvNet())
    check(model, data(5, size=8), memory=2 * bytes_an_image(model, nets.images(1, size=8)))


def test_a_network_that_looks_at_its_values_runs_in_full() -> None:
    class Looks(nets.SmallConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)

    model = nets.randomise(Looks())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check(model, data(3, size=8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_lies_before_the_filter_is_not_done_again() -> None:
    model = nets.randomise(build("resnet10", width=4, num_classes=4))
    found = find_filters(model, nets.images(1))
    with torch.no_grad():
        run = Recorder(model).record(nets.images(2))
        assert isinstance(run, Pass)
        with _Ran() as ran:
            run.without(cleared_tensors(found.group("layer4.0.conv1"), "silence"), 0)
    # The filter itself is known to be silent, so only the next convolution runs, on one channel.
    assert ran.names.count("convolution") == 1


def test_a_filter_without_effect_changes_nothing_at_all() -> None:
    model = nets.randomise(build("vgg11_bn", width=4, num_classes=4))
    found = find_filters(model, nets.images(1))
    with torch.no_grad():
        model.get_parameter("features.1.bias")[2] = -100.0  # silenced by the ReLU
    ablations = ablate(model, data(3), found, [("features.0", 2)])
    assert float(ablations.changes()["features.0"][2]) == 0.0


def test_modes_and_all_filters_and_what_was_not_asked() -> None:
    model = nets.randomise(nets.SmallConvNet()).train()
    found = find_filters(model, nets.images(1, size=8))
    everything = ablate(model, data(2, size=8), found)
    assert model.training
    assert not any(torch.isnan(values).any() for values in everything.losses.values())
    assert set(everything.losses) == {group.name for group in found.prunable}
    name = found.prunable[0].name
    one = ablate(model, data(2, size=8), found, [(name, 1)])
    assert torch.isnan(one.losses[name]).tolist()[:2] == [True, False]


def test_what_cannot_be_measured_is_refused() -> None:
    model = nets.randomise(nets.SmallConvNet())
    found = find_filters(model, nets.images(1, size=8))
    with pytest.raises(InvalidInputError, match="needs images, got none"):
        ablate(model, data(0, size=8), found)
    with pytest.raises(InvalidInputError, match="no filter 999 in layer"):
        ablate(model, data(2, size=8), found, [(found.prunable[0].name, 999)])
