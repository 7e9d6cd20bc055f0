"""Set the options of a method from text: ``suppression.budget=100`` reaches into nested dataclasses."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from unbackdoor.errors import InvalidInputError

Method = TypeVar("Method")


def configure(method: Method, assignments: Sequence[str], *, unlisted: Collection[str] = ()) -> Method:
    """Return a copy of ``method`` with the options in ``assignments``.

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
    names, hints = [field.name for field in fields(target)], get_type_hints(type(target))
    values: dict[str, Any] = {}
    inner: dict[str, list[tuple[list[str], str, str]]] = {}
    for path, value, full in assignments:
        if path[0] not in names:
            offered = [name for name in names if name not in unlisted]
            near = difflib.get_close_matches(path[0], offered, n=1)
            hint = f"did you mean {prefix + near[0]!r}? " if near else ""
            known = ", ".join(prefix + name for name in offered)
            raise InvalidInputError(f"unknown option {full!r}: {hint}known are {known}.")
        current = getattr(target, path[0])
        if len(path) > 1:
            if not is_dataclass(current):
                raise InvalidInputError(f"option {path[0]!r} has no parts, so {full!r} does not exist.")
            inner.setdefault(path[0], []).append((path[1:], value, full))
        elif is_dataclass(current):
            parts = ", ".join(f"{full}.{field.name}" for field in fields(current))
            raise InvalidInputError(f"option {full!r} has parts; set one of {parts}.")
        else:
            values[path[0]] = _parse(hints[path[0]], value, full)
    values |= {
        name: _assigned(getattr(target, name), parts, prefix=f"{prefix}{name}.")
        for name, parts in inner.items()
    }
    return replace(target, **values)


def _parse(kind: Any, value: str, full: str) -> Any:
    try:
        decoded = json.loads(value)
    except ValueError:
        decoded = [part.strip() for part in value.split(",")] if "," in value else value
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    for candidate in (decoded, value, [value]):
        try:
            return adapter.validate_python(candidate)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
    raise InvalidInputError(f"option {full!r} cannot be {value!r}: {problem}.")
