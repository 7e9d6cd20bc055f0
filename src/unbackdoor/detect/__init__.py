"""Detectors: how suspicious is a model, seen with clean images alone; one file a method."""

from unbackdoor.detect import registry as registry
from unbackdoor.detect.ac import ActivationClustering as ActivationClustering
from unbackdoor.detect.ban import BAN as BAN
from unbackdoor.detect.bti_dbf import BTIDBF as BTIDBF
from unbackdoor.detect.collapse import Collapse as Collapse
from unbackdoor.detect.head_weights import HeadWeights as HeadWeights
from unbackdoor.detect.ibd_psc import IBDPSC as IBDPSC
from unbackdoor.detect.mm_bd import MaximumMargin as MaximumMargin
from unbackdoor.detect.mnp import CorrelationRatio as CorrelationRatio
from unbackdoor.detect.nc import TriggerSize as TriggerSize
from unbackdoor.detect.perturbation_search import PerturbationSearch as PerturbationSearch
from unbackdoor.detect.recovery import Recovery as Recovery
from unbackdoor.detect.rnp import UnlearntLabel as UnlearntLabel
from unbackdoor.detect.rnp import UnlearntSample as UnlearntSample
from unbackdoor.detect.rnp import UnlearntTrigger as UnlearntTrigger
from unbackdoor.detect.scale_up import ScaleUp as ScaleUp
from unbackdoor.detect.scan import Scan as Scan
from unbackdoor.detect.scan_statistics import SCAn as SCAn
from unbackdoor.detect.screening import Screening as Screening
from unbackdoor.detect.spectral import SpectralSignatures as SpectralSignatures
from unbackdoor.detect.strip import STRIP as STRIP
from unbackdoor.detect.trigger_search import TriggerSearch as TriggerSearch
from unbackdoor.detect.warp_search import WarpSearch as WarpSearch
