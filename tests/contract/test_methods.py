"""Every method of the package keeps the contract that ``unbackdoor.testing`` states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from unbackdoor.attacks import (
    BPP,
    CL,
    DFST,
    FC,
    IAB,
    LF,
    LIRA,
    SIG,
    SRA,
    AdapBlend,
    AdapPatch,
    AdaptiveMagnitude,
    BadNets,
    Blend,
    Trojan,
    WaNet,
)
from unbackdoor.detect import (
    Collapse,
    CorrelationRatio,
    Recovery,
    Scan,
    UnlearntLabel,
    UnlearntSample,
    UnlearntTrigger,
)
from unbackdoor.detect.ac import ActivationClustering
from unbackdoor.detect.ban import BAN
from unbackdoor.detect.bti_dbf import BTIDBF
from unbackdoor.detect.calibration import Calibration
from unbackdoor.detect.decoupling import Decoupling
from unbackdoor.detect.head_weights import HeadWeights
from unbackdoor.detect.ibd_psc import IBDPSC
from unbackdoor.detect.mm_bd import MaximumMargin
from unbackdoor.detect.nc import TriggerSize
from unbackdoor.detect.perturbation_search import PerturbationSearch
from unbackdoor.detect.scale_up import ScaleUp
from unbackdoor.detect.scan_statistics import SCAn
from unbackdoor.detect.screening import Screening
from unbackdoor.detect.spectral import SpectralSignatures
from unbackdoor.detect.strip import STRIP
from unbackdoor.detect.trigger_search import TriggerSearch
from unbackdoor.detect.warp_search import WarpSearch
from unbackdoor.inversion import Inversion
from unbackdoor.masks import MaskTraining
from unbackdoor.purify import (
    ANP,
    AWM,
    BNP,
    BSAR,
    CLP,
    EP,
    FP,
    FST,
    FT,
    FTSAM,
    GUP,
    IBAU,
    MNP,
    NAD,
    NC,
    ONP,
    RNP,
    SAU,
    TSBD,
    RandomOrder,
)
from unbackdoor.purify.onp import Agent
from unbackdoor.purify.selection import Selection
from unbackdoor.suppression import Suppression
from unbackdoor.testing import ATTACK_CHECKS, DETECTOR_CHECKS, PURIFIER_CHECKS, SAMPLE_DETECTOR_CHECKS
from unbackdoor.train import Recipe
from unbackdoor.types import (
    Attack,
    Detection,
    LabelledImages,
    ModelDetector,
    Progress,
    Purifier,
    SampleDetector,
    silent,
)

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.02, crop_padding=1, schedule="one_cycle")
SUPPRESSION = Suppression(budget=4, batch_size=16)
MASKS = MaskTraining(epochs=2, batch_size=16)
INVERSION = Inversion(steps=4, round_steps=2, batch_size=8, success=0.01)
FAINT = replace(Inversion.additive(), steps=4, round_steps=2, batch_size=8, success=0.01)
BENT = replace(Inversion.warp(), steps=4, round_steps=2, batch_size=8, success=0.01)
QUICK = MNP(suppression=SUPPRESSION, masks=MASKS, inversion=INVERSION, perturbation=FAINT, warp=BENT)


@dataclass(frozen=True)
class ScanDetector:
    """``Scan`` seen as a detector.

    Args:
        scan: Its options.
    """

    name: ClassVar[str] = "scan"
    scan: Scan = field(default_factory=Scan)

    def score(
        self,
        model: nn.Module,
        clean: LabelledImages,
        *,
        generator: torch.Generator,
        progress: Progress = silent,
    ) -> Detection:
        result = self.scan.run(model, clean, generator=generator, progress=progress)
        found = result.detection("collapse")
        return found or Detection(math.nan, 1.0, "no detector ran", undetermined=result.reason)


ATTACKS: dict[str, Attack] = {
    "adap-blend": AdapBlend(recipe=RECIPE, poison_fraction=0.2, cover_fraction=0.2),
    "adap-patch": AdapPatch(recipe=RECIPE, poison_fraction=0.2, rule="all_to_all", patch_size=3),
    "adap-patch-stored": AdapPatch(recipe=RECIPE, trigger_stage="before_augmentation"),
    "adaptive-magnitude": AdaptiveMagnitude(recipe=RECIPE, rule="all_to_all"),
    "adaptive-magnitude-after": AdaptiveMagnitude(
        recipe=RECIPE, trigger_stage="after_augmentation", norm_weight=0.0, dropout_fraction=0.5
    ),
    "sra": SRA(recipe=RECIPE, subnet=replace(RECIPE, epochs=1), tries=2),
    "sra-first": SRA(recipe=RECIPE, repair_epochs=0, subnet=RECIPE, channel_choice="first", channels=3),
    "dfst": DFST(recipe=RECIPE, injector_steps=2, injector_batch=8, injector_width=4),
    "dfst-redrawn": DFST(recipe=RECIPE, detox_fraction=0.0, redraw=True, rule="all_to_all"),
    "badnets": BadNets(recipe=RECIPE, poison_fraction=0.2),
    "badnets-all-to-all": BadNets(recipe=RECIPE, rule="all_to_all", pattern="white"),
    "badnets-after": BadNets(recipe=RECIPE, trigger_stage="after_augmentation", margin=1),
    "blend": Blend(recipe=RECIPE, poison_fraction=0.2),
    "blend-per-image": Blend(recipe=RECIPE, poison_fraction=0.2, key="per_image"),
    "blend-all-to-all-after": Blend(recipe=RECIPE, rule="all_to_all", trigger_stage="after_augmentation"),
    "sig": SIG(recipe=RECIPE),
    "sig-square-after": SIG(
        recipe=RECIPE, form="square_wave", trigger_stage="after_augmentation", poison_fraction=0.1
    ),
    "wanet": WaNet(recipe=RECIPE),
    "wanet-static": WaNet(
        recipe=RECIPE, rule="all_to_all", control_points=8, redraw=False, trigger_stage="before_augmentation"
    ),
    "trojan": Trojan(recipe=RECIPE, poison_fraction=0.2),
    "trojan-neuron-all-to-all": Trojan(
        recipe=RECIPE, surrogate=RECIPE, variant="neuron", rule="all_to_all", steps=3, fine_tune_epochs=1
    ),
    "trojan-optimised-after": Trojan(
        recipe=RECIPE, surrogate=RECIPE, optimise=True, steps=2, trigger_stage="after_augmentation"
    ),
    "lf": LF(recipe=RECIPE, surrogate=RECIPE, steps=2, eps=64),
    "lf-all-to-all-after": LF(
        recipe=RECIPE, surrogate=RECIPE, steps=1, rule="all_to_all", trigger_stage="after_augmentation"
    ),
    "bpp": BPP(recipe=RECIPE),
    "bpp-all-to-all-dithered": BPP(recipe=RECIPE, rule="all_to_all", dither=True, redraw=False),
    "cl": CL(recipe=RECIPE, surrogate=RECIPE, steps=2),
    "cl-robust-after": CL(
        recipe=RECIPE,
        surrogate=RECIPE,
        steps=1,
        surrogate_steps=1,
        corners="one",
        trigger_stage="after_augmentation",
        poison_fraction=0.1,
    ),
    "iab": IAB(recipe=RECIPE, width=4, mask_epochs=1),
    "iab-all-to-all-fixed": IAB(
        recipe=RECIPE, rule="all_to_all", width=4, mask_epochs=1, redraw=False, cross_fraction=0.3
    ),
    "fc": FC(recipe=RECIPE, surrogate=RECIPE, steps=2),
    "fc-hidden": FC(
        recipe=RECIPE, surrogate=RECIPE, variant="hidden", steps=2, fine_tune_epochs=1, fine_tune_layers=1
    ),
    "fc-targeted": FC(
        recipe=RECIPE, surrogate=RECIPE, variant="targeted", steps=2, fine_tune_epochs=1, instances=2
    ),
    "fc-pair": FC(recipe=RECIPE, surrogate=RECIPE, variant="pair", steps=2, class_fraction=0.5),
    "lira": LIRA(recipe=RECIPE, width=4),
    "lira-autoencoder-fixed": LIRA(
        recipe=RECIPE, rule="all_to_all", width=4, network="autoencoder", poison_fraction=0.2, redraw=False
    ),
}
PURIFIERS: dict[str, Purifier] = {
    "default": QUICK,
    "both-ways": replace(QUICK, exposures=("inversion", "suppression"), act_on="smallest"),
    "paper": replace(MNP.paper(count=5), suppression=replace(SUPPRESSION, stop_accuracy=0.0), masks=MASKS),
    "no-suppression": replace(QUICK, stages=("penalise", "preserve"), score="sum"),
    "no-penalty": replace(QUICK, stages=("suppress", "preserve")),
    "no-preservation": replace(QUICK, stages=("suppress", "penalise"), score="rank_sum"),
    "fraction": replace(QUICK, amount="fraction", fraction=0.1, score="rank_sum", norm_scaling="layer"),
    "threshold": replace(QUICK, amount="threshold", threshold=0.9, norm_folded=True),
    "norm-scale": replace(
        QUICK,
        masks=replace(MASKS, target="norm_scale", norm_mode="train"),
        score="sum",
        prune_mode="norm_scale",
    ),
    "held-out": replace(QUICK, held_out_fraction=0.3, literal_line12=True, score="sum"),
    "ft": FT(RECIPE),
    "ft-super": FT.super(epochs=2),
    "clp": CLP(),
    "clp-paper": CLP.paper(u=1.0),
    "random-order": RandomOrder(),
    "random-order-count": RandomOrder(Selection("count", count=3), prune_mode="weight"),
    "rnp": RNP(SUPPRESSION, replace(MASKS, target="norm_scale", norm_mode="train")),
    "rnp-filters": RNP(SUPPRESSION, MASKS, selection=Selection("own"), threshold=0.9),
    "fp": FP(recipe=RECIPE),
    "fp-paper": replace(FP.paper(), recipe=RECIPE),
    "fp-count": FP(ranking="mean", selection=Selection(amount="count", count=3), recipe=None),
    "anp": ANP(iterations=3, batch_size=16),
    "anp-own": ANP(
        iterations=3,
        batch_size=16,
        steps=2,
        project_noise=True,
        augment=True,
        threshold=0.95,
        selection=Selection("own"),
    ),
    "fst": FST(recipe=RECIPE),
    "ft-sam": FTSAM(recipe=RECIPE),
    "ft-sam-plain": FTSAM(rho=0.1, adaptive=False, label_smoothing=0.0, recipe=RECIPE),
    "nc": NC(inversion=INVERSION, recipe=RECIPE),
    "nc-unlearn": NC(inversion=INVERSION, recipe=RECIPE, act_on="smallest"),
    "nc-prune": NC(inversion=INVERSION, mitigation="prune", act_on="smallest"),
    "bnp": BNP(),
    "bnp-paper": BNP.paper(u=1.0),
    "ep": EP(),
    "ep-paper": EP.paper(u=1.0),
    "nad": NAD(teacher=(RECIPE,), student=(RECIPE, RECIPE)),
    "nad-named": NAD(betas=(10.0,), power=1.0, layers=("6",), teacher=(RECIPE,), student=(RECIPE,)),
    "i-bau": IBAU(rounds=1, iterations=2, batch_size=16),
    "i-bau-own": IBAU(rounds=1, iterations=2, batch_size=8, inner_batch="own", amsgrad=True),
    "awm": AWM(rounds=2, passes=1, batch_size=16),
    "awm-all": AWM(rounds=1, batch_size=64, layers="all", gamma=0.1),
    "bs-ar": BSAR(RECIPE),
    "bs-ar-authors": replace(BSAR.authors(), recipe=RECIPE),
    "sau": SAU(epochs=1, batch_size=16, adversarial_steps=1),
    "sau-paper": replace(SAU.paper(), epochs=1, adversarial_steps=1, lambda2=0.5, norm_mode="train"),
    "tsbd": TSBD(unlearning=SUPPRESSION, shares=(0.1, 0.3), recipe=RECIPE),
    "tsbd-fraction": replace(TSBD.paper(), unlearning=SUPPRESSION, recipe=RECIPE),
    "onp": ONP(steps=9, horizon=3, agent=Agent(rollout=4, passes=2), suppression=SUPPRESSION),
    "onp-greedy": ONP("greedy", steps=6, residual="single", suppression=SUPPRESSION),
    "onp-random": ONP("random", steps=6, candidates=1.0, suppression=SUPPRESSION),
    "gup": GUP(inversion=INVERSION, recipe=RECIPE),
    "gup-own": GUP(inversion=INVERSION, selection=Selection("own"), recipe=None, prune_mode="weight"),
}
DETECTORS: dict[str, ModelDetector] = {
    "collapse": Collapse(SUPPRESSION),
    "collapse-calibrated": Collapse(
        SUPPRESSION, calibration=Calibration((0.1, 0.2, 0.3), "three"), alpha=0.25
    ),
    "recovery": Recovery(SUPPRESSION),
    "recovery-calibrated": Recovery(
        SUPPRESSION, candidates=4, count=1, calibration=Calibration((0.1, 0.2, 0.3), "three"), alpha=0.25
    ),
    "ratio": CorrelationRatio(SUPPRESSION),
    "difference": CorrelationRatio(SUPPRESSION, comparison="difference"),
    "rnp-label": UnlearntLabel(SUPPRESSION),
    "rnp-label-calibrated": UnlearntLabel(
        replace(SUPPRESSION, stop_accuracy=1.0), Calibration((0.1, 0.2, 0.3), "three"), alpha=0.25
    ),
    "rnp-trigger": UnlearntTrigger(replace(SUPPRESSION, stop_accuracy=1.0), INVERSION),
    "scan": ScanDetector(Scan(suppression=SUPPRESSION, search=TriggerSearch(INVERSION, INVERSION))),
    "trigger-search": TriggerSearch(INVERSION, INVERSION),
    "warp-search": WarpSearch(replace(Inversion.warp(), steps=10)),
    "perturbation-search": PerturbationSearch(replace(Inversion.additive(), steps=10, learning_rate=0.05)),
    "trigger-search-calibrated": TriggerSearch(
        INVERSION,
        INVERSION,
        refined=2,
        held_out_fraction=0.0,
        fewest_classes=3,
        calibration=Calibration((0.1, 0.2, 0.3), "three"),
        alpha=0.25,
    ),
    "nc": TriggerSize(INVERSION),
    "nc-ratio": TriggerSize(INVERSION, statistic="ratio", fewest_classes=3),
    "nc-log-calibrated": TriggerSize(
        INVERSION,
        "log_index",
        fewest_classes=3,
        calibration=Calibration((0.1, 0.2, 0.3), "three"),
        alpha=0.25,
    ),
    "mm-bd": MaximumMargin(restarts=3, steps=4, together=2, fewest_classes=4),
    "mm-bd-simulated": MaximumMargin(
        restarts=3, steps=4, momentum=0.0, fewest_classes=4, null="simulated", draws=20
    ),
    "head-weights": HeadWeights(),
    "head-weights-both": HeadWeights(side="both", fewest_classes=4),
    "bti-dbf": BTIDBF(),
    "bti-dbf-calibrated": BTIDBF(
        Decoupling(steps=3, penalty=0.5, starts=1),
        fewest_classes=3,
        calibration=Calibration((0.1, 0.2, 0.3), "three"),
        alpha=0.25,
    ),
    "ban": BAN(Decoupling(steps=4, penalty=0.75), steps=3, batch_size=16),
    "ban-whole": BAN(
        Decoupling(steps=2), steps=2, batch_size=8, project_noise=True, norm_mode="eval", reading="whole"
    ),
}

SAMPLE_DETECTORS: dict[str, SampleDetector] = {
    "screening": Screening(strip=STRIP(n=5)),
    "screening-unlearnt": Screening(("rnp_sample",), rnp_sample=UnlearntSample(SUPPRESSION), kept=0.5),
    "rnp-sample": UnlearntSample(SUPPRESSION),
    "ac": ActivationClustering(),
    "ac-whitened": ActivationClustering("distance", dimensions=2, whiten=True, restarts=2, fewest=1),
    "ac-larger": ActivationClustering("larger", fewest=2),
    "sc": SpectralSignatures(),
    "sc-clean-ranks": SpectralSignatures("clean", "rank", "bimodality"),
    "sc-an": SCAn(fewest=1),
    "sc-an-authors": SCAn(shrinkage=0.1, iterations=5, one_mean="authors", fewest=2),
    "strip": STRIP(n=5),
    "strip-mean": STRIP(n=5, sample_weight=0.5, overlay_weight=0.5),
    "scale-up": ScaleUp(),
    "scale-up-data-free": ScaleUp("data_free", scales=(2.0, 4.0)),
    "ibd-psc": IBDPSC(),
    "ibd-psc-one": IBDPSC(n=1, xi=0.0),
}


NEEDS = {"onp": ("gymnasium", "sb3_contrib")}
"""Packages of extras without which a method cannot run."""


def pairs(methods: dict[str, Any], checks: dict[str, Callable[[Any], None]]) -> list[Any]:
    return [
        pytest.param(m, c, id=f"{n}-{k}", marks=skipped(n))
        for n, m in methods.items()
        for k, c in checks.items()
    ]


def skipped(name: str) -> list[pytest.MarkDecorator]:
    absent = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    return [pytest.mark.skip(reason=f"needs {', '.join(absent)}")] if absent else []


@pytest.mark.parametrize(("attack", "check"), pairs(ATTACKS, ATTACK_CHECKS))
def test_attack(attack: Attack, check: Callable[[Any], None]) -> None:
    check(attack)


@pytest.mark.parametrize(("purifier", "check"), pairs(PURIFIERS, PURIFIER_CHECKS))
def test_purifier(purifier: Purifier, check: Callable[[Any], None]) -> None:
    check(purifier)


@pytest.mark.parametrize(("detector", "check"), pairs(DETECTORS, DETECTOR_CHECKS))
def test_detector(detector: ModelDetector, check: Callable[[Any], None]) -> None:
    check(detector)


@pytest.mark.parametrize(("detector", "check"), pairs(SAMPLE_DETECTORS, SAMPLE_DETECTOR_CHECKS))
def test_sample_detector(detector: SampleDetector, check: Callable[[Any], None]) -> None:
    check(detector)
