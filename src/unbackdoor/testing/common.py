"""What every method must be: a frozen, documented dataclass with a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

from unbackdoor.errors import InvalidInputError, UnsupportedModelError


def is_frozen_dataclass(method: object) -> None:
    """Methods are values: nothing about them changes after they were made."""
    cls: type[Any] = type(method)
    assert is_dataclass(cls), f"{cls.__name__} is no dataclass; decorate it with @dataclass(frozen=True)."
    for name in [field.name for field in fields(cls)][:1]:
        try:
            setattr(method, name, getattr(method, name))
        except FrozenInstanceError:
            continue
        raise AssertionError(f"{cls.__name__} can be changed; decorate it with @dataclass(frozen=True).")


def is_default_constructible(method: object) -> None:
    """Every option has a default, so that the command line and suites can start from one."""
    cls: type[Any] = type(method)
    try:
        cls()
    except TypeError as error:
        raise AssertionError(f"{cls.__name__}() fails ({error}); give every field a default.") from error


def has_name(method: object) -> None:
    """Methods are called by a short name in snake_case."""
    name = getattr(method, "name", None)
    assert isinstance(name, str), f"{type(method).__name__}.name must be text, got {name!r}."
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name), f"the name {name!r} is not in snake_case."


def documents_fields(method: object) -> None:
    """Each option is described under ``Args:`` of the class docstring."""
    cls: type[Any] = type(method)
    missing = [f.name for f in fields(cls) if not re.search(rf"^\s+{f.name}: \S", cls.__doc__ or "", re.M)]
    assert not missing, f"the docstring of {cls.__name__} does not describe {missing} under Args."


def repr_round_trips(method: object) -> None:
    """The repr is an expression for an equal object: what a report prints can be run again."""
    names = {cls.__name__: cls for cls in _classes_in(method)}
    known = {"__builtins__": {}, "nan": float("nan"), "inf": float("inf"), **names}
    try:
        rebuilt = eval(repr(method), known)  # noqa: S307 - the repr of the caller's own object
    except (SyntaxError, NameError, TypeError) as error:
        raise AssertionError(
            f"{method!r} is no expression ({error}); use plain values as options."
        ) from error
    assert repr(rebuilt) == repr(method), f"{method!r} does not come back from its repr."


COMMON_CHECKS: dict[str, Callable[[Any], None]] = {
    check.__name__: check
    for check in (
        is_frozen_dataclass,
        is_default_constructible,
        has_name,
        documents_fields,
        repr_round_trips,
    )
}


def must_refuse(action: Callable[[], object], what: str) -> None:
    """Raise AssertionError unless ``action`` raises one of the errors that say what is wrong."""
    assert _refusal(action, what), f"{what} was accepted; raise InvalidInputError with what to do about it."


def may_refuse(action: Callable[[], object], what: str) -> None:
    """Raise AssertionError if ``action`` fails with an error that does not say what is wrong."""
    _refusal(action, what)


def _refusal(action: Callable[[], object], what: str) -> bool:
    try:
        action()
    except (InvalidInputError, UnsupportedModelError) as error:
        text = str(error)
        assert len(text) > 20, f"{what} was refused with {text!r}; say what is wrong and what to do."
        return True
    except Exception as error:
        raise AssertionError(
            f"{what} ended in {type(error).__name__}: {error}; check for it and raise InvalidInputError or "
            "UnsupportedModelError."
        ) from error
    return False


def _classes_in(value: object) -> Iterator[type]:
    if is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for field in fields(value):
            yield from _classes_in(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _classes_in(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _classes_in(entry)
