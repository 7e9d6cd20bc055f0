"""Find and remove backdoors in PyTorch image classifiers, given a few hundred clean images.

The names below are the public ones; torch is imported when the first of them is used.

Example:
    >>> import unbackdoor as ub
    >>> loaded = ub.load_model(Path("model.safetensors"), "resnet18", num_classes=10)
    >>> clean = ub.load_images("path/to/images", limit=500)
    >>> result = ub.Scan().run(loaded.model, clean, generator=ub.generator(0))
    >>> purified = ub.purify.MNP().purify(loaded.model, clean, generator=ub.generator(0))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unbackdoor import attacks as attacks
    from unbackdoor import detect as detect
    from unbackdoor import evaluate as evaluate
    from unbackdoor import filters as filters
    from unbackdoor import models as models
    from unbackdoor import purify as purify
    from unbackdoor import train as train
    from unbackdoor import triggers as triggers
    from unbackdoor.data import draw_balanced as draw_balanced
    from unbackdoor.data import load_images as load_images
    from unbackdoor.detect.scan import Scan as Scan
    from unbackdoor.errors import UnbackdoorError as UnbackdoorError
    from unbackdoor.evaluate import BackdoorMetrics as BackdoorMetrics
    from unbackdoor.filters import FilterMask as FilterMask
    from unbackdoor.filters import find_filters as find_filters
    from unbackdoor.models import NormalisedModel as NormalisedModel
    from unbackdoor.models.loading import load_model as load_model
    from unbackdoor.models.loading import save_like as save_like
    from unbackdoor.rates import Rate as Rate
    from unbackdoor.rng import generator as generator
    from unbackdoor.train import Recipe as Recipe
    from unbackdoor.types import AllToAll as AllToAll
    from unbackdoor.types import AllToOne as AllToOne
    from unbackdoor.types import Detection as Detection
    from unbackdoor.types import Infected as Infected
    from unbackdoor.types import LabelledImages as LabelledImages
    from unbackdoor.types import OneToOne as OneToOne
    from unbackdoor.types import Purified as Purified

_SUBPACKAGES = ("attacks", "detect", "evaluate", "filters", "models", "purify", "train", "triggers")
_HOMES = {
    "draw_balanced": "data", "load_images": "data", "Scan": "detect.scan", "UnbackdoorError": "errors",
    "BackdoorMetrics": "evaluate", "FilterMask": "filters",
    "find_filters": "filters", "NormalisedModel": "models", "load_model": "models.loading",
    "save_like": "models.loading", "Rate": "rates", "generator": "rng", "Recipe": "train",
    "AllToAll": "types", "AllToOne": "types", "Detection": "types", "Infected": "types",
    "LabelledImages": "types", "OneToOne": "types", "Purified": "types",
}  # fmt: skip

__all__ = ["__version__", *_SUBPACKAGES, *_HOMES]  # noqa: PLE0604 - names, spelt out above


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"unbackdoor.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"unbackdoor.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'unbackdoor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
