from __future__ import annotations

import pytest
import torch

from unbackdoor import rng
from unbackdoor.neuron_noise import Target, ascended, perturbed_tensors, random_noise

TARGET = Target("0", 16, ("1.weight",), ("1.bias",), on_norm=True)


def test_noise_enters_scale_beside_the_mask_and_shift_alone() -> None:
    generator = rng.generator(1)
    mask, delta, xi, weight, bias = (torch.rand(16, generator=generator) for _ in range(5))
    tensors = {"1.weight": weight, "1.bias": bias}
    replaced = perturbed_tensors(tensors, [TARGET], {"0": mask}, {"1.weight": delta, "1.bias": xi})
    torch.testing.assert_close(replaced["1.weight"], (mask + delta) * weight)
    torch.testing.assert_close(replaced["1.bias"], (1 + xi) * bias)
    plain = perturbed_tensors(tensors, [TARGET], {"0": mask}, None)
    assert set(plain) == {"1.weight"}
    torch.testing.assert_close(plain["1.weight"], mask * weight)


def test_ascent_steps_are_signed_and_projected_only_if_asked_for() -> None:
    noise = {"a": torch.tensor([0.3, -0.3, 0.1])}
    gradient = [torch.tensor([5.0, -1e-9, 0.0])]
    assert ascended(noise, gradient, 0.4, 2, project=False)["a"].tolist() == pytest.approx([0.5, -0.5, 0.1])
    assert ascended(noise, gradient, 0.4, 2, project=True)["a"].tolist() == pytest.approx([0.4, -0.4, 0.1])


def test_random_noise_fills_the_budget_and_follows_the_generator() -> None:
    one, other = (
        random_noise([TARGET], 0.2, generator=rng.generator(0), device=torch.device("cpu")) for _ in range(2)
    )
    assert list(one) == ["1.weight", "1.bias"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    drawn = torch.cat(list(one.values()))
    assert drawn.shape == (32,)
    assert float(drawn.abs().max()) <= 0.2
    assert float(drawn.min()) < -0.1 < 0.1 < float(drawn.max())
