from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import find_filters
from unbackdoor.purify import EP
from unbackdoor.purify.ep import answer_entropies, histogram_entropy
from unbackdoor.types import LabelledImages


def network() -> nn.Sequential:
    with rng.isolated(rng.generator(0)):
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 4),
        ).eval()  # fmt: skip


def data(count: int) -> LabelledImages:
    images = torch.rand(count, 3, 8, 8, generator=rng.generator(1))
    return LabelledImages(images, torch.arange(count) % 4)


def test_two_peaks_have_the_entropy_of_a_coin() -> None:
    values = torch.tensor([[0.0], [0.0], [0.0], [5.0]])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(histogram_entropy(values, 0.1)) == pytest.approx(expected)


def test_values_on_an_edge_are_counted() -> None:
    # Standardised to -1, 0 and 1: all of them on edges of bins of width 1, one in each.
    values = torch.tensor([[1.0], [2.0], [3.0]])
    assert float(histogram_entropy(values, 1.0)) == pytest.approx(math.log(3))


def test_columns_do_not_mix_and_scale_does_not_matter() -> None:
    values = torch.randn(300, 5, generator=rng.generator(0))
    together = histogram_entropy(values * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]), 0.1)
    for j in range(5):
        assert float(together[j]) == pytest.approx(float(histogram_entropy(values[:, [j]], 0.1)), abs=1e-3)
    finer = histogram_entropy(values, 0.01)
    assert bool((finer > together).all())
    assert float(finer.max()) <= math.log(300) + 1e-6


def test_constant_filters_have_no_entropy_and_stay() -> None:
    model, clean = network(), data(64)
    conv = model[0]
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight[2] = 0.0
    entropies = answer_entropies(model, clean, find_filters(model, clean.images[:1]), 0.1)["0"]
    assert bool(entropies[2].isnan())
    assert int(entropies.isnan().sum()) == 1
    result = EP.paper(u=0.5).purify(model, clean, generator=rng.generator(0))
    assert float(result.scores["0"][2]) == 0.0
    assert result.mask is not None
    assert ("0", 2) not in result.mask.removed()
    assert result.diagnostics["constant_filters"] == 1
    json.dumps(dict(result.diagnostics))


def test_a_filter_that_one_image_alone_excites_goes() -> None:
    model, clean = network(), data(64)
    conv = model[0]
    assert isinstance(conv, nn.Conv2d)
    images = clean.images.clone()
    images[:, 0], images[5, 0] = 0.1, 1.0
    with torch.no_grad():
        conv.weight[9] = 0.0
        conv.weight[9, 0] = 1.0
    result = EP.paper(u=2.5).purify(model, LabelledImages(images, clean.labels), generator=rng.generator(0))
    assert result.mask is not None
    assert result.mask.removed() == [("0", 9)]


def test_largest_answers_are_taken_over_places() -> None:
    model, clean = network(), data(40)
    found = answer_entropies(model, clean, find_filters(model, clean.images[:1]), 0.1)["0"]
    with torch.no_grad():
        peaks = model[0](clean.images).amax((2, 3))
    torch.testing.assert_close(found, histogram_entropy(peaks, 0.1))


def test_networks_without_batch_norm_are_refused() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval()
    with pytest.raises(UnsupportedModelError, match="running statistics"):
        EP().purify(model, data(8), generator=rng.generator(0))


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="bin_width"):
        EP(bin_width=0.0)
    with pytest.raises(InvalidInputError, match="u must be"):
        EP(u=-1.0)


def test_filters_that_overflow_have_no_entropy() -> None:
    values = torch.randn(50, 3, generator=rng.generator(0))
    values[7, 1] = math.inf
    values[7, 2] = math.nan
    found = histogram_entropy(values, 0.5)
    assert found.isnan().tolist() == [False, True, True]
    torch.testing.assert_close(found[:1], histogram_entropy(values[:, :1], 0.5))
