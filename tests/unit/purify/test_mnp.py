from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from unbackdoor import rng
from unbackdoor.bench.recording import series
from unbackdoor.compute import accuracy_of, predictions_of
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.select import Guard
from unbackdoor.inversion import Inversion, InvertedTrigger
from unbackdoor.masks import MaskTraining
from unbackdoor.purify import MNP, mnp
from unbackdoor.purify.mnp import Way
from unbackdoor.purify.relearning import Relearning, relearn
from unbackdoor.suppression import Suppression
from unbackdoor.testing import planted_backdoor
from unbackdoor.train import Recipe
from unbackdoor.types import Progress, Purified, silent

PLANTED = planted_backdoor()
CLEAN = PLANTED.clean_data(64, rng.generator(0))
QUICK = MNP(
    ("suppression",), suppression=Suppression(budget=4), masks=MaskTraining(epochs=2), relearns="never"
)
INVERTING = replace(
    QUICK,
    exposures=("inversion",),
    inversion=Inversion(steps=60, batch_size=8),
    # The planted trigger is a patch, which the ways for faint changes and warps are not made for.
    perturbation=Inversion(steps=60, batch_size=8),
    warp=Inversion(steps=60, batch_size=8),
    act_on="smallest",
    settled_index=0.0,
    restarts=0,
    # Nor does it survive crops of 4 of 16 pixels, and the few images make few steps.
    relearning=Relearning(
        Recipe(epochs=5, batch_size=64, learning_rate=0.003, schedule="constant", crop_padding=0, flip=False),
        path_radius=0.0,
    ),
)
RELEARNING = replace(INVERTING, relearns="triggers", amount="count", count=0)


def purify(method: MNP, progress: Progress = silent) -> Purified:
    return method.purify(PLANTED.model, CLEAN, generator=rng.generator(0), progress=progress)


def removed(result: Purified) -> int:
    assert result.mask is not None
    return result.mask.n_removed


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"amount": "count", "count": 7}, 7),
        ({"amount": "count", "count": 0}, 0),
        ({"amount": "fraction", "fraction": 0.25}, 24),
        ({"amount": "threshold", "threshold": 2.999, "score": "sum"}, 96),
        ({"amount": "threshold", "threshold": -1.0}, 0),
    ],
)
def test_amounts(options: dict[str, Any], count: int) -> None:
    assert removed(purify(replace(QUICK, **options))) == count


@pytest.mark.parametrize(
    ("options", "threshold"),
    [({}, 1.0), ({"exposures": ("inversion",), "score": "sum"}, 1.5), ({"score": "sum"}, 3.0)],
)
def test_a_threshold_that_every_mask_is_below_is_refused(options: dict[str, Any], threshold: float) -> None:
    with pytest.raises(InvalidInputError, match="would remove every filter"):
        replace(QUICK, amount="threshold", threshold=threshold, **options)


def test_the_lowest_scores_go() -> None:
    result = purify(replace(QUICK, amount="count", count=10, score="sum"))
    assert result.mask is not None
    scores = torch.cat([result.scores[name] for name in result.mask.keep])
    gone = torch.cat([~kept for kept in result.mask.keep.values()])
    assert float(scores[gone].max()) <= float(scores[~gone].min())


@pytest.mark.parametrize(("score", "low", "high"), [("m1", 0, 1), ("sum", 1, 3), ("rank_sum", 0, 190)])
def test_scores_lie_in_their_range(score: Literal["m1", "sum", "rank_sum"], low: float, high: float) -> None:
    result = purify(replace(QUICK, score=score))
    assert sum(len(values) for values in result.scores.values()) == 96
    for values in result.scores.values():
        assert low <= float(values.min())
        assert float(values.max()) <= high


def test_line_12_as_printed_makes_m2_one() -> None:
    printed = purify(replace(QUICK, score="sum", literal_line12=True))
    alone = purify(replace(QUICK, score="m1"))
    for name, values in printed.scores.items():
        torch.testing.assert_close(values, alone.scores[name] + 1)


def test_a_strict_guard_keeps_the_loss_and_a_lax_one_takes_all_candidates() -> None:
    lax = Guard(candidates=0.1, per_filter=1e9, total=1e9, accuracy=1.0, benefit=0.0)
    strict = Guard(candidates=0.1, per_filter=-1e9)
    assert removed(purify(replace(QUICK, guard=lax))) == 10
    kept = purify(replace(QUICK, guard=strict))
    assert removed(kept) == 0
    for name, tensor in PLANTED.model.state_dict().items():
        assert torch.equal(kept.model.state_dict()[name], tensor)


def test_the_default_guard_holds_the_clean_accuracy() -> None:
    result = purify(QUICK)
    walk = result.diagnostics["walk"]
    assert len(walk) == round(0.15 * 96)
    assert accuracy_of(result.model, CLEAN) >= accuracy_of(PLANTED.model, CLEAN) - 0.02 - 1e-9
    assert sum(step["removed"] for step in walk) == removed(result)
    json.dumps(dict(result.diagnostics))


def test_held_out_images_are_not_learnt_from() -> None:
    assert purify(QUICK).diagnostics["learning_images"] == 64
    assert purify(replace(QUICK, held_out_fraction=0.25)).diagnostics["learning_images"] == 48


def test_the_papers_reading_has_the_papers_numbers() -> None:
    paper = MNP.paper()
    assert (paper.lambda1, paper.lambda2, paper.count, paper.score) == (5e-4, 5e-4, 30, "sum")
    assert (paper.suppression.mu, paper.suppression.learning_rate, paper.masks.learning_rate) == (
        0.001,
        0.01,
        0.1,
    )
    assert (paper.suppression.budget, paper.suppression.unit) == (20, "epoch")
    assert paper.suppression.stop_accuracy == 0.0
    assert paper.prune_mode == "weight"


def test_progress_names_its_stages_and_reaches_the_end() -> None:
    calls: list[tuple[str, int, int]] = []
    purify(replace(QUICK, score="sum"), progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["clean suppression", "weight penalty", "clean preserving", "guarded walk"]
    for stage in stages:
        last = [call for call in calls if call[0] == stage][-1]
        assert last[1] == last[2]


@pytest.mark.parametrize("way", ["inversion", "perturbation", "warp"])
def test_triggers_expose_the_planted_filters_and_name_their_class(
    way: Literal["inversion", "perturbation", "warp"],
) -> None:
    result = purify(replace(INVERTING, exposures=(way,)))
    found = result.diagnostics[way]
    assert found["acted_on"] == [PLANTED.label_rule.target_class]
    assert result.mask is not None
    assert result.mask.n_removed > 0
    assert set(result.mask.removed()) <= PLANTED.guilty
    assert {step["exposure"] for step in result.diagnostics["walk"]} == {way}
    json.dumps(result.diagnostics, allow_nan=False)


@pytest.mark.parametrize("first_settles", [True, False])
def test_what_inversion_settled_is_left_alone(first_settles: bool) -> None:
    alone = purify(INVERTING).diagnostics["walk"]
    relieved = sum(step["benefit"] for step in alone if step["removed"])
    assert relieved > 0.5
    settled = relieved - 0.01 if first_settles else relieved + 0.01
    result = purify(replace(INVERTING, exposures=("inversion", "suppression"), settled=settled))
    ways = {step["exposure"] for step in result.diagnostics["walk"]}
    assert ways == ({"inversion"} if first_settles else {"inversion", "suppression"})


def test_a_change_is_looked_for_even_where_a_patch_settled_the_matter() -> None:
    result = purify(replace(INVERTING, exposures=("inversion", "perturbation", "suppression"), settled=0.3))
    assert set(result.diagnostics) >= {"inversion", "perturbation"}
    assert "suppression" not in result.diagnostics


def test_a_warp_is_not_looked_for_where_a_patch_settled_the_matter() -> None:
    ways: tuple[Way, ...] = ("inversion", "warp", "suppression")
    settled = purify(replace(INVERTING, exposures=ways, settled=0.3)).diagnostics
    assert not {"warp", "suppression"} & set(settled)
    open_still = purify(replace(INVERTING, exposures=ways, settled=2.0)).diagnostics
    assert {"warp", "suppression"} <= set(open_still)


def test_a_patch_that_hardly_stands_out_settles_nothing() -> None:
    ways: tuple[Way, ...] = ("inversion", "suppression")
    # One class alone has a trigger, which does not stand out from itself.
    alone = replace(INVERTING, exposures=ways, settled=0.3, fewest_classes=1)
    for asked in (0.0, 0.01):
        found = purify(replace(alone, settled_index=asked)).diagnostics
        assert found["inversion"]["log_index"] == 0
        assert ("suppression" in found) == (asked > 0)


def test_leaving_a_way_out_changes_nothing_of_the_others() -> None:
    alone = purify(replace(INVERTING, exposures=("warp",))).diagnostics["warp"]
    never = replace(INVERTING, exposures=("suppression", "warp"), amount="count", count=0)
    assert purify(never).diagnostics["warp"]["triggers"] == alone["triggers"]


def relearnt(result: Purified) -> dict[str, Any]:
    (found,) = result.diagnostics["relearning"]
    return dict(found)


def test_what_is_not_pruned_relearns_to_ignore_the_trigger() -> None:
    hard = replace(RELEARNING.relearning.recipe, epochs=20, learning_rate=0.03)
    result = purify(replace(RELEARNING, relearning=replace(INVERTING.relearning, recipe=hard)))
    found = relearnt(result)
    before, after = found["trigger_success"]
    assert before > 0.9
    assert after < 0.1
    assert found["taken"]
    assert removed(result) == 0
    others = CLEAN.subset(CLEAN.labels != PLANTED.label_rule.target_class)
    triggered = PLANTED.trigger(others.floats())
    hits = predictions_of(result.model, triggered) == PLANTED.label_rule.target_class
    assert float(hits.float().mean()) < 0.2
    assert accuracy_of(result.model, CLEAN) >= accuracy_of(PLANTED.model, CLEAN) - 0.01
    json.dumps(result.diagnostics, allow_nan=False)


@pytest.mark.parametrize(("rate", "partway"), [(1.0, False), (1e30, True)])
def test_relearning_that_costs_too_much_is_not_taken(rate: float, partway: bool) -> None:
    wild = replace(RELEARNING.relearning.recipe, learning_rate=rate, epochs=1)
    result = purify(replace(RELEARNING, relearning=Relearning(wild), retries=0, partway=partway))
    assert not relearnt(result)["taken"]
    for mine, theirs in zip(result.model.parameters(), PLANTED.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_relearning_that_costs_too_much_is_tried_again_with_fewer_triggers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[float] = []
    crops: list[int] = []

    def costly(model: Any, *others: Any, **options: Any) -> Any:  # noqa: ANN401
        shares.append(others[3].stamped_fraction)
        crops.append(others[3].recipe.crop_padding)
        broken, record = relearn(model, *others, **options)
        if len(shares) < 3:
            for parameter in broken.parameters():
                parameter.data.zero_()
        return broken, record

    monkeypatch.setattr(mnp, "relearn", costly)
    cropped = replace(RELEARNING.relearning, recipe=replace(RELEARNING.relearning.recipe, crop_padding=2))
    method = replace(RELEARNING, rounds=1, relearning=cropped)
    log = purify(method).diagnostics["relearning"]
    assert shares == [0.5, 0.25, 0.125]
    assert crops == [2, 0, 0]
    assert [tried["taken"] for tried in log] == [False, False, True]
    assert ["tried_again" in tried for tried in log] == [True, True, False]
    shares.clear()
    crops.clear()
    assert len(purify(replace(method, retry_crops=True)).diagnostics["relearning"]) == 3
    assert crops == [2, 2, 2]
    shares.clear()
    assert len(purify(replace(method, retries=1)).diagnostics["relearning"]) == 2
    shares.clear()
    # Without triggers there is nothing to stamp less of.
    purify(replace(QUICK, relearns="always"))
    assert shares == [0.5]


def shrunk(share: float) -> torch.nn.Module:
    """Return the planted network with all parameters shrunk by ``share``."""
    network = copy.deepcopy(PLANTED.model)
    for parameter in network.parameters():
        parameter.data.mul_(1 - share)
    return network


def shrinking(monkeypatch: pytest.MonkeyPatch, *factors: float) -> None:
    """Let each relearning end in the network times the next factor; the last one stays."""
    left = list(factors)

    def costly(model: Any, *others: Any, **options: Any) -> Any:  # noqa: ANN401
        broken, record = relearn(model, *others, **options)
        factor = left.pop(0) if len(left) > 1 else left[0]
        before = dict(model.named_parameters())
        for name, parameter in broken.named_parameters():
            parameter.data.copy_(factor * before[name].data)
        return broken, record

    monkeypatch.setattr(mnp, "relearn", costly)


def test_relearning_that_costs_too_much_is_taken_as_far_as_the_guard_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shrinking(monkeypatch, 0.0)
    accuracies = [accuracy_of(shrunk(tenths / 10), CLEAN) for tenths in range(11)]
    # The bound lies between what two and three tenths of the way keep.
    assert accuracies[2] > accuracies[3] > accuracies[10]
    bound = (accuracies[2] + accuracies[3]) / 2
    lenient = replace(RELEARNING.guard, accuracy=accuracies[0] - bound)
    method = replace(RELEARNING, retries=1, rounds=1, guard=lenient)
    result = purify(method)
    first, last = result.diagnostics["relearning"]
    assert (first["taken"], first["share"], last["taken"]) == (False, 0.0, False)
    assert last["share"] == 0.2
    assert last["accuracy_kept"] == accuracy_of(result.model, CLEAN)
    for mine, theirs in zip(result.model.parameters(), shrunk(0.2).parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    kept = series(result.diagnostics)["relearning.share"]
    assert kept == [0.0, 0.2], "a record does not say how far it went"
    refused = purify(replace(method, partway=False))
    assert refused.diagnostics["relearning"][-1]["share"] == 0.0
    for mine, theirs in zip(refused.model.parameters(), PLANTED.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_nothing_is_taken_where_no_tenth_of_the_way_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tenth of the way to minus a thousand times itself turns every answer round.
    shrinking(monkeypatch, -1000.0)
    result = purify(replace(RELEARNING, rounds=1))
    assert [step["share"] for step in result.diagnostics["relearning"]] == [0.0, 0.0, 0.0]
    for mine, theirs in zip(result.model.parameters(), PLANTED.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_was_removed_stays_removed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    shrinking(monkeypatch, 0.0)
    lenient = replace(RELEARNING.guard, accuracy=0.6)
    result = purify(replace(RELEARNING, count=3, rounds=1, retries=0, guard=lenient))
    assert removed(result) == 3
    assert 0 < relearnt(result)["share"] < 1
    assert result.mask is not None
    again = copy.deepcopy(result.model)
    result.mask.clear(again, find_filters(again, CLEAN.floats()[:1]), prune_mode=RELEARNING.prune_mode)
    for mine, theirs in zip(result.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_relearning_waits_for_triggers_unless_it_is_always_wanted() -> None:
    assert "relearning" not in purify(replace(QUICK, relearns="triggers")).diagnostics
    assert "relearning" not in purify(INVERTING).diagnostics
    found = relearnt(purify(replace(QUICK, relearns="always")))
    assert found["trigger_success"] == [None, None]


def test_survivors_relearn_until_no_small_trigger_is_left() -> None:
    hard = replace(
        RELEARNING.relearning, recipe=replace(RELEARNING.relearning.recipe, epochs=20, learning_rate=0.03)
    )
    (log,) = purify(replace(RELEARNING, relearning=hard)).diagnostics["relearning"]
    assert log["left"] == []
    (again,) = log["inverted_anew"]
    assert again["target_class"] == PLANTED.label_rule.target_class
    (once,) = purify(replace(RELEARNING, relearning=hard, rounds=1)).diagnostics["relearning"]
    assert "left" not in once


def test_a_suspicious_class_is_inverted_from_several_starts() -> None:
    found = {}
    for restarts in (0, 2):
        method = replace(INVERTING, restarts=restarts, refined=0, exposures=("inversion",))
        found[restarts] = purify(method).diagnostics["inversion"]
    assert "inverted_anew" not in found[0]
    assert found[0]["triggers"] == found[2]["triggers"]
    (target,) = found[2]["acted_on"]
    assert [trigger["target_class"] for trigger in found[2]["inverted_anew"]] == [target, target]
    one, other = (trigger["l1_pixels"] for trigger in found[2]["inverted_anew"])
    assert one != other


def test_the_classes_with_the_smallest_patches_are_inverted_again_before_they_are_judged() -> None:
    plain, judged = (
        purify(replace(INVERTING, restarts=2, refined=refined)).diagnostics["inversion"] for refined in (0, 2)
    )
    first = {trigger["target_class"]: trigger["l1_pixels"] for trigger in plain["triggers"]}
    best = {trigger["target_class"]: trigger["l1_pixels"] for trigger in judged["triggers"]}
    again = [trigger["target_class"] for trigger in judged["inverted_anew"]]
    smallest = sorted(first, key=lambda k: first[k])[:2]
    assert again == [smallest[0]] * 2 + [smallest[1]] * 2
    for target, norm in best.items():
        starts = [t["l1_pixels"] for t in judged["inverted_anew"] if t["target_class"] == target]
        assert norm == min(first[target], *starts) if starts else norm == first[target]
    # Faint changes start at nothing: only suspects get further starts.
    additive = replace(Inversion.additive(), learning_rate=0.05, success=0.5)
    method = replace(INVERTING, exposures=("perturbation",), perturbation=additive, restarts=1)
    faint = purify(method).diagnostics["perturbation"]
    assert [t["target_class"] for t in faint["inverted_anew"]] == faint["acted_on"]


def test_what_rounds_of_relearning_leave_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    def never_rid_of(*_: object, classes: list[int], **__: object) -> list[InvertedTrigger]:
        mask, pattern = torch.zeros(1, 16, 16), torch.zeros(3, 16, 16)
        return [InvertedTrigger(k, mask, pattern, 0.1, 1.0, reached=True, steps=1) for k in classes]

    monkeypatch.setattr(mnp, "invert_all", never_rid_of)
    method = replace(INVERTING, exposures=("inversion", "suppression"), relearns="triggers", settled=0.1)
    for rounds in (1, 2):
        result = purify(replace(method, rounds=rounds))
        log = result.diagnostics["relearning"]
        assert len(log) == rounds
        assert ("suppression" in result.diagnostics) == (rounds > 1)
    assert log[0]["left"] == log[1]["left"] == [PLANTED.label_rule.target_class]


def test_relearning_may_settle_the_matter() -> None:
    both = replace(
        INVERTING, exposures=("inversion", "suppression"), relearns="triggers", guard=Guard(benefit=0.95)
    )
    hard = replace(both.relearning.recipe, epochs=20, learning_rate=0.03)
    assert (
        "suppression"
        not in purify(replace(both, relearning=replace(INVERTING.relearning, recipe=hard))).diagnostics
    )
    assert "suppression" in purify(replace(both, relearns="never")).diagnostics


def test_without_a_suspicious_class_inversion_changes_nothing() -> None:
    result = purify(replace(INVERTING, act_on="flagged"))
    assert removed(result) == 0
    assert result.diagnostics["walk"] == []
    assert all(
        torch.equal(a, b) for a, b in zip(result.model.parameters(), PLANTED.model.parameters(), strict=True)
    )


def test_both_ways_share_one_budget() -> None:
    both = purify(replace(INVERTING, exposures=("inversion", "suppression"), settled=2.0))
    walk = both.diagnostics["walk"]
    ways = [step["exposure"] for step in walk]
    assert ways == sorted(ways)
    assert set(ways) == {"inversion", "suppression"}
    gone = [(step["layer"], step["filter"]) for step in walk if step["removed"]]
    assert both.mask is not None
    assert sorted(gone) == sorted(both.mask.removed())
    assert (
        sum(step["loss_change"] for step in both.diagnostics["walk"] if step["removed"])
        <= QUICK.guard.total + 1e-6
    )


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"amount": "count", "count": 7}, 7),
        ({"amount": "fraction", "fraction": 0.1}, 10),
        ({"amount": "threshold", "threshold": -1.0}, 0),
    ],
)
def test_both_ways_share_one_count(options: dict[str, Any], count: int) -> None:
    both = replace(INVERTING, exposures=("inversion", "suppression"), **options)
    result = purify(both)
    assert result.diagnostics["inversion"]["acted_on"]
    assert "suppression" in result.diagnostics
    assert removed(result) == count


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"exposures": ()}, "exposures must name"),
        ({"exposures": ("magic",)}, "exposures must name"),
        ({"outlier_share": 0.0}, "outlier_share and warp_share must lie"),
        ({"restarts": -1}, "restarts, refined and retries 0; got 4, -1, 2 and 2"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"retries": -1}, "refined and retries 0"),
        ({"evidence": 1.0}, r"evidence must lie in \[0, 1\), got 1.0"),
        (
            {"collapsed": 0.0},
            "0, settled_index and outlier_index at least 0, got 0.0, 3.0 and 0.0",
        ),
        ({"outlier_index": -1.0}, "outlier_index at least 0, got 0.6, 3.0 and -1.0"),
        ({"settled_index": -1.0}, "outlier_index at least 0, got 0.6, -1.0 and 0.0"),
        ({"warp_share": 0.0}, "outlier_share and warp_share"),
        ({"relearns": "sometimes"}, "relearns must be"),
        ({"stages": ("suppress",)}, "stages must name 'penalise' or 'preserve'"),
        ({"stages": ("penalise", "magic")}, "stages must name"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction must lie in \[0, 1\)"),
        ({"held_out_fraction": -0.1}, r"held_out_fraction must lie in \[0, 1\)"),
        ({"amount": "count", "count": -1}, "count must be at least 0"),
        ({"amount": "fraction", "fraction": 1.5}, r"fraction must lie in \[0, 1\]"),
        ({"amount": "fraction", "fraction": -0.5}, r"fraction must lie in \[0, 1\]"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        MNP(**options)


def test_suppression_takes_filters_only_if_together_they_tell_enough() -> None:
    alone = replace(QUICK, collapsed=2.0)
    result = purify(replace(alone, evidence=0.01))
    found = result.diagnostics["evidence"]
    assert found["taken"]
    assert found["filters"] == removed(result) > 0
    assert 0 < found["largest_benefit"] < found["benefit"] < 1
    just = purify(replace(alone, evidence=found["benefit"] - 1e-6))
    assert just.diagnostics["evidence"] == found
    assert removed(just) == found["filters"]
    kept = purify(replace(alone, evidence=found["benefit"] + 1e-6))
    assert kept.diagnostics["evidence"] == {**found, "taken": False}
    assert removed(kept) == 0
    assert not any(step["removed"] for step in kept.diagnostics["walk"])
    json.dumps(kept.diagnostics, allow_nan=False)


def test_or_if_the_errors_gather() -> None:
    strict = replace(QUICK, evidence=0.999)
    found = purify(replace(strict, collapsed=2.0)).diagnostics["evidence"]
    assert not found["taken"]
    assert found["concentration"] > 0
    taken = purify(replace(strict, collapsed=found["concentration"] - 1e-6))
    assert taken.diagnostics["evidence"] == {**found, "taken": True}
    assert removed(taken) == found["filters"] > 0
    assert removed(purify(replace(strict, collapsed=found["concentration"] + 1e-6))) == 0


def test_a_benefit_that_no_filter_brings_removes_nothing() -> None:
    demanding = Guard(candidates=0.1, per_filter=1e9, total=1e9, accuracy=1.0, benefit=0.999)
    assert removed(purify(replace(QUICK, guard=demanding))) == 0


def test_layers_limits_what_is_pruned() -> None:
    purified = purify(replace(QUICK, layers="conv", amount="count", count=5))
    assert purified.mask is not None
    assert purified.mask.n_removed == 5
    assert all("conv" in layer for layer, _ in purified.mask.removed())
