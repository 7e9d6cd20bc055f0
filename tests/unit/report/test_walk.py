"""Which limit of the guard kept a filter, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from unbackdoor.report.documents import PurifyDocument, WalkStep, parse_document
from unbackdoor.report.walk import ACCURACY, BENEFIT, LOSS, NOT_TRIED, TAKEN_BACK, TOTAL, caption, reasons

GUARD = {
    "candidates": 0.15, "per_filter": 0.01, "total": 0.025, "accuracy": 0.01, "benefit": 0.01, "screen": 0.5,
    "patience": 60,
}  # fmt: skip


def walked(
    purify: PurifyDocument, options: dict[str, Any], *steps: tuple[float | None, bool, float | None]
) -> PurifyDocument:
    """Return a document whose steps are (change of the loss, kept, benefit)."""
    walk = [
        WalkStep(rank=rank, layer="conv1", filter=rank, loss_change=change, kept=kept, benefit=benefit)
        for rank, (change, kept, benefit) in enumerate(steps)
    ]
    return purify.model_copy(update={"options": options, "walk": tuple(walk)})


def test_what_a_filter_costs_is_told_from_the_steps_before_it(purify: PurifyDocument) -> None:
    options = {"selection": {"guard": {**GUARD, "benefit": 0.0}}}
    document = walked(
        purify, options,
        (0.009, False, None), (0.02, True, None), (0.009, False, None), (0.008, True, None),
        (-0.004, False, None), (0.008, False, None), (-0.02, True, None),
    )  # fmt: skip
    assert reasons(document) == ["", LOSS, "", TOTAL, "", "", ACCURACY]


def test_without_a_recorded_benefit_all_that_may_be_is_named(purify: PurifyDocument) -> None:
    steps = ((0.009, True, None), (None, True, None), (0.02, True, None))
    one_walk = walked(purify, {"selection": {"guard": GUARD}}, *steps)
    assert reasons(one_walk) == [f"{ACCURACY} or {BENEFIT}", NOT_TRIED, LOSS]
    # Several walks: what came before does not add up.
    several = walked(purify, {"guard": GUARD}, *steps)
    assert reasons(several) == [f"{TOTAL} or {ACCURACY} or {BENEFIT}", NOT_TRIED, LOSS]


def test_a_recorded_benefit_tells_it_from_the_costs(purify: PurifyDocument) -> None:
    steps = ((0.0, False, 0.2), (-0.01, True, 0.002), (-0.01, True, None), (0.0, True, 0.05))
    document = walked(purify, {"guard": GUARD}, *steps)
    assert reasons(document) == ["", BENEFIT, f"{TOTAL} or {ACCURACY}", TAKEN_BACK]
    assert "What suppression exposed is put back as a whole if" in " ".join(caption(document))


def test_the_caption_names_all_limits(purify: PurifyDocument) -> None:
    document = walked(purify, {"guard": GUARD}, (None, True, None))
    said = " ".join(caption(document)).replace("\u202f", " ")
    for words in (
        "this removal raises the loss by more than 0.01", "together raise the loss by more than 0.025",
        "lower the accuracy by more than 1.0 %", "falls by less than 1.0 %", "were not tried",
        "after 60 in a row", "kept although the loss falls",
    ):  # fmt: skip
        assert words in said
    asks_none = walked(
        purify, {"selection": {"guard": {**GUARD, "benefit": 0, "patience": 0}}}, (0, True, None)
    )
    assert "benefit" not in " ".join(caption(asks_none))
    assert "in a row" not in " ".join(caption(asks_none))


@pytest.mark.parametrize(
    "options", [{}, {"guard": 1}, {"selection": [], "guard": {"total": "x"}}, {"guard": {"per_filter": True}}]
)
def test_limits_that_are_not_known_are_named_without_numbers(
    purify: PurifyDocument, options: dict[str, Any]
) -> None:
    document = walked(purify, options, (0.5, True, None), (None, True, None))
    assert reasons(document) == ["", NOT_TRIED]
    assert "by more than a limit" in caption(document)[0]
    assert "of too little benefit" in caption(document)[0]


def test_documents_from_before_the_benefit_open(purify: PurifyDocument) -> None:
    text = purify.model_dump_json(
        exclude={"walk": {"__all__": {"benefit"}}, "method_title": True, "method_source": True}
    )
    assert "benefit" not in text
    assert parse_document(text) == purify
