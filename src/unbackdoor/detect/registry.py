"""Every detector by name."""

from __future__ import annotations

from typing import Any

from unbackdoor.detect.collapse import Collapse
from unbackdoor.detect.mnp import CorrelationRatio
from unbackdoor.detect.rnp import UnlearntLabel, UnlearntSample, UnlearntTrigger

MODEL_DETECTORS: dict[str, type[Any]] = {
    cls.name: cls for cls in (Collapse, CorrelationRatio, UnlearntLabel, UnlearntTrigger)
}
"""By snake_case name; ``ModelDetector`` protocol, frozen dataclasses."""

SAMPLE_DETECTORS: dict[str, type[Any]] = {cls.name: cls for cls in (UnlearntSample,)}
"""By snake_case name; ``SampleDetector`` protocol, frozen dataclasses."""
