"""What all methods have in common from outside: a name, a source, what they need, and options with a text.

A method is a frozen dataclass whose fields are its options; everything here is read off the class and its
docstring, so that a command line or a report knows a new method without a line written for it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from unbackdoor.errors import InvalidInputError
from unbackdoor.usercode import load, names_code

_SAID = ("name", "title", "source", "needs")
"""What a method's class says of itself."""
_SNAKE = re.compile(r"^[a-z][a-z0-9_]*$")
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Example|Examples|Note|Notes):$")


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        path: As ``--set`` takes it; parts with dots.
        kind: Its type, as written in the source.
        default: Its value, as text.
        text: What the docstring says of it.
    """

    path: str
    kind: str
    default: str
    text: str


@dataclass(frozen=True)
class Entry:
    """A method in a list.

    Args:
        kind: ``attack``, ``purifier``, ``model detector`` or ``sample detector``; those for graphs have
            ``graph`` before it; or ``scan``.
        name: As the command line takes it, with dashes.
        title: Its name for people.
        source: The paper.
        needs: What it has to be given.
        summary: The first sentence of its docstring.
    """

    kind: str
    name: str
    title: str
    source: str
    needs: str
    summary: str


def dashed(name: str) -> str:
    """Return a method's name as the command line writes it; code of the user's own keeps its path."""
    return name if names_code(name) else name.replace("_", "-")


def find(kind: str, methods: Mapping[str, type[Any]], name: str, *, own: str = "") -> type[Any]:
    """Return a method's class by its name, in snake case or with dashes, or out of the user's own code.

    Args:
        kind: What is looked for, for the message.
        methods: A registry.
        name: What the user wrote.
        own: What a class of the user's own must do, such as ``purify``; none is taken where this is empty.

    Raises:
        InvalidInputError: If there is none; near misses are suggested. If the user's class is no method.
        UnsupportedModelError: If the user's code cannot be imported.
    """
    if own and names_code(name):
        return own_class(kind, methods, name, own)
    return methods[name_of(kind, methods, name)]


def own_class(kind: str, methods: Mapping[str, type[Any]], spec: str, *does: str) -> type[Any]:
    """Return a method's class out of the user's own code.

    Args:
        kind: What it is to be, for the message.
        methods: The registry, whose names are taken.
        spec: ``package.module:Class`` or ``path/to/file.py:Class``.
        does: The functions of which it must have one.

    Raises:
        InvalidInputError: If there is no such class, or it is no method.
        UnsupportedModelError: If the user's code cannot be imported.
    """
    cls = load(spec, kind=kind, example="Class")
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise InvalidInputError(f"{kind} {spec!r} is no dataclass; its fields are to be its options.")
    absent = [part for part in _SAID if not isinstance(getattr(cls, part, None), str)]
    absent += [] if any(callable(getattr(cls, part, None)) for part in does) else [f"{' or '.join(does)}()"]
    if absent:
        raise InvalidInputError(f"{kind} {spec!r} has no {' and no '.join(absent)}; give the class that.")
    said: str = cls.name  # type: ignore[attr-defined]
    if not _SNAKE.match(said) or said in methods:
        why = "belongs to a method of this package" if said in methods else "is not in snake_case"
        raise InvalidInputError(f"{kind} {spec!r} is named {said!r}, which {why}; change its name.")
    if needed := [each.name for each in fields(cls) if _is_needed(each)]:
        raise InvalidInputError(f"{kind} {spec!r} has no default for {', '.join(needed)}; give it one.")
    return cls


def _is_needed(option: Field[Any]) -> bool:
    return option.init and option.default is MISSING and option.default_factory is MISSING


def name_of(kind: str, known: Collection[str], name: str) -> str:
    """Return the known name, in snake case, that a user wrote in snake case or with dashes.

    Args:
        kind: What is looked for, for the message.
        known: The names that there are.
        name: What the user wrote.

    Raises:
        InvalidInputError: If there is none; near misses are suggested.
    """
    wanted = name.strip().lower().replace("-", "_")
    if wanted in known:
        return wanted
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {dashed(near[0])!r}? " if near else ""
    raise InvalidInputError(f"unknown {kind} {name!r}: {hint}known are {', '.join(map(dashed, known))}.")


def configured(kind: str, methods: Mapping[str, type[Any]], name: str, *, paper: bool, own: str = "") -> Any:  # noqa: ANN401
    """Return a method with its default options, or those of its paper; see ``find``.

    Raises:
        InvalidInputError: If there is no such method, or its paper's settings are not known.
        UnsupportedModelError: If the user's code cannot be imported.
    """
    cls = find(kind, methods, name, own=own)
    if not paper:
        return cls()
    if not hasattr(cls, "paper"):
        raise InvalidInputError(
            f"the settings of the paper behind {dashed(cls.name)} are not known; leave --paper out."
        )
    return cls.paper()


def entry(kind: str, cls: type[Any]) -> Entry:
    """Describe a method."""
    return Entry(kind, dashed(cls.name), cls.title, cls.source, cls.needs, summary(cls))


def summary(cls: type[Any]) -> str:
    """Return the first sentence of a method's docstring."""
    return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def version_of(cls: type[Any]) -> int:
    """Return the version of a method's code: its ``version``, raised when results change, or 1."""
    return int(getattr(cls, "version", 1))


def description(cls: type[Any]) -> str:
    """Return the docstring of a method without its list of options."""
    return re.split(r"^Args:$", inspect.cleandoc(cls.__doc__ or ""), maxsplit=1, flags=re.MULTILINE)[
        0
    ].strip()


def options_of(method: Any, prefix: str = "") -> list[Option]:  # noqa: ANN401 - any frozen dataclass
    """Return the options of a method, those of its parts with dots.

    Args:
        method: An instance; its values are the defaults shown.
        prefix: Put before each path.
    """
    cls: Any = type(method)
    known, found = _described(cls), []
    for field in fields(method):
        value, path = getattr(method, field.name), prefix + field.name
        if is_dataclass(value) and not isinstance(value, type):
            found += options_of(value, f"{path}.")
        else:
            kind, text = known[field.name]
            found.append(Option(path, kind, shown(value), text))
    return found


@cache
def _described(cls: type[Any]) -> Mapping[str, tuple[str, str]]:
    """Return the type and the text of each field of a dataclass; a suite asks for them thousands of times."""
    texts, hints = argument_texts(cls), get_type_hints(cls)
    return {field.name: (kind_of(hints[field.name]), texts.get(field.name, "")) for field in fields(cls)}


def argument_texts(cls: type[Any]) -> dict[str, str]:
    """Return what the ``Args`` section of a class's docstring says of each argument."""
    texts: dict[str, str] = {}
    name, inside = "", False
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if _SECTION.match(line):
            name, inside = "", line == "Args:"
        elif inside and (start := re.match(r"^    (\w+): (.*)$", line)):
            name, texts[start[1]] = start[1], start[2].strip()
        elif inside and name and line.startswith("        "):
            texts[name] += " " + line.strip()
    return texts


def kind_of(hint: Any) -> str:  # noqa: ANN401 - any annotation
    """Return a type for people: ``float``, ``'a' | 'b'``, ``list of Recipe``."""
    origin, arguments = getattr(hint, "__origin__", None), getattr(hint, "__args__", ())
    if str(origin) == "typing.Literal":
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_joined(argument for argument in arguments if argument is not Ellipsis)}"
    if arguments:
        return " or ".join(kind_of(argument) for argument in arguments)
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _joined(hints: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(kind_of(hint) for hint in hints))


def _is_part(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _differing(part: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return the options of a part that are not its class's defaults, as JSON values."""
    usual = type(part)()
    names = [field.name for field in fields(part)]
    return {name: getattr(part, name) for name in names if getattr(part, name) != getattr(usual, name)}


def shown(value: object) -> str:
    """Return a value as ``--set`` would take it."""
    if isinstance(value, tuple) and value and all(map(_is_part, value)):
        return json.dumps([_differing(each) for each in value])
    if isinstance(value, tuple):
        return ",".join(shown(each) for each in value) if value else "[]"
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{field.name}={shown(getattr(value, field.name))}" for field in fields(value))
        return f"({inner})"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
