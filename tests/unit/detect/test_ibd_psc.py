from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.detect.ibd_psc import IBDPSC, amplified, log_doubt, norm_tensors
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.filters import find_filters
from unbackdoor.testing import planted_backdoor
from unbackdoor.types import LabelledImages


class Waking(nn.Module):
    """Images are one pixel of two channels, content c and trigger t; three classes.

    The first two norms pass both on. The third has a filter for c, one that wakes up where its input
    exceeds 1.2, and one for t; they are the logits of classes 1, 2 and (30 times) 0. So for c = 1 scaling the
    last norm keeps class 1, scaling the last two wakes class 2, and t = 1 always gives class 0. Modules are
    registered in the wrong order on purpose.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.norm3, self.norm2, self.norm1 = (nn.BatchNorm2d(n, eps=1e-12) for n in (3, 2, 2))
        self.conv3, self.conv2, self.conv1 = (nn.Conv2d(2, n, 1, bias=False) for n in (3, 2, 2))
        with torch.no_grad():
            for conv in (self.conv1, self.conv2):
                conv.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
            self.conv3.weight.copy_(torch.tensor([[1.0, 0], [1, 0], [0, 1]]).view(3, 2, 1, 1))
            # The shift is part of the threshold: 10 (z - 1.1) - 1.
            self.norm3.weight[1], self.norm3.bias[1] = 10.0, -1.0
            assert self.norm3.running_mean is not None
            self.norm3.running_mean[1] = 1.1
            self.head.weight.copy_(torch.tensor([[0.0, 0, 30], [1, 0, 0], [0, 1, 0]]))
            self.head.bias.zero_()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.conv1(images)))
        hidden = torch.relu(self.norm2(self.conv2(hidden)))
        logits: Tensor = self.head(torch.relu(self.norm3(self.conv3(hidden))).flatten(1))
        return logits


def pixels(*values: tuple[float, float], label: int = 1) -> LabelledImages:
    images = torch.tensor(values).view(-1, 2, 1, 1)
    return LabelledImages(images, torch.full((len(values),), label))


CLEAN = pixels((1.0, 0.0), (1.0, 0.0))
BOTH = pixels((1.0, 0.0), (1.0, 1.0)).images


def psc(scores: Tensor) -> list[float]:
    """Return PSC, which the score is minus the logarithm of one minus."""
    return (1 - (-scores.double()).exp()).tolist()


def by_hand(depth: int, trigger: bool) -> float:
    """Return the confidence of class 1, or 0 for a trigger, with the last ``depth`` norms scaled by 1.5."""
    c = 1.5 ** (depth - 1)
    logits = [30 * 1.5 * c * trigger, 1.5 * c, 1.5 * max(0.0, 10 * (c - 1.1) - 1)]
    return math.exp(logits[0 if trigger else 1]) / sum(map(math.exp, logits))


def test_norms_are_found_in_the_order_in_which_they_run() -> None:
    model = Waking()
    norms = norm_tensors(find_filters(model, BOTH))
    assert norms == tuple((f"norm{i}.weight", f"norm{i}.bias") for i in (1, 2, 3))


def test_versions_scale_one_more_norm_from_the_end() -> None:
    model = Waking()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norms = norm_tensors(find_filters(model, BOTH))
    for depth, version in enumerate(amplified(model, norms, 1.5), 1):
        for index, names in enumerate(norms):
            factor = 1.5 if index >= len(norms) - depth else 1.0
            for name in names:
                assert torch.equal(version.state_dict()[name], before[name] * factor)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_score_is_the_mean_confidence_from_the_first_wrong_depth_on_by_hand() -> None:
    # One norm leaves clean images right, two make all of them wrong: depths 2 and 3 of the three there are.
    assert by_hand(1, False) > 0.5
    assert by_hand(2, False) < 0.5
    seen: list[tuple[str, int, int]] = []
    scores = IBDPSC().score(
        Waking(), BOTH, CLEAN, generator=rng.generator(0), progress=lambda *event: seen.append(event)
    )
    expected = [(by_hand(2, trigger) + by_hand(3, trigger)) / 2 for trigger in (False, True)]
    assert psc(scores) == pytest.approx(expected, abs=1e-6)
    # The second is certain of its answer as far as float32 can tell, and how certain is told all the same.
    assert scores[1] > 40 > -math.log(0.1) > scores[0]
    assert seen[-1] == ("scaling norms", 3, 3)


def test_no_more_than_n_versions_are_read() -> None:
    scores = IBDPSC(n=1).score(Waking(), BOTH, CLEAN, generator=rng.generator(0))
    assert psc(scores) == pytest.approx([by_hand(2, False), by_hand(2, True)], abs=1e-6)


def test_the_clean_error_must_exceed_xi() -> None:
    # Four of five images have no content and stay in class 0: at depth 2 the error is 0.2.
    clean = pixels((1.0, 0.0), *[(0.0, 0.0)] * 4)
    clean = LabelledImages(clean.images, torch.tensor([1, 0, 0, 0, 0]))
    IBDPSC(xi=0.1).score(Waking(), BOTH, clean, generator=rng.generator(0))
    with pytest.raises(UnsupportedModelError, match=r"clean error is 0\.20, not above xi = 0\.6"):
        IBDPSC().score(Waking(), BOTH, clean, generator=rng.generator(0))


def test_a_network_whose_clean_answers_survive_is_refused() -> None:
    # Both norms of the planted network feed rectifiers without thresholds of their own.
    planted = planted_backdoor()
    clean = planted.clean_data(64, rng.generator(0))
    with pytest.raises(UnsupportedModelError, match="raise omega"):
        IBDPSC().score(planted.model, clean.images, clean, generator=rng.generator(0))


def test_networks_without_norm_scales_are_refused() -> None:
    norm = nn.BatchNorm2d(2, affine=False)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), norm, nn.Flatten(), nn.Linear(2, 3)).eval()
    with pytest.raises(UnsupportedModelError, match="norm with a scale"):
        IBDPSC().score(model, BOTH, CLEAN, generator=rng.generator(0))


def test_group_norms_count_too() -> None:
    norm = nn.GroupNorm(1, 2)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), norm, nn.Flatten(), nn.Linear(2, 3)).eval()
    assert norm_tensors(find_filters(model, BOTH)) == (("1.weight", "1.bias"),)


def test_an_overflow_is_no_confidence() -> None:
    class Infinite(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 3), math.inf)

    assert log_doubt(Infinite(), BOTH, torch.tensor([0, 1])).tolist() == [0.0, 0.0]


def test_certainty_beyond_numbers_stays_a_number() -> None:
    class Certain(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[0.0, -math.inf]]).expand(len(images), 2)

    found = log_doubt(Certain(), BOTH, torch.tensor([0, 1])).float()
    assert found.isfinite().all()
    assert found[1] == 0 > -1e30 > found[0]


@pytest.mark.parametrize(
    "options", [{"omega": 1.0}, {"omega": math.inf}, {"n": 0}, {"xi": 1.0}, {"xi": -0.1}]
)
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="IBD-PSC needs"):
        IBDPSC(**options)
