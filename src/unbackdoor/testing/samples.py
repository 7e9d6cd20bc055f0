"""The contract of sample detectors, one function a promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.testing.common import COMMON_CHECKS, may_refuse, must_refuse
from unbackdoor.testing.subjects import (
    CLASSES,
    Snapshot,
    awkward_model,
    global_randomness_untouched,
    same_bits,
    small_data,
)
from unbackdoor.types import LabelledImages, SampleDetector, as_float

Check = Callable[[Any], None]

SAMPLES = 24


def _score(
    detector: SampleDetector,
    model: nn.Module,
    samples: Tensor,
    clean: LabelledImages,
    labels: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    return detector.score(model, samples, clean, labels=labels, generator=rng.generator(seed))


def leaves_input_untouched(detector: SampleDetector) -> None:
    """Weights, modes, gradient flags, images and samples are as before."""
    model, clean, samples = awkward_model(), small_data(), small_data(SAMPLES).images
    before, images, kept = Snapshot.of(model), clean.images.clone(), samples.clone()
    _score(detector, model, samples, clean)
    before.check(model)
    assert torch.equal(images, clean.images), "the clean images were changed; work on a copy."
    assert torch.equal(kept, samples), "the samples were changed; work on a copy."


def leaves_global_randomness_untouched(detector: SampleDetector) -> None:
    """All randomness comes from the generator."""
    with global_randomness_untouched():
        _score(detector, awkward_model(), small_data(SAMPLES).images, small_data())


def same_seed_gives_same_scores(detector: SampleDetector) -> None:
    """Equal generators give equal scores, whatever the global state."""
    samples = small_data(SAMPLES).images
    one = _score(detector, awkward_model(), samples, small_data(), seed=5)
    torch.rand(7)
    other = _score(detector, awkward_model(), samples, small_data(), seed=5)
    assert same_bits(one, other), "equal seeds gave other scores."


def gives_one_finite_score_a_sample(detector: SampleDetector) -> None:
    """Scores are float32, finite, on the CPU, one a sample."""
    for count in (1, 2, SAMPLES):
        scores = _score(detector, awkward_model(), small_data(count).images, small_data())
        assert isinstance(scores, Tensor), f"score must return a tensor, got {type(scores).__name__}."
        assert scores.shape == (count,), f"{count} samples got scores of shape {tuple(scores.shape)}."
        assert scores.dtype == torch.float32, f"scores must be float32, got {scores.dtype}."
        assert scores.device.type == "cpu", "scores must be on the CPU."
        assert bool(torch.isfinite(scores).all()), "some scores are not finite."


def mode_does_not_matter(detector: SampleDetector) -> None:
    """A model left in train mode gives the scores that it gives in eval mode."""
    samples = small_data(SAMPLES).images
    one = _score(detector, awkward_model().train(), samples, small_data())
    other = _score(detector, awkward_model().eval(), samples, small_data())
    assert same_bits(one, other), "the scores depend on the mode that the model was left in."


def storage_does_not_matter(detector: SampleDetector) -> None:
    """Bytes and the same images as floats give the same scores."""
    samples = small_data(SAMPLES).images
    one = _score(detector, awkward_model(), samples, small_data())
    other = _score(detector, awkward_model(), as_float(samples), small_data(as_floats=True))
    assert torch.allclose(one, other, atol=1e-5), "uint8 and float samples get other scores."


def treats_labels(detector: SampleDetector) -> None:
    """Labels that came with the samples are taken, whatever the detector does with them."""
    data = small_data(SAMPLES)
    _score(detector, awkward_model(), data.images, small_data(), labels=data.labels)


def treats_grey_images(detector: SampleDetector) -> None:
    """One channel is as good as three."""
    _score(
        detector, awkward_model(channels=1), small_data(SAMPLES, channels=1).images, small_data(channels=1)
    )


def treats_missing_classes(detector: SampleDetector) -> None:
    """Clean images of one class alone are weak data, not a crash."""
    data = small_data()
    one = data.subset(data.labels == 2)
    may_refuse(lambda: _score(detector, awkward_model(), data.images, one), "data of one class")


def treats_answers_that_are_no_numbers(detector: SampleDetector) -> None:
    """A network whose weights are broken is refused in words, or its samples get finite scores."""

    def score_with_a_broken_model() -> None:
        model = awkward_model()
        with torch.no_grad():
            list(model.parameters())[-1].fill_(float("nan"))
        scores = _score(detector, model, small_data(SAMPLES).images, small_data())
        assert bool(torch.isfinite(scores).all()), "a model without answers gave scores that are no numbers."

    may_refuse(score_with_a_broken_model, "a model whose answers are no numbers")


def refuses_bad_input(detector: SampleDetector) -> None:
    """No samples, no clean images, unknown labels and other channels are refused in words."""
    data, model = small_data(), awkward_model()
    beyond = LabelledImages(data.images, data.labels + CLASSES)
    must_refuse(lambda: _score(detector, model, data.images[:0], data), "no samples")
    must_refuse(lambda: _score(detector, model, data.images, small_data(0)), "an empty set of clean images")
    must_refuse(lambda: _score(detector, model, data.images, beyond), "a label beyond the outputs")
    must_refuse(
        lambda: _score(detector, model, data.images, data, labels=data.labels[:3]), "three labels for all"
    )
    must_refuse(lambda: _score(detector, awkward_model(channels=1), data.images, data), "other channels")


SAMPLE_DETECTOR_CHECKS: dict[str, Check] = {
    **COMMON_CHECKS,
    **{
        check.__name__: check
        for check in (
            leaves_input_untouched,
            leaves_global_randomness_untouched,
            same_seed_gives_same_scores,
            gives_one_finite_score_a_sample,
            mode_does_not_matter,
            storage_does_not_matter,
            treats_labels,
            treats_grey_images,
            treats_missing_classes,
            treats_answers_that_are_no_numbers,
            refuses_bad_input,
        )
    },
}
"""Name to function of a sample detector, which raises AssertionError with a sentence."""


def check_sample_detector(detector: SampleDetector) -> None:
    """Run every check on ``detector``.

    Raises:
        AssertionError: With what is wrong and what to do.
    """
    for check in SAMPLE_DETECTOR_CHECKS.values():
        check(detector)
