"""The guarded walk of a purification in words: which limits it had, and which of them kept a filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unbackdoor.report.documents import PurifyDocument, WalkStep
from unbackdoor.report.values import number, percent

NOT_TRIED = "not tried"
LOSS = "loss by this filter"
TOTAL = "loss by all removals"
ACCURACY = "accuracy"
BENEFIT = "benefit"
TAKEN_BACK = "largest benefit"
"""Why filters stayed, in the words of ``caption``."""


@dataclass(frozen=True)
class Limits:
    """The limits of a guard, see ``unbackdoor.filters.select.Guard``; None where they are not known.

    Args:
        per_filter: Largest rise of the clean loss by one more removal.
        total: Largest rise of it by all removals together.
        accuracy: Largest loss of clean accuracy by all removals together.
        benefit: Smallest fall of the loss where the backdoor was exposed; 0 if none was asked for.
        patience: Candidates in a row that stayed, after which the walk ended; 0 if it went on.
        at_once: Whether there was one walk alone, so that its steps add up to what all removals cost.
    """

    per_filter: float | None
    total: float | None
    accuracy: float | None
    benefit: float | None
    patience: float | None
    at_once: bool

    @staticmethod
    def of(document: PurifyDocument) -> Limits:
        """Read them off the options of the method, which are untrusted: what is no number is not known."""
        selection = document.options.get("selection")
        # MNP alone has a guard of its own, for a walk after each way of exposing filters.
        owner = selection if isinstance(selection, Mapping) else document.options
        guard = owner.get("guard")
        values = guard if isinstance(guard, Mapping) else {}
        per_filter, total, accuracy, benefit, patience = (
            _number(values.get(name)) for name in ("per_filter", "total", "accuracy", "benefit", "patience")
        )
        return Limits(per_filter, total, accuracy, benefit, patience, at_once=owner is selection)


def caption(document: PurifyDocument) -> list[str]:
    """Say in sentences what kept a candidate of the walk in the network."""
    limits = Limits.of(document)
    benefit = (
        ", or if it is of too little benefit: the loss where the backdoor was exposed falls by less than "
        f"{_share(limits.benefit)} of what it was at the start"
    )
    found = [
        "Each candidate is removed on trial. It is put back, and so kept, if on clean images this removal "
        f"raises the loss by more than {_amount(limits.per_filter)}, if all removals together raise the loss "
        f"by more than {_amount(limits.total)} or lower the accuracy by more than {_share(limits.accuracy)}"
        f"{'' if limits.benefit == 0 else benefit}.",
        "A filter may thus be kept although the loss falls without it.",
    ]
    if any(step.loss_change is None for step in document.walk):
        found.append("Candidates that promised too little benefit were not tried.")
    if TAKEN_BACK in reasons(document):
        found.append("What suppression exposed is put back as a whole if the largest benefit is too small.")
    if limits.patience:
        found.append(f"The walk ends after {number(limits.patience)} in a row that were tried and kept.")
    return found


def reasons(document: PurifyDocument) -> list[str]:
    """Return why each candidate of the walk was kept; an empty text if it was removed, or nobody knows.

    Where the document does not tell which of several limits it was, all of them are named.
    """
    limits, spent, found = Limits.of(document), 0.0, list[str]()
    told = any(step.benefit is not None for step in document.walk)
    for step in document.walk:
        found.append(_reason(step, limits, spent, told=told) if step.kept else "")
        spent += 0.0 if step.kept else step.loss_change or 0.0
    return found


def _reason(step: WalkStep, limits: Limits, spent: float, *, told: bool) -> str:
    if step.loss_change is None:
        return NOT_TRIED
    if limits.per_filter is None or limits.total is None:
        return ""
    if step.loss_change > limits.per_filter:
        return LOSS
    if step.benefit is not None:
        # It is measured only for what the clean images can spare.
        return BENEFIT if step.benefit < (limits.benefit or 0.0) else TAKEN_BACK
    if limits.at_once and spent + step.loss_change > limits.total:
        return TOTAL
    possible = [ACCURACY] if limits.at_once else [TOTAL, ACCURACY]
    return " or ".join(possible if told or limits.benefit == 0 else [*possible, BENEFIT])


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _amount(value: float | None) -> str:
    return "a limit" if value is None else number(value)


def _share(value: float | None) -> str:
    return "a share" if value is None else percent(value)
