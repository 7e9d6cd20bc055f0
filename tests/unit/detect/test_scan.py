"""Scans of planted models and of what people hand in by mistake: a clear answer, never a traceback."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.cli.scanning import OTHER_IMAGES, advice_on
from unbackdoor.detect.calibration import CalibrationSet, Kind, ScoredModel, options_of
from unbackdoor.detect.evidence import DECIDING, Evidence
from unbackdoor.detect.mm_bd import MaximumMargin
from unbackdoor.detect.nc import TriggerSize
from unbackdoor.detect.plausibility import Plausibility
from unbackdoor.detect.scan import Measured, Scan, ScanResult
from unbackdoor.detect.smallest import Smallest
from unbackdoor.detect.trigger_search import FoundTriggers, RecoveredTrigger, TriggerSearch
from unbackdoor.detect.warp_search import WarpSearch
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.inversion import Inversion, InvertedTrigger
from unbackdoor.rates import Rate
from unbackdoor.settings import configure
from unbackdoor.suppression import Check, Suppressed, Suppression
from unbackdoor.testing import PlantedBackdoor, planted_backdoor
from unbackdoor.testing.subjects import Snapshot, small_network
from unbackdoor.types import Detection, LabelledImages

SCAN = Scan(
    suppression=Suppression(budget=60),
    search=TriggerSearch(
        first=Inversion(steps=50, batch_size=8, success=0.95),
        second=Inversion(steps=50, batch_size=8, success=0.95),
        refined=1,
    ),
    warps=WarpSearch(replace(Inversion.warp(), steps=20)),
)

FAST = replace(SCAN, fast=True)


@cache
def planted(*, infected: bool = True) -> PlantedBackdoor:
    return planted_backdoor(target_class=3, infected=infected)


def images(count: int = 160) -> LabelledImages:
    return planted().clean_data(count, rng.generator(1))


def calibrated(scan: Scan, collapse: float, search: float, count: int = 160, recovery: float = 2.0) -> Scan:
    """Return ``scan`` with nineteen clean models around these scores; no model recovers by more than 1."""
    clean = images(count)
    scores = {
        "collapse": collapse,
        "recovery": recovery,
        "trigger_search": search,
        "mnp": 0.0,
        "head_weights": 1.0,
        "warp_search": 9.0,
    }
    return replace(
        scan,
        calibration=CalibrationSet(
            description="made for this test",
            kind=Kind.of(planted().model, clean, 8),
            images=count,
            options={name: options_of(detector) for name, detector in scan.detectors().items()},
            models=tuple(
                ScoredModel(
                    name=str(i),
                    scores={
                        name: s + 0.001 * (i % 7) for name, s in scores.items() if name in scan.detectors()
                    },
                )
                for i in range(19)
            ),
        ),
    )


def scanned(scan: Scan, model: nn.Module, clean: LabelledImages) -> ScanResult:
    return scan.run(model, clean, generator=rng.generator(0))


def test_a_planted_backdoor_is_found_with_everything_a_report_needs() -> None:
    before, stages = Snapshot.of(planted().model), set[str]()
    result = calibrated(SCAN, 0.3, 0.5).run(
        planted().model,
        images(),
        generator=rng.generator(0),
        progress=lambda stage, done, total: stages.add(stage),
    )
    before.check(planted().model)
    assert (result.verdict, result.target_class) == ("backdoored", 3)
    assert len(stages) >= 3
    assert [each.name for each in result.evidence] == [
        "collapse",
        "recovery",
        "mnp",
        "trigger_search",
        "head_weights",
    ]
    assert [each.decides for each in result.evidence] == [True, True, False, True, False]
    for each in (result.evidence[0], result.evidence[1], result.evidence[3]):
        assert each.detection.p_value is not None
        assert "made for this test" in each.detection.threshold_source
    assert result.confidence is not None
    assert (result.confidence.origin, result.confidence.models) == ("models", 19)
    assert result.trigger is not None
    assert result.trigger.held_out.value >= 0.9
    # The planted filters lead the list of suspects.
    assert {(each.layer, each.filter) for each in result.filters[:2]} <= planted().guilty
    assert result.warnings == ()


@cache
def measured_once(*, infected: bool) -> Measured:
    return SCAN.measure(planted(infected=infected).model, images(), generator=rng.generator(0))


def concluded(scan: Scan, *, infected: bool = True) -> ScanResult:
    found = measured_once(infected=infected)
    return scan.conclude(found, images(), scan.calibration, Plausibility(Rate(1, 1)))


def test_recovery_alone_flags_a_model_that_the_others_pass() -> None:
    assert concluded(calibrated(SCAN, 9.0, 9.0)).verdict == "clean"
    scan = calibrated(SCAN, 9.0, 9.0, recovery=0.1)
    result = concluded(scan)
    assert (result.verdict, result.target_class) == ("backdoored", 3)
    assert "give back" in result.reason
    assert concluded(scan, infected=False).verdict == "clean"


def test_recovery_decides_only_where_clean_models_were_scored_by_it() -> None:
    scan = calibrated(SCAN, 0.3, 9.0, recovery=0.1)
    assert scan.calibration is not None
    older = tuple(
        model.model_copy(update={"scores": {n: s for n, s in model.scores.items() if n != "recovery"}})
        for model in scan.calibration.models
    )
    scan = replace(scan, calibration=scan.calibration.model_copy(update={"models": older}))
    result = concluded(scan)
    assert [each.name for each in result.evidence if each.decides] == ["collapse", "trigger_search"]
    assert (result.verdict, result.target_class) == ("backdoored", 3)
    assert "has no scores of recovery" in " ".join(scan.foreseen(planted().model, images()))


def test_what_does_not_decide_is_calibrated_by_itself() -> None:
    result = scanned(calibrated(FAST, 0.3, 0.0), planted().model, images())
    shown = result.detection("head_weights")
    assert shown is not None
    # The largest of the clean scores is 1.006, where the fixed threshold is 6.
    assert shown.threshold == pytest.approx(1.006)
    assert "19 clean models" in shown.threshold_source
    assert shown.p_value is not None
    assert shown.is_backdoored == (shown.p_value <= 0.05)
    # Nineteen models cannot guarantee one per cent.
    result = scanned(replace(calibrated(FAST, 0.3, 0.0), alpha=0.01), planted().model, images())
    shown = result.detection("head_weights")
    assert shown is not None
    assert shown.threshold == 6
    assert "uncalibrated" in shown.threshold_source


def found_triggers(*, reached: bool) -> FoundTriggers:
    """Return triggers of eight classes, of which class 3 alone was refined."""
    first = tuple(
        InvertedTrigger(k, torch.zeros(1, 4, 4), torch.zeros(3, 4, 4), 9.0, 1.0, reached, 10)
        for k in range(8)
    )
    return FoundTriggers(first, (RecoveredTrigger(first[3], Rate(1, 1)),), 100)


@pytest.mark.parametrize(
    ("target", "reached", "why"),
    [
        (3, True, ""),
        (3, False, "inversion found none that sends enough images to the suspected class '3'"),
        (5, True, "inversion did not go on with the suspected class '5'"),
        (None, True, "(all-to-all)"),
    ],
)
def test_a_missing_trigger_is_explained(target: int | None, reached: bool, why: str) -> None:
    classes = 8
    confusion = 10 * torch.eye(classes, dtype=torch.int64)
    suppressed = Suppressed(nn.Identity(), (Check(0, confusion),), "accuracy")
    detection = Detection(9.0, 0.5, "a guess", None, target, evidence={"pattern": "all-to-all, class + 1"})
    collapse = Evidence("k", "collapse", "Collapse", "us", detection, decides=True, seconds=1.0)
    exposure = SimpleNamespace(suppressed=suppressed)
    measured = Measured(exposure, found_triggers(reached=reached), (collapse,))  # type: ignore[arg-type]
    scan = calibrated(SCAN, 0.3, 0.5)
    result = scan.conclude(measured, images(), scan.calibration, Plausibility(Rate(1, 1)))
    assert (result.verdict, result.target_class) == ("backdoored", target)
    assert (result.trigger is None) == bool(why)
    assert why in " ".join(result.warnings)
    assert bool(result.warnings) == bool(why)


def test_a_clean_twin_is_clean() -> None:
    result = scanned(calibrated(SCAN, 9.0, 9.0), planted(infected=False).model, images())
    assert (result.verdict, result.target_class, result.filters, result.trigger) == ("clean", None, (), None)


@pytest.mark.parametrize(
    ("norm", "success", "doubtful"),
    [(0.4, 0.95, True), (1.8, 0.95, False), (0.4, 0.85, False)],
)
def test_a_small_warp_makes_a_clean_verdict_doubtful(
    norm: float, success: float, doubtful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No warp leads to the other classes: they count as an eighth of 16 pixels.
    sizes = {3: (norm, success)}
    triggers = [
        InvertedTrigger(
            k, torch.ones(1, 16, 16), torch.zeros(2, 6, 6), size, rate, rate >= 0.9, 9, form="warp"
        )
        for k, (size, rate) in ((k, sizes.get(k, (1.0, 0.1))) for k in range(8))
    ]
    found = Smallest(triggers, triggers[3], Rate(9, 10), 100, (3, 16, 16))
    monkeypatch.setattr("unbackdoor.detect.scan.find_smallest", lambda *_, **__: found)
    clean = images()
    twin, scan = planted(infected=False).model, calibrated(SCAN, 9.0, 9.0)
    result = scanned(scan, twin, clean)
    evidence = result.evidence[-1]
    assert (evidence.name, evidence.decides) == ("warp_search", doubtful)
    if not doubtful:
        assert (result.verdict, result.ground, result.target_class) == ("clean", "nothing", None)
        assert result.filters == ()
        return
    assert (result.verdict, result.ground, result.target_class) == ("inconclusive", "warp", 3)
    assert f"a shift of the pixels by {norm} leads 95% of the images" in result.reason
    assert "5.00 times less than what the median class needs (threshold 2.00)" in result.reason
    assert "no clean models were scored by that" in result.reason
    assert "`unbackdoor purify` it" in advice_on(result)
    assert scanned(replace(scan, doubt=False), twin, clean).verdict == "clean"


def test_a_warp_is_looked_for_before_a_model_is_called_clean_only(monkeypatch: pytest.MonkeyPatch) -> None:
    flagged = scanned(calibrated(SCAN, 0.3, 0.5), planted().model, images())
    assert "warp_search" not in {each.name for each in flagged.evidence}
    options = ("warp-search.inversion.steps=5",)
    asked = calibrated(replace(SCAN, others=("warp-search",), other_options=options), 9.0, 9.0)
    # Asked for by name it is not looked for again, and clean models that were scored by it tell.
    monkeypatch.setattr("unbackdoor.detect.scan.find_smallest", None)
    cleared = scanned(asked, planted(infected=False).model, images())
    (opinion,) = (each for each in cleared.evidence if each.name == "warp_search")
    assert (cleared.verdict, opinion.decides) == ("clean", False)
    assert opinion.detection.threshold == pytest.approx(9.006, abs=1e-3)
    assert opinion.detection.p_value == 1


def test_a_fast_scan_flags_and_never_clears() -> None:
    fast = replace(SCAN, fast=True)
    assert scanned(calibrated(fast, 0.3, 0.0), planted().model, images()).verdict == "backdoored"
    result = scanned(calibrated(fast, 9.0, 0.0), planted(infected=False).model, images())
    assert result.verdict == "inconclusive"
    assert "trigger inversion was left out" in result.reason
    assert result.detection("trigger_search") is None


def test_what_is_compared_does_not_depend_on_who_abstains() -> None:
    scan = calibrated(SCAN, 0.3, 0.5)
    assert scan.calibration is not None
    mute = scan.joint({"collapse": 9.0, "mnp": None, "trigger_search": None}, scan.calibration)
    assert mute is not None
    assert (set(mute.p_values), mute.n) == ({"collapse", "trigger_search"}, 19)
    # A clean model on which the search abstained stays; one that it was not run on has no say.
    first, second, *rest = scan.calibration.models
    first = first.model_copy(update={"scores": first.scores | {"trigger_search": None}})
    second = second.model_copy(update={"scores": {"collapse": 0.3}})
    odd = scan.calibration.model_copy(update={"models": (first, second, *rest)})
    joint = scan.joint({"collapse": 9.0, "trigger_search": 0.5}, odd)
    assert joint is not None
    assert joint.n == 18
    # No scores of the search at all: collapse alone is compared, as the file says and not the suspect.
    without = tuple(m.model_copy(update={"scores": {"collapse": 0.3}}) for m in odd.models)
    for search in (None, 0.5):
        alone = scan.joint(
            {"collapse": 9.0, "trigger_search": search}, odd.model_copy(update={"models": without})
        )
        assert alone is not None
        assert (set(alone.p_values), alone.n) == ({"collapse"}, 19)


def test_without_clean_models_nothing_is_claimed() -> None:
    result = scanned(FAST, planted().model, images())
    assert result.verdict == "inconclusive"
    assert result.ground == "uncompared"
    assert result.reason.startswith("there are no clean models to compare with")
    assert result.target_class == 3  # pointed at all the same
    assert result.confidence is not None
    assert result.confidence.origin == "none"
    assert "No calibration comes with this package for" in result.warnings[0]


def test_a_calibration_of_another_kind_is_refused() -> None:
    scan = calibrated(FAST, 0.3, 0.0)
    assert scan.calibration is not None
    kind = scan.calibration.kind.model_copy(update={"parameters": 3})
    other = replace(scan, calibration=scan.calibration.model_copy(update={"kind": kind}))
    with pytest.raises(InvalidInputError, match=r"the calibration is of .* the model is"):
        scanned(other, planted().model, images())


def test_a_calibration_with_other_options_or_images_does_not_apply() -> None:
    scan = calibrated(FAST, 0.3, 0.0)
    result = scanned(replace(scan, suppression=Suppression(budget=61)), planted().model, images())
    assert result.verdict == "inconclusive"
    assert "made with other options of collapse and recovery" in " ".join(result.warnings)
    result = scanned(calibrated(FAST, 0.3, 0.0, count=320), planted().model, images(80))
    assert result.verdict == "inconclusive"
    assert "made with 320 images and does not hold for 80; give 160 to 640" in result.warnings[0]
    assert result.reason.startswith(
        "the clean models at hand were scored with another number of images, so that"
    )
    assert advice_on(result) == OTHER_IMAGES
    result = scanned(calibrated(FAST, 0.3, 0.0, count=240), planted().model, images())
    assert result.verdict == "backdoored"
    assert "its rates hold only roughly" in result.warnings[0]


@pytest.mark.parametrize("count", [5, 8])
def test_one_image_a_class_or_fewer(count: int) -> None:
    result = scanned(SCAN, planted().model, images(count))
    assert result.verdict == "inconclusive"
    assert f"{count} images are too few for a verdict: 8 of the model's 8 classes" in result.reason
    # Said before any work is done.
    assert (result.ground, result.evidence, result.exposure) == ("too few images", (), None)


def test_no_image_and_one_image_are_refused() -> None:
    for count in (0, 1):
        with pytest.raises(InvalidInputError, match="a scan needs at least 2 image"):
            scanned(SCAN, planted().model, images(8).subset(torch.arange(count)))


class Constant(nn.Module):
    """A head whose answer to an image is its first pixel's class: right on all images of a made data set."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2 * classes, 1), nn.BatchNorm2d(2 * classes)
        self.head = nn.Linear(2 * classes, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return logits


def separable(classes: int, per_class: int) -> tuple[nn.Module, LabelledImages]:
    """Return images of one grey level a class, and a network that tells the levels apart."""
    labels = torch.arange(classes * per_class) % classes
    levels = (labels + 0.5) / classes
    model = Constant(classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # Logit k is 2 c_k x - c_k^2 up to a constant: largest at the nearest level c_k.
        centres = (torch.arange(classes) + 0.5) / classes
        model.conv.weight[:classes] = 1.0
        model.norm.weight.fill_((1 + model.norm.eps) ** 0.5)
        model.head.weight[:, 0] = 2e4 * centres
        model.head.bias.copy_(-1e4 * centres**2)
        inputs = levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    return model, LabelledImages(inputs, labels)


def test_a_further_detector_that_refuses_does_not_lose_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InvalidInputError("it wants other images.")

    monkeypatch.setattr("unbackdoor.detect.rnp.UnlearntLabel.score", refuse)
    found = scanned(replace(FAST, others=("rnp-label",)), planted().model, images()).detection("rnp_label")
    assert found is not None
    assert found.undetermined == "it wants other images"


def test_two_classes_get_an_answer() -> None:
    result = scanned(SCAN, *separable(2, 40))
    assert result.plausibility.accuracy.value == 1.0
    assert result.verdict == "inconclusive"
    collapse = result.detection("collapse")
    assert collapse is not None
    assert "images of 2 classes leave errors too few places to go" in collapse.undetermined


def test_with_two_classes_no_comparison_can_say_clean() -> None:
    model, clean = separable(2, 40)
    base = calibrated(SCAN, 0.3, 9.0, len(clean))
    assert base.calibration is not None
    scan = replace(base, calibration=base.calibration.model_copy(update={"kind": Kind.of(model, clean, 2)}))
    result = scanned(scan, model, clean)
    assert (result.verdict, result.ground) == ("inconclusive", "too few classes")
    warning = "With 2 classes a scan can find a backdoor, but never say that there is none"
    assert any(warning in said for said in result.warnings)
    assert any(warning in said for said in scan.foreseen(model, clean))


def test_a_model_much_more_accurate_than_those_compared_with_is_named() -> None:
    base = calibrated(SCAN, 0.3, 9.0)
    assert base.calibration is not None
    models = tuple(model.model_copy(update={"clean_accuracy": 0.7}) for model in base.calibration.models)
    scan = replace(base, calibration=base.calibration.model_copy(update={"models": models}))
    result = scanned(scan, planted(infected=False).model, images())
    assert any("are right on 70.0% to 70.0% of their images, this model on" in w for w in result.warnings)
    unsaid = scanned(base, planted(infected=False).model, images())
    assert not any("of their images" in warning for warning in unsaid.warnings)


def test_two_hundred_classes_get_an_answer() -> None:
    result = scanned(replace(FAST, suppression=Suppression(budget=10)), *separable(200, 1))
    assert result.plausibility.accuracy.value == 1.0
    assert result.verdict == "inconclusive"
    assert "200 of the model's 200 classes have fewer than 5, such as '0' with 1" in result.reason


def test_images_of_few_classes_permit_no_verdict() -> None:
    clean = images(400)
    for most in (1, 2):
        few = clean.subset(clean.labels < most)
        result = scanned(calibrated(SCAN, 9.0, 9.0, len(few)), planted().model, few)
        assert (result.verdict, result.ground) == ("inconclusive", "too few images")
        assert f"{8 - most} of the model's 8 classes have fewer than 5" in result.reason


def test_a_dead_network_is_named() -> None:
    model = small_network(classes=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    result = scanned(SCAN, model, images())
    assert result.verdict == "inconclusive"
    assert "it answers '0' for every image" in result.reason


def test_a_dead_network_on_unbalanced_images_is_named() -> None:
    model = small_network(classes=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    even = images(400)
    often = (torch.arange(400) % 10 == 0) | (even.labels == 0)
    clean = even.subset(often.nonzero().flatten().repeat(2))
    first = clean.subset(clean.labels == 0)
    clean = LabelledImages(
        torch.cat([clean.images, *[first.images] * 3]), torch.cat([clean.labels, *[first.labels] * 3])
    )
    result = scanned(SCAN, model, clean)
    assert result.plausibility.accuracy.value > 0.7
    assert result.verdict == "inconclusive"
    assert "it answers '0' for every image" in result.reason


def test_a_random_network_is_named() -> None:
    with rng.isolated(rng.generator(0)):
        model = small_network(classes=8)
    result = scanned(SCAN, model, images())
    assert result.verdict == "inconclusive"
    assert "the model is right on only" in result.reason


def test_weights_that_are_no_numbers_are_named() -> None:
    model = planted_backdoor().model
    with torch.no_grad():
        next(iter(model.parameters()))[0] = torch.nan
    result = scanned(SCAN, model, images())
    assert result.verdict == "inconclusive"
    assert "1 of the model's tensors, 'conv1.weight' first, hold values that are not finite" in result.reason


def test_grey_images_for_a_colour_model_are_refused() -> None:
    grey = LabelledImages(images().images[:, :1], images().labels)
    with pytest.raises(UnsupportedModelError, match="cannot be run on one image of shape"):
        scanned(SCAN, planted().model, grey)


def test_foreign_images_permit_no_verdict() -> None:
    noise = torch.rand(160, 3, 16, 16, generator=rng.generator(0))
    result = scanned(SCAN, planted().model, LabelledImages(noise, images().labels))
    assert result.verdict == "inconclusive"
    assert "the model is right on only" in result.reason


def test_other_detectors_are_shown_and_do_not_decide() -> None:
    scan = replace(FAST, others=("rnp-label", "mm_bd"))
    result = scanned(scan, *separable(2, 40))
    rows = {each.name: each for each in result.evidence}
    assert list(rows) == ["collapse", "recovery", "mnp", "head_weights", "rnp_label", "mm_bd"]
    assert not rows["mm_bd"].decides
    # No calibration: the threshold is the detector's own.
    assert rows["rnp_label"].detection.p_value is None
    assert rows["rnp_label"].kind == "a further detector"
    for others in (("nc", "nc"), ("collapse",), ("magic",)):
        with pytest.raises(InvalidInputError, match=r"once; do not name it again|unknown model detector"):
            replace(FAST, others=others)


def test_other_detectors_take_options() -> None:
    chosen = ("mm-bd.steps=7", "nc.inversion.steps=9", "mm_bd.restarts=2")
    found = replace(FAST, others=("nc", "mm-bd"), other_options=chosen).detectors()
    assert found["mm_bd"] == MaximumMargin(steps=7, restarts=2)
    assert found["nc"] == TriggerSize(inversion=Inversion(steps=9))
    with pytest.raises(InvalidInputError, match=r"'ban.steps=3' is for a detector that does not run.*nc"):
        replace(FAST, others=("nc",), other_options=("ban.steps=3",))
    with pytest.raises(InvalidInputError, match="did you mean 'fewest_classes'"):
        replace(FAST, others=("nc",), other_options=("nc.fewest_class=3",))


def test_deciding_detectors_are_named_with_dashes_or_as_in_python() -> None:
    written = ("trigger-search", "Head-Weights", "collapse", "trigger_search")
    assert Scan(deciding=written).deciding == ("trigger_search", "head_weights", "collapse")
    assert Scan(deciding=DECIDING) == Scan()
    scan = configure(Scan(), ["deciding=collapse,trigger-search,head-weights"])
    assert scan.deciding == ("collapse", "trigger_search", "head_weights")
    with pytest.raises(
        InvalidInputError,
        match=r"unknown deciding detector 'triger-search': did you mean 'trigger-search'[?] known are "
        r"collapse, recovery, mnp, trigger-search, head-weights[.]",
    ):
        configure(Scan(), ["deciding=collapse,triger-search"])
    with pytest.raises(
        InvalidInputError,
        match=r"must hold collapse and trigger-search and may hold others of recovery, mnp, head-weights; "
        r"got collapse, head-weights[.]",
    ):
        Scan(deciding=("collapse", "head_weights"))


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"deciding": ("collapse",)}, {"deciding": ("magic",)}, {"deciding": ()}]
)
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match=r"alpha must lie|deciding must hold|unknown deciding"):
        Scan(**options)  # type: ignore[arg-type]
