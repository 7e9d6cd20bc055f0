"""Imports of optional packages, with one clear error when they are absent."""

from __future__ import annotations

import importlib
from types import ModuleType

from unbackdoor.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Dotted module name, such as ``"pyarrow.parquet"``.
        extra: The extra of this package that brings it.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: If it cannot be imported; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"This needs {module.split('.', maxsplit=1)[0]!r}, which could not be imported ({error}); "
            f"install it, in the project's folder, with: pip install -c constraints.txt -e '.[{extra}]'."
        ) from error
