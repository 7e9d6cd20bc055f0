from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unbackdoor.errors import InvalidInputError
from unbackdoor.types import (
    AllToAll,
    AllToOne,
    Detection,
    LabelledImages,
    LabelRule,
    OneToOne,
    as_float,
    label_rule_from,
    quantise,
)

LABELS = torch.tensor([0, 1, 2])


def floats(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (torch.zeros(3, 8, 8), LABELS, r"must have shape \(N, C, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.float64), LABELS, "must be uint8 or float32, got torch.float64"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.int64), LABELS, "must be uint8 or float32, got torch.int64"),
        (torch.zeros(3, 1, 8, 8), LABELS[:2], r"labels must be int64 of shape \(3,\)"),
        (torch.zeros(3, 1, 8, 8), LABELS.int(), r"got torch.int32 of shape \(3,\)"),
        (torch.zeros(3, 1, 8, 8), LABELS.view(3, 1), r"of shape \(3, 1\)"),
        (torch.zeros(3, 1, 8, 8), LABELS - 1, "labels must be at least 0, got -1"),
        (floats(0, 0.5, 1.01), LABELS, r"must lie in \[0, 1\], got values from 0 to 1.01; divide by 255"),
        (floats(-0.1, 0.5, 1), LABELS, "got values from -0.1 to 1"),
        (floats(0, float("nan"), 1), LABELS, "got values from nan to nan"),
        (floats(0, float("inf"), 1), LABELS, "to inf"),
    ],
)
def test_bad_images_are_refused_with_their_values(images: Tensor, labels: Tensor, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        LabelledImages(images, labels)


def test_images_know_their_length_classes_and_names() -> None:
    data = LabelledImages(torch.zeros(3, 1, 2, 2), LABELS, ("a", "b", "c", "d"))
    assert (len(data), data.num_classes, data.name_of(3), data.name_of(4)) == (3, 4, "d", "4")
    assert LabelledImages(torch.zeros(3, 1, 2, 2), LABELS).num_classes == 3
    assert LabelledImages(torch.zeros(0, 1, 2, 2), LABELS[:0]).num_classes == 0


def test_subsets_take_indices_and_masks() -> None:
    data = LabelledImages(floats(0, 0.5, 1), LABELS, ("a", "b", "c"))
    for chosen in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        part = data.subset(chosen)
        assert sorted(part.labels.tolist()) == [0, 2]
        assert part.class_names == ("a", "b", "c")
    assert data.subset(torch.tensor([2, 0])).images.flatten().tolist() == [1.0, 0.0]
    assert data.to("cpu").labels.tolist() == [0, 1, 2]


def test_bytes_and_floats_convert_exactly() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(as_float(levels)), levels)
    unchanged = torch.rand(3)
    assert as_float(unchanged) is unchanged
    assert quantise(torch.tensor([-3.0, 0.5, 7.0])).tolist() == [0, 128, 255]


@pytest.mark.parametrize("rule", [AllToOne(2), AllToAll(5), AllToAll(5, shift=3), OneToOne(3, 1)])
def test_label_rules_survive_their_description(rule: LabelRule) -> None:
    assert isinstance(rule, LabelRule)
    assert label_rule_from(rule.describe()) == rule


def test_label_rules_count_and_map() -> None:
    assert AllToOne(1)(LABELS).tolist() == [1, 1, 1]
    assert AllToOne(1).counts(LABELS).tolist() == [True, False, True]
    assert AllToAll(3)(LABELS).tolist() == [1, 2, 0]
    assert AllToAll(3).counts(LABELS).tolist() == [True, True, True]
    rule = OneToOne(source_class=2, target_class=0)
    assert rule(torch.tensor([0, 1, 2, 2])).tolist() == [0, 1, 0, 0]
    assert rule(LABELS).dtype == torch.int64
    assert rule.counts(torch.tensor([0, 1, 2, 2])).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ({"rule": "all_to_some"}, "unknown label rule 'all_to_some'"),
        ({"rule": "all_to_one"}, "is incomplete: 'target_class'"),
        ({"rule": "all_to_all", "num_classes": "many", "shift": 1}, "'many' is no whole number from 1"),
        ({"rule": "all_to_all", "num_classes": 0, "shift": 1}, "0 is no whole number from 1 to 999999"),
        ({"rule": "all_to_one", "target_class": math.inf}, "inf is no whole number"),
        ({"rule": "all_to_one", "target_class": 1e30}, "is no whole number"),
        ({"rule": "all_to_one", "target_class": True}, "True is no whole number"),
        ({}, "is incomplete: 'rule'"),
        ({"rule": "one_to_one", "source_class": 1}, "is incomplete: 'target_class'"),
        ({"rule": "all_to_one", "target_class": None}, "is incomplete"),
    ],
)
def test_odd_label_rules_are_refused(description: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        label_rule_from(description)


def test_detections_decide_unless_undetermined() -> None:
    assert Detection(0.5, 0.5, "x").is_backdoored is True
    assert Detection(0.4, 0.5, "x").is_backdoored is False
    assert Detection(0.9, 0.5, "x", undetermined="no idea").is_backdoored is None
