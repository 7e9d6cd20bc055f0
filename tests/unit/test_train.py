from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.compute import (
    accuracy_of,
    check_fits,
    logits_of,
    memory_format_for,
    mode,
    predictions_of,
    uses_bf16,
)
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.testing.subjects import awkward_model, modes_of, small_data, small_network
from unbackdoor.train import Batch, Recipe, batches, cross_entropy_step, train

RECIPE = Recipe(epochs=4, batch_size=8, learning_rate=0.05, crop_padding=2, schedule="one_cycle")


def network(seed: int = 0) -> nn.Sequential:
    with rng.isolated(rng.generator(seed)):
        return small_network()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, after: int, schedule: Literal["one_cycle", "cosine", "constant"]
) -> None:
    recipe = Recipe(epochs=4, batch_size=8, learning_rate=0.05, crop_padding=2, schedule=schedule)
    data, state = small_data(33), tmp_path / "state.safetensors"
    whole = network()
    record = train(whole, data, recipe, generator=rng.generator(1))

    def kill(stage: str, done: int, total: int) -> None:
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        train(network(), data, recipe, generator=rng.generator(1), resume_from=state, progress=kill)
    torch.rand(11)  # the global state is another one in a new process
    resumed = network(seed=9)
    calls: list[tuple[str, int, int]] = []
    again = train(
        resumed,
        data,
        recipe,
        generator=rng.generator(77),
        resume_from=state,
        progress=lambda *call: calls.append(call),
    )
    assert same(weights(whole), weights(resumed))
    assert again.losses == record.losses
    assert again.resumed_at_epoch == after
    assert record.resumed_at_epoch == 0
    assert calls == [("train", done, 4) for done in range(after, 5)]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    first, second = network(), network(seed=5)
    record = train(first, small_data(), RECIPE, generator=rng.generator(1), resume_from=state)
    again = train(second, small_data(), RECIPE, generator=rng.generator(1), resume_from=state)
    assert same(weights(first), weights(second))
    assert record.losses == again.losses


def test_training_lowers_the_loss_and_leaves_eval_mode() -> None:
    model = network()
    recipe = Recipe(epochs=30, batch_size=8, learning_rate=0.05, crop_padding=0, flip=False)
    record = train(model, small_data(32), recipe, generator=rng.generator(0))
    assert record.losses[-1] < 0.8 * record.losses[0]
    assert not any(modes_of(model).values())
    assert record.describe()["recipe"]["epochs"] == 30
    assert record.precision in ("fp32", "bf16")


def test_frozen_parameters_stay() -> None:
    model = awkward_model()
    before = weights(model)
    train(model, small_data(), RECIPE, generator=rng.generator(0))
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert not torch.equal(model.state_dict()["4.weight"], before["4.weight"])


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    train(network(), small_data(), RECIPE, generator=rng.generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_schedules_take_their_textbook_values() -> None:
    cosine = Recipe(learning_rate=0.1, schedule="cosine")
    assert [cosine.rate_at(step, 4) for step in range(4)] == pytest.approx(
        [0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))]
    )
    cycle = Recipe(learning_rate=0.1, schedule="one_cycle", warmup_fraction=0.25)
    assert [cycle.rate_at(step, 8) for step in range(8)] == pytest.approx(
        [0.05, 0.1, 0.1, 0.5 / 6, 0.4 / 6, 0.05, 0.2 / 6, 0.1 / 6]
    )
    assert {Recipe(schedule="constant").rate_at(step, 9) for step in range(9)} == {0.1}
    for schedule in (cosine, cycle):
        for steps in (1, 2, 3, 50):
            rates = [schedule.rate_at(step, steps) for step in range(steps)]
            assert 0 < max(rates) <= 0.1 + 1e-12
            assert min(rates) >= 0


def test_the_schedule_is_followed_across_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    original = Recipe.rate_at

    def spy(self: Recipe, step: int, steps: int) -> float:
        asked.append((step, steps))
        return original(self, step, steps)

    monkeypatch.setattr(Recipe, "rate_at", spy)
    train(network(), small_data(33), Recipe(epochs=2, batch_size=8), generator=rng.generator(0))
    # 33 images make four batches of 8; the one left over is skipped.
    assert asked == [(step, 8) for step in range(8)]


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"learning_rate": math.nan}]
)
def test_impossible_recipes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="must be positive"):
        Recipe(**options)


def test_divergence_is_an_error_with_the_rate() -> None:
    def explode(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy_step(model, batch) * float("inf")

    with pytest.raises(
        UnsupportedModelError, match=r"diverged: the mean loss is (inf|nan) .* 0.05; lower it"
    ):
        train(network(), small_data(), RECIPE, generator=rng.generator(0), loss_step=explode)


def test_a_diverged_epoch_is_not_kept_for_a_resumed_run(tmp_path: Path) -> None:
    def explode(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy_step(model, batch) * float("nan")

    state = tmp_path / "state.safetensors"
    with pytest.raises(UnsupportedModelError):
        train(
            network(), small_data(), RECIPE, generator=rng.generator(0), loss_step=explode, resume_from=state
        )
    assert not state.exists()


def test_batches_cover_the_data_once_less_a_single_one() -> None:
    sizes = [len(batch.labels) for batch in batches(small_data(33), 8, rng.generator(0))]
    assert sizes == [8, 8, 8, 8]
    assert [len(b.labels) for b in batches(small_data(34), 8, rng.generator(0))] == [8, 8, 8, 8, 2]
    assert [len(b.labels) for b in batches(small_data(1), 8, rng.generator(0))] == [1]
    data = small_data(30)
    seen = torch.cat([batch.indices for batch in batches(data, 7, rng.generator(0))])
    assert sorted(seen.tolist()) == list(range(30))
    for batch in batches(data, 7, rng.generator(0)):
        assert torch.equal(batch.labels, data.labels[batch.indices])
        torch.testing.assert_close(batch.images, data.floats()[batch.indices])


def test_channels_last_only_where_it_is_safe_on_the_cpu() -> None:
    assert memory_format_for(small_network()) is torch.channels_last
    assert memory_format_for(nn.Sequential(nn.Conv2d(3, 8, 3))) is torch.contiguous_format
    assert (
        memory_format_for(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 24, 1))) is torch.contiguous_format
    )
    assert memory_format_for(nn.Linear(3, 5)) is torch.channels_last


def test_precision_is_what_was_asked_for() -> None:
    cpu = torch.device("cpu")
    assert uses_bf16("bf16", cpu)
    assert not uses_bf16("fp32", cpu)


def test_mode_restores_every_flag_even_after_an_error() -> None:
    model = awkward_model()
    before = modes_of(model)
    seen: dict[str, bool] = {}

    def fail() -> None:
        with mode(model, training=True):
            seen.update(modes_of(model))
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert all(seen.values())
    assert modes_of(model) == before


def test_forward_passes_do_not_depend_on_the_batch_size() -> None:
    model, data = awkward_model().train(), small_data(33)
    whole = logits_of(model, data.images)
    torch.testing.assert_close(logits_of(model, data.images, batch_size=4), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(predictions_of(model, data.images), whole.argmax(1))
    assert accuracy_of(model, data) == pytest.approx(float((whole.argmax(1) == data.labels).float().mean()))
    assert all(modes_of(model).values())


def test_check_fits_says_what_does_not_fit() -> None:
    data = small_data()
    assert check_fits(awkward_model(), data, purpose="x") == 4
    with pytest.raises(InvalidInputError, match=r"training needs at least 40 image.s., got 33"):
        check_fits(awkward_model(), data, purpose="training", at_least=40)
    with pytest.raises(InvalidInputError, match="labels go up to 3, but the model has 2 outputs"):
        check_fits(awkward_model(classes=2), data, purpose="x")
    wanted = r"cannot be run on one image of shape \(3, 12, 12\) \(its first convolution takes 1 channel"
    with pytest.raises(UnsupportedModelError, match=wanted):
        check_fits(awkward_model(channels=1), data, purpose="x")
    with pytest.raises(UnsupportedModelError, match=r"one tensor of logits \(N, K\), got \(1, 3, 12, 12\)"):
        check_fits(nn.Identity(), data, purpose="x")


def test_training_on_nothing_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="training needs at least 1"):
        train(network(), small_data(0), RECIPE, generator=rng.generator(0))
