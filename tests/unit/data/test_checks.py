from __future__ import annotations

import pytest
import torch

from unbackdoor.data.checks import check_against_model, clean_draw
from unbackdoor.errors import InvalidInputError
from unbackdoor.rng import generator
from unbackdoor.types import LabelledImages


def data(counts: list[int], names: tuple[str, ...] = ()) -> LabelledImages:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return LabelledImages(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels, names)


def test_sound_data_gets_no_warning() -> None:
    assert check_against_model(data([5, 6, 7]), 3) == ()


def test_more_classes_than_outputs_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="the data has 4 classes, the model's head 3 outputs"):
        check_against_model(data([5, 5, 5, 1]), 3)


def test_more_names_than_outputs_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="the data has 3 classes, the model's head 2 outputs"):
        check_against_model(data([5, 5], ("a", "b", "c")), 2)


def test_empty_data_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="no images"):
        check_against_model(data([0]), 3)


def test_absent_classes_are_named() -> None:
    (warning,) = check_against_model(data([5, 0, 5], ("cat", "dog", "owl")), 4)
    assert "2 of the model's 4 classes have no image (dog, 3)" in warning


def test_long_lists_of_classes_are_cut() -> None:
    (warning,) = check_against_model(data([5]), 11)
    assert "(1, 2, 3, 4, 5 and 5 more)" in warning


def test_small_classes_are_named() -> None:
    (warning,) = check_against_model(data([8, 4]), 2)
    assert "1 classes have fewer than 5 images (1)" in warning


def test_imbalance_is_reported_beyond_a_factor_of_ten() -> None:
    assert check_against_model(data([50, 5]), 2) == ()
    (warning,) = check_against_model(data([51, 5], ("cat", "dog")), 2)
    assert "from 5 images (dog) to 51 (cat)" in warning


def test_clean_draw_is_balanced_and_silent_where_enough_exist() -> None:
    draw = clean_draw(data([50, 20]), 20, generator(0))
    assert draw.data.labels.bincount().tolist() == [10, 10]
    assert draw.warnings == ()


def test_clean_draw_warns_where_fewer_exist() -> None:
    draw = clean_draw(data([5, 2]), 20, generator(0))
    assert len(draw.data) == 7
    assert draw.warnings == ("Only 7 clean images exist where 20 were asked for.",)
