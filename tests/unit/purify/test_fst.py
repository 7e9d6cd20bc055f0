from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters.groups import find_filters
from unbackdoor.purify.fst import FST, ShiftStep, _draw
from unbackdoor.testing.subjects import small_data, small_network
from unbackdoor.train import Batch, Recipe

with rng.isolated(rng.generator(0)):
    MODEL = small_network().eval()
DATA = small_data(32)
RECIPE = Recipe(
    epochs=10,
    batch_size=16,
    learning_rate=0.1,
    weight_decay=0.0,
    crop_padding=0,
    flip=False,
    precision="fp32",
)
HEAD = "10.weight"


def test_the_loss_is_that_of_the_paper_and_the_norm_is_held() -> None:
    head = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(nn.Flatten(), head)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.6, 0.0], [0.0, 0.8]]))
    # Norm 1, asked for 2: the weight becomes diag(1.2, 1.6). <W, W_orig> = 1.2 * 2.
    step = ShiftStep({"1.weight": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}, alpha=0.5)
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    loss = step(model, Batch(images, torch.tensor([0, 0]), torch.arange(2)))
    torch.testing.assert_close(head.weight.detach(), torch.tensor([[1.2, 0.0], [0.0, 1.6]]))
    losses = F.softplus(torch.tensor([-1.2, 1.6])).mean()
    assert float(loss.detach()) == pytest.approx(float(losses) + 0.5 * 2.4, abs=1e-6)
    loss.backward()
    gradient = head.weight.grad
    assert gradient is not None
    # Row 0, column 1 has no part in the inner product: the cross-entropy's gradient alone.
    assert float(gradient[0, 1]) == pytest.approx(-0.5 * float(torch.tensor(1.6).sigmoid()), abs=1e-6)
    assert float(gradient[0, 0]) == pytest.approx(-0.5 * float(torch.tensor(-1.2).sigmoid()) + 0.5 * 2.0)


def test_the_head_ends_with_its_norm_and_away_from_what_it_was() -> None:
    old = MODEL.state_dict()[HEAD]
    cosines = {}
    for alpha in (0.0, 2.0):
        result = FST(alpha, RECIPE).purify(MODEL, DATA, generator=rng.generator(0))
        new = result.model.state_dict()[HEAD]
        assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-5)
        cosines[alpha] = float(F.cosine_similarity(new.flatten(), old.flatten(), dim=0))
        assert result.diagnostics["head_cosine_similarity"] == {HEAD: pytest.approx(cosines[alpha], abs=1e-6)}
    assert cosines[2.0] < -0.5 < cosines[0.0]


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_the_head_starts_from_a_new_draw_at_the_old_norm(alpha: float) -> None:
    """With a rate of almost nothing, what comes back is what the training started from."""
    still = replace(RECIPE, epochs=1, learning_rate=1e-12)
    state = FST(alpha, still).purify(MODEL, DATA, generator=rng.generator(0)).model.state_dict()
    drawn = copy.deepcopy(MODEL)
    head = find_filters(MODEL, DATA.floats()[:1]).head
    assert head is not None
    _draw(drawn, head, rng.generator(0))
    old, new = MODEL.state_dict()[HEAD], drawn.state_dict()[HEAD]
    torch.testing.assert_close(state[HEAD], new * old.norm() / new.norm())
    torch.testing.assert_close(state["10.bias"], drawn.state_dict()["10.bias"])
    assert abs(float(F.cosine_similarity(new.flatten(), old.flatten(), dim=0))) < 0.5
    assert torch.equal(state["4.weight"], MODEL.state_dict()["4.weight"])


def test_features_learn_too() -> None:
    result = FST(recipe=RECIPE).purify(MODEL, DATA, generator=rng.generator(0))
    for name in ("0.weight", "1.weight", "1.running_mean", "4.weight"):
        assert not torch.equal(result.model.state_dict()[name], MODEL.state_dict()[name]), name


def test_a_new_head_is_uniform_within_its_fan_in() -> None:
    model = nn.Sequential(nn.Conv2d(3, 400, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(400, 50))
    before = copy.deepcopy(model.state_dict())
    head = find_filters(model, torch.zeros(1, 3, 4, 4)).head
    assert head is not None
    _draw(model, head, rng.generator(0))
    drawn = model.state_dict()["3.weight"] * 20
    assert 0.99 < float(drawn.abs().max()) <= 1.0
    assert float(drawn.std()) == pytest.approx(3**-0.5, rel=0.02)
    assert float(model.state_dict()["3.bias"].abs().max()) <= 1 / 20
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def test_a_convolution_can_be_the_head() -> None:
    with rng.isolated(rng.generator(0)):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).eval()
    result = FST(recipe=replace(RECIPE, epochs=1)).purify(model, DATA, generator=rng.generator(0))
    assert list(result.diagnostics["head_cosine_similarity"]) == ["2.weight"]


class Split(nn.Module):
    """Two layers yield two classes each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 2, 12), nn.Conv2d(3, 2, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], 1).flatten(1)


def test_a_network_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no head to draw anew"):
        FST(recipe=RECIPE).purify(Split(), DATA, generator=rng.generator(0))


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_odd_weights_are_refused(alpha: float) -> None:
    with pytest.raises(InvalidInputError, match="alpha"):
        FST(alpha=alpha)


def test_the_paper_has_no_weight_decay_and_batches_of_128() -> None:
    paper = FST.paper()
    assert (paper.recipe.weight_decay, paper.recipe.batch_size, paper.recipe.epochs) == (0.0, 128, 10)
