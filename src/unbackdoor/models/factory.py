"""Find the constructor of a network by name: one of ours, or a function of the user's own code.

The architecture never comes from the model file. User code that is named here is run: naming it is the
user's decision, as with any script.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import nn

from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.models.registry import ARCHITECTURES, build
from unbackdoor.usercode import load, names_code


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
    if spec in ARCHITECTURES or not names_code(spec):
        if spec not in ARCHITECTURES:
            build(spec)  # raises, with suggestions
        return Architecture(spec, partial(build, spec), is_user_code=False)
    factory = cast(Callable[..., object], load(spec, kind="architecture", example="function"))
    return Architecture(spec, partial(_call, spec, factory), is_user_code=True)


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
