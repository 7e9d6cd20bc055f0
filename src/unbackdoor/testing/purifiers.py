"""The contract of purifiers, one function a promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.filters import FilterMask
from unbackdoor.testing.common import COMMON_CHECKS, may_refuse, must_refuse
from unbackdoor.testing.subjects import (
    CLASSES,
    Snapshot,
    awkward_model,
    certain_model,
    check_same_tensors,
    functional_model,
    global_randomness_untouched,
    linear_model,
    modes_of,
    same_bits,
    small_data,
)
from unbackdoor.types import LabelledImages, Purified, Purifier

Check = Callable[[Any], None]


def _purify(purifier: Purifier, model: nn.Module, clean: LabelledImages, seed: int = 0) -> Purified:
    return purifier.purify(model, clean, generator=rng.generator(seed))


def leaves_input_untouched(purifier: Purifier) -> None:
    """Weights, modes, gradient flags and images are as before."""
    model, clean = awkward_model(), small_data()
    before, images, labels = Snapshot.of(model), clean.images.clone(), clean.labels.clone()
    _purify(purifier, model, clean)
    before.check(model)
    assert torch.equal(images, clean.images), "the clean images were changed; work on a copy."
    assert torch.equal(labels, clean.labels), "the labels were changed; work on a copy."


def leaves_global_randomness_untouched(purifier: Purifier) -> None:
    """All randomness comes from the generator."""
    with global_randomness_untouched():
        _purify(purifier, awkward_model(), small_data())


def same_seed_gives_same_result(purifier: Purifier) -> None:
    """Equal generators give equal bits, whatever the global state."""
    one = _purify(purifier, awkward_model(), small_data(), seed=5)
    torch.rand(7)
    other = _purify(purifier, awkward_model(), small_data(), seed=5)
    check_same_tensors(
        dict(one.model.state_dict()), dict(other.model.state_dict()), "equal seeds gave other weights"
    )
    check_same_tensors(dict(one.scores), dict(other.scores), "equal seeds gave other scores")
    if one.mask is not None and other.mask is not None:
        assert one.mask.equals(other.mask), "equal seeds gave other masks; draw from the generator alone."


def returns_new_module(purifier: Purifier) -> None:
    """The result shares no memory with the input and has its structure."""
    model = awkward_model()
    purified = _purify(purifier, model, small_data()).model
    assert purified is not model, "the input model itself was returned; return a copy."
    old = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    shared = [name for name, tensor in purified.state_dict().items() if tensor.data_ptr() in old]
    assert not shared, f"the new model shares memory with the input at {shared}; copy it."
    assert set(purified.state_dict()) == set(model.state_dict()), "the names of the tensors changed."


def keeps_modes(purifier: Purifier) -> None:
    """Train/eval and gradient flags of the new model are those of the input, layer by layer."""
    model = awkward_model()
    purified = _purify(purifier, model, small_data()).model
    assert modes_of(purified) == modes_of(model), "the new model is not in the input's train/eval modes."
    flags = {name: parameter.requires_grad for name, parameter in purified.named_parameters()}
    assert flags == Snapshot.of(model).requires_grad, "the new model has other requires_grad flags."


def keeps_device_and_dtype(purifier: Purifier) -> None:
    """Tensors of the new model live where, and are what, those of the input are."""
    model = awkward_model()
    purified = _purify(purifier, model, small_data()).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert purified[name].dtype == tensor.dtype, f"the dtype of {name} changed."
        assert purified[name].device == tensor.device, f"the device of {name} changed."


def works_in_train_mode(purifier: Purifier) -> None:
    """A model left in train mode gives the mask and the weights that it gives in eval mode."""
    trained, evaluated = awkward_model().train(), awkward_model().eval()
    one, other = _purify(purifier, trained, small_data()), _purify(purifier, evaluated, small_data())
    assert all(modes_of(one.model).values()), "the model came in train mode and left in another."
    check_same_tensors(
        dict(one.model.state_dict()),
        dict(other.model.state_dict()),
        "the result depends on the mode that the model was left in",
    )


def storage_does_not_matter(purifier: Purifier) -> None:
    """Bytes and the same images as floats give the same result."""
    one = _purify(purifier, awkward_model(), small_data())
    other = _purify(purifier, awkward_model(), small_data(as_floats=True))
    check_same_tensors(
        dict(one.model.state_dict()), dict(other.model.state_dict()), "uint8 and float images differ"
    )


def describes_itself(purifier: Purifier) -> None:
    """Mask, scores and diagnostics have the types that reports read."""
    result = _purify(purifier, awkward_model(), small_data())
    assert isinstance(result, Purified), f"purify must return Purified, got {type(result).__name__}."
    assert result.mask is None or isinstance(result.mask, FilterMask), "mask must be a FilterMask or None."
    for name, scores in result.scores.items():
        assert scores.ndim == 1, f"the scores of {name!r} must be (filters,), got {tuple(scores.shape)}."
        if result.mask is not None and name in result.mask.keep:
            assert len(scores) == len(result.mask.keep[name]), (
                f"scores and mask of {name!r} differ in length."
            )
    try:
        json.dumps(dict(result.diagnostics))
    except TypeError as error:
        raise AssertionError(f"the diagnostics must be JSON values: {error}.") from error


def treats_grey_images(purifier: Purifier) -> None:
    """One channel is as good as three."""
    _purify(purifier, awkward_model(channels=1), small_data(channels=1))


def treats_weights_of_any_name(purifier: Purifier) -> None:
    """A layer whose weight is not called ``weight`` is treated, or refused in words."""
    may_refuse(
        lambda: _purify(purifier, functional_model(), small_data()), "a network with a functional convolution"
    )


def treats_leftover_batches(purifier: Purifier) -> None:
    """A last batch of one image, on which batch norm cannot train, is no obstacle."""
    for count in (17, 129):
        result = _purify(purifier, awkward_model(), small_data(count))
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in result.model.state_dict().values())
        assert finite, f"the new model's weights are not finite after {count} images."


def treats_missing_classes(purifier: Purifier) -> None:
    """Images of one class alone are weak data, not a crash."""
    data = small_data()
    may_refuse(lambda: _purify(purifier, awkward_model(), data.subset(data.labels == 2)), "data of one class")


def treats_networks_without_doubt(purifier: Purifier) -> None:
    """A network whose loss is 0, and so without a gradient, gets an answer or a refusal."""
    model, data = certain_model()
    may_refuse(lambda: _purify(purifier, model, data), "a network whose loss is 0")


def treats_networks_without_hidden_layers(purifier: Purifier) -> None:
    """A network that is a head alone gets an answer or a refusal."""
    may_refuse(lambda: _purify(purifier, linear_model(), small_data()), "a network without hidden layers")


def refuses_bad_input(purifier: Purifier) -> None:
    """No images, unknown labels and other channels are refused in words."""
    data = small_data()
    beyond = LabelledImages(data.images, data.labels + CLASSES)
    must_refuse(lambda: _purify(purifier, awkward_model(), small_data(0)), "an empty set of clean images")
    must_refuse(lambda: _purify(purifier, awkward_model(), beyond), "a label beyond the model's outputs")
    must_refuse(lambda: _purify(purifier, awkward_model(channels=1), data), "images of other channels")
    must_refuse(lambda: _purify(purifier, nn.Flatten(), data), "a model without layers")
    may_refuse(lambda: _purify(purifier, awkward_model(), small_data(1)), "a single image")


def generator_matters_alone(purifier: Purifier) -> None:
    """The generator may be used before: the result depends on its state, not on its identity."""
    first = rng.generator(3)
    twin = torch.Generator()
    twin.set_state(first.get_state())
    one = purifier.purify(awkward_model(), small_data(), generator=first)
    other = purifier.purify(awkward_model(), small_data(), generator=twin)
    same = all(
        same_bits(tensor, other.model.state_dict()[name]) for name, tensor in one.model.state_dict().items()
    )
    assert same, "two generators in the same state gave different results."


PURIFIER_CHECKS: dict[str, Check] = {
    **COMMON_CHECKS,
    **{
        check.__name__: check
        for check in (
            leaves_input_untouched,
            leaves_global_randomness_untouched,
            same_seed_gives_same_result,
            generator_matters_alone,
            returns_new_module,
            keeps_modes,
            keeps_device_and_dtype,
            works_in_train_mode,
            storage_does_not_matter,
            describes_itself,
            treats_grey_images,
            treats_weights_of_any_name,
            treats_leftover_batches,
            treats_missing_classes,
            treats_networks_without_doubt,
            treats_networks_without_hidden_layers,
            refuses_bad_input,
        )
    },
}
"""Name to function of a purifier, which raises AssertionError with a sentence."""


def check_purifier(purifier: Purifier) -> None:
    """Run every check on ``purifier``.

    Give it few steps: each check purifies a small network once or twice.

    Raises:
        AssertionError: With what is wrong and what to do.
    """
    for check in PURIFIER_CHECKS.values():
        check(purifier)
