"""Look through a pickle without running it, and refuse all but plain data and named imports.

A pickle is a program for a small stack machine. The walk below follows that machine with the *kinds* of
values only, so nothing is imported, called or allocated. It allows a list of opcodes and a list of
imports; whatever is not on them is refused (a list of forbidden names always lacks one).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from unbackdoor.errors import UnsafeFileError

MAX_OPCODES = 1_000_000
"""A ResNet-152 checkpoint has about 40 000, a CIFAR-100 batch about 300 000."""
MAX_PROTOCOL = 3
"""Protocol 4 brought ``STACK_GLOBAL``, which takes the name of an import from computed strings."""
MAX_SHOWN = 80

REMEDY = (
    "Ask the author for a .safetensors file, or a torch.save(model.state_dict()) checkpoint; "
    "docs/how-to/open-a-refused-file.md says more."
)

_IMPORT, _RESULT = "reference to ", "result of "
"""Kinds that carry a name begin with these."""

_PUSHED_KINDS: dict[str, str] = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"), "scalar"),
    **dict.fromkeys(("BINFLOAT", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING"), "scalar"),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES"), "scalar"),
    "EMPTY_DICT": "dict",
    "EMPTY_LIST": "list",
    "EMPTY_TUPLE": "zero-length tuple",
    "MARK": "mark",
}

DATA_OPCODES: frozenset[str] = frozenset(_PUSHED_KINDS) | {
    "PROTO", "STOP", "GLOBAL", "REDUCE", "BUILD", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "SETITEM", "SETITEMS", "APPEND", "APPENDS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip
"""What protocol 2 and 3 writers emit for containers, numbers, strings and reconstructed objects."""

TORCH_OPCODES: frozenset[str] = DATA_OPCODES | {"BINPERSID"}
"""``torch.save`` refers to the storages of tensors by persistent ids."""

OBJECT_OPCODES: frozenset[str] = DATA_OPCODES | {"NEWOBJ"}
"""Objects of imported classes that were pickled by their attributes, such as sparse matrices."""

LONGEST_KEY = 2**63
"""Whole numbers of at most eight bytes: among larger ones any number share a hash, and a dictionary of such
keys takes for ever to fill."""

_MAPPINGS = ("dict", f"{_RESULT}collections.OrderedDict", f"{_RESULT}collections.defaultdict")


def refusal(source: str, fact: str, *, remedy: str = REMEDY) -> UnsafeFileError:
    """Return the error for a refused file: the fact, that nothing ran, and what to do.

    Args:
        source: Path or name of the file; only its last part is shown.
        fact: What is wrong, without a full stop.
        remedy: A sentence that says what to do.
    """
    return UnsafeFileError(
        f"Refused to load {shown(PurePath(source).name or source)}: {fact}. "
        f"Nothing in the file was executed. {remedy}"
    )


def shown(text: str) -> str:
    """Return hostile text quoted, escaped to ASCII and cut, so that it cannot disturb a terminal."""
    return ascii(text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "...")


def check_pickle(
    stream: bytes,
    *,
    source: str,
    allowed_imports: frozenset[str],
    allowed_opcodes: frozenset[str] = DATA_OPCODES,
    part: str = "the pickle",
    remedy: str = REMEDY,
) -> None:
    """Refuse a pickle that could do more than build plain data and call the allowed imports.

    Beyond the two lists it is checked that only imports are called, that ``OrderedDict`` is called
    without arguments, that dictionary keys are strings, numbers of usual length or the like (hashing nested
    tuples, or numbers that share a hash, can take for ever), that no state is set on an import, that memo
    numbers are small, and that nothing follows STOP.

    Args:
        stream: The whole pickle.
        source: Path or name of the file, for the message.
        allowed_imports: Names such as ``"collections.OrderedDict"``.
        allowed_opcodes: Names as in ``pickletools``.
        part: What inside the file is looked at, for the message.
        remedy: The last sentence of the message.

    Raises:
        UnsafeFileError: If anything is not allowed or the pickle is damaged.
    """
    walk = _Walk(allowed_imports)
    try:
        for count, (opcode, argument, position) in enumerate(_operations(stream)):
            if count >= MAX_OPCODES:
                raise _Refused(f"has more than {MAX_OPCODES} instructions")
            if opcode not in allowed_opcodes:
                raise _Refused(f"uses the pickle instruction {opcode} at byte {position}")
            walk.step(opcode, argument, position)
        walk.finish(len(stream))
    except _Refused as error:
        raise refusal(source, f"{part} {error}", remedy=remedy) from None


def imports_of(stream: bytes, *, limit: int = 50_000) -> tuple[str, ...]:
    """Return the names that the first ``limit`` instructions import, as far as they are sound."""
    names: list[str] = []
    try:
        for count, (opcode, argument, _) in enumerate(_operations(stream)):
            if count >= limit:
                break
            if opcode == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
    except _Refused:
        pass
    return tuple(dict.fromkeys(names))


_Argument = Any
"""What follows an instruction in the stream: a number, text, bytes or nothing."""


class _Refused(Exception):  # noqa: N818 - a private signal, turned into UnsafeFileError at the edge
    """Carries the rest of a sentence that begins with the name of the pickle."""


def _operations(stream: bytes) -> Iterator[tuple[str, Any, int]]:
    try:
        for opcode, argument, position in pickletools.genops(stream):
            yield opcode.name, argument, position or 0
    except (ValueError, IndexError, OverflowError) as error:
        raise _Refused("is damaged or no pickle at all") from error


@dataclass
class _Walk:
    """The stack machine with kinds in place of values."""

    allowed_imports: frozenset[str]
    stack: list[str] = field(default_factory=list)
    memo: dict[int, str] = field(default_factory=dict)
    stopped_at: int = -1

    def step(self, opcode: str, argument: _Argument, position: int) -> None:
        if opcode in _PUSHED_KINDS:
            long = opcode == "LONG1" and not -LONGEST_KEY <= argument < LONGEST_KEY
            self.stack.append("long number" if long else _PUSHED_KINDS[opcode])
            return
        _STEPS[opcode](self, argument, position)

    def finish(self, length: int) -> None:
        if self.stack or self.stopped_at != length - 1:
            raise _Refused(f"does not end at its STOP instruction (byte {self.stopped_at} of {length})")

    def pop(self, position: int) -> str:
        if not self.stack or self.stack[-1] == "mark":
            raise _Refused(f"takes a value from an empty stack at byte {position}")
        return self.stack.pop()

    def pop_to_mark(self, position: int) -> list[str]:
        items: list[str] = []
        while self.stack and self.stack[-1] != "mark":
            items.append(self.stack.pop())
        if not self.stack:
            raise _Refused(f"looks for a mark that is not there at byte {position}")
        self.stack.pop()
        return items[::-1]

    def top(self, position: int) -> str:
        kind = self.pop(position)
        self.stack.append(kind)
        return kind


def _protocol(walk: _Walk, argument: _Argument, position: int) -> None:
    if argument > MAX_PROTOCOL:
        raise _Refused(f"is written in pickle protocol {argument}, at most {MAX_PROTOCOL} is read")


def _stop(walk: _Walk, argument: _Argument, position: int) -> None:
    walk.pop(position)
    walk.stopped_at = position


def _import(walk: _Walk, argument: _Argument, position: int) -> None:
    module, _, name = str(argument).partition(" ")
    dotted = f"{module}.{name}"
    if dotted not in walk.allowed_imports or "." in name:
        raise _Refused(f"wants to import {shown(dotted)} at byte {position}")
    walk.stack.append(f"{_IMPORT}{dotted}")


def _call(walk: _Walk, argument: _Argument, position: int) -> None:
    arguments, function = walk.pop(position), walk.pop(position)
    if not function.startswith(_IMPORT) or not arguments.endswith("tuple"):
        raise _Refused(f"calls a {function} with a {arguments} at byte {position}")
    name = function.removeprefix(_IMPORT)
    if name == "collections.OrderedDict" and arguments != "zero-length tuple":
        raise _Refused(f"passes arguments to OrderedDict at byte {position}")
    # Storages are named in persistent ids only; calling the class would allocate any number of bytes.
    if name.startswith("torch.") and name.endswith("Storage"):
        raise _Refused(f"calls {name} at byte {position}")
    # Python 3 writes bytes as a call of encode in protocol 2; they may be dictionary keys.
    walk.stack.append("scalar" if name == "_codecs.encode" else f"{_RESULT}{name}")


def _new_object(walk: _Walk, argument: _Argument, position: int) -> None:
    arguments, cls = walk.pop(position), walk.pop(position)
    if not cls.startswith(_IMPORT) or arguments != "zero-length tuple":
        raise _Refused(f"makes an object of a {cls} from a {arguments} at byte {position}")
    walk.stack.append(f"{_RESULT}{cls.removeprefix(_IMPORT)}")


def _set_state(walk: _Walk, argument: _Argument, position: int) -> None:
    walk.pop(position)
    target = walk.top(position)
    # Setting the state of a tensor would give it new sizes behind the back of its constructor.
    if not target.startswith(_RESULT) or target.startswith(f"{_RESULT}torch."):
        raise _Refused(f"sets the state of a {target} at byte {position}")


def _tuple_of(size: int) -> _Step:
    def step(walk: _Walk, argument: _Argument, position: int) -> None:
        walk.stack.append(_tuple_kind([walk.pop(position) for _ in range(size)]))

    return step


def _tuple_to_mark(walk: _Walk, argument: _Argument, position: int) -> None:
    walk.stack.append(_tuple_kind(walk.pop_to_mark(position)))


def _tuple_kind(items: list[str]) -> str:
    if not items:
        return "zero-length tuple"
    flat = all(item == "scalar" or item.startswith(_IMPORT) for item in items)
    return "flat tuple" if flat else "nested tuple"


def _set_item(walk: _Walk, argument: _Argument, position: int) -> None:
    value, key = walk.pop(position), walk.pop(position)
    _check_items(walk, [key, value], position)


def _set_items(walk: _Walk, argument: _Argument, position: int) -> None:
    _check_items(walk, walk.pop_to_mark(position), position)


def _check_items(walk: _Walk, items: list[str], position: int) -> None:
    target = walk.top(position)
    if target not in _MAPPINGS:
        raise _Refused(f"stores items in a {target} at byte {position}")
    if len(items) % 2:
        raise _Refused(f"stores a key without a value at byte {position}")
    odd = next((key for key in items[::2] if key != "scalar"), None)
    if odd is not None:
        raise _Refused(f"uses a {odd} as a dictionary key at byte {position}")


def _append(walk: _Walk, argument: _Argument, position: int) -> None:
    walk.pop(position)
    _check_list(walk, position)


def _append_all(walk: _Walk, argument: _Argument, position: int) -> None:
    walk.pop_to_mark(position)
    _check_list(walk, position)


def _check_list(walk: _Walk, position: int) -> None:
    target = walk.top(position)
    if target != "list":
        raise _Refused(f"appends to a {target} at byte {position}")


def _put(walk: _Walk, argument: _Argument, position: int) -> None:
    # The C unpickler allocates its memo up to the largest number it meets.
    if argument > MAX_OPCODES:
        raise _Refused(f"uses the memo number {argument} at byte {position}")
    walk.memo[argument] = walk.top(position)


def _get(walk: _Walk, argument: _Argument, position: int) -> None:
    if argument not in walk.memo:
        raise _Refused(f"reads the unset memo number {argument} at byte {position}")
    walk.stack.append(walk.memo[argument])


def _persistent(walk: _Walk, argument: _Argument, position: int) -> None:
    identity = walk.pop(position)
    # PyTorch looks its parts up in a dictionary: nested tuples could take for ever to hash.
    if identity != "flat tuple":
        raise _Refused(f"has a {identity} as a persistent id at byte {position}")
    walk.stack.append("storage")


_Step = Callable[[_Walk, Any, int], None]

_STEPS: dict[str, _Step] = {
    "PROTO": _protocol,
    "STOP": _stop,
    "GLOBAL": _import,
    "REDUCE": _call,
    "NEWOBJ": _new_object,
    "BUILD": _set_state,
    "TUPLE": _tuple_to_mark,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "APPEND": _append,
    "APPENDS": _append_all,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "BINPERSID": _persistent,
}
