"""Detectors: how suspicious is a model, seen with clean images alone; one file a method."""

from unbackdoor.detect.collapse import Collapse as Collapse
from unbackdoor.detect.mnp import CorrelationRatio as CorrelationRatio
from unbackdoor.detect.rnp import UnlearntLabel as UnlearntLabel
from unbackdoor.detect.rnp import UnlearntSample as UnlearntSample
from unbackdoor.detect.rnp import UnlearntTrigger as UnlearntTrigger
from unbackdoor.detect.scan import Scan as Scan
