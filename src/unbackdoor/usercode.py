"""Load what a user names in code of their own: ``package.module:name`` or ``path/to/file.py:name``.

Naming it is the user's decision, as with any script; nothing here is named by a file that was opened.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from unbackdoor.errors import InvalidInputError, UnsupportedModelError


def names_code(spec: str) -> bool:
    """Say whether a user means code of their own."""
    _, colon, name = spec.rpartition(":")
    return bool(colon) and not name.startswith(("\\", "/"))  # those are paths with a drive


def load(spec: str, *, kind: str, example: str) -> object:
    """Load what ``spec`` names.

    A file is executed anew at each call, under a private module name; ``sys.path`` is left alone, so a file
    that imports its neighbours has to be named as ``package.module:name``.

    Args:
        spec: ``package.module:name`` or ``path/to/file.py:name``.
        kind: What it is meant to be, for messages.
        example: What stands behind the colon, for messages, such as ``function``.

    Raises:
        InvalidInputError: If there is no such module, file or name, or nothing that can be called.
        UnsupportedModelError: If importing the user's code fails.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InvalidInputError(
            f"{kind} {spec!r} is incomplete; write package.module:{example} or path/to/file.py:{example}."
        )
    asked = _Asked(spec, kind, example)
    module = asked.file(Path(source)) if source.endswith(".py") else asked.module(source)
    found: object = getattr(module, name, None)
    if not callable(found):
        there = {key: each for key, each in vars(module).items() if callable(each) and key[0] != "_"}
        own_first = sorted(there, key=lambda key: getattr(there[key], "__module__", "") != module.__name__)
        raise InvalidInputError(
            f"{kind} {spec!r}: {source} has no {example.lower()} {name!r}; it has "
            f"{', '.join(own_first[:10]) or 'none'}."
        )
    return found


def fingerprint(cls: type) -> str | None:
    """Return the SHA-256 of the file that a class of the user was written in; None for those of this package.

    What the file imports is not in it.
    """
    if cls.__module__.partition(".")[0] == "unbackdoor":
        return None
    path = inspect.getsourcefile(cls)
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


@dataclass(frozen=True)
class _Asked:
    """What a user named, for the messages."""

    spec: str
    kind: str
    example: str

    def module(self, name: str) -> ModuleType:
        if not all(part.isidentifier() for part in name.split(".")):
            raise self.no_module(name)
        try:
            found = importlib.util.find_spec(name)
        except (Exception, SystemExit) as error:  # finding a submodule runs its parent package
            if isinstance(error, ValueError) or getattr(error, "name", None) in _parents(name):
                raise self.no_module(name) from error
            raise self.failed(error) from error
        if found is None:
            raise self.no_module(name)
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise self.failed(error) from error

    def file(self, path: Path) -> ModuleType:
        path = path.expanduser()
        if not path.is_file():
            raise InvalidInputError(f"{self.kind} {self.spec!r}: there is no file {path}; check the path.")
        # The private name keeps the file from shadowing a real module, such as one called `resnet`.
        name = f"_unbackdoor_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
        found = importlib.util.spec_from_file_location(name, path)
        if found is None or found.loader is None:
            raise InvalidInputError(
                f"{self.kind} {self.spec!r}: {path} cannot be imported; name a Python file."
            )
        module = importlib.util.module_from_spec(found)
        previous = sys.modules.get(name)
        # Dataclasses and pickling look their module up there.
        sys.modules[name] = module
        try:
            found.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            if previous is None:
                del sys.modules[name]
            else:
                sys.modules[name] = previous
            raise self.failed(error) from error
        return module

    def no_module(self, name: str) -> InvalidInputError:
        return InvalidInputError(
            f"{self.kind} {self.spec!r}: there is no module {name!r}; install it, set PYTHONPATH to its "
            f"folder, or write path/to/file.py:{self.example}."
        )

    def failed(self, error: BaseException) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.kind} {self.spec!r} cannot be imported: {type(error).__name__}: {error}; mend that code "
            "first."
        )


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
