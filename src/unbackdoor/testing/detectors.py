"""The contract of model detectors, one function a promise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.testing.common import COMMON_CHECKS, may_refuse, must_refuse
from unbackdoor.testing.subjects import (
    CLASSES,
    Snapshot,
    awkward_model,
    certain_model,
    global_randomness_untouched,
    linear_model,
    small_data,
)
from unbackdoor.types import Detection, LabelledImages, ModelDetector

Check = Callable[[Any], None]


def _score(detector: ModelDetector, model: nn.Module, clean: LabelledImages, seed: int = 0) -> Detection:
    return detector.score(model, clean, generator=rng.generator(seed))


def leaves_input_untouched(detector: ModelDetector) -> None:
    """Weights, modes, gradient flags and images are as before."""
    model, clean = awkward_model(), small_data()
    before, images, labels = Snapshot.of(model), clean.images.clone(), clean.labels.clone()
    _score(detector, model, clean)
    before.check(model)
    assert torch.equal(images, clean.images), "the clean images were changed; work on a copy."
    assert torch.equal(labels, clean.labels), "the labels were changed; work on a copy."


def leaves_global_randomness_untouched(detector: ModelDetector) -> None:
    """All randomness comes from the generator."""
    with global_randomness_untouched():
        _score(detector, awkward_model(), small_data())


def same_seed_gives_same_score(detector: ModelDetector) -> None:
    """Equal generators give equal scores, whatever the global state."""
    one = _score(detector, awkward_model(), small_data(), seed=5)
    torch.rand(7)
    other = _score(detector, awkward_model(), small_data(), seed=5)
    assert _same(one.score, other.score), f"equal seeds gave the scores {one.score} and {other.score}."
    assert one.target_class == other.target_class, "equal seeds gave different target classes."
    assert one.undetermined == other.undetermined, "equal seeds abstained for different reasons."


def mode_does_not_matter(detector: ModelDetector) -> None:
    """A model left in train mode gets the score that it gets in eval mode."""
    one = _score(detector, awkward_model().train(), small_data())
    other = _score(detector, awkward_model().eval(), small_data())
    assert _same(one.score, other.score), f"train mode gives {one.score}, eval mode {other.score}."


def storage_does_not_matter(detector: ModelDetector) -> None:
    """Bytes and the same images as floats give the same score."""
    one = _score(detector, awkward_model(), small_data())
    other = _score(detector, awkward_model(), small_data(as_floats=True))
    assert _same(one.score, other.score), f"bytes give {one.score}, floats {other.score}."


def says_what_it_means(detector: ModelDetector) -> None:
    """The fields of the detection agree with each other, and evidence is JSON."""
    found = _score(detector, awkward_model(), small_data())
    assert isinstance(found, Detection), f"score must return Detection, got {type(found).__name__}."
    assert not math.isnan(found.score) or found.undetermined, "the score is NaN and nothing says why."
    assert found.threshold_source, "threshold_source is empty; say where the threshold comes from."
    assert found.p_value is None or 0 < found.p_value <= 1, f"p_value {found.p_value} is not in (0, 1]."
    target = found.target_class
    assert target is None or 0 <= target < CLASSES, f"target_class {target} is no class of the model."
    expected = None if found.undetermined else found.score >= found.threshold
    assert found.is_backdoored is expected, "is_backdoored contradicts score and threshold."
    try:
        json.dumps(dict(found.evidence))
    except TypeError as error:
        raise AssertionError(f"the evidence must be JSON values: {error}.") from error


def treats_grey_images(detector: ModelDetector) -> None:
    """One channel is as good as three."""
    _score(detector, awkward_model(channels=1), small_data(channels=1))


def treats_leftover_batches(detector: ModelDetector) -> None:
    """A last batch of one image, on which batch norm cannot train, is no obstacle."""
    for count in (17, 129):
        _score(detector, awkward_model(), small_data(count))


def treats_missing_classes(detector: ModelDetector) -> None:
    """Images of one class alone are weak data, not a crash."""
    data = small_data()
    may_refuse(lambda: _score(detector, awkward_model(), data.subset(data.labels == 2)), "data of one class")


def treats_two_classes(detector: ModelDetector) -> None:
    """A binary classifier gets an answer or an abstention."""
    may_refuse(lambda: _score(detector, awkward_model(classes=2), small_data(classes=2)), "two classes")


def treats_networks_without_doubt(detector: ModelDetector) -> None:
    """A network whose loss is 0, and so without a gradient, gets an answer or an abstention."""
    model, data = certain_model()
    may_refuse(lambda: _score(detector, model, data), "a network whose loss is 0")


def treats_networks_without_hidden_layers(detector: ModelDetector) -> None:
    """A network that is a head alone gets an answer or a refusal."""
    may_refuse(lambda: _score(detector, linear_model(), small_data()), "a network without hidden layers")


def refuses_bad_input(detector: ModelDetector) -> None:
    """No images, unknown labels and other channels are refused in words."""
    data = small_data()
    beyond = LabelledImages(data.images, data.labels + CLASSES)
    must_refuse(lambda: _score(detector, awkward_model(), small_data(0)), "an empty set of clean images")
    must_refuse(lambda: _score(detector, awkward_model(), beyond), "a label beyond the model's outputs")
    must_refuse(lambda: _score(detector, awkward_model(channels=1), data), "images of other channels")
    may_refuse(lambda: _score(detector, awkward_model(), small_data(1)), "a single image")


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


DETECTOR_CHECKS: dict[str, Check] = {
    **COMMON_CHECKS,
    **{
        check.__name__: check
        for check in (
            leaves_input_untouched,
            leaves_global_randomness_untouched,
            same_seed_gives_same_score,
            mode_does_not_matter,
            storage_does_not_matter,
            says_what_it_means,
            treats_grey_images,
            treats_leftover_batches,
            treats_missing_classes,
            treats_two_classes,
            treats_networks_without_doubt,
            treats_networks_without_hidden_layers,
            refuses_bad_input,
        )
    },
}
"""Name to function of a detector, which raises AssertionError with a sentence."""


def check_detector(detector: ModelDetector) -> None:
    """Run every check on ``detector``.

    Raises:
        AssertionError: With what is wrong and what to do.
    """
    for check in DETECTOR_CHECKS.values():
        check(detector)
