"""Every detector by name."""

from __future__ import annotations

from typing import Any

from unbackdoor.detect.ac import ActivationClustering
from unbackdoor.detect.ban import BAN
from unbackdoor.detect.bti_dbf import BTIDBF
from unbackdoor.detect.collapse import Collapse
from unbackdoor.detect.head_weights import HeadWeights
from unbackdoor.detect.ibd_psc import IBDPSC
from unbackdoor.detect.mm_bd import MaximumMargin
from unbackdoor.detect.mnp import CorrelationRatio
from unbackdoor.detect.nc import TriggerSize
from unbackdoor.detect.perturbation_search import PerturbationSearch
from unbackdoor.detect.recovery import Recovery
from unbackdoor.detect.rnp import UnlearntLabel, UnlearntSample, UnlearntTrigger
from unbackdoor.detect.scale_up import ScaleUp
from unbackdoor.detect.scan_statistics import SCAn
from unbackdoor.detect.screening import Screening
from unbackdoor.detect.spectral import SpectralSignatures
from unbackdoor.detect.strip import STRIP
from unbackdoor.detect.trigger_search import TriggerSearch
from unbackdoor.detect.warp_search import WarpSearch

MODEL_DETECTORS: dict[str, type[Any]] = {
    cls.name: cls
    for cls in (
        Collapse,
        Recovery,
        CorrelationRatio,
        UnlearntLabel,
        UnlearntTrigger,
        TriggerSize,
        TriggerSearch,
        PerturbationSearch,
        WarpSearch,
        MaximumMargin,
        HeadWeights,
        BTIDBF,
        BAN,
    )
}
"""By ``name`` in snake_case (users write dashes); ``ModelDetector`` protocol, frozen dataclasses."""

SAMPLE_DETECTORS: dict[str, type[Any]] = {
    cls.name: cls
    for cls in (
        Screening,
        STRIP,
        IBDPSC,
        UnlearntSample,
        ScaleUp,
        ActivationClustering,
        SpectralSignatures,
        SCAn,
    )
}
"""By ``name`` in snake_case (users write dashes); ``SampleDetector`` protocol, frozen dataclasses."""
