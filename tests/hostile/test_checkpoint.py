"""Files from strangers: each must be refused quickly, without running anything in it."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hostile.build import (
    END,
    HEAD,
    EvalPayload,
    Payload,
    dictionary,
    entry,
    global_,
    good_tensors,
    number,
    numbers,
    saved,
    storage,
    tensor,
    text,
    write_archive,
    write_safetensors,
    write_tensor_archive,
)
from unbackdoor.errors import InvalidInputError, MismatchedCheckpointError, UnsafeFileError
from unbackdoor.models import loading
from unbackdoor.models.checkpoint import read_checkpoint, read_metadata, read_tensors
from unbackdoor.models.loading import load_model

MEMORY_KIB = 256 * 1024


@pytest.fixture(autouse=True, scope="module")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import what loading imports, outside of the clock."""
    path = tmp_path_factory.mktemp("warm") / "good.pt"
    path.write_bytes(saved(good_tensors()))
    read_checkpoint(path)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "payload-ran"


def refusal_of(path: Path, read: Callable[[Path], object] = read_checkpoint) -> str:
    """Return the message of a refusal that was quick, frugal and in the standard wording."""
    folder, started = path.parent, time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnsafeFileError) as caught:
        read(path)
    # Against files that take for ever; a million instructions alone take about 1 s of a slow processor.
    assert time.process_time() - started < 5.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY_KIB
    assert not (folder / "payload-ran").exists()
    message = str(caught.value)
    assert message.startswith(f"Refused to load '{path.name}': ")
    assert ". Nothing in the file was executed. " in message
    assert "weights_only" not in message
    return message


def write_program(path: Path, program: bytes) -> Path:
    return write_archive(path, HEAD + program + END)


# --- Code in pickles


@pytest.mark.parametrize("payload", [Payload, EvalPayload])
@pytest.mark.parametrize("legacy", [False, True])
def test_payload_beside_tensors(tmp_path: Path, marker: Path, payload: type[Payload], legacy: bool) -> None:
    path = tmp_path / "mal.pt"
    content = {"state_dict": good_tensors(), "extra": payload(marker)}
    path.write_bytes(saved(content, legacy=legacy))
    message = refusal_of(path)
    assert ("before version 1.6" if legacy else "data.pkl wants to import") in message


def test_the_import_is_named_with_its_place(tmp_path: Path) -> None:
    path = write_program(tmp_path / "mal.pt", global_("posix", "system") + text("true") + b"\x85R")
    assert refusal_of(path) == (
        "Refused to load 'mal.pt': data.pkl wants to import 'posix.system' at byte 2. Nothing in the file "
        "was executed. Ask the author for a .safetensors file, "
        "or a torch.save(model.state_dict()) checkpoint; docs/how-to/open-a-refused-file.md says more."
    )


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickle(tmp_path: Path, marker: Path, protocol: int) -> None:
    path = tmp_path / "mal.pkl"
    path.write_bytes(pickle.dumps(Payload(marker), protocol=protocol))
    assert "pickle" in refusal_of(path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_payload_in_later_protocols(tmp_path: Path, marker: Path, protocol: int) -> None:
    path = write_archive(tmp_path / "mal.pt", pickle.dumps(Payload(marker), protocol=protocol))
    assert "data.pkl" in refusal_of(path)


@pytest.mark.parametrize(
    ("program", "fact"),
    [
        (text("os") + text("system") + b"\x93" + text("x") + b"\x85R", "STACK_GLOBAL"),
        (b"(" + text("x") + b"ios\nsystem\n", "INST"),
        (b"(" + global_("torch", "FloatStorage") + text("x") + b"o", "OBJ"),
        (global_("torch", "FloatStorage") + b")\x81", "NEWOBJ"),
        (b"\x82\x01", "EXT1"),
        (b"P0\n", "PERSID"),
        (global_("builtins", "getattr"), "'builtins.getattr'"),
        (global_("torch", "_utils._rebuild_tensor_v2"), "wants to import"),
        (global_("collections", "OrderedDict.fromkeys"), "wants to import"),
        (global_("torch.serialization", "load"), "'torch.serialization.load'"),
        (global_("torch.jit", "load"), "'torch.jit.load'"),
        (text("x") + b")R", "calls a scalar"),
        (global_("collections", "OrderedDict") + b")R)R", "calls a result of"),
        (global_("collections", "OrderedDict") + b"]\x85R", "passes arguments to OrderedDict"),
        (global_("torch", "FloatStorage") + number(2**40) + b"\x85R", "calls torch.FloatStorage"),
        (global_("collections", "OrderedDict") + b"}b", "sets the state of a reference to collections"),
        (tensor([4], [1], numel=4) + numbers([1]) + b"b", "sets the state of a result of torch."),
        (tensor([4], [1], numel=4) + number(0) + text("x") + b"s", "stores items in a result of torch."),
        (b"(a", "empty stack"),
        (b"u", "mark that is not there"),
        (b"h\x05", "memo number 5"),
        (b"Nr\xff\xff\xff\x7f", "memo number 2147483647"),
        (b"X\xff\xff\xff\x7f", "damaged"),
        (b"N.N", "does not end at its STOP"),
        (b"NN", "does not end at its STOP"),
    ],
)
def test_pickle_tricks(tmp_path: Path, program: bytes, fact: str) -> None:
    assert fact in refusal_of(write_program(tmp_path / "trick.pt", program))


def test_too_many_instructions(tmp_path: Path) -> None:
    path = write_program(tmp_path / "long.pt", b"N0" * 3)
    assert "POP" in refusal_of(path)
    path = write_program(tmp_path / "long.pt", b"N" * 1_000_001)
    assert "more than 1000000 instructions" in refusal_of(path)


def _doubling(levels: int) -> bytes:
    """Pickle ``levels`` tuples of which each holds the last one twice: 2^levels steps to hash."""
    program = b")"
    for level in range(levels):
        program += b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86"
    return program


def test_tuples_that_take_for_ever_to_hash(tmp_path: Path) -> None:
    path = write_program(tmp_path / "hash.pt", b"}" + _doubling(50) + b"Ns")
    assert "nested tuple as a dictionary key" in refusal_of(path)
    path = write_program(tmp_path / "hash2.pt", storage(_doubling(50), 4))
    assert "nested tuple as a persistent id" in refusal_of(path)


def test_numbers_that_share_a_hash(tmp_path: Path) -> None:
    def long(value: int) -> bytes:
        digits = value.to_bytes(16, "little", signed=True)
        return b"\x8a" + bytes([len(digits)]) + digits

    # All multiples of 2^61 - 1 have the hash 0: a dictionary of n of them takes n^2 steps to fill.
    same = b"".join(long(k * (2**61 - 1)) + b"N" for k in range(8, 12))
    path = write_program(tmp_path / "long.pt", b"}(" + same + b"u")
    assert "long number as a dictionary key" in refusal_of(path)
    key = b"(" + text("storage") + long(2**80) + b"tQ"
    assert "nested tuple as a persistent id" in refusal_of(write_program(tmp_path / "id.pt", key))


def test_names_of_nothing_but_prefixes(tmp_path: Path) -> None:
    # Each prefix that is stripped makes a copy of the name: memory by the square of its length.
    name = "module." * 6000 + "conv1.weight"
    path = write_safetensors(tmp_path / "m.safetensors", {name: entry([1], 0, 4)}, bytes(4))
    with pytest.raises(MismatchedCheckpointError):
        load_model(path, "resnet10")
    assert len(list(loading._views({name: torch.zeros(1)}))) == loading.MOST_PREFIXES


def test_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pt"
    path.write_bytes(saved(nn.Sequential(nn.Linear(2, 2))))
    assert "this is a whole pickled model, which can run code when opened" in refusal_of(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    assert "TorchScript" in refusal_of(path)


def test_safe_globals_of_the_process_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "payload.pt"
    path.write_bytes(saved({"w": torch.zeros(2), "x": np.float64(1)}))
    with torch.serialization.safe_globals([np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        assert "numpy" in refusal_of(path)
        write_tensor_archive(path)
        read_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == before
        assert np.dtype in before


# --- Zip structure


def test_deflated_bomb(tmp_path: Path) -> None:
    program = HEAD + dictionary({"w": tensor([25 * 2**20], [1], numel=25 * 2**20)}) + END
    path = write_archive(
        tmp_path / "bomb.pt", program, {"0": bytes(100 * 2**20)}, compression=zipfile.ZIP_DEFLATED
    )
    assert path.stat().st_size < 2**20
    assert "is compressed" in refusal_of(path)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("archive/../../evil", "has a member called"),
        ("/archive/evil", "has a member called"),
        ("archive\\evil", "has a member called"),
        ("archive/a\0b", "has a member called"),
        ("C:/evil", "has a member called"),
        ("archive//evil", "has a member called"),
        ("other/evil", "outside of the folder"),
        ("evil", "outside of the folder"),
        ("archive/sub/data.pkl", "2 members called data.pkl"),
    ],
)
def test_member_names(tmp_path: Path, name: str, fact: str) -> None:
    info = zipfile.ZipInfo("archive/placeholder")
    info.filename = name
    assert fact in refusal_of(write_tensor_archive(tmp_path / "slip.pt", more=[(info, b"x")]))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_duplicate_names(tmp_path: Path, name: str) -> None:
    path = write_tensor_archive(tmp_path / "twice.pt", more=[(name, b"x")])
    assert "data.pkl" in refusal_of(path) if name.endswith("pkl") else "same name" in refusal_of(path)


def _directory_entry(path: Path, name: str) -> tuple[int, bytearray]:
    raw = bytearray(path.read_bytes())
    place = raw.rindex(name.encode()) - 46
    assert raw[place : place + 4] == b"PK\x01\x02"
    return place, raw


def _with_field(path: Path, name: str, offset: int, format_: str, value: int) -> Path:
    place, raw = _directory_entry(path, name)
    struct.pack_into(format_, raw, place + offset, value)
    path.write_bytes(raw)
    return path


def test_overlapping_members(tmp_path: Path) -> None:
    path = write_tensor_archive(tmp_path / "overlap.pt", storages={"0": bytes(16), "1": bytes(16)})
    with zipfile.ZipFile(path) as archive:
        first = archive.getinfo("archive/data/0").header_offset
        second = archive.getinfo("archive/data/1").header_offset
    _with_field(path, "archive/data/1", 42, "<L", first)
    assert "overlaps" in refusal_of(path)
    path = write_tensor_archive(tmp_path / "overlap2.pt", storages={"0": bytes(16), "1": bytes(16)})
    for field in (20, 24):
        _with_field(path, "archive/data/0", field, "<L", second)
    assert "more bytes than the file has" in refusal_of(path) or "overlaps" in refusal_of(path)


def test_members_that_claim_too_much(tmp_path: Path) -> None:
    path = write_tensor_archive(tmp_path / "claim.pt")
    _with_field(path, "archive/data/0", 20, "<L", 2**31)
    assert "more bytes than the file has" in refusal_of(_with_field(path, "archive/data/0", 24, "<L", 2**31))


def test_encrypted_member(tmp_path: Path) -> None:
    path = write_tensor_archive(tmp_path / "secret.pt")
    assert "encrypted" in refusal_of(_with_field(path, "archive/data/0", 8, "<H", 1))


def test_local_header_that_differs(tmp_path: Path) -> None:
    path = write_tensor_archive(tmp_path / "two-faced.pt")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"archive/data.pkl", b"archive/evil.pkl", 1))
    assert "two different headers" in refusal_of(path)


def test_many_members(tmp_path: Path) -> None:
    path = write_tensor_archive(tmp_path / "many.pt", more=[(f"archive/x{i}", b"") for i in range(20_001)])
    assert "more than 20000 members" in refusal_of(path)


def test_large_pickle(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "large.pt", bytes(16 * 2**20 + 1))
    assert "data.pkl has 16777217 bytes" in refusal_of(path)


def test_second_archive_appended_and_prepended(tmp_path: Path, marker: Path) -> None:
    good = write_tensor_archive(tmp_path / "good.pt").read_bytes()
    bad = write_archive(tmp_path / "bad.pt", pickle.dumps(Payload(marker), protocol=2)).read_bytes()
    for index, content in enumerate([good + bad, bad + good, good + b"x", good[:-2] + b"\1\0x"]):
        path = tmp_path / f"joined{index}.pt"
        path.write_bytes(content)
        assert refusal_of(path)


def test_zip64_records_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "zip64.pt"
    raw = bytearray(saved(good_tensors()))
    place = raw.rindex(b"PK\x06\x06")
    struct.pack_into("<Q", raw, place + 48, 0)
    path.write_bytes(raw)
    assert "two zip directories differ" in refusal_of(path)


# --- Tensors that claim more than there is


@pytest.mark.parametrize(
    ("shape", "stride", "numel", "offset", "fact"),
    [
        ([10**6, 10**6], [0, 0], 4, 0, "'w' claims shape (1000000, 1000000) but only 16 bytes are stored"),
        ([2**31, 2**31, 2**31], [0, 0, 0], 4, 0, "'w'|restricted loader"),
        ([100, 100], [1, 1], 4, 0, "restricted loader"),
        ([10**9], [1], 10**9, 0, "'w'|restricted loader"),
        ([4], [1], -4, 0, "'w'|restricted loader"),
        ([4], [1], 4, 10**6, "restricted loader"),
        ([4], [1], 4, -2, "restricted loader"),
        ([4], [-1], 4, 3, "restricted loader"),
        ([1] * 9, [1] * 9, 4, 0, "9 dimensions"),
    ],
)
def test_shape_bombs(
    tmp_path: Path, shape: list[int], stride: list[int], numel: int, offset: int, fact: str
) -> None:
    program = dictionary({"w": tensor(shape, stride, numel=numel, offset=offset)})
    message = refusal_of(write_program(tmp_path / "bomb.pt", program))
    assert any(part in message for part in fact.split("|")), message


def test_many_views_of_one_storage(tmp_path: Path) -> None:
    count = 2**18
    views = {f"w{i}": tensor([count - i], [1], numel=count) for i in range(500)}
    path = write_archive(tmp_path / "views.pt", HEAD + dictionary(views) + END, {"0": bytes(4 * count)})
    assert "claim more than" in refusal_of(path)


def test_missing_storage(tmp_path: Path) -> None:
    program = dictionary({"w": tensor([4], [1], numel=4, key="7")})
    assert "restricted loader" in refusal_of(write_program(tmp_path / "gone.pt", program))


def test_sparse_tensor(tmp_path: Path) -> None:
    path = tmp_path / "sparse.pt"
    place, value = torch.zeros(2, 1), torch.ones(1)
    sparse = torch.sparse_coo_tensor(place, value, (10**9, 10**9), check_invariants=True)
    path.write_bytes(saved({"w": sparse}))
    assert "'torch._utils._rebuild_sparse_tensor'" in refusal_of(path)


def test_quantised_tensor(tmp_path: Path) -> None:
    path = write_program(tmp_path / "q.pt", dictionary({"w": tensor([4], [1], numel=4, kind="QInt8Storage")}))
    assert "'torch.QInt8Storage'" in refusal_of(path)


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_shared_container_bomb(tmp_path: Path, kind: str) -> None:
    """Forty levels, each holding the last twice: walking them naively takes 2^40 steps."""
    program = {"list": b"]", "tuple": b")", "dict": b"}"}[kind]
    for level in range(40):
        put, get = b"q" + bytes([level]), b"h" + bytes([level])
        if kind == "dict":
            # Build outwards: the inner dict is on the stack, so fetch it into a new one by its memo.
            program += put + b"}" + text("a") + get + b"s" + text("b") + get + b"s"
        elif kind == "list":
            program += put + b"](" + get + get + b"e"
        else:
            program += put + get + b"\x86"
    # The leftovers below the outermost level go into one tuple, so that the stack ends with one value.
    message = refusal_of(write_program(tmp_path / "shared.pt", b"(" + program + b"t"))
    assert "no dictionary of tensors" in message
    path = write_program(tmp_path / "shared2.pt", b"}" + text("state_dict") + b"(" + program + b"ts")
    assert "no tensors under string keys" in refusal_of(path)


def test_shared_dict_bomb_under_a_dict(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    for _ in range(14):
        content = {"model": content, "b": content, "c": content}
    path = tmp_path / "shared.pt"
    path.write_bytes(saved(content))
    assert "no tensors under string keys" in refusal_of(path)


def test_deep_and_cyclic_dicts(tmp_path: Path) -> None:
    content: dict[str, object] = {"w": torch.zeros(1)}
    for _ in range(20):
        content = {"a": content}
    path = tmp_path / "deep.pt"
    path.write_bytes(saved(content))
    assert "nested more than 16 deep" in refusal_of(path)
    cyclic: dict[str, object] = {}
    cyclic["model"] = cyclic
    path.write_bytes(saved(cyclic))
    assert "no tensors" in refusal_of(path)


def test_ordered_dict_with_a_forged_method(tmp_path: Path) -> None:
    program = (
        global_("collections", "OrderedDict") + b")R" + text("w") + tensor([4], [1], numel=4) + b"s"
        + dictionary({"items": text("x"), "get": text("x")}) + b"b"
    )  # fmt: skip
    checkpoint = read_checkpoint(write_program(tmp_path / "forged.pt", program))
    assert list(checkpoint.tensors) == ["w"]


def test_names_that_collide(tmp_path: Path) -> None:
    path = tmp_path / "collide.pt"
    path.write_bytes(saved({"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)}))
    assert "two of its tensors are called 'a.b'" in refusal_of(path)


# --- Values that no sound model has


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    path = tmp_path / "nan.pt"
    weights = torch.zeros(3, dtype=dtype)
    weights[1] = value
    path.write_bytes(saved({"conv.weight": weights}))
    assert "'conv.weight' contains NaN or infinite values" in refusal_of(path)


def test_negative_variance(tmp_path: Path) -> None:
    path = tmp_path / "var.pt"
    path.write_bytes(saved({"bn.running_var": torch.tensor([1.0, -0.5])}))
    assert "'bn.running_var' contains the negative variance -0.5" in refusal_of(path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_element_types_that_no_classifier_has(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "odd.pt"
    path.write_bytes(saved({"w": torch.zeros(2).to(dtype)}))
    assert "wants to import 'torch." in refusal_of(path)


def test_names_cannot_disturb_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "escape.pt"
    path.write_bytes(saved({"\x1b[2J\n" + "w" * 500: torch.tensor(float("nan"))}))
    message = refusal_of(path)
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(2), 3, "x", {1: torch.zeros(2)}, {"epoch": 3}]
)
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "none.pt"
    path.write_bytes(saved(content))
    message = refusal_of(path)
    assert "no dictionary of tensors" in message or "no tensors under string keys" in message


# --- safetensors


@pytest.mark.parametrize(
    ("header", "size", "fact"),
    [
        ({"w": entry([10**6, 10**6], 0, 4)}, 4, "'w' claims shape (1000000, 1000000) but only 4 bytes"),
        ({"w": entry([2**62, 4], 0, 0)}, 0, "claims shape"),
        ({"w": entry([2**64, 0], 0, 0)}, 0, "no list of counts"),
        ({"w": entry([1], 0, 4), "v": entry([1], 0, 4)}, 4, "begin at 0 and not at 4"),
        ({"w": entry([1], 4, 8)}, 8, "begin at 4 and not at 0"),
        ({"w": entry([1], 0, 4)}, 8, "end at byte 4, but 8 bytes are stored"),
        ({"w": entry([2], 0, 8)}, 4, "end at byte 8, but 4 bytes are stored"),
        ({"w": entry([-1], 0, 4)}, 4, "no list of counts"),
        ({"w": entry([True], 0, 4)}, 4, "no list of counts"),
        ({"w": entry([1] * 9, 0, 4)}, 4, "9 dimensions"),
        ({"w": entry([1], 0, 4, "F8_E5M2")}, 4, "element type 'F8_E5M2'"),
        ({"w": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}, 4, "element type"),
        ({"w": [1, 2]}, 0, "in an unknown way"),
        ({"w": entry([1], 0, 4) | {"more": 1}}, 4, "in an unknown way"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"__metadata__": []}, 0, "__metadata__"),
        (b'{"w": {"dtype"', 0, "no sound JSON"),
        (b'{"a":1,"a":2}', 0, "no sound JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "no sound JSON"),
        (b'{"a":' + b"[" * 70_000 + b"}", 0, "no sound JSON"),
        (b'{"a":' + b"[" * 1_000_000, 0, "more than 20000 tensors"),
        (b'{"a":"\xff\xfe"}', 0, "no sound JSON"),
        ({f"w{i}": entry([0], 0, 0) for i in range(20_001)}, 0, "more than 20000 tensors"),
        ({}, 0, "no tensors"),
    ],
)
def test_safetensors_lies(tmp_path: Path, header: object, size: int, fact: str) -> None:
    path = write_safetensors(tmp_path / "lie.safetensors", header, bytes(size))
    assert fact in refusal_of(path)
    if header != {}:
        assert fact in refusal_of(path, read_tensors)
        assert fact in refusal_of(path, read_metadata)


@pytest.mark.parametrize("length", [2**63, 100, 33 * 2**20])
def test_safetensors_header_length(tmp_path: Path, length: int) -> None:
    path = write_safetensors(tmp_path / "huge.safetensors", {"w": entry([1], 0, 4)}, bytes(4), length=length)
    assert f"its header claims {length} bytes" in refusal_of(path)


def test_safetensors_with_nan(tmp_path: Path) -> None:
    data = struct.pack("<f", float("nan"))
    path = write_safetensors(tmp_path / "nan.safetensors", {"w": entry([1], 0, 4)}, data)
    assert "NaN" in refusal_of(path)


def test_archive_where_safetensors_are_needed(tmp_path: Path, marker: Path) -> None:
    path = write_archive(tmp_path / "mal.safetensors", pickle.dumps(Payload(marker), protocol=2))
    assert ".safetensors file is needed" in refusal_of(path, read_tensors)
    assert ".safetensors file is needed" in refusal_of(path, read_metadata)


# --- Other files


def test_renamed_extension(tmp_path: Path, marker: Path) -> None:
    path = write_archive(tmp_path / "model.safetensors", pickle.dumps(Payload(marker), protocol=2))
    assert "system" in refusal_of(path)
    path = tmp_path / "model.png"
    path.write_bytes(saved(good_tensors()))
    assert set(read_checkpoint(path).tensors) == set(good_tensors())


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100, 5000])
def test_random_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "noise.pt"
    path.write_bytes(b"\x01" + torch.arange(size - 1).mul(37).to(torch.uint8).numpy().tobytes())
    assert "neither a safetensors file nor a PyTorch archive" in refusal_of(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_truncated_file(tmp_path: Path, share: float, kind: str) -> None:
    path = tmp_path / "cut.pt"
    raw = saved(good_tensors())
    if kind == "safetensors":
        raw = write_safetensors(path, {"w": entry([4], 0, 16)}, bytes(16)).read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    assert refusal_of(path)


@pytest.mark.parametrize(
    ("head", "fact"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x93NUMPY" + bytes(100), "NumPy array"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"BZh9" + bytes(100), "bzip2"),
        (b"\xfd7zXZ\0" + bytes(100), "xz"),
        (b"", "is empty"),
    ],
)
def test_other_formats(tmp_path: Path, head: bytes, fact: str) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(head)
    assert fact in refusal_of(path)


def test_numpy_archive_with_objects(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "weights.npz"
    np.savez(path, w=np.array([Payload(marker)], dtype=object))
    assert "NumPy .npz" in refusal_of(path)


def test_tar(tmp_path: Path) -> None:
    path, inner = tmp_path / "old.pt", tmp_path / "x"
    inner.write_bytes(b"x")
    with tarfile.open(path, "w") as archive:
        archive.add(inner, "storages")
    assert "tar archive" in refusal_of(path)


def test_ordinary_zip(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/photo.jpg", b"x")
    assert "a zip archive that torch.save did not write" in refusal_of(path)


def test_symlink(tmp_path: Path) -> None:
    target, link = tmp_path / "good.pt", tmp_path / "link.pt"
    target.write_bytes(saved(good_tensors()))
    link.symlink_to(target)
    assert "it is a symbolic link" in refusal_of(link)


def test_folder_and_pipe(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    assert "no regular file" in refusal_of(folder)
    assert "no regular file" in refusal_of(pipe)


def test_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "good.pt"
    path.write_bytes(saved(good_tensors()))
    assert "larger than the limit of 100 bytes" in refusal_of(
        path, lambda p: read_checkpoint(p, max_bytes=100)
    )
    with path.open("r+b") as file:
        file.truncate(5 * 2**30)  # sparse: takes no room
    assert "larger than the limit" in refusal_of(path)


def test_missing_file(tmp_path: Path) -> None:
    for read in (read_checkpoint, read_tensors, read_metadata):
        with pytest.raises(InvalidInputError, match=r"there is no file .*gone\.pt"):
            read(tmp_path / "gone.pt")
    with pytest.raises(InvalidInputError, match="cannot be opened"):
        read_checkpoint(Path("a\0b"))


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    path = write_tensor_archive(tmp_path / "good.pt")
    read_checkpoint(path)
    refusal_of(write_program(tmp_path / "bad.pt", b"NN"))
    assert list(private.iterdir()) == []


def test_thousands_of_names_for_one_tensor_cost_one_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    isfinite = torch.isfinite

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        looks.append(tensor.numel())
        return isfinite(tensor)

    monkeypatch.setattr(torch, "isfinite", counted)
    shared = torch.ones(1000)
    path = tmp_path / "aliases.pt"
    path.write_bytes(saved({f"layer{i}.weight": shared for i in range(500)}))
    assert len(read_checkpoint(path).tensors) == 500
    assert looks == [1000]


def test_a_negative_variance_under_a_second_name(tmp_path: Path) -> None:
    shared = torch.tensor([1.0, -0.5])
    path = tmp_path / "var.pt"
    path.write_bytes(saved({"layer.weight": shared, "bn.running_var": shared}))
    assert "'bn.running_var' contains the negative variance -0.5" in refusal_of(path)
