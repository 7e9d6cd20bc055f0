"""Make model files that nobody should load, out of bytes: nothing here needs the code under test."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END = b"."
HEAD = b"\x80\x02"

Members = Sequence[tuple[str | zipfile.ZipInfo, bytes]]


class Payload:
    """Unpickles to a shell command that leaves ``marker`` behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.marker}",)


class EvalPayload(Payload):
    """The same through ``builtins.eval``."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


def text(value: str) -> bytes:
    """Pickle a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Pickle an integer."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: Iterable[int]) -> bytes:
    """Pickle a tuple of integers."""
    return b"(" + b"".join(number(value) for value in values) + b"t"


def global_(module: str, name: str) -> bytes:
    """Pickle an import."""
    return f"c{module}\n{name}\n".encode()


def storage(key: bytes, numel: int, kind: str = "FloatStorage") -> bytes:
    """Pickle a persistent id, as torch.save does; ``key`` is a pickled value."""
    return b"(" + text("storage") + global_("torch", kind) + key + text("cpu") + number(numel) + b"tQ"


def tensor(
    shape: Iterable[int],
    stride: Iterable[int],
    *,
    numel: int,
    key: str = "0",
    kind: str = "FloatStorage",
    offset: int = 0,
) -> bytes:
    """Pickle a tensor."""
    arguments = storage(text(key), numel, kind) + number(offset) + numbers(shape) + numbers(stride)
    hooks = global_("collections", "OrderedDict") + b")R"
    return global_("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"\x89" + hooks + b"tR"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    """Pickle a dict of pickled values."""
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def write_archive(
    path: Path,
    program: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    more: Members = (),
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a zip file in the layout of torch.save."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for key, content in (storages or {"0": bytes(16)}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", b"3\n")
        for name, content in more:
            archive.writestr(name, content)
    return path


def write_tensor_archive(
    path: Path, *, storages: Mapping[str, bytes] | None = None, more: Members = ()
) -> Path:
    """Write an archive with one sound tensor ``w`` of four zeros."""
    program = HEAD + dictionary({"w": tensor([4], [1], numel=4)}) + END
    return write_archive(path, program, storages, more=more)


def write_safetensors(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file with any header (an object or raw bytes) that claims any length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """Return the header entry of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def saved(value: object, *, legacy: bool = False) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def good_tensors() -> dict[str, Tensor]:
    """Return a small sound state dict."""
    return {"conv.weight": torch.arange(12.0).view(3, 4), "bn.running_var": torch.ones(3)}
