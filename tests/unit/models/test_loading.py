from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, MismatchedCheckpointError
from unbackdoor.models.checkpoint import read_checkpoint, write_tensors
from unbackdoor.models.loading import load_model, save_like
from unbackdoor.models.normalise import NormalisedModel
from unbackdoor.models.registry import ARCHITECTURES, build

State = dict[str, Tensor]

USER = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, num_classes)
        self.register_buffer("scale", torch.rand(1) + 1, persistent=False)

    def forward(self, x):
        return self.head(self.model(x).mean((2, 3)))


def inner(num_classes=10):
    net = nn.Module()
    net.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes))
    return net


def fixed():
    return Net(6)


def headless():
    return nn.Sequential(nn.Conv2d(3, 4, 3))


class Late(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.head = nn.Linear(32, num_classes)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 32))

    def forward(self, x):
        return self.head(self.body(x))
"""


def trained(name: str = "resnet10", **options: int | str) -> nn.Module:
    with rng.isolated(rng.generator(1)):
        model = build(name, **{"num_classes": 5, "width": 4} | options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = torch.randn(module.num_features)
                module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(4, channels, size, size, generator=rng.generator(2))


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def assert_same(model: nn.Module, expected: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad():
        assert torch.allclose(model(inputs), expected(inputs), atol=1e-6)


@pytest.fixture
def user(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(USER)
    return str(path)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_of_ours(tmp_path: Path, name: str) -> None:
    model = trained(name, in_channels=2)
    path = save(model.state_dict(), tmp_path / "m.pt")
    loaded = load_model(path, name)
    assert loaded.num_classes == 5
    assert (loaded.normalisation, loaded.key_prefix) == ("none", "")
    assert not loaded.architecture.is_user_code
    assert_same(loaded.model, model, images(2))


@pytest.mark.parametrize("stem", ["3x3", "7x7"])
@pytest.mark.parametrize("layout", ["cifar", "torchvision"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_layouts(tmp_path: Path, name: str, layout: str, stem: str) -> None:
    model = trained(name, layout=layout, stem=stem)
    path = save(model.state_dict(), tmp_path / "m.pt")
    assert_same(load_model(path, name).model, model, images())


def test_names_of_other_projects(tmp_path: Path) -> None:
    """The same weights under the names of torchvision are the same function."""
    model = trained("resnet18")
    renamed = {
        name.replace(".shortcut.", ".downsample.").replace("linear.", "fc."): tensor
        for name, tensor in model.state_dict().items()
    }
    assert "layer2.0.downsample.0.weight" in renamed
    assert "fc.bias" in renamed
    loaded = load_model(save(renamed, tmp_path / "m.pt"), "resnet18")
    assert_same(loaded.model, model, images())


def test_preact_names(tmp_path: Path) -> None:
    names = set(trained("preactresnet18").state_dict())
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer2.0.shortcut.0.weight", "linear.weight"} <= names
    assert "layer2.0.shortcut.1.weight" not in names
    assert "bn1.weight" not in names


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "module.model.", "_orig_mod.module.net."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    model = trained()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    loaded = load_model(save({"state_dict": state}, tmp_path / "m.pt"), "resnet10")
    assert loaded.key_prefix == prefix
    assert loaded.checkpoint.container == "state_dict"
    assert_same(loaded.model, model, images())


def test_prefix_that_is_not_common_is_kept(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in trained().state_dict().items()}
    state["extra"] = torch.zeros(1)
    with pytest.raises(MismatchedCheckpointError, match=r"unexpected: 'extra', 'module\.bn1\.bias'"):
        load_model(save(state, tmp_path / "m.pt"), "resnet10")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    loaded = load_model(save(state, tmp_path / "m.pt"), "resnet10")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert_same(loaded.model, model.to(dtype).float(), images())


def test_result_is_complete_trainable_and_independent(tmp_path: Path) -> None:
    loaded = load_model(save(trained().state_dict(), tmp_path / "m.pt"), "resnet10")
    tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    with torch.no_grad():
        next(loaded.model.parameters()).zero_()
    assert loaded.checkpoint.tensors["conv1.weight"].abs().sum() > 0


def test_global_randomness_is_untouched(tmp_path: Path, user: str) -> None:
    own = save(trained().state_dict(), tmp_path / "m.pt")
    theirs = save(user_state(5), tmp_path / "u.pt")
    before = torch.get_rng_state()
    load_model(own, "resnet10")
    load_model(theirs, f"{user}:inner", num_classes=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_counters_may_be_absent_or_unknown(tmp_path: Path) -> None:
    model = trained()
    state = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert_same(load_model(save(state, tmp_path / "m.pt"), "resnet10").model, model, images())
    state["other.num_batches_tracked"] = torch.tensor(3)
    assert_same(load_model(save(state, tmp_path / "n.pt"), "resnet10").model, model, images())


def test_loading_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Drawing random weights on the meta device imports 800 modules, which takes seconds."""
    path = save(trained("resnet10").state_dict(), tmp_path / "m.pt")
    code = (
        "import sys; from pathlib import Path; from unbackdoor.models.loading import load_model; "
        f"load_model(Path({str(path)!r}), 'resnet10'); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Mismatches


def change(edit: Callable[[State], object]) -> State:
    state = dict(trained().state_dict())
    edit(state)
    return state


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("bn1.weight"), "1 missing: 'bn1.weight'; name the architecture"),
        (lambda s: s.update(odd=torch.zeros(1)), "1 unexpected: 'odd'"),
        (
            lambda s: s.update({"bn1.weight": torch.zeros(9)}),
            r"1 of another shape: 'bn1.weight' \(9,\) float32 instead of \(4,\) float32",
        ),
        (lambda s: s.update({"bn1.weight": torch.zeros(4, dtype=torch.int8)}), "int8 instead of"),
        (lambda s: [s.pop(n) for n in list(s) if "layer3" in n], r"15 missing: .*, \.\.\.; name"),
        (lambda s: s.pop("conv1.weight"), "1 missing: 'conv1.weight'; .* of another shape"),
        (lambda s: s.update({"conv1.weight": torch.zeros(2**20, 2**20, 0, 3)}), "does not fit 'resnet10'"),
        (lambda s: s.update({"conv1.weight": torch.zeros(3)}), "of another shape"),
        (lambda s: s.update({"\x1b[2J": torch.zeros(1)}), r"unexpected: '\\x1b\[2J'"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, edit: Callable[[State], object], message: str) -> None:
    with pytest.raises(MismatchedCheckpointError, match=message):
        load_model(save(change(edit), tmp_path / "m.pt"), "resnet10")


def test_the_right_architecture_is_suggested(tmp_path: Path) -> None:
    path = save(trained("resnet18").state_dict(), tmp_path / "m.pt")
    with pytest.raises(
        MismatchedCheckpointError, match=r"unexpected: .*; it fits 'resnet18', name that one\."
    ):
        load_model(path, "resnet10")


def test_absurd_widths_allocate_nothing(tmp_path: Path) -> None:
    state = change(lambda s: s.update({"conv1.weight": torch.zeros(2**18, 1, 1, 1)}))
    with pytest.raises(MismatchedCheckpointError, match="does not fit 'resnet10'"):
        load_model(save(state, tmp_path / "m.pt"), "resnet10")


@pytest.mark.parametrize(("option", "has"), [("num_classes", 5), ("width", 4), ("in_channels", 3)])
def test_options_that_differ_from_the_file(tmp_path: Path, option: str, has: int) -> None:
    path = save(trained().state_dict(), tmp_path / "m.pt")
    with pytest.raises(MismatchedCheckpointError, match=f"has {option} {has} but 7 was given"):
        load_model(path, "resnet10", **{option: 7})  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=f"{option} must be at least 1, got 0"):
        load_model(path, "resnet10", **{option: 0})  # type: ignore[arg-type]
    assert load_model(path, "resnet10", **{option: has}).num_classes == 5  # type: ignore[arg-type]


# --- Normalisation

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def test_mean_and_std_of_the_caller(tmp_path: Path) -> None:
    model = trained()
    loaded = load_model(save(model.state_dict(), tmp_path / "m.pt"), "resnet10", mean=MEAN, std=STD)
    assert loaded.normalisation == "option"
    assert_same(loaded.model, NormalisedModel(model, MEAN, STD), images())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_normalisation_in_the_file(tmp_path: Path, prefix: str) -> None:
    model = NormalisedModel(trained(), MEAN, STD)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = save(state, tmp_path / "m.pt")
    loaded = load_model(path, "resnet10")
    assert (loaded.normalisation, loaded.key_prefix) == ("checkpoint", prefix)
    assert isinstance(loaded.model, NormalisedModel)
    assert torch.equal(loaded.model.normalise.mean, model.normalise.mean)
    assert torch.equal(loaded.model.normalise.std, model.normalise.std)
    assert_same(loaded.model, model, images())
    with pytest.raises(InvalidInputError, match="carries its own normalisation"):
        load_model(path, "resnet10", mean=MEAN, std=STD)


def test_prefix_inside_of_the_wrapper(tmp_path: Path) -> None:
    model = NormalisedModel(trained(), MEAN, STD)
    state = {n.replace("network.", "network.module."): t for n, t in model.state_dict().items()}
    loaded = load_model(save(state, tmp_path / "m.pt"), "resnet10")
    assert_same(loaded.model, model, images())


def test_unusable_normalisation(tmp_path: Path) -> None:
    path = save(trained().state_dict(), tmp_path / "m.pt")
    with pytest.raises(InvalidInputError, match="give both or neither"):
        load_model(path, "resnet10", mean=MEAN)
    with pytest.raises(InvalidInputError, match="mean has 2 channels but the network takes 3"):
        load_model(path, "resnet10", mean=(0.5, 0.5), std=(0.5, 0.5))
    assert load_model(path, "resnet10", mean=(0.5,), std=(0.5,)).normalisation == "option"
    state = NormalisedModel(trained(), MEAN, STD).state_dict()
    state["normalise.std"].zero_()
    with pytest.raises(InvalidInputError, match="std positive"):
        load_model(save(state, path), "resnet10")


# --- Networks of the user


def user_state(outputs: int, prefix: str = "") -> State:
    return {
        f"{prefix}model.0.weight": torch.ones(4, 3, 3, 3),
        f"{prefix}model.0.bias": torch.ones(4),
        f"{prefix}model.1.weight": torch.ones(outputs, 4),
        f"{prefix}model.1.bias": torch.ones(outputs),
    }


@pytest.mark.parametrize("prefix", ["", "module.", "net.module."])
def test_names_of_the_user_that_look_like_prefixes(tmp_path: Path, user: str, prefix: str) -> None:
    path = save(user_state(5, prefix), tmp_path / "m.pt")
    loaded = load_model(path, f"{user}:inner", num_classes=5)
    assert loaded.key_prefix == prefix
    assert loaded.architecture.is_user_code
    assert loaded.num_classes == 5
    assert torch.equal(loaded.model.state_dict()["model.1.bias"], torch.ones(5))


def test_user_network_that_needs_real_memory(tmp_path: Path, user: str) -> None:
    state = {
        "model.0.weight": torch.ones(4, 3, 3, 3), "model.0.bias": torch.ones(4),
        "model.1.weight": torch.ones(4), "model.1.bias": torch.ones(4), "model.1.running_mean": torch.ones(4),
        "model.1.running_var": torch.ones(4), "head.weight": torch.ones(6, 4), "head.bias": torch.ones(6),
    }  # fmt: skip
    path = save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "m.pt")
    loaded = load_model(path, f"{user}:fixed", mean=MEAN, std=STD)
    assert loaded.num_classes == 6
    assert loaded.model(images()).shape == (4, 6)
    with pytest.raises(MismatchedCheckpointError, match="has 6 classes but num_classes 9 was given"):
        load_model(path, f"{user}:fixed", num_classes=9)
    with pytest.raises(InvalidInputError, match="takes no width"):
        load_model(path, f"{user}:fixed", width=9)


def test_a_head_that_is_registered_first_is_found_by_asking_the_network(tmp_path: Path, user: str) -> None:
    state = {
        "head.weight": torch.ones(7, 32), "head.bias": torch.ones(7), "body.0.weight": torch.ones(4, 3, 3, 3),
        "body.0.bias": torch.ones(4), "body.3.weight": torch.ones(32, 4), "body.3.bias": torch.ones(32),
    }  # fmt: skip
    path = save(state, tmp_path / "m.pt")
    assert load_model(path, f"{user}:Late").num_classes == 7
    assert load_model(path, f"{user}:Late", num_classes=7).num_classes == 7


def test_user_network_that_does_not_fit(tmp_path: Path, user: str) -> None:
    path = save(user_state(5), tmp_path / "m.pt")
    with pytest.raises(MismatchedCheckpointError, match=r"'model.1.bias' \(5,\) float32 instead of \(10,\)"):
        load_model(path, f"{user}:inner")
    state = {"0.weight": torch.zeros(4, 3, 3, 3), "0.bias": torch.zeros(4)}
    with pytest.raises(InvalidInputError, match="give num_classes"):
        load_model(save(state, path), f"{user}:headless")
    assert load_model(path, f"{user}:headless", num_classes=4).num_classes == 4


# --- Saving


@pytest.mark.parametrize("form", ["plain", "prefixed", "wrapped", "option", "uncounted"])
def test_save_like(tmp_path: Path, form: str) -> None:
    model = trained()
    state: State = dict(model.state_dict())
    names = set(state)
    options: dict[str, Any] = {"mean": MEAN, "std": STD} if form == "option" else {}
    if form == "prefixed":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if form == "wrapped":
        state = dict(NormalisedModel(model, MEAN, STD).state_dict())
        names = set(state)
    if form == "uncounted":
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        names = set(state)
    loaded = load_model(save(state, tmp_path / "m.pt"), "resnet10", **options)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(0.5)
    out = tmp_path / "out.safetensors"
    save_like(loaded, loaded.model, out)
    assert set(read_checkpoint(out).tensors) == names
    assert_same(load_model(out, "resnet10", **options).model, loaded.model, images())


def test_save_like_refuses(tmp_path: Path) -> None:
    path = save(trained().state_dict(), tmp_path / "m.pt")
    loaded = load_model(path, "resnet10", mean=MEAN, std=STD)
    before = path.read_bytes()
    with pytest.raises(InvalidInputError, match="is the input file"):
        save_like(loaded, loaded.model, path)
    with pytest.raises(InvalidInputError, match=r"differs from the loaded one in 'bn1\.bias'"):
        save_like(loaded, trained(), tmp_path / "out.safetensors")
    assert path.read_bytes() == before
    assert replace(loaded, key_prefix="x").key_prefix == "x"


def test_what_was_loaded_is_shown_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(trained().state_dict(), path)
    shown = repr(load_model(path, "resnet10"))
    assert shown.startswith("LoadedModel(resnet10, 5 classes, ")
    assert "normalisation: none" in shown
    assert f"Checkpoint({str(path)!r}, safetensors, " in shown
    assert len(shown.replace(str(path), "")) < 150
