"""Set the options of a method from text: ``suppression.budget=100`` reaches into nested dataclasses."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from unbackdoor.errors import InvalidInputError

Method = TypeVar("Method")

_NONE = ("none", "null")


def configure(method: Method, assignments: Sequence[str], *, unlisted: Collection[str] = ()) -> Method:
    """Return a copy of ``method`` with the options in ``assignments``.

    A part that may be left out is so by ``part=none``, and comes back with its default by any of its options.

    Args:
        method: A dataclass instance.
        assignments: ``name=value`` or ``part.name=value``; values are checked against the field's type.
        unlisted: Options that no message offers: those that the caller sets in another way.

    Raises:
        InvalidInputError: If an option does not exist (near misses are suggested) or a value does not fit.
    """
    read = []
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise InvalidInputError(f"an option must read name=value, got {assignment!r}.")
        read.append((path.strip().split("."), value.strip(), path.strip()))
    # All at once: options that only make sense together may come in any order.
    changed: Method = _assigned(method, read, unlisted=unlisted) if read else method
    return changed


def _assigned(
    target: Any,
    assignments: Sequence[tuple[list[str], str, str]],
    *,
    prefix: str = "",
    unlisted: Collection[str] = (),
) -> Any:
    cls: Any = type(target)
    names, hints = [field.name for field in fields(target)], _hints_of(cls)
    values: dict[str, Any] = {}
    parts = {field.name: _part_of(target, field) for field in fields(target)}
    inner: dict[str, list[tuple[list[str], str, str]]] = {}
    for path, value, full in assignments:
        if path[0] not in names:
            offered = [name for name in names if name not in unlisted]
            near = difflib.get_close_matches(path[0], offered, n=1)
            hint = f"did you mean {prefix + near[0]!r}? " if near else ""
            known = ", ".join(prefix + name for name in offered)
            raise InvalidInputError(f"unknown option {full!r}: {hint}known are {known}.")
        part = parts[path[0]]
        if len(path) > 1:
            if part is None:
                raise InvalidInputError(f"option {path[0]!r} has no parts, so {full!r} does not exist.")
            inner.setdefault(path[0], []).append((path[1:], value, full))
        elif part is not None and not (_may_be_none(hints[path[0]]) and value in _NONE):
            known = ", ".join(f"{full}.{field.name}" for field in fields(part))
            raise InvalidInputError(f"option {full!r} has parts; set one of {known}.")
        else:
            values[path[0]] = _parse(hints[path[0]], value, full)
    values |= {
        name: _assigned(parts[name], assigned, prefix=f"{prefix}{name}.") for name, assigned in inner.items()
    }
    return replace(target, **values)


@cache
def _hints_of(cls: type[Any]) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields; a suite asks for them thousands of times."""
    return get_type_hints(cls)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _part_of(target: Any, field: Field[Any]) -> Any:
    """Return the dataclass in a field, the default one if it is left out, or None if there is never any."""
    current = getattr(target, field.name)
    if current is None and callable(field.default_factory):
        current = field.default_factory()
    return current if is_dataclass(current) and not isinstance(current, type) else None


def _may_be_none(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _parse(kind: Any, value: str, full: str) -> Any:
    if _may_be_none(kind) and value in _NONE:
        return None
    inside = get_args(kind)[0] if get_origin(kind) is tuple else None
    if is_dataclass(inside):
        return _parse_list(inside, value, full)
    try:
        decoded = json.loads(value)
    except ValueError:
        decoded = [part.strip() for part in value.split(",")] if "," in value else value
    for candidate in (decoded, value, [value]):
        try:
            found = _adapter(kind).validate_python(candidate)
            if any(isinstance(each, float) and math.isnan(each) for each in (found, *_members(found))):
                raise InvalidInputError(f"option {full!r} cannot be {value!r}: it is no number.")
            return found
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
    raise InvalidInputError(f"option {full!r} cannot be {value!r}: {problem}.")


def _members(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else ()


def _parse_list(cls: Any, value: str, full: str) -> tuple[Any, ...]:
    """Read a JSON list of objects, each the options of one ``cls`` that differ from its defaults."""
    try:
        rows = json.loads(value)
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        names = ", ".join(field.name for field in fields(cls))
        raise InvalidInputError(
            f"option {full!r} takes a JSON list of objects with some of {names}, got {value!r}."
        )
    made = []
    for row in rows:
        given = [([name], each if isinstance(each, str) else json.dumps(each), f"{full}.{name}")
                 for name, each in row.items()]  # fmt: skip
        made.append(_assigned(cls(), given, prefix=f"{full}."))
    return tuple(made)
