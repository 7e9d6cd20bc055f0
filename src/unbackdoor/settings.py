"""Set the options of a method from text: ``suppression.budget=100`` reaches into nested dataclasses."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from unbackdoor.errors import InvalidInputError

Method = TypeVar("Method")


def configure(method: Method, assignments: Sequence[str]) -> Method:
    """Return a copy of ``method`` with the options in ``assignments``.

    Args:
        method: A dataclass instance.
        assignments: ``name=value`` or ``part.name=value``; values are checked against the field's type.

    Raises:
        InvalidInputError: If an option does not exist (near misses are suggested) or a value does not fit.
    """
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise InvalidInputError(f"an option must read name=value, got {assignment!r}.")
        method = _assign(method, path.strip().split("."), value.strip(), path.strip())
    return method


def _assign(target: Any, path: list[str], value: str, full: str) -> Any:
    names = [field.name for field in fields(target)]
    if path[0] not in names:
        near = difflib.get_close_matches(path[0], names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidInputError(f"unknown option {full!r}: {hint}known are {', '.join(names)}.")
    current = getattr(target, path[0])
    if len(path) > 1:
        if not is_dataclass(current):
            raise InvalidInputError(f"option {path[0]!r} has no parts, so {full!r} does not exist.")
        return replace(target, **{path[0]: _assign(current, path[1:], value, full)})
    if is_dataclass(current):
        parts = ", ".join(f"{full}.{field.name}" for field in fields(current))
        raise InvalidInputError(f"option {full!r} has parts; set one of {parts}.")
    kind = get_type_hints(type(target))[path[0]]
    return replace(target, **{path[0]: _parse(kind, value, full)})


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
