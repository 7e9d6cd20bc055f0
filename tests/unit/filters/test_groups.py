from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import networks as nets
from unbackdoor import rng
from unbackdoor.errors import UnsupportedModelError
from unbackdoor.filters import FilterGroup, FilterMap, FilterMask, find_filters
from unbackdoor.models.normalise import NormalisedModel
from unbackdoor.models.registry import build
from unbackdoor.suppression import Suppression, suppress
from unbackdoor.testing.subjects import small_data


class Case(NamedTuple):
    """A network and what must be found in it; ``norms`` by their scale (or mean), a ``+`` for foldable."""

    make: Callable[[], nn.Module]
    groups: dict[str, tuple[int, tuple[str, ...]]]
    head: str | None
    untreated: dict[str, str] = {}  # noqa: RUF012 - read only


def bare(filters: int) -> tuple[int, tuple[str, ...]]:
    return filters, ()


def normed(filters: int, *norms: str) -> tuple[int, tuple[str, ...]]:
    return filters, norms


CONV_BN_HEAD = {"0": normed(8, "1.weight+"), "3.fc": bare(4)}

CASES = {
    "mobilenet": Case(
        nets.MobileNet,
        {
            "stem.0": normed(8, "stem.1.weight+"), "wide.0": normed(16, "wide.1.weight+"),
            "depthwise": normed(16, "depthwise_bn.weight+"), "se.reduce": bare(4), "se.expand": bare(16),
            "project.0": normed(8, "project.1.weight+"), "head.0": bare(12), "head.3": bare(4),
        },
        "head.3",
    ),
    "shufflenet": Case(
        nets.ShuffleNet,
        {
            "conv1": normed(8, "bn1.weight+"), "conv2": normed(8, "bn2.weight+"),
            "conv3": normed(4, "bn3.weight+"), "head.fc": bare(4),
        },
        "head.fc",
    ),
    "densenet": Case(
        nets.DenseNet,
        {
            "stem": bare(8), "conv1": normed(6, "norm2.weight+"), "conv2": bare(4), "conv3": bare(4),
            "head.fc": bare(4),
        },
        "head.fc",
    ),
    "convnext": Case(
        nets.ConvNeXt,
        {
            "stem": normed(8, "stem_norm.weight"), "dwconv": normed(8, "norm.weight"), "up": bare(16),
            "down": bare(8), "head": bare(4),
        },
        "head",
        {"gamma": "used by mul"},
    ),
    "vit": Case(
        nets.VisionTransformer,
        {
            "patch": bare(8), "block.self_attn.in_proj_weight": bare(24), "block.self_attn.out_proj": bare(8),
            "block.linear1": bare(16), "block.linear2": bare(8), "head": bare(4),
        },
        "head",
        {"token": "used by cat, expand", "position": "used by add"},
    ),
    "vgg_with_bias": Case(
        nets.vgg_with_bias,
        {"0": normed(8, "1.weight+"), "4": normed(12, "5.weight+"), "9": bare(16), "12": bare(4)},
        "12",
    ),
    "relu_before_norm": Case(
        nets.relu_before_norm,
        {"0": normed(8, "2.weight"), "3": normed(8, "6.running_mean"), "7.fc": bare(4)},
        "7.fc",
    ),
    "norm_without_affine": Case(
        nets.norm_without_affine, {"0": normed(8, "1.running_mean"), "3.fc": bare(4)}, "3.fc"
    ),
    "sigmoid_before_bare_norm": Case(
        nets.sigmoid_before_bare_norm, {"3.fc": bare(4)}, "3.fc", {"0": "no scale and shift to clear"}
    ),
    "bare_layer_norm": Case(nets.bare_layer_norm, {"3": bare(4)}, "3", {"1": "no scale and shift to clear"}),
    "shared_norm": Case(
        nets.SharedNorm,
        {"head.fc": bare(4)},
        "head.fc",
        {"a": "(norm.weight) also serves other layers", "b": "(norm.weight) also serves other layers"},
    ),
    "shared_conv": Case(
        nets.SharedConv,
        {"stem": bare(8), "conv": normed(8, "norm1.weight", "norm2.weight"), "head.fc": bare(4)},
        "head.fc",
    ),
    "computed_weights": Case(
        nets.computed_weights,
        {"7.fc": bare(4)},
        "7.fc",
        {
            "0": "computed from '0.weight'", "3": "computed from '3.weight'",
            "5.parametrizations.weight.original0": "used by _weight_norm_interface",
            "5.parametrizations.weight.original1": "computed from '5.parametrizations.weight.original1'",
        },
    ),
    "transposed": Case(
        nets.transposed, {"0": bare(8), "5.fc": bare(4)}, "5.fc", {"2": "it is a transposed convolution"}
    ),
    "functional": Case(
        nets.Functional, {"kernel": normed(8, "scale+"), "pointwise": bare(6), "out": bare(4)}, "out"
    ),
    "inputs_as_rows": Case(
        nets.InputsAsRows,
        {"head": bare(4)},
        "head",
        {"rows": "stored with inputs as rows", "flat": "does not have one row for each of its 8 outputs"},
    ),
    "control_flow": Case(
        nets.ControlFlow,
        {"stem": normed(8, "bn.weight+"), "bright": bare(8), "head.fc": bare(4)},
        "head.fc",
        {"dark": "not used in the pass", "dark.bias": "not used in the pass"},
    ),
    "in_place": Case(
        nets.InPlace,
        {
            "conv1": normed(8, "bn1.weight+"), "conv2": normed(8, "bn2.weight+"), "conv3": bare(8),
            "head.fc": bare(4),
        },
        "head.fc",
    ),
    "group_norm": Case(
        nets.group_norm,
        {"0": normed(8, "1.weight"), "3": normed(8, "4.weight"), "9.fc": bare(4)},
        "9.fc",
        {"6": "no scale and shift to clear"},
    ),
    "mlp": Case(
        nets.mlp, {"1": normed(16, "2.weight+"), "4": normed(8, "5.weight+"), "7": bare(4)}, "7"
    ),
    "network_in_network": Case(
        nets.network_in_network, {"0": bare(8), "2": bare(4)}, "2", {"1": "used by _prelu_kernel"}
    ),
    "log_probabilities": Case(nets.log_probabilities, CONV_BN_HEAD, "3.fc"),
    "two_heads": Case(
        nets.TwoHeads,
        {"conv": normed(8, "bn.weight+"), "mean_head": bare(4), "max_head": bare(4)},
        "mean_head",
    ),
    "logits_after_norm": Case(
        nets.logits_after_norm,
        {"0": bare(8), "3.fc": normed(4, "4.weight+")},
        None,
        {"<output>": "no layer yields the logits directly"},
    ),
    "wrapped": Case(
        nets.Wrapped, {"module.0": normed(8, "module.1.weight+"), "module.3.fc": bare(4)}, "module.3.fc"
    ),
    "frozen": Case(nets.frozen, CONV_BN_HEAD, "3.fc"),
    "auxiliary": Case(
        nets.Auxiliary,
        {"conv": normed(8, "bn.weight+"), "head.fc": bare(4)},
        "head.fc",
        {"aux": "not used in the pass", "aux.bias": "not used in the pass"},
    ),
    "fixed_kernel": Case(
        nets.FixedKernel,
        {"conv": normed(8, "bn.weight"), "head.fc": bare(4)},
        "head.fc",
        {"kernel": "is a buffer"},
    ),
    "batch_statistics": Case(
        nets.BatchStatistics, {"conv": normed(8, "scale"), "head.fc": bare(4)}, "head.fc"
    ),
    "hand_written_norm": Case(
        nets.HandWrittenNorm,
        {"conv": bare(8), "head.fc": bare(4)},
        "head.fc",
        {"scale": "used by mul", "shift": "used by add"},
    ),
}  # fmt: skip

OURS = ("resnet18", "resnet50", "preactresnet18", "vgg11", "vgg11_bn")


def ours(name: str) -> nn.Module:
    with rng.isolated(rng.generator(0)):
        model = build(name, num_classes=nets.CLASSES, width=4)
    return nets.randomise(NormalisedModel(model, (0.5,) * 3, (0.25,) * 3))


def norm_names(group: FilterGroup) -> tuple[str, ...]:
    return tuple(f"{n.weight or n.running_mean}{'+' if n.foldable else ''}" for n in group.norms)


@pytest.mark.parametrize("name", CASES)
def test_finds_groups_norms_head_and_leftovers(name: str) -> None:
    case = CASES[name]
    found = find_filters(nets.randomise(case.make()), nets.images())
    assert {g.name: (g.filters, norm_names(g)) for g in found.groups} == case.groups
    assert (found.head.name if found.head else None) == case.head
    reasons = {item.name: item.reason for item in found.untreated}
    assert set(reasons) == set(case.untreated)
    for item, fragment in case.untreated.items():
        assert fragment in reasons[item], reasons[item]


def silenced_everywhere(model: nn.Module, found: FilterMap, inputs: Tensor, seed: int = 0) -> None:
    """Assert that removing one random filter a group silences it, and nothing else of its layer."""
    generator = rng.generator(seed)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = nets.watch(model, inputs)
    for group in found.prunable:
        j = int(torch.randint(group.filters, (1,), generator=generator))
        pruned = FilterMask.full(found).without([(group.name, j)]).apply(model, found)
        after = nets.watch(pruned, inputs)
        others = [i for i in range(group.filters) if i != j]
        for name in (group.weight, *(n.weight or n.running_mean or "" for n in group.norms)):
            for output in after[name]:
                assert output[j].abs().max() == 0.0, (group.name, j, name)
            assert before[name][0][j].abs().max() > 0.0, "the test sees nothing if it was silent before"
        # A second use of the layer sees what the first made of it; layer and group norms mix channels.
        torch.testing.assert_close(after[group.weight][0][others], before[group.weight][0][others])
        if group.norms and group.norms[0].kind == "batch":
            name = group.norms[0].weight or group.norms[0].running_mean or ""
            torch.testing.assert_close(after[name][0][others], before[name][0][others])
    now = model.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in original.items())


# FixedKernel counts its calls in a buffer, so the comparison of its buffers would see the passes made here.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("fixed_kernel", "batch_statistics")])
def test_a_removed_filter_is_exactly_silent(name: str) -> None:
    model = nets.randomise(CASES[name].make())
    found = find_filters(model, nets.images())
    silenced_everywhere(model, found, nets.images())


@pytest.mark.parametrize("name", OURS)
def test_a_removed_filter_of_our_networks_is_exactly_silent(name: str) -> None:
    model = ours(name)
    found = find_filters(model, nets.images(1))
    thinned = FilterMap(found.groups[:6] + found.groups[-3:])
    silenced_everywhere(model, thinned, nets.images(2))


@pytest.mark.parametrize("make", [nets.Functional, nets.MobileNet, nets.norm_without_affine])
def test_every_filter_of_every_layer_can_be_silenced_at_once(make: Callable[[], nn.Module]) -> None:
    model = nets.randomise(make())
    found = find_filters(model, nets.images())
    everything = [(g.name, j) for g in found.prunable for j in range(g.filters)]
    after = nets.watch(FilterMask.full(found).without(everything).apply(model, found), nets.images())
    for group in found.prunable:
        for name in (group.weight, *(n.weight or n.running_mean or "" for n in group.norms)):
            assert all(output.abs().max() == 0.0 for output in after[name])


class Expected(NamedTuple):
    layers: int
    foldable: int
    head: str


EXPECTED = {
    "resnet18": Expected(21, 20, "network.linear"),
    "resnet50": Expected(54, 53, "network.linear"),
    "preactresnet18": Expected(21, 8, "network.linear"),
    "vgg11": Expected(9, 0, "network.classifier"),
    "vgg11_bn": Expected(9, 8, "network.classifier"),
}


@pytest.mark.parametrize("name", OURS)
def test_our_networks_are_treated_whole(name: str) -> None:
    model = ours(name)
    found = find_filters(model, nets.images(1))
    modules = dict(model.named_modules())
    layers = {n for n, m in modules.items() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {g.name for g in found.groups} == layers
    assert len(found.groups) == EXPECTED[name].layers
    assert sum(n.foldable for g in found.groups for n in g.norms) == EXPECTED[name].foldable
    assert found.untreated == ()
    assert found.head is not None
    assert found.head.name == EXPECTED[name].head
    assert found.head not in found.prunable
    assert len(found.prunable) == len(found.groups) - 1


def test_resnet_pairs_each_convolution_with_the_norm_of_its_number() -> None:
    found = find_filters(ours("resnet18"), nets.images(1))
    for group in found.prunable:
        expected = group.name.replace("conv", "bn").replace("shortcut.0", "shortcut.1") + ".weight"
        assert [norm.weight for norm in group.norms] == [expected]


def test_preactresnet_pairs_only_norms_that_read_a_convolution_directly() -> None:
    found = find_filters(ours("preactresnet18"), nets.images(1))
    # The norm of the first block reads the stem, and so does the identity shortcut: no folding.
    stem = found.group("network.conv1")
    assert [(n.weight, n.foldable) for n in stem.norms] == [("network.layer1.0.bn1.weight", False)]
    inner = found.group("network.layer2.0.conv1")
    assert [(n.weight, n.foldable) for n in inner.norms] == [("network.layer2.0.bn2.weight", True)]
    assert found.group("network.layer2.0.conv2").norms == ()


def test_resnet18_of_full_width_has_the_published_number_of_filters() -> None:
    with rng.isolated(rng.generator(0)):
        found = find_filters(build("resnet18"), nets.images(1, size=8))
    assert sum(group.filters for group in found.prunable) == 4800


def test_heads_that_are_summed_are_all_kept() -> None:
    found = find_filters(nets.TwoHeads(), nets.images())
    assert [g.name for g in found.groups if g.is_head] == ["mean_head", "max_head"]
    assert [g.name for g in found.prunable] == ["conv"]


def test_a_residual_sum_before_the_head_makes_no_head() -> None:
    found = find_filters(nets.randomise(nets.InPlace()), nets.images())
    assert [g.name for g in found.groups if g.is_head] == ["head.fc"]


def test_norms_carry_their_own_epsilon() -> None:
    found = find_filters(nets.randomise(nets.Functional()), nets.images())
    assert found.group("kernel").norms[0].eps == pytest.approx(1e-3)
    assert find_filters(nets.mlp(), nets.images()).group("1").norms[0].eps == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["mobilenet", "vit", "frozen", "fixed_kernel", "batch_statistics"])
def test_tracing_leaves_everything_as_it_was(name: str) -> None:
    model = nets.randomise(CASES[name].make()).train()
    next(iter(model.children())).eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    ids = [id(t) for t in (*model.parameters(), *model.buffers())]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        find_filters(model, nets.images())
        assert not torch.is_grad_enabled()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in state.items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == ids
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_order_of_groups_is_that_of_the_pass_not_of_the_definition() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(8, 4), nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.first(x).mean((2, 3)))
            return logits

    assert [g.name for g in find_filters(Reversed(), nets.images()).groups] == ["first", "last"]


def test_one_image_and_many_give_the_same_filters() -> None:
    model = nets.randomise(nets.ShuffleNet())
    assert find_filters(model, nets.images(1)) == find_filters(model, nets.images(7))


def test_an_unknown_layer_is_an_error_that_names_the_known_ones() -> None:
    found = find_filters(nets.mlp(), nets.images())
    with pytest.raises(UnsupportedModelError, match=r"no layer 'conv9' .* 1, 4, 7"):
        found.group("conv9")


class Counting(nn.Module):
    """A network with a parameter that counts, and can have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros((), dtype=torch.int64), requires_grad=False)
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).mean((2, 3)))
        return logits


def test_a_parameter_that_is_no_float_is_left_alone() -> None:
    model, data = Counting().eval(), small_data(16)
    assert [group.name for group in find_filters(model, data.floats()[:1]).prunable] == ["conv"]
    options = Suppression(budget=2, batch_size=8, stop_accuracy=0.0)
    suppressed = suppress(model, data, options, generator=rng.generator(0))
    assert suppressed.model.state_dict()["calls"].dtype == torch.int64


def test_a_tuple_output_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"logits \(N, K\), got tuple"):
        find_filters(nets.TupleOutput(), nets.images())


def test_a_feature_map_as_output_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"logits \(N, K\), got \(1, 8, 14, 14\)"):
        find_filters(nn.Conv2d(3, 8, 3), nets.images())


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no convolution or linear layer"):
        find_filters(nn.Flatten(), nets.images())


def test_a_wrong_image_size_is_refused_and_the_model_restored() -> None:
    model = nets.mlp().train()
    with pytest.raises(UnsupportedModelError, match=r"shape \(3, 20, 20\)"):
        find_filters(model, nets.images(size=20))
    assert all(module.training for module in model.modules())


TORCHVISION = {
    "resnet18": (21, 4810, "fc"),
    "mobilenet_v3_small": (54, 9978, "classifier.3"),
    "densenet121": (121, 10250, "classifier"),
    "convnext_tiny": (59, 41194, "classifier.2"),
    "shufflenet_v2_x0_5": (57, 3986, "fc"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(name: str) -> None:
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchvision cannot be imported here: {error}")
    with rng.isolated(rng.generator(0)):
        model = nets.randomise(getattr(torchvision.models, name)(num_classes=10))
    found = find_filters(model, nets.images(1, size=64))
    head = found.head.name if found.head else None
    assert (len(found.groups), sum(g.filters for g in found.groups), head) == TORCHVISION[name]
    silenced_everywhere(model, FilterMap(found.groups[:3] + found.groups[-2:]), nets.images(2, size=64))


def test_layers_say_which_filters_they_read() -> None:
    residual = find_filters(build("resnet18", width=4), torch.zeros(1, 3, 16, 16))
    reads = {group.name: group.reads for group in residual.groups}
    assert reads["conv1"] == ()
    assert reads["layer1.0.conv1"] == ("conv1",)
    assert reads["layer1.0.conv2"] == ("layer1.0.conv1",)
    assert reads["layer1.1.conv1"] == ("conv1", "layer1.0.conv2")
    shortcut = next(name for name in reads if name.startswith("layer2.0.") and "conv" not in name)
    assert reads[shortcut] == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert set(reads["layer2.1.conv1"]) == {"layer2.0.conv2", shortcut}
    assert residual.head is not None
    assert len(residual.head.reads) == 3
