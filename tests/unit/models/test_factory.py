from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.models.factory import resolve_architecture
from unbackdoor.models.resnet import ResNet

CODE = """
from dataclasses import dataclass

from torch import nn


@dataclass
class Options:
    width: int = 3


def with_classes(num_classes=7):
    return nn.Linear(2, num_classes)


def with_anything(**options):
    return nn.Linear(2, options["num_classes"])


def without():
    return nn.Linear(2, 4)


def broken():
    raise KeyError("no such layer")


def leaving():
    raise SystemExit(3)


def wrong():
    return "a network"


class Net(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(2, num_classes)


_private = 5
"""


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "my_nets.py"
    path.write_text(CODE)
    return path


def test_ours() -> None:
    found = resolve_architecture("resnet10")
    network = found.build(num_classes=3, width=4)
    assert (found.name, found.is_user_code) == ("resnet10", False)
    assert isinstance(network, ResNet)


def test_unknown_names_suggest_near_misses() -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'resnet18'"):
        resolve_architecture("resnet81")
    with pytest.raises(InvalidInputError, match=r"path/to/file\.py:function"):
        resolve_architecture("C:\\nets\\mine.py")


@pytest.mark.parametrize(
    ("function", "outputs"), [("with_classes", 5), ("with_anything", 5), ("without", 4), ("Net", 5)]
)
def test_file(nets: Path, function: str, outputs: int) -> None:
    found = resolve_architecture(f"{nets}:{function}")
    network = found.build(num_classes=5)
    assert found.is_user_code
    assert isinstance(network, nn.Linear)
    assert network.out_features == outputs


def test_file_with_a_colon_in_its_folder(nets: Path) -> None:
    folder = nets.parent / "C:"
    folder.mkdir()
    moved = nets.rename(folder / nets.name)
    network = resolve_architecture(f"{moved}:with_classes").build()
    assert isinstance(network, nn.Linear)
    assert network.out_features == 7


def test_file_is_read_anew(nets: Path) -> None:
    resolve_architecture(f"{nets}:without")
    nets.write_text(CODE.replace("nn.Linear(2, 4)", "nn.Linear(2, 41)"))
    network = resolve_architecture(f"{nets}:without").build()
    assert isinstance(network, nn.Linear)
    assert network.out_features == 41


def test_imports_leave_no_traces(nets: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    resolve_architecture(f"{nets}:without")
    assert sys.path == path
    assert all(name.startswith("_unbackdoor_user_") for name in set(sys.modules) - modules)
    nets.write_text("raise ValueError('x')")
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    with pytest.raises(UnsupportedModelError):
        resolve_architecture(f"{nets}:without")
    assert set(sys.modules) == modules


def test_module(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(nets.parent)
    network = resolve_architecture("my_nets:with_classes").build(num_classes=5)
    del sys.modules["my_nets"]
    assert isinstance(network, nn.Linear)
    assert network.out_features == 5


@pytest.mark.parametrize(
    "spec", ["no_such_module_here:make", "unbackdoor.nothing:make", ".relative:make", "a..b:f"]
)
def test_missing_module(spec: str) -> None:
    with pytest.raises(InvalidInputError, match="there is no module"):
        resolve_architecture(spec)


def test_missing_file_and_function(nets: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"there is no file .*gone\.py"):
        resolve_architecture(f"{nets.parent / 'gone.py'}:make")
    with pytest.raises(InvalidInputError, match=r"no function 'make'; it has .*with_classes"):
        resolve_architecture(f"{nets}:make")
    with pytest.raises(InvalidInputError, match="no function '_private'"):
        resolve_architecture(f"{nets}:_private")
    with pytest.raises(InvalidInputError, match="incomplete"):
        resolve_architecture("module:")


def test_code_that_fails(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="KeyError: 'no such layer'") as caught:
        resolve_architecture(f"{nets}:broken").build()
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(UnsupportedModelError, match="SystemExit: 3"):
        resolve_architecture(f"{nets}:leaving").build()
    with pytest.raises(UnsupportedModelError, match=r"returned a str; it must return a torch\.nn\.Module"):
        resolve_architecture(f"{nets}:wrong").build()
    with pytest.raises(InvalidInputError, match="takes no width"):
        resolve_architecture(f"{nets}:without").build(width=3)
    nets.write_text("import no_such_package_here")
    with pytest.raises(UnsupportedModelError, match="cannot be imported: ModuleNotFoundError"):
        resolve_architecture(f"{nets}:make")
    monkeypatch.syspath_prepend(nets.parent)
    with pytest.raises(UnsupportedModelError, match="cannot be imported: ModuleNotFoundError"):
        resolve_architecture("my_nets:make")
