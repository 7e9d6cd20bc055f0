"""Every detector by name."""

from __future__ import annotations

from typing import Any

from unbackdoor.detect.collapse import Collapse
from unbackdoor.detect.mnp import CorrelationRatio

MODEL_DETECTORS: dict[str, type[Any]] = {cls.name: cls for cls in (Collapse, CorrelationRatio)}
"""By snake_case name; ``ModelDetector`` protocol, frozen dataclasses."""

SAMPLE_DETECTORS: dict[str, type[Any]] = {}
"""By snake_case name; ``SampleDetector`` protocol, frozen dataclasses."""
