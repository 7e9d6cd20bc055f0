from __future__ import annotations

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError, UnsafeFileError
from unbackdoor.models.checkpoint import (
    read_checkpoint,
    read_metadata,
    read_tensors,
    save_state_dict,
    write_tensors,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())
        assert not found[name].requires_grad


def test_state_dict(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    checkpoint = read_checkpoint(path)
    assert_equal(checkpoint.tensors, model.state_dict())
    assert (checkpoint.format, checkpoint.container, checkpoint.path) == ("torch-zip", "", path)
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "model.bin"
    safetensors.torch.save_file(model.state_dict(), path, metadata={"a": "b"})
    checkpoint = read_checkpoint(path)
    assert_equal(checkpoint.tensors, model.state_dict())
    assert (checkpoint.format, checkpoint.container) == ("safetensors", "")


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict", "network"])
def test_state_dict_with_training_state_beside(tmp_path: Path, key: str) -> None:
    model = network()
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 3, 3, 3)).sum().backward()
    optimiser.step()
    content = {
        "epoch": 3,
        "best": 0.5,
        "history": [1, None, True, (1, 2, 3, 4), {"x": torch.zeros(1)}],
        "acc": torch.tensor(0.9),
        "optimizer": optimiser.state_dict(),
        key: model.state_dict(),
    }
    torch.save(content, tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert_equal(checkpoint.tensors, model.state_dict())
    assert checkpoint.container == key


def test_optimiser_beside_a_flat_state_dict(tmp_path: Path) -> None:
    model = network()
    state = {"momentum": torch.zeros(4)}
    content: dict[object, object] = {"optimizer": state, 7: torch.zeros(1)}
    content.update(model.state_dict())
    torch.save(content, tmp_path / "model.pt")
    assert_equal(read_checkpoint(tmp_path / "model.pt").tensors, model.state_dict())


def test_containers_in_containers(tmp_path: Path) -> None:
    torch.save({"model": {"state_dict": {"a": torch.ones(2)}}, "net": {}}, tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert checkpoint.container == "model.state_dict"
    assert_equal(checkpoint.tensors, {"a": torch.ones(2)})


def test_nested_dicts_are_joined_by_dots(tmp_path: Path) -> None:
    torch.save({"body": {"a": torch.ones(2)}, "head": {"b": torch.zeros(1)}}, tmp_path / "model.pt")
    expected = {"body.a": torch.ones(2), "head.b": torch.zeros(1)}
    assert_equal(read_checkpoint(tmp_path / "model.pt").tensors, expected)


def test_parameters_strides_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = OrderedDict(
        weight=nn.Parameter(torch.randn(4, 3)),
        transposed=torch.randn(4, 3).t(),
        last=torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        part=torch.arange(10)[3:7],
        gaps=torch.arange(10.0)[::3],
        running_var=torch.ones(2, requires_grad=True),
        scalar=torch.tensor(3),
        empty=torch.zeros(0, 3),
    )
    torch.save(tensors, tmp_path / "model.pt")
    assert_equal(read_checkpoint(tmp_path / "model.pt").tensors, tensors)


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"],
)
def test_element_types(tmp_path: Path, dtype: str) -> None:
    tensors = {"w": torch.tensor([0, 1, 1]).to(getattr(torch, dtype))}
    torch.save(tensors, tmp_path / "model.pt")
    write_tensors(tensors, tmp_path / "model.safetensors")
    assert_equal(read_checkpoint(tmp_path / "model.pt").tensors, tensors)
    assert_equal(read_checkpoint(tmp_path / "model.safetensors").tensors, tensors)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(1000)
    torch.save({"a": weight, "b": weight, "c": weight.clone()}, tmp_path / "model.pt")
    tensors = read_checkpoint(tmp_path / "model.pt").tensors
    assert tensors["a"] is tensors["b"]
    assert tensors["a"] is not tensors["c"]


def test_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1000)}, path)
    tensors = read_checkpoint(path).tensors
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(tensors["w"], torch.ones(1000))
    tensors["w"].zero_()
    assert tensors["w"].untyped_storage().nbytes() == 4000


def test_damaged_files_load_soundly_or_are_refused(tmp_path: Path) -> None:
    """Flip one byte anywhere: never another exception, never a crash, never unsound tensors."""
    model, path = network(), tmp_path / "model.pt"
    draw = random.Random(0)
    for kind in ("torch", "safetensors"):
        torch.save(model.state_dict(), path) if kind == "torch" else write_tensors(model.state_dict(), path)
        raw, refused = path.read_bytes(), 0
        for _ in range(80):
            changed = bytearray(raw)
            changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            try:
                found = read_checkpoint(path).tensors
            except UnsafeFileError:
                refused += 1
            else:
                assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
        assert 5 < refused < 80


def test_write_and_read(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tensors: dict[str, Tensor] = {
        "a": shared,
        "b": shared,
        "t": shared.t(),
        "p": nn.Parameter(torch.randn(2)),
        "state": torch.Generator().manual_seed(1).get_state(),
        "losses": torch.tensor([1.0, float("nan")], dtype=torch.float64),
        "none": torch.zeros(0),
    }
    path = tmp_path / "state.safetensors"
    write_tensors(tensors, path, {"trigger": "patch", "options": json.dumps({"a": [1]})})
    found = read_tensors(path)
    assert read_metadata(path) == {"trigger": "patch", "options": '{"a": [1]}'}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name].nan_to_num(), tensor.detach().nan_to_num())
        assert found[name].dtype == tensor.dtype


def test_no_metadata_and_no_tensors(tmp_path: Path) -> None:
    write_tensors({}, tmp_path / "none.safetensors")
    assert read_tensors(tmp_path / "none.safetensors") == {}
    assert read_metadata(tmp_path / "none.safetensors") == {}


def test_writing_is_repeatable_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for name in ("one", "two", "one"):
        write_tensors(network_state(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def network_state() -> dict[str, Tensor]:
    return {"b": torch.ones(2), "a": torch.zeros(3), "c": torch.ones(1, dtype=torch.int64)}


def test_failed_writes_keep_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(network_state(), path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(InvalidInputError, match="No space left on device"):
        write_tensors({"a": torch.ones(9)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot write .*gone.*No such file"):
        write_tensors({}, tmp_path / "gone" / "x.safetensors")
    with pytest.raises(InvalidInputError, match=r"tensor 'z' is torch\.complex64"):
        write_tensors({"z": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "x.safetensors")


def test_save_state_dict_never_overwrites_its_input(tmp_path: Path) -> None:
    source, link, hard = tmp_path / "in.pt", tmp_path / "link.pt", tmp_path / "hard.pt"
    torch.save({"w": torch.ones(2)}, source)
    link.symlink_to(source)
    hard.hardlink_to(source)
    before = source.read_bytes()
    for target in (source, link, hard, tmp_path / "x" / ".." / "in.pt"):
        with pytest.raises(InvalidInputError, match="is the input file"):
            save_state_dict({"w": torch.zeros(2)}, target, never=source)
    assert source.read_bytes() == before
    save_state_dict({"w": torch.zeros(2)}, tmp_path / "out.safetensors", never=source)
    assert_equal(read_checkpoint(tmp_path / "out.safetensors").tensors, {"w": torch.zeros(2)})
