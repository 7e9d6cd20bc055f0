from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unbackdoor import rng
from unbackdoor.errors import InvalidInputError
from unbackdoor.filters.groups import find_filters
from unbackdoor.filters.head import head_features
from unbackdoor.filters.select import Exposed, Guard
from unbackdoor.inversion import Inversion
from unbackdoor.masks import MaskTraining
from unbackdoor.purify import selection as selecting
from unbackdoor.purify.anp import ANP
from unbackdoor.purify.bnp import BNP
from unbackdoor.purify.clp import CLP
from unbackdoor.purify.ep import EP
from unbackdoor.purify.fp import FP
from unbackdoor.purify.gup import GUP
from unbackdoor.purify.mnp import MNP
from unbackdoor.purify.nc import NC
from unbackdoor.purify.rnp import RNP
from unbackdoor.purify.selection import Selection, guarded_units, select
from unbackdoor.purify.tsbd import TSBD
from unbackdoor.settings import configure
from unbackdoor.suppression import Suppression, suppress
from unbackdoor.testing import planted_backdoor
from unbackdoor.testing.subjects import small_data, small_network
from unbackdoor.train import Recipe
from unbackdoor.types import LabelledImages, Purifier

with rng.isolated(rng.generator(0)):
    MODEL = small_network().eval()
DATA = small_data()
FILTERS = find_filters(MODEL, DATA.floats()[:1])
SCORES = {"0": torch.arange(16).float(), "4": torch.arange(16).flip(0).float() + 0.5}


def _removed(**options: object) -> list[tuple[str, int]]:
    selection = Selection(**options)  # type: ignore[arg-type]
    return select(MODEL, DATA, FILTERS, SCORES, selection, own=[("4", 3)]).mask.removed()


def test_counts_and_fractions_take_the_lowest_scores_of_all_layers() -> None:
    assert _removed(amount="count", count=3) == [("0", 0), ("0", 1), ("4", 15)]
    assert _removed(amount="fraction", fraction=0.125) == [("0", 0), ("0", 1), ("4", 14), ("4", 15)]
    assert _removed(amount="count", count=0) == []


def test_own_is_what_the_paper_says() -> None:
    assert _removed(amount="own") == [("4", 3)]


def test_the_guard_keeps_what_clean_images_need() -> None:
    free = Guard(candidates=0.25, per_filter=9.0, total=9.0, accuracy=1.0, benefit=0.0)
    chosen = select(MODEL, DATA, FILTERS, SCORES, Selection(guard=free), own=[])
    assert chosen.mask.n_removed == 8
    strict = Guard(candidates=0.25, per_filter=-9.0, total=9.0, accuracy=1.0, benefit=0.0)
    kept = select(MODEL, DATA, FILTERS, SCORES, Selection(guard=strict), own=[])
    assert kept.mask.n_removed == 0
    assert len(kept.describe()["walk"]) == 8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"amount": "all"}, "amount must be"),
        ({"count": -1}, "count must be"),
        ({"fraction": 1.5}, "fraction lie in"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction must lie in \[0, 1\)"),
        ({"amount": "own", "held_out_fraction": 0.2}, "serve the guard alone"),
        ({"guard": Guard(benefit=0.01)}, "nothing exposes it"),
        ({"expose": "unlearnt"}, "set guard.benefit too"),
        ({"expose": "unlearnt", "guard": Guard(), "amount": "count"}, "serve the guard alone"),
        ({"expose": "magic"}, "expose must be"),
    ],
)
def test_odd_rules_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        Selection(**options)  # type: ignore[arg-type]


def test_a_method_that_holds_out_itself_says_so() -> None:
    for selection in (Selection(held_out_fraction=0.2), Selection(guard=Guard(), expose="unlearnt")):
        with pytest.raises(InvalidInputError, match="of its own"):
            TSBD(selection=selection)


PLANTED = planted_backdoor()
CLEAN = PLANTED.clean_data(64, rng.generator(0))
LAX = Guard(candidates=0.5, per_filter=9.0, total=9.0, accuracy=1.0, screen=0.0, patience=0)
SHORT, HALF = Inversion(steps=8, batch_size=8, success=0.01), Selection(held_out_fraction=0.5)
HOLDING: list[Purifier] = [
    ANP(iterations=2, batch_size=16, selection=HALF),
    RNP(Suppression(budget=2), MaskTraining(epochs=1, target="norm_scale"), selection=HALF),
    CLP(selection=HALF),
    BNP(selection=HALF),
    EP(selection=HALF),
    GUP(inversion=SHORT, recipe=None, selection=HALF),
    FP(recipe=None, selection=HALF),
    NC(inversion=SHORT, act_on="smallest", mitigation="prune", selection=HALF),
]


@pytest.mark.parametrize("method", HOLDING, ids=lambda method: method.name)
def test_all_methods_hold_out_the_images_that_mnp_does(
    method: Purifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided: list[LabelledImages] = []
    measured: list[object] = []
    true_divide = selecting.divide

    def spy(*given: object) -> tuple[LabelledImages, LabelledImages]:
        divided.extend(true_divide(*given))  # type: ignore[arg-type]
        return divided[-2], divided[-1]

    for module in ("anp", "rnp", "clp", "bnp", "ep", "gup", "fp", "nc", "mnp"):
        monkeypatch.setattr(f"unbackdoor.purify.{module}.divide", spy)
    mnp = MNP(("suppression",), suppression=Suppression(budget=1), masks=MaskTraining(epochs=1))
    mnp = replace(mnp, held_out_fraction=0.5)
    for each in (mnp, method):
        result = each.purify(MODEL, DATA, generator=rng.generator(3))
        measured.append(result.diagnostics["walk"])
    (learning, held), (_, same) = divided[:2], divided[2:]
    assert len(learning) + len(held) == len(DATA)
    assert torch.equal(held.images, same.images)
    assert measured[1], "the guard has measured something"
    # The walk's accuracies are those of the held-out images.
    kept = [step for step in result.diagnostics["walk"] if not step["removed"]]
    assert all(float(step["accuracy"] * len(held)).is_integer() for step in kept)


# Of each method, the functions that learn and those that measure for the guard.
READERS: list[tuple[Purifier, tuple[str, ...], tuple[str, ...]]] = [
    (CLP(selection=HALF), (), ("select",)),
    (HOLDING[0], ("batches",), ("select",)),
    (HOLDING[1], ("suppress", "learn_masks"), ("select",)),
    (BNP(selection=HALF), ("clean_divergences",), ("select",)),
    (EP(selection=HALF), ("answer_entropies",), ("select",)),
    (
        FP(recipe=Recipe(epochs=1, batch_size=16), selection=HALF),
        ("_find_units", "fine_tuned"),
        ("_Sweep.of",),
    ),
    (
        MNP(
            ("suppression",), suppression=Suppression(budget=1), masks=MaskTraining(epochs=1),
            held_out_fraction=0.5,
        ),
        ("suppress", "learn_masks"),
        ("guarded_walk",),
    ),
]  # fmt: skip


@pytest.mark.parametrize("expose", [False, True])
@pytest.mark.parametrize(
    ("method", "learners", "guards"), READERS, ids=[method.name for method, *_ in READERS]
)
def test_learners_and_guard_each_get_their_part_of_the_images(
    method: Any,  # noqa: ANN401
    learners: tuple[str, ...],
    guards: tuple[str, ...],
    expose: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if expose and not isinstance(method, MNP):
        asking = Selection(guard=LAX, expose="unlearnt", held_out_fraction=0.5)
        method = replace(method, selection=asking)
    learning, held = selecting.divide(CLEAN, 0.5, rng.generator(3))
    home = f"unbackdoor.purify.{method.name}"
    seen: dict[str, list[LabelledImages | Tensor]] = {}

    def spy_on(name: str) -> None:
        true = pkgutil.resolve_name(f"{home}:{name}")

        def spy(*given: Any, **options: Any) -> Any:  # noqa: ANN401
            values = [*given, *options.values()]
            values += [each.data for each in values if isinstance(each, Exposed)]
            parts: list[LabelledImages | Tensor] = [
                each for each in values if isinstance(each, LabelledImages)
            ]
            # Fine-pruning hands over images or labels alone.
            parts += [each for each in values[2:] if isinstance(each, Tensor) and len(each) == len(held)]
            seen.setdefault(name, []).extend(parts)
            return true(*given, **options)

        monkeypatch.setattr(f"{home}.{name}", spy)

    for name in (*learners, *guards):
        spy_on(name)
    method.purify(PLANTED.model, CLEAN, generator=rng.generator(3))
    assert set(seen) == {*learners, *guards}
    for name, parts in seen.items():
        expected = learning if name in learners else held
        assert parts
        for part in parts:
            if isinstance(part, LabelledImages):
                assert torch.equal(part.images, expected.images), name
            elif part.dtype == torch.int64:
                assert torch.equal(part.cpu(), expected.labels), name
            elif part.ndim == 4:
                assert torch.equal(part, expected.images), name
            elif not expose:
                features = head_features(PLANTED.model, "head", expected.images)
                torch.testing.assert_close(part.flatten(1), features)


def test_an_unlearnt_copy_unlearns_what_the_scores_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    learning, held = selecting.divide(CLEAN, 0.5, rng.generator(3))
    unlearnt: list[LabelledImages] = []
    true = suppress

    def spy(model: nn.Module, data: LabelledImages, *given: Any, **options: Any) -> Any:  # noqa: ANN401
        unlearnt.append(data)
        return true(model, data, *given, **options)

    monkeypatch.setattr(selecting, "suppress", spy)
    asking = Selection(guard=LAX, expose="unlearnt", held_out_fraction=0.5)
    exposed = selecting.exposed_copy(
        PLANTED.model, learning, held, asking, generator=rng.generator(0)
    )  # fmt: skip
    assert exposed is not None
    assert exposed.data is held
    assert unlearnt == [learning]


def test_the_walk_over_units_ends_when_nothing_goes() -> None:
    tried: list[int] = []

    def measure(removed: Sequence[int]) -> tuple[float, float]:
        tried.extend(removed[-1:])
        return (9.0, 0.0) if 1 in removed or 2 in removed else (1.0, 1.0)

    removed, steps = guarded_units(measure, "head.inputs", [0, 1, 2, 3], Guard(patience=2))
    assert (removed, tried, len(steps)) == ([0], [0, 1, 2], 3)
    assert guarded_units(measure, "head.inputs", [0, 1, 2, 3], Guard(patience=0))[0] == [0, 3]


@pytest.mark.parametrize("method", HOLDING, ids=lambda method: method.name)
def test_filters_go_only_if_that_helps_the_unlearnt_copy(method: Purifier) -> None:
    asking = Selection(guard=LAX, expose="unlearnt")
    exposing = replace(method, selection=asking)  # type: ignore[type-var]
    walk = exposing.purify(PLANTED.model, CLEAN, generator=rng.generator(0)).diagnostics["walk"]
    assert walk
    assert all(step["removed"] == (step["benefit"] >= 0.01) for step in walk)
    assert not all(step["removed"] for step in walk)


def test_a_screened_walk_passes_over_what_promises_no_benefit() -> None:
    method = CLP(layers="conv", selection=Selection(guard=replace(LAX, screen=0.5), expose="unlearnt"))
    walk = method.purify(PLANTED.model, CLEAN, generator=rng.generator(0)).diagnostics["walk"]
    assert any(step["loss_change"] is None for step in walk)


def test_rnp_passes_the_copy_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "suppress", None)
    method = replace(HOLDING[1], selection=Selection(guard=LAX, expose="unlearnt"))  # type: ignore[type-var]
    walk = method.purify(PLANTED.model, CLEAN, generator=rng.generator(0)).diagnostics["walk"]
    assert any(step["benefit"] is not None for step in walk)


@pytest.mark.parametrize("backwards", [False, True])
def test_settings_that_belong_together_come_in_any_order(backwards: bool) -> None:
    settings = ["selection.expose=unlearnt", "selection.guard.benefit=0.02"]
    chosen = configure(ANP(), settings[::-1] if backwards else settings).selection
    assert (chosen.expose, chosen.guard.benefit) == ("unlearnt", 0.02)


def test_an_exposed_copy_without_any_loss_gives_no_benefit() -> None:
    removed, steps = selecting.guarded_units(
        lambda units: (0.1, 1.0), "head", [0, 1], Guard(benefit=0.01), exposed=lambda units: 0.0
    )
    assert (removed, [step.benefit for step in steps]) == ([], [0.0, 0.0])
