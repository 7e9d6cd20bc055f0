"""Bad input to attacks is refused in one sentence, before any training, or simply works."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.attacks.registry import ATTACKS, attack_named
from unbackdoor.errors import InvalidInputError
from unbackdoor.testing.subjects import small_data, small_network
from unbackdoor.train import Recipe
from unbackdoor.types import LabelledImages

ONE_EPOCH = Recipe(epochs=1, batch_size=16, learning_rate=0.01, crop_padding=0, schedule="one_cycle")
CLEAN_LABEL = ("cl", "sig", "fc")
PATCHES = ("badnets", "trojan", "cl", "sra", "adap_patch", "adaptive_magnitude")


def _quick(name: str, **options: Any) -> Any:  # noqa: ANN401
    """Return an attack of that name whose every schedule is one epoch, with further options."""
    cls = ATTACKS[name]
    known = {field.name for field in fields(cls)}
    short: dict[str, Any] = dict.fromkeys(known & {"recipe", "surrogate", "subnet"}, ONE_EPOCH)
    short |= dict.fromkeys(known & {"steps", "mask_epochs", "injector_steps", "repair_epochs"}, 1)
    return cls(**{**short, **options})


def _never_built() -> nn.Module:
    raise AssertionError("a network was built before the input was checked")


def _refused(name: str, data: LabelledImages | None = None, **options: Any) -> str:  # noqa: ANN401
    with pytest.raises(InvalidInputError) as caught:
        _quick(name, **options).run(data or small_data(), _never_built, generator=rng.generator(0))
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize("target", [-1, 4, 99])
def test_a_target_that_is_no_class_is_refused(name: str, target: int) -> None:
    assert f"{target} is not a class of a data set with 4 classes" in _refused(name, target_class=target)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"sra", *CLEAN_LABEL}))
@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, 0.001, float("nan")])
def test_a_rate_of_zero_out_of_range_or_too_low_for_one_image_is_refused(name: str, rate: float) -> None:
    assert "poison_fraction" in _refused(name, poison_fraction=rate)


@pytest.mark.parametrize("name", CLEAN_LABEL)
def test_a_clean_label_rate_above_what_the_class_holds_is_refused(name: str) -> None:
    assert "which holds 9" in _refused(name, poison_fraction=0.5)
    assert "class_fraction must lie in (0, 1]" in _refused(name, class_fraction=0.0)
    assert "class_fraction must lie in (0, 1]" in _refused(name, class_fraction=1.2)
    assert "selects none" in _refused(name, class_fraction=0.01)


@pytest.mark.parametrize("name", PATCHES)
def test_an_image_smaller_than_the_patch_is_refused(name: str) -> None:
    side = {"adap_patch": 9}.get(name, 13)
    assert "12x12" in _refused(name, patch_size=side)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("badnets", option) for option in ("pattern", "corner", "rule", "trigger_stage")),
        *((name, "pattern") for name in ("sra", "adaptive_magnitude")),
        *((name, "rule") for name in ("blend", "wanet", "iab", "dfst", "lira", "bpp", "lf", "trojan")),
        *((name, "trigger_stage") for name in ("blend", "sig", "adap_blend", "adap_patch", "wanet")),
        ("adaptive_magnitude", "trigger_stage"),
        *(("blend", "key"), ("lira", "network"), ("sra", "channel_choice")),
    ],
)
def test_a_slip_in_a_named_choice_is_refused(name: str, option: str) -> None:
    assert f"{option} must be one of '" in _refused(name, None, **{option: "slip"})


@pytest.mark.parametrize("name", ["badnets", "sra", "adaptive_magnitude", "adap_patch"])
@pytest.mark.parametrize("option", ["patch_size", "margin"])
def test_a_negative_size_of_a_patch_is_refused(name: str, option: str) -> None:
    assert "patch_size and margin must be at least 0" in _refused(name, None, **{option: -1})


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 20])
def test_small_large_and_grey_images_work(name: str, channels: int, side: int) -> None:
    data = small_data(40, channels=channels)
    images = torch.nn.functional.interpolate(data.floats(), size=(side, side))
    result = _quick(name).run(
        LabelledImages(images, data.labels), lambda: small_network(channels), generator=rng.generator(0)
    )
    assert result.trigger(images).shape == images.shape


def test_names_may_have_dashes_and_unknown_ones_are_refused() -> None:
    assert type(attack_named("adap-blend")) is type(attack_named("adap_blend"))
    with pytest.raises(InvalidInputError, match=r"unknown attack 'nope': known are badnets, trojan"):
        attack_named("nope")


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_states_the_settings_of_its_paper(name: str) -> None:
    paper = attack_named(name, paper=True)
    assert type(paper) is ATTACKS[name]
    assert paper.name == name
    assert paper.recipe == Recipe()
    assert replace(paper) == paper


@pytest.mark.parametrize(
    ("name", "option"), [("wanet", "cross_ratio"), ("iab", "cross_fraction"), ("bpp", "negative_fraction")]
)
def test_what_was_not_trained_against_is_no_decoy(name: str, option: str) -> None:
    for share in (0.0, 0.5):
        attack = _quick(name, **{option: share})
        decoys = attack.run(small_data(), small_network, generator=rng.generator(0)).decoys
        assert bool(decoys) is (share > 0)
