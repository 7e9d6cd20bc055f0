"""Find the constructor of a network by name: one of ours, or a function of the user's own code.

The architecture never comes from the model file. User code that is named here is run: naming it is the
user's decision, as with any script.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.models.registry import ARCHITECTURES, build


@dataclass(frozen=True)
class Architecture:
    """How a network is made.

    Args:
        name: The specification it was found by.
        build: Takes keyword options such as ``num_classes`` and returns a network with fresh weights.
        is_user_code: Whether ``build`` runs code from outside of this package.
    """

    name: str
    build: Callable[..., nn.Module]
    is_user_code: bool


def resolve_architecture(spec: str) -> Architecture:
    """Find the architecture that ``spec`` names.

    A function of the user gets ``num_classes=`` if its signature takes it. A file is executed anew at
    each call, under a private module name; ``sys.path`` is left alone, so a file that imports its
    neighbours has to be named as ``package.module:function``.

    Args:
        spec: A name in ``registry.ARCHITECTURES``, ``package.module:function`` or
            ``path/to/file.py:function``.

    Raises:
        InvalidInputError: If there is no such name, module, file or function.
        UnsupportedModelError: If importing the user's code fails. ``build`` raises it too, if the
            function fails or returns something other than a ``torch.nn.Module``.
    """
    source, colon, function = spec.rpartition(":")
    if spec in ARCHITECTURES or not colon or function.startswith(("\\", "/")):
        if spec not in ARCHITECTURES:
            build(spec)  # raises, with suggestions
        return Architecture(spec, partial(build, spec), is_user_code=False)
    if not source or not function:
        raise InvalidInputError(
            f"architecture {spec!r} is incomplete; write package.module:function or path/to/file.py:function."
        )
    module = _load_file(spec, Path(source)) if source.endswith(".py") else _load_module(spec, source)
    factory = getattr(module, function, None)
    if not callable(factory):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InvalidInputError(
            f"architecture {spec!r}: {source} has no function {function!r}; it has "
            f"{', '.join(names[:10]) or 'none'}."
        )
    return Architecture(spec, partial(_call, spec, factory), is_user_code=True)


def _load_module(spec: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise _no_module(spec, name)
    try:
        found = importlib.util.find_spec(name)
    except (Exception, SystemExit) as error:  # finding a submodule runs its parent package
        if isinstance(error, ValueError) or getattr(error, "name", None) in _parents(name):
            raise _no_module(spec, name) from error
        raise _failed_import(spec, error) from error
    if found is None:
        raise _no_module(spec, name)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _failed_import(spec, error) from error


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}


def _load_file(spec: str, path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        raise InvalidInputError(f"architecture {spec!r}: there is no file {path}; check the path.")
    # The private name keeps the file from shadowing a real module, such as one called `resnet`.
    name = f"_unbackdoor_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InvalidInputError(f"architecture {spec!r}: {path} cannot be imported; name a Python file.")
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
        raise _failed_import(spec, error) from error
    return module


def _no_module(spec: str, name: str) -> InvalidInputError:
    return InvalidInputError(
        f"architecture {spec!r}: there is no module {name!r}; install it, set PYTHONPATH to its folder, or "
        "write path/to/file.py:function."
    )


def _failed_import(spec: str, error: BaseException) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"architecture {spec!r} cannot be imported: {type(error).__name__}: {error}; mend that code first."
    )


def _call(spec: str, factory: Callable[..., object], **options: Any) -> nn.Module:  # noqa: ANN401
    given = {name: value for name, value in options.items() if _takes(factory, name)}
    refused = sorted(options.keys() - given.keys() - {"num_classes"})
    if refused:
        raise InvalidInputError(
            f"architecture {spec!r} takes no {', '.join(refused)}; leave it out or add it to the function."
        )
    try:
        network = factory(**given)
    except (Exception, SystemExit) as error:
        raise UnsupportedModelError(
            f"architecture {spec!r} failed when called with {given}: {type(error).__name__}: {error}; "
            "mend that function first."
        ) from error
    if not isinstance(network, nn.Module):
        raise UnsupportedModelError(
            f"architecture {spec!r} returned a {type(network).__name__}; it must return a torch.nn.Module."
        )
    return network


def _takes(factory: Callable[..., object], name: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return True
    found = parameters.get(name)
    return found is not None and found.kind is not inspect.Parameter.POSITIONAL_ONLY
