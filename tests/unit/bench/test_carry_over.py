"""The script that takes answers over from before an option, where the option could not have acted."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import settings_of
from unbackdoor.purify import MNP

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "carry_over.py"))


def asked(**rest: Any) -> Cell:  # noqa: ANN401
    return Cell(model="badnets", model_sha256="0" * 64, data="cifar10", method="mnp", **rest)


def answer(seed: int, *taken: float) -> dict[str, Any]:
    """Return a record of before the option whose tries of relearning were taken or not."""
    settings = settings_of(MNP(partway=False, evidence_together=1.0))
    assert not {"partway", "evidence_together"} & settings.keys()
    cell = asked(seed=seed, settings=settings)
    notes = {"relearning.taken": bool(taken[0])} if len(taken) == 1 else {}
    series = {"relearning.taken": list(taken)} if len(taken) > 1 else {}
    return {"key": cell.key, "cell": cell.describe(), "status": "ok", "notes": notes, "series": series}


@pytest.mark.parametrize(
    ("taken", "refused"),
    [
        ((), False),
        ((1.0,), False),
        ((0.0,), True),
        ((0.0, 0.0, 1.0), False),
        ((0.0, 0.0, 0.0), True),
        # Of two rounds the first was refused for good, or the second.
        ((0.0, 0.0, 0.0, 1.0), True),
        ((1.0, 0.0, 0.0, 0.0), True),
        ((0.0, 1.0, 0.0, 1.0), False),
    ],
)
def test_a_refusal_is_one_of_all_tries_in_a_row(taken: tuple[float, ...], refused: bool) -> None:
    assert SCRIPT["was_refused"](answer(0, *taken)) == refused


def test_whoever_asked_without_the_option_is_not_answered_with_it() -> None:
    record = answer(0, 1.0)
    assert SCRIPT["concerns"](record)
    record["cell"]["options"] = {"partway": "false", "evidence_together": "1"}
    assert not SCRIPT["concerns"](record)


@pytest.mark.parametrize(
    ("taken", "together", "acted"),
    [(True, 0.9, False), (False, 0.3, False), (False, 0.7, True), (None, None, False)],
)
def test_filters_that_tell_enough_together_today_must_be_asked_again(
    taken: bool | None, together: float | None, acted: bool
) -> None:
    record = answer(0)
    record["notes"] = {"evidence.taken": taken, "evidence.benefit": together} if taken is not None else {}
    assert SCRIPT["was_kept"](record) == acted


def test_answers_without_a_refusal_answer_todays_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    other = {"key": "k", "cell": {**asked().describe(), "method": "rnp"}, "status": "ok"}
    rows = [answer(0, 1.0), answer(1, 0.0, 0.0, 0.0), other]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["carry_over.py", "--records", str(source), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    for _ in range(2):
        SCRIPT["main"]()
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["key"] == asked(settings=settings_of(MNP())).key
    assert record["carried_from"] == rows[0]["key"]
    assert "partway" in record["carried_over"]
    said = capsys.readouterr().out
    assert "partway could act: badnets seed 1" in said
    assert "1 answers taken over" in said
