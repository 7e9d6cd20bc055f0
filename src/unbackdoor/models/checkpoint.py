"""Open model files from strangers: the only file of this package that does.

A file is copied to a private place first, and what was checked is what is loaded. Its format is told by
content. safetensors headers and zip directories are read strictly; the pickle inside a PyTorch archive is
walked without running it (``pickle_guard``) before PyTorch's restricted loader, the second barrier, sees
it; then the tensors themselves are checked. A file that loads is not a clean file: weights can carry a
backdoor in any format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unbackdoor.errors import InvalidInputError, UnsafeFileError
from unbackdoor.models.pickle_guard import TORCH_OPCODES, check_pickle, imports_of, refusal, shown

GIB = 2**30
MAX_BYTES = 4 * GIB
MAX_HEADER_BYTES = 32 * 2**20
MAX_PICKLE_BYTES = 16 * 2**20
MAX_MEMBERS = 20_000
MAX_DEPTH = 16
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**31

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The element types that are read, by their safetensors names."""

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")

ALLOWED_IMPORTS: frozenset[str] = frozenset(f"torch.{name}Storage" for name in _STORAGES) | {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
}
"""All that ``torch.save`` imports for a state dict."""

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where training scripts put the state dict, in the order in which they are tried."""

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19",
        "a PyTorch file from before version 1.6",
    ),
    (0, b"\x80", "a bare pickle, which can run code when opened"),
    (257, b"ustar", "a tar archive, perhaps a very old PyTorch file"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, perhaps a Keras model"),
    (0, b"\x93NUMPY", "a NumPy array file"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ", "an xz file"),
)
_PLAIN_PICKLE_STARTS = (b"c", b"(", b"}", b"]", b"i")
_ARCHIVES: tuple[tuple[str, str], ...] = (
    (".npy", "a NumPy .npz archive"),
    ("config.json", "a Keras archive"),
    ("archive_format", "a torch.export program"),
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a model file, checked.

    Args:
        tensors: Name to dense CPU tensor with finite values; names of nested dicts are joined by dots.
        path: The file as it was named.
        sha256: Hex digest of its bytes.
        format: ``"safetensors"`` or ``"torch-zip"``.
        container: Dotted keys under which the state dict lay; empty for the top level.
    """

    tensors: Mapping[str, Tensor]
    path: Path
    sha256: str
    format: Literal["safetensors", "torch-zip"]
    container: str

    def __repr__(self) -> str:
        """Name the file; its tensors would fill the screen."""
        return f"Checkpoint({str(self.path)!r}, {self.format}, {len(self.tensors)} tensors)"


def read_checkpoint(path: Path, *, max_bytes: int = MAX_BYTES) -> Checkpoint:
    """Read the state dict in a safetensors file or a zip-format ``torch.save`` file.

    Args:
        path: A regular file, no symbolic link.
        max_bytes: Larger files are refused unread.

    Returns:
        The tensors in memory of their own, without gradients; tied tensors stay tied.

    Raises:
        InvalidInputError: If the file is missing or cannot be read.
        UnsafeFileError: If it is in another format, damaged, could run code, claims more than it
            holds, or contains tensors that no sound model has. Nothing in it is executed.
    """
    path = Path(path)
    with _private_copy(path, max_bytes) as copy:
        try:
            if copy.format == "safetensors":
                tensors, container = _load_safetensors(copy), ""
            else:
                tensors, container = _load_archive(copy)
            if not tensors:
                raise _Refused("it holds no tensors under string keys")
            _check_tensors(tensors, copy.size)
            return Checkpoint(_own(tensors), path, copy.sha256, copy.format, container)
        except _Refused as error:
            raise refusal(str(path), str(error)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, whatever their values.

    Raises:
        InvalidInputError: If the file is missing or cannot be read.
        UnsafeFileError: If it is no sound safetensors file.
    """
    with _safetensors_copy(Path(path)) as copy:
        return _own(_load_safetensors(copy))


def read_metadata(path: Path) -> dict[str, str]:
    """Read the ``__metadata__`` of a safetensors file: text from the file's author, to be escaped when shown.

    Raises:
        InvalidInputError: If the file is missing or cannot be read.
        UnsafeFileError: If it is no sound safetensors file.
    """
    with _safetensors_copy(Path(path)) as copy:
        return _read_header(copy).metadata


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically: a kill leaves the old file, the new one, or a ``.tmp`` beside.

    Args:
        tensors: Of any device, stride or sharing; each is written in full.
        path: Where to; an existing file is replaced.
        metadata: Text kept in the header.

    Raises:
        InvalidInputError: If the folder is missing, not writable, or a tensor type has no safetensors name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values()]
    if odd:
        raise InvalidInputError(
            f"tensor {shown(odd[0])} is {tensors[odd[0]].dtype}, which is not written to {path}; convert it."
        )
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    encoded = safetensors.torch.save(copies, metadata=dict(metadata) if metadata else None)
    try:
        with temporary.open("xb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write {path} ({error.strerror}); name a file in a folder that exists."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_state_dict(tensors: Mapping[str, Tensor], path: Path, *, never: Path | None = None) -> None:
    """Write a state dict as safetensors, but never over the file it came from.

    Args:
        tensors: The state dict.
        path: Where to.
        never: The input file, if any.

    Raises:
        InvalidInputError: If ``path`` is ``never`` under any name, or cannot be written.
    """
    path = Path(path)
    if never is not None and _same_file(path, Path(never)):
        raise InvalidInputError(f"the output {path} is the input file {never}; give another output.")
    write_tensors(tensors, path)


def _same_file(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


class _Refused(Exception):  # noqa: N818 - a private signal, turned into UnsafeFileError at the edge
    """Carries a fact about the file, without its name."""


# --- The file and its format


@dataclass(frozen=True)
class _Copy:
    """A file that nobody else can change, and what is known of it."""

    path: Path
    source: Path
    size: int
    sha256: str
    format: Literal["safetensors", "torch-zip"]


@contextmanager
def _private_copy(path: Path, max_bytes: int) -> Iterator[_Copy]:
    with (
        _open_regular(path) as source,
        tempfile.TemporaryDirectory(prefix="unbackdoor-", ignore_cleanup_errors=True) as folder,
    ):
        target = Path(folder) / "model"
        size, sha256 = _copy_bytes(source, target, path, max_bytes)
        yield _Copy(target, path, size, sha256, _format_of(target, path, size))


@contextmanager
def _safetensors_copy(path: Path) -> Iterator[_Copy]:
    with _private_copy(path, MAX_BYTES) as copy:
        try:
            if copy.format != "safetensors":
                raise _Refused("a .safetensors file is needed here, and this is a PyTorch archive")
            yield copy
        except _Refused as error:
            raise refusal(str(path), str(error)) from None


@contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # not all exist on all systems
        flags |= getattr(os, name, 0)
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "symbolic link")
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise InvalidInputError(f"there is no file {path}; check the path.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise refusal(
                str(path), "it is a symbolic link", remedy="Give the path of the file it leads to."
            ) from None
        raise InvalidInputError(
            f"{path} cannot be opened ({error}); check the path and its rights."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refusal(str(path), "it is no regular file", remedy="Give the path of the model file itself.")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _copy_bytes(source: BinaryIO, target: Path, path: Path, max_bytes: int) -> tuple[int, str]:
    digest, size = hashlib.sha256(), os.fstat(source.fileno()).st_size
    too_large = f"it is larger than the limit of {max_bytes} bytes"
    if size > max_bytes:
        raise refusal(str(path), too_large)
    size = 0
    try:
        with target.open("xb") as file:
            while block := source.read(2**20):
                size += len(block)
                if size > max_bytes:  # it grew while being read
                    raise refusal(str(path), too_large)
                digest.update(block)
                file.write(block)
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be copied to {target.parent} ({error.strerror}); set TMPDIR to a roomy folder."
        ) from error
    return size, digest.hexdigest()


def _format_of(copy: Path, path: Path, size: int) -> Literal["safetensors", "torch-zip"]:
    with copy.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "torch-zip"
    # A header's length may begin with the bytes of any signature below: one in 32 begins like a pickle.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= min(MAX_HEADER_BYTES, size - 8):
        return "safetensors"
    fact = "it is empty" if not head else "it is neither a safetensors file nor a PyTorch archive"
    for offset, signature, name in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            raise refusal(str(path), f"this is {name}")
    if head[8:9] == b"{":
        fact = f"its header claims {length} bytes, of a file of {size} bytes"
    elif head[:1] in _PLAIN_PICKLE_STARTS and b"\n" in head:
        fact = "this may be a text pickle, which can run code when opened"
    raise refusal(str(path), fact)


# --- safetensors


@dataclass(frozen=True)
class _Header:
    metadata: dict[str, str]
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]


def _load_safetensors(copy: _Copy) -> dict[str, Tensor]:
    header = _read_header(copy)
    try:
        with safetensors.safe_open(copy.path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in header.shapes}
    except Exception as error:  # the library's own types differ between versions
        raise _Refused(f"the safetensors library does not accept it ({type(error).__name__})") from error
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != header.shapes[name] or tensor.dtype != header.dtypes[name]:
            raise _Refused(f"{shown(name)} is not what the header says")
    return tensors


def _read_header(copy: _Copy) -> _Header:
    with copy.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length)
    # Counting brackets first bounds the memory that parsing takes.
    if raw.count(b"{") + raw.count(b"[") > 4 * MAX_MEMBERS or raw.count(b",") > 16 * MAX_MEMBERS:
        raise _Refused(f"its header describes more than {MAX_MEMBERS} tensors")
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        raise _Refused("its header is no sound JSON") from None
    if not isinstance(entries, dict):
        raise _Refused("its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Refused("its __metadata__ is no map from text to text")
    if len(entries) > MAX_MEMBERS:
        raise _Refused(f"its header describes more than {MAX_MEMBERS} tensors")
    spans = {name: _check_entry(name, entry) for name, entry in entries.items()}
    _check_spans(spans, copy.size - 8 - length)
    return _Header(
        metadata,
        {name: DTYPES[entry["dtype"]] for name, entry in entries.items()},
        {name: tuple(entry["shape"]) for name, entry in entries.items()},
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _check_entry(name: str, entry: object) -> tuple[int, int]:
    """Check one tensor of the header and return where its bytes begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"its header describes {shown(name)} in an unknown way")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"{shown(name)} has the element type {shown(str(dtype))}, which is not read")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _Refused(f"its header gives {shown(name)} a shape or place that is no list of counts")
    if len(shape) > MAX_DIMENSIONS:
        raise _Refused(f"{shown(name)} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise _Refused(_overclaim(name, tuple(shape), end - begin))
    return begin, end


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_spans(spans: Mapping[str, tuple[int, int]], size: int) -> None:
    reached = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != reached:
            raise _Refused(f"the bytes of {shown(name)} begin at {begin} and not at {reached}")
        reached = end
    if reached != size:
        raise _Refused(f"its tensors end at byte {reached}, but {size} bytes are stored")


def _overclaim(name: str, shape: tuple[int, ...], stored: int) -> str:
    return f"{shown(name)} claims shape {shown(str(shape))[1:-1]} but only {stored} bytes are stored"


# --- PyTorch's zip archives


def _load_archive(copy: _Copy) -> tuple[dict[str, Tensor], str]:
    stream = _check_archive(copy)
    try:
        check_pickle(
            stream,
            source=str(copy.source),
            allowed_imports=ALLOWED_IMPORTS,
            allowed_opcodes=TORCH_OPCODES,
            part="data.pkl",
        )
    except UnsafeFileError:
        if any(name.startswith(("torch.nn.modules.", "torchvision.models.")) for name in imports_of(stream)):
            raise _Refused("this is a whole pickled model, which can run code when opened") from None
        raise
    try:
        with _no_safe_globals():
            content = torch.load(copy.path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - and its text, which recommends an unsafe call, is not shown
        raise _Refused(f"PyTorch's restricted loader does not accept it ({type(error).__name__})") from None
    return _state_dict_in(content)


@contextmanager
def _no_safe_globals() -> Iterator[None]:
    """Forget, inside the block, which classes this process has declared safe to unpickle."""
    allowed = list(torch.serialization.get_safe_globals())
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _check_archive(copy: _Copy) -> bytes:
    """Check the zip structure and return ``data.pkl`` as PyTorch's reader sees it."""
    with copy.path.open("rb") as file:
        _check_directory(file, copy.size)
        try:
            with zipfile.ZipFile(file) as archive:
                members, start = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
            raise _Refused("its zip directory is damaged") from None
        if len(members) > MAX_MEMBERS:
            raise _Refused(f"it has more than {MAX_MEMBERS} members")
        _check_kind([member.orig_filename for member in members])
        _check_names([member.orig_filename for member in members])
        for member in members:
            _check_stored(member)
        if sum(member.file_size for member in members) > copy.size:
            raise _Refused("its members claim more bytes than the file has")
        stream = _read_members(file, members, start)
    _check_agreement(copy.path, members, stream)
    return stream


def _check_directory(file: BinaryIO, size: int) -> None:
    """Check the end records, so that every zip reader finds the same directory, and a small one."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise _Refused("its zip directory is not at the end; the file may be cut off")
    disk, first_disk, here, count, length, offset = struct.unpack("<4H2L", tail[-18:-2])
    end = size - 22
    if tail[-42:-38] == b"PK\x06\x07" and len(tail) == 98:
        end = size - 98
        marker, claimed, *_, count64, length64, offset64 = struct.unpack("<4sQ2H2L4Q", tail[:56])
        place = struct.unpack("<LQL", tail[-38:-22])[1]
        agree = (
            count in (count64, 0xFFFF)
            and length in (length64, 0xFFFFFFFF)
            and offset in (offset64, 0xFFFFFFFF)
        )
        if marker != b"PK\x06\x06" or claimed != 44 or place != end or not agree:
            raise _Refused("its two zip directories differ")
        here = count = count64
        length, offset = length64, offset64
    if disk or first_disk or here != count or offset + length != end:
        raise _Refused("its zip directory does not lie where it should")
    if count > MAX_MEMBERS or length > MAX_MEMBERS * 1024:
        raise _Refused(f"it has more than {MAX_MEMBERS} members")


def _check_kind(names: list[str]) -> None:
    """Recognise other kinds of zip files, for the sake of the message."""
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise _Refused("this is a TorchScript program, which can run code when opened")
    pickles = sum(name.rpartition("/")[2] == "data.pkl" for name in names)
    if pickles > 1:
        raise _Refused(f"it has {pickles} members called data.pkl")
    if not pickles:
        kinds = [kind for ending, kind in _ARCHIVES if any(name.endswith(ending) for name in names)]
        raise _Refused(f"this is {kinds[0] if kinds else 'a zip archive that torch.save did not write'}")


def _check_names(names: list[str]) -> None:
    top = names[0].partition("/")[0]
    for name in names:
        parts = name.split("/")
        if (
            "\\" in name
            or "\0" in name
            or ":" in parts[0]
            or not all(parts)
            or not {".", ".."}.isdisjoint(parts)
        ):
            raise _Refused(f"it has a member called {shown(name)}")
        if len(parts) < 2 or parts[0] != top:
            raise _Refused(f"its member {shown(name)} lies outside of the folder {shown(top)}")
    if len(set(names)) != len(names):
        raise _Refused("two of its members have the same name")
    if f"{top}/data.pkl" not in names:
        raise _Refused("its data.pkl does not lie in the top folder")


def _check_stored(member: zipfile.ZipInfo) -> None:
    name = shown(member.orig_filename)
    if member.flag_bits & 0x2041:
        raise _Refused(f"its member {name} is encrypted")
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise _Refused(f"its member {name} is compressed, which torch.save never does")
    if member.orig_filename.endswith("/data.pkl") and member.file_size > MAX_PICKLE_BYTES:
        raise _Refused(f"its data.pkl has {member.file_size} bytes, at most {MAX_PICKLE_BYTES} are read")


def _read_members(file: BinaryIO, members: list[zipfile.ZipInfo], directory: int) -> bytes:
    """Check that local headers agree with the directory and that no two overlap; return ``data.pkl``."""
    stream, reached = b"", 0
    for member in sorted(members, key=lambda member: member.header_offset):
        file.seek(member.header_offset)
        header = file.read(30)
        if member.header_offset < reached or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise _Refused(f"its member {shown(member.orig_filename)} overlaps another or is cut off")
        flags, method = struct.unpack("<2H", header[6:10])
        name_length, extra_length = struct.unpack("<2H", header[26:30])
        name = file.read(name_length)
        encoding = "utf-8" if flags & 0x800 else "cp437"
        if method or flags & 0x2041 or name.decode(encoding, "replace") != member.orig_filename:
            raise _Refused(f"its member {shown(member.orig_filename)} has two different headers")
        begin = member.header_offset + 30 + name_length + extra_length
        reached = begin + member.file_size
        if reached > directory:
            raise _Refused(f"its member {shown(member.orig_filename)} overlaps another or is cut off")
        if member.orig_filename.endswith("/data.pkl"):
            file.seek(begin)
            stream = file.read(member.file_size)
    return stream


def _check_agreement(path: Path, members: list[zipfile.ZipInfo], stream: bytes) -> None:
    """Compare with what PyTorch's own zip reader finds, so that what was walked is what is loaded."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        records = sorted(reader.get_all_records())
        same = bytes(reader.get_record("data.pkl")) == stream
    except RuntimeError:
        raise _Refused("PyTorch's archive reader does not accept it") from None
    if not same or records != sorted(member.orig_filename.partition("/")[2] for member in members):
        raise _Refused("two zip readers disagree on what it contains")


# --- What was loaded


def _state_dict_in(content: object) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the state dict, and the keys that lead to it."""
    if not isinstance(content, dict):
        raise _Refused(f"it holds a {type(content).__name__} and no dictionary of tensors")
    container: list[str] = []
    visited: set[int] = set()
    while id(content) not in visited and len(container) < MAX_DEPTH:
        visited.add(id(content))
        for key in STATE_DICT_KEYS:
            inner = dict.get(content, key)
            if isinstance(inner, dict) and _tensors_in(inner):
                content = inner
                container.append(key)
                break
    return _tensors_in(content), ".".join(container)


def _tensors_in(tree: dict[Any, Any]) -> dict[str, Tensor]:
    """Collect tensors under string keys of nested dicts, looking into each dict once."""
    found: dict[str, Tensor] = {}
    visited = {id(tree)}
    waiting: list[tuple[str, int, dict[Any, Any]]] = [("", 0, tree)]
    while waiting:
        prefix, depth, branch = waiting.pop()
        # An OrderedDict from a pickle can carry an attribute `items` of its own.
        for key, value in dict.items(branch):
            if not isinstance(key, str):
                continue
            if isinstance(value, Tensor):
                if prefix + key in found:
                    raise _Refused(f"two of its tensors are called {shown(prefix + key)}")
                found[prefix + key] = value
            elif isinstance(value, dict) and id(value) not in visited and "optim" not in key.lower():
                if depth + 1 >= MAX_DEPTH:
                    raise _Refused(f"its dictionaries are nested more than {MAX_DEPTH} deep")
                visited.add(id(value))
                waiting.append((f"{prefix}{key}.", depth + 1, value))
    return found


def _check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    if len(tensors) > MAX_MEMBERS:
        raise _Refused(f"it holds more than {MAX_MEMBERS} tensors")
    total = 0
    names = _distinct_tensors(tensors)
    for aliases in names:
        name, tensor = aliases[0], tensors[aliases[0]]
        _check_tensor(name, tensor)
        total += math.prod(tensor.shape) * tensor.itemsize
        # Tensors may share storage (a transposed tie), but not so that 1 MB becomes 100 GB.
        if total > 2 * size:
            raise _Refused(f"its tensors claim more than {total} bytes in all, of a file of {size} bytes")
    # Once for all names of a tensor: thousands may share a large one.
    for aliases in names:
        _check_values(aliases, tensors[aliases[0]].detach())


def _check_tensor(name: str, tensor: Tensor) -> None:
    label = shown(name)
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise _Refused(f"{label} is no plain dense tensor")
    if tensor.device.type != "cpu" or tensor.is_neg() or tensor.is_conj():
        raise _Refused(f"{label} is no plain tensor in memory")
    if tensor.dtype not in DTYPES.values():
        raise _Refused(f"{label} has the element type {tensor.dtype}, which is not read")
    if tensor.ndim > MAX_DIMENSIONS:
        raise _Refused(f"{label} has {tensor.ndim} dimensions, at most {MAX_DIMENSIONS} are read")
    elements, stored = math.prod(tensor.shape), tensor.untyped_storage().nbytes()
    if elements * tensor.itemsize > stored:
        raise _Refused(_overclaim(name, tuple(tensor.shape), stored))
    if elements > MAX_ELEMENTS:
        raise _Refused(f"{label} has {elements} elements, at most {MAX_ELEMENTS} are read")


def _check_values(names: Sequence[str], tensor: Tensor) -> None:
    name = next((name for name in names if name.rpartition(".")[2] == "running_var"), names[0])
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise _Refused(f"{shown(name)} contains NaN or infinite values, so the model cannot work")
    if name.rpartition(".")[2] == "running_var" and tensor.numel() and float(tensor.min()) < 0:
        raise _Refused(f"{shown(name)} contains the negative variance {float(tensor.min()):g}")


_Identity = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


def _identity(tensor: Tensor) -> _Identity:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _distinct_tensors(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each tensor."""
    aliases: dict[_Identity, list[str]] = {}
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise _Refused(f"{shown(name)} is no plain dense tensor")
        aliases.setdefault(_identity(tensor), []).append(name)
    return list(aliases.values())


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors out of the mapped file, keeping ties."""
    copies: dict[_Identity, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = _identity(tensor)
        if key not in copies or not tensor.numel():
            copies[key] = tensor.detach().clone()
        result[name] = copies[key]
    return result
