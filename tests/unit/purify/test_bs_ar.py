from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import find_filters
from unbackdoor.filters.saliency import taylor_saliency
from unbackdoor.purify import BSAR
from unbackdoor.purify.bs_ar import _RegularisedStep, benign_salience, penalty_of, suspected
from unbackdoor.testing import planted_backdoor
from unbackdoor.train import JointStep, Recipe
from unbackdoor.types import LabelledImages, Purified

PLANTED = planted_backdoor()
CLEAN = PLANTED.clean_data(64, rng.generator(0))
RECIPE = Recipe(
    epochs=2, batch_size=32, learning_rate=0.01, weight_decay=0.0, schedule="constant", crop_padding=0,
    flip=False,
)  # fmt: skip
QUICK = BSAR(RECIPE)


def purify(method: BSAR, model: nn.Module = PLANTED.model, clean: LabelledImages = CLEAN) -> Purified:
    return method.purify(model, clean, generator=rng.generator(0))


def test_salience_is_minus_parameter_times_gradient() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8))
    weight, bias = model[1].weight, model[1].bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    found = benign_salience(model, CLEAN, ["1.weight", "1.bias"], batch_size=10)
    # The gradient of a linear classifier is known: (softmax - one hot) times the input.
    x = CLEAN.floats().flatten(1)
    error = (x @ weight.detach().T + bias.detach()).softmax(1) - F.one_hot(CLEAN.labels, 8)
    torch.testing.assert_close(found["1.weight"], -(error.T @ x) / 64 * weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["1.bias"], -error.mean(0) * bias.detach(), rtol=1e-4, atol=1e-6)


def test_scores_are_the_filters_salience_of_the_input_model() -> None:
    result = purify(QUICK)
    expected = taylor_saliency(PLANTED.model, CLEAN, find_filters(PLANTED.model, CLEAN.floats()[:1]))
    assert set(result.scores) == {"conv1", "conv2"}
    for name, values in result.scores.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-6)
    assert result.mask is None
    json.dumps(dict(result.diagnostics))


def test_the_regulariser_by_hand() -> None:
    values = torch.tensor([-7.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 7.0])
    e4 = math.exp(4)
    expected = [3 * e4, math.exp(2), 1.0, 0.5, 0.0, 0.5, 1.0, math.exp(2), 3 * e4]
    assert penalty_of(values, "adaptive").tolist() == pytest.approx(expected)
    assert penalty_of(values, "l1").tolist() == values.abs().tolist()
    assert penalty_of(values, "l2").tolist() == values.square().tolist()


def test_the_regulariser_pulls_both_signs_towards_zero() -> None:
    values = torch.tensor([-9.0, -2.0, -0.5, 0.5, 2.0, 9.0], requires_grad=True)
    (slope,) = torch.autograd.grad(penalty_of(values, "adaptive").sum(), values)
    e, e4 = math.e, math.exp(4)
    assert slope.tolist() == pytest.approx([-e4, -e, -1, 1, e, e4])


def test_suspects_are_a_share_of_one_end() -> None:
    salience = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    assert suspected(salience, 0.5, "lowest").tolist() == [[False, True], [True, False]]
    assert suspected(salience, 0.5, "highest").tolist() == [[True, False], [False, True]]
    assert int(suspected(salience, 0.01, "lowest").sum()) == 1
    assert int(suspected(torch.zeros(4), 0.5, "lowest").sum()) == 2


def test_suspect_filters_shrink_at_the_norm_and_others_do_not() -> None:
    small = replace(RECIPE, learning_rate=1e-3, epochs=1, momentum=0.0)
    result = purify(replace(QUICK, recipe=small, alpha=20.0, regulariser="l1"))
    plain = purify(replace(QUICK, recipe=small, alpha=0.0)).model.state_dict()
    after = result.model.state_dict()
    for layer in ("1", "2"):
        suspect = suspected(result.scores[f"conv{layer}"], 0.1, "lowest")
        fall = plain[f"norm{layer}.weight"].abs() - after[f"norm{layer}.weight"].abs()
        # Two steps of 0.001 times 20; the others feel it through the loss alone.
        torch.testing.assert_close(fall[suspect], torch.full_like(fall[suspect], 0.04), rtol=0.1, atol=0.0)
        assert float(fall[~suspect].abs().max()) < 0.004


def test_without_strength_it_is_fine_tuning() -> None:
    one, other = purify(replace(QUICK, alpha=0.0)), purify(replace(QUICK, alpha=0.0, suspects="highest"))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name])


def test_the_share_grows_to_all() -> None:
    fixed = purify(replace(QUICK, beta=0.25)).diagnostics["suspects"]
    growing = purify(replace(QUICK, beta=0.25, growing=True)).diagnostics["suspects"]
    assert fixed == [24, 24]
    assert growing == [60, 96]


def test_the_authors_example_shrinks_the_head() -> None:
    result = purify(replace(BSAR.authors(), recipe=RECIPE))
    assert result.scores == {}
    assert result.diagnostics["suspects"] == [8 * 48 * 3 // 4 + 6, 8 * 48 + 8]
    plain = purify(replace(BSAR.authors(), recipe=RECIPE, alpha=0.0))
    name = "head.weight"
    assert float(result.model.state_dict()[name].norm()) < float(plain.model.state_dict()[name].norm())


def test_filters_without_a_norm_shrink_at_their_weights() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
        ).eval()
    result = purify(replace(QUICK, alpha=1.0, beta=0.25), model)
    ratio = result.model.state_dict()["0.weight"].flatten(1).norm(dim=1) / model.state_dict()[
        "0.weight"
    ].flatten(1).norm(dim=1)
    suspect = suspected(result.scores["0"], 0.25, "lowest")
    assert float(ratio[suspect].max()) < float(ratio[~suspect].min())


def test_a_network_of_a_head_alone() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8)).eval()
    with pytest.raises(UnsupportedModelError, match="layers = 'hidden'"):
        purify(QUICK, model)
    assert purify(replace(BSAR.authors(), recipe=RECIPE), model).mask is None


def test_the_step_is_one_that_the_training_loop_prepares_before_each_epoch() -> None:
    assert isinstance(_RegularisedStep(QUICK, (), CLEAN), JointStep)


def test_salience_is_carried_over_from_epoch_to_epoch() -> None:
    first, later = planted_backdoor().model, planted_backdoor(seed=1).model
    filter_map = find_filters(first, CLEAN.floats()[:1])
    names = [group.weight for group in filter_map.prunable]
    now = [benign_salience(model, CLEAN, names) for model in (first, later, first)]
    by_filter = [{n: values.flatten(1).sum(1) for n, values in each.items()} for each in now]
    step = _RegularisedStep(replace(QUICK, eta=0.75), tuple(filter_map.prunable), CLEAN)
    kept = dict(by_filter[0])
    for epoch, (model, found) in enumerate(zip((first, later, first), by_filter, strict=True)):
        step.before_epoch(model, epoch)
        kept = {n: 0.75 * kept[n] + 0.25 * found[n] for n in names}
        for name in names:
            torch.testing.assert_close(step.salience[name], kept[name])
            torch.testing.assert_close(step.first[name], by_filter[0][name])
    for group in filter_map.prunable:
        chosen = step.chosen[str(group.norms[0].weight)]
        assert torch.equal(chosen, suspected(kept[group.weight], 0.1, "lowest"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": 0.0}, "beta lie"),
        ({"eta": 1.0}, "eta in"),
        ({"unit": "layer"}, "unit must be"),
        ({"layers": "all"}, "is a class"),
        ({"regulariser": "l3"}, "regulariser must be"),
    ],
)
def test_options_are_checked(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        BSAR(**options)  # type: ignore[arg-type]
