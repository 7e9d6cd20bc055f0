"""PyTorch Geometric, imported when it is first used."""

from __future__ import annotations

import warnings
from types import ModuleType

from unbackdoor.extras import require


def geometric(module: str) -> ModuleType:
    """Import ``torch_geometric.<module>``.

    Raises:
        MissingDependencyError: If PyTorch Geometric is absent.
    """
    with warnings.catch_warnings():
        # It scripts some of its classes on import, which current versions of torch frown upon.
        warnings.simplefilter("ignore", DeprecationWarning)
        return require(f"torch_geometric.{module}", extra="graph")
