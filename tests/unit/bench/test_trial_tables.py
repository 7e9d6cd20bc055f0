from __future__ import annotations

import math
from typing import Any

import pytest

from unbackdoor.bench.trial_tables import (
    area_under_curve,
    attack_table,
    columns,
    comparable,
    halves,
    model_table,
    ratio_table,
    scored,
    summary_table,
)
from unbackdoor.detect.calibration import CalibrationSet, Kind, ScoredModel


def record(
    name: str,
    attack: str | None,
    scores: dict[str, float | None],
    *,
    target: int = 3,
    rate: float = 0.1,
    **more: object,
) -> dict[str, Any]:
    return {
        "key": name,
        "cell": {"data": "d", "model": name, "detector": "scan"},
        "status": "ok",
        "valid": True,
        "attack": attack,
        "poison_fraction": rate if attack else None,
        "label_rule": {"rule": "all_to_one", "target_class": 3} if attack else None,
        "detections": {
            detector: {"score": score, "target_class": target, "seconds": 2.0, "undetermined": ""}
            for detector, score in scores.items()
        },
    } | more


def trial() -> list[dict[str, Any]]:
    clean = [
        record(
            f"clean-{i:02d}", None, {"collapse": 0.01 * i, "trigger_search": 0.01 * (i * 7 % 40), "mnp": 0.0}
        )
        for i in range(40)
    ]
    infected = [
        record("badnets-00", "badnets", {"collapse": 0.2, "trigger_search": 3.0, "mnp": 0.1}),
        record("badnets-01", "badnets", {"collapse": 9.0, "trigger_search": 0.0, "mnp": 0.1}, target=4),
        record("blend-00", "blend", {"collapse": 0.1, "trigger_search": None, "mnp": None}),
        record(
            "adaptive-magnitude-00", "adaptive_magnitude", {"collapse": 0, "trigger_search": 0, "mnp": 0.9}
        ),
        record("iab-00", "iab", {"collapse": 9.0}, valid=False),
    ]
    return clean + infected


def test_thresholds_come_from_one_half_and_figures_from_the_other() -> None:
    models = scored(trial())
    assert len(models) == 44  # the attack that did not take is left out
    calibration, rest = halves([model for model in models if model.is_clean])
    assert (len(calibration), len(rest)) == (20, 20)
    assert not {m.name for m in calibration} & {m.name for m in rest}
    found = {column.detector: column for column in columns(models)}
    assert set(found) == {"collapse", "mnp", "trigger_search", "scan"}
    for column in found.values():
        assert (column.calibrated_on, column.rate, len(column.of(clean=True))) == (20, 0.05, 20)
    flagged = {o.model.name for o in found["scan"].of(clean=False) if o.flagged}
    assert flagged == {"badnets-00", "badnets-01"}
    assert {o.model.name for o in found["collapse"].of(clean=False) if o.flagged} == {"badnets-01"}
    # All that a scan ran takes six seconds.
    assert found["scan"].seconds == 6.0


def test_a_scan_takes_what_all_of_it_took() -> None:
    records = [each | {"scan_seconds": 9.5} for each in trial()]
    found = {column.detector: column for column in columns(scored(records))}
    assert (found["scan"].seconds, found["mnp"].seconds) == (9.5, 2.0)


def asked(name: str, score: float, statistic: str, *options: str, more: int = 0) -> dict[str, Any]:
    found = record(name, None, {"nc": score})
    settings = {"nc": {"statistic": statistic} | ({"fewest_classes": more} if more else {})}
    found["cell"] = found["cell"] | {"detector": "nc", "options": options, "settings": settings}
    return found


def test_answers_to_different_questions_are_not_mixed() -> None:
    names = [f"clean-{i:02d}" for i in range(40)]
    records = [asked(name, 1.0, "index") for name in names]
    # Another statistic was stopped after half of the models.
    records += [asked(name, 100.0, "ratio", "statistic=ratio") for name in names[:20]]
    models = scored(records)
    assert {model.scores["nc"] for model in models} == {1.0}
    assert [model.scores.get("nc [statistic=ratio]") for model in models] == [100.0] * 20 + [None] * 20
    assert [column.detector for column in columns(models)] == ["nc", "nc [statistic=ratio]"]
    # The default changed, and half of the models were asked again.
    changed = scored([*records[:40], *(asked(name, 7.0, "index", more=6) for name in names[:20])])
    assert [model.scores.get("nc") for model in changed] == [7.0] * 20 + [None] * 20
    # An option that came later, at its default, changes nothing.
    added = scored([*records[:40], *(asked(name, 7.0, "index", more=5) for name in names[:20])])
    assert [model.scores.get("nc") for model in added] == [7.0] * 20 + [1.0] * 20


def test_scans_with_options_have_a_row_of_their_own() -> None:
    records = trial()
    for each in trial():
        records.append(each | {"cell": each["cell"] | {"options": ["search.refined=1"]}})
    found = [column.detector for column in columns(scored(records))]
    assert {"scan", "scan [search.refined=1]", "mnp [search.refined=1]"} <= set(found)


def calibration_file(**changes: Any) -> CalibrationSet:  # noqa: ANN401
    return CalibrationSet(
        description="made up",
        kind=Kind(architecture="x", parameters=1, num_classes=2, image_shape=(3, 8, 8)),
        images=500,
        options={"nc": {"statistic": "index"}},
        models=tuple(ScoredModel(name=str(i), sha256=f"sha-{i}", scores={"nc": 0.01 * i}) for i in range(20)),
    ).model_copy(update=changes)


def test_what_a_file_does_not_hold_for_is_left_out_and_counted() -> None:
    records = [asked(f"clean-{i:02d}", 1.0, "index") for i in range(6)]
    for index, each in enumerate(records):
        each["cell"] |= {"model_sha256": f"sha-{index + 18}", "clean_images": 500}
    records[2]["cell"]["clean_images"] = 300
    kind = calibration_file().kind
    records[3]["kind"] = kind.model_dump(mode="json")
    records[4]["kind"] = kind.model_copy(update={"parameters": 2}).model_dump(mode="json")
    records[5]["cell"]["settings"] = {"nc": {"statistic": "ratio"}}
    kept, left_out = comparable(records, calibration_file())
    assert [each["key"] for each in kept] == ["clean-03"]
    assert left_out == {
        "in the calibration itself": 2,
        "not scored with 500 clean images": 1,
        "of another kind": 1,
        "scored by a detector with other options": 1,
    }
    (column,) = columns(scored(kept), 0.05, calibration_file())
    assert (column.detector, column.calibrated_on, len(column.of(clean=True))) == ("nc", 20, 1)


def test_of_a_scan_the_parts_that_a_file_holds_for_are_kept() -> None:
    scan = record("clean-00", None, {"collapse": 0.1, "nc": 2.0, "mnp": 0.0})
    scan["cell"]["settings"] = {"collapse": {}, "nc": {"statistic": "ratio"}, "mnp": {}}
    (kept,), left_out = comparable([scan], calibration_file())
    assert list(kept["detections"]) == list(kept["cell"]["settings"]) == ["collapse", "mnp"]
    assert left_out == {"scored by a detector with other options": 1}


def test_each_model_has_a_row_with_the_verdict() -> None:
    models = scored(trial())
    lines = model_table(models, columns(models), "d").splitlines()
    assert lines[0] == "| d | verdict | p | collapse | trigger_search | mnp |"
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[2:]}
    # Infected models first; the target is class 3.
    assert list(rows)[:4] == ["adaptive-magnitude-00", "badnets-00", "badnets-01", "blend-00"]
    assert rows["badnets-00"] == ["backdoored", "0.048", "0.20 (right)", "3.00 (right)", "0.10 (right)"]
    assert rows["badnets-01"][2] == "9.00 (wrong)"
    assert rows["blend-00"][0] == "inconclusive"
    assert rows["blend-00"][3:] == ["abstained", "abstained"]
    # Half of the clean models are what the others are compared with, and have no verdict.
    clean = [row for name, row in rows.items() if name.startswith("clean")]
    assert sum(row[:2] == ["-", "-"] for row in clean) == 20
    assert all(row[4] == "0.00" for row in clean)


def test_thresholds_may_come_from_a_file() -> None:
    file = CalibrationSet(
        description="made up",
        kind=Kind(architecture="x", parameters=1, num_classes=2, image_shape=(3, 8, 8)),
        images=500,
        options={"collapse": {}, "trigger_search": {}},
        models=tuple(
            ScoredModel(name=str(i), scores={"collapse": 0.01 * i, "trigger_search": 0.01 * (7 * i % 20)})
            for i in range(20)
        ),
    )
    found = {column.detector: column for column in columns(scored(trial()), 0.05, file)}
    # The file has no scores of the third detector, which therefore has no threshold.
    assert set(found) == {"collapse", "trigger_search", "scan"}
    for column in found.values():
        assert (column.calibrated_on, len(column.of(clean=True))) == (20, 40)
    # Of clean scores 0.00 to 0.39, twenty lie above the file's largest.
    assert sum(o.flagged for o in found["collapse"].of(clean=True)) == 20


def test_what_a_file_does_not_have_is_judged_by_its_fixed_threshold() -> None:
    file = CalibrationSet(
        description="made up",
        kind=Kind(architecture="x", parameters=1, num_classes=2, image_shape=(3, 8, 8)),
        images=500,
        options={"collapse": {}},
        models=tuple(ScoredModel(name=str(i), scores={"collapse": 0.01 * i}) for i in range(20)),
    )
    records = [
        record("clean-00", None, {"collapse": 0.1, "recovery": 0.11, "mnp": 0.1}),
        record("badnets-00", "badnets", {"collapse": 0.1, "recovery": 0.3, "mnp": 0.1}),
        record("badnets-01", "badnets", {"collapse": 0.1, "recovery": 0.1, "mnp": 0.1}),
        record("badnets-02", "badnets", {"collapse": 0.1, "recovery": None, "mnp": 0.1}),
    ]
    for each in records:
        each["detections"]["recovery"]["fixed_threshold"] = 0.12
        each["detections"]["mnp"]["fixed_threshold"] = None
    found = {column.detector: column for column in columns(scored(records), 0.05, file)}
    assert set(found) == {"collapse", "recovery"}
    verdicts = {o.model.name: o.verdict for o in found["recovery"].outcomes}
    assert verdicts == {
        "clean-00": "clean",
        "badnets-00": "backdoored",
        "badnets-01": "clean",
        "badnets-02": "inconclusive",
    }
    (row,) = (line for line in summary_table([found["recovery"]]).splitlines() if "| all |" in line)
    assert row.endswith("| fixed |")


def test_groups_keep_all_of_a_name_but_its_number() -> None:
    records = [record(name, "badnets", {"mnp": 0.0}) for name in ("badnets-0.5pct", "badnets-a2a-03")]
    assert {model.group for model in scored(records)} == {"badnets-0.5pct", "badnets-a2a"}


def test_the_tables() -> None:
    models = scored(trial())
    found = columns(models)
    lines = summary_table(found).splitlines()
    rows = [line.split(" | ") for line in lines if "| scan |" in line]
    # Of three models that are no adaptive attack two are flagged; one of these names the right class.
    assert rows[0][3].startswith("66.7 (2/3) [")
    assert rows[0][6].startswith("50.0 (1/2) [")
    # The third is inconclusive, since the search abstained, and a miss.
    assert rows[0][7].startswith("1/3 [")
    assert [row[2] for row in rows] == ["all", "six of Table 4", "ten of the paper"]
    attacks = attack_table(found, "d").splitlines()
    assert [line.split(" | ")[0] for line in attacks[2:]] == [
        "| adaptive-magnitude", "| badnets", "| blend", "| clean",
    ]  # fmt: skip
    # The search has one of the two above all clean models, and the other below.
    search = attacks[0].split(" | ").index("trigger_search")
    assert attacks[3].split(" | ")[search].startswith("1/2 [")
    assert attacks[3].split(" | ")[search].endswith(", AUC 0.50")
    assert "AUC" not in attacks[-1]
    ratios = ratio_table(models).splitlines()
    assert ratios[2].split(" | ")[:4] == ["| d", "clean", "40", "1.00"]
    assert ratios[3].split(" | ")[2] == "3"


def test_the_scan_follows_its_own_rule() -> None:
    # p <= rate, the search abstained, p <= 2 rate, and far below.
    models = scored(
        [
            *(
                record(f"clean-{i:02d}", None, {"collapse": 0.01 * i, "trigger_search": 0.01 * i})
                for i in range(38)
            ),
            record("badnets-00", "badnets", {"collapse": 9.0, "trigger_search": None}),
            record("badnets-01", "badnets", {"collapse": 0.1, "trigger_search": None}),
            record("badnets-02", "badnets", {"collapse": 0.1, "trigger_search": 0.0}),
        ]
    )
    found = {column.detector: column for column in columns(models)}
    verdicts = {o.model.name: o.verdict for o in found["scan"].of(clean=False)}
    assert verdicts == {"badnets-00": "backdoored", "badnets-01": "inconclusive", "badnets-02": "clean"}
    # Clean models beside the threshold: those that exactly one model of the calibration exceeds.
    calibration, rest = halves([model for model in models if model.is_clean])
    ranks = {
        o.model.name: sum(m.name >= o.model.name for m in calibration) for o in found["scan"].of(clean=True)
    }
    assert {o.model.name for o in found["scan"].of(clean=True) if o.inconclusive} == {
        model.name for model in rest if ranks[model.name] == 1
    }
    assert not any(o.inconclusive for o in found["collapse"].outcomes)
    (row,) = [
        line.split(" | ")
        for line in summary_table(list(found.values())).splitlines()
        if "| scan | all" in line
    ]
    assert row[7].startswith("1/3 [")


def with_recovery(records: list[dict[str, Any]], **scores: float | None) -> list[dict[str, Any]]:
    """Let recovery say 0 of all models but those named here."""
    for each in records:
        score = scores.get(each["key"].replace("-", "_"), 0.0)
        each["detections"]["recovery"] = each["detections"]["collapse"] | {"score": score}
    return records


def test_recovery_decides_where_it_was_asked() -> None:
    records = with_recovery(trial(), blend_00=0.5, badnets_01=None)
    found = {column.detector: column for column in columns(scored(records))}
    verdicts = {o.model.name: o.verdict for o in found["scan"].of(clean=False)}
    # Blend is seen by nothing else, and the search abstained on it; without recovery the others suffice.
    assert verdicts["blend-00"] == "backdoored"
    assert verdicts["badnets-01"] == "backdoored"
    assert verdicts["adaptive-magnitude-00"] == "clean"
    # An abstention of recovery leaves the evidence complete.
    records = with_recovery(trial(), adaptive_magnitude_00=None)
    found = {column.detector: column for column in columns(scored(records))}
    verdicts = {o.model.name: o.verdict for o in found["scan"].of(clean=False)}
    assert verdicts["adaptive-magnitude-00"] == "clean"
    # A calibration that knows nothing of it leaves it out.
    calibration = calibration_file()
    assert not calibration.has("recovery")
    found = {column.detector: column for column in columns(scored(with_recovery(trial())), 0.05, calibration)}
    assert "recovery" not in found


def test_summaries_select_infected_models() -> None:
    scores: dict[str, float | None] = {"collapse": 9.0, "trigger_search": 0.0}
    all_to_all = record("badnets-a2a-00", "badnets", scores)
    all_to_all["label_rule"] = {"rule": "all_to_all"}
    models = scored(
        [
            *trial()[:40],
            record("badnets-00", "badnets", scores),
            record("badnets-1pct-00", "badnets", scores, rate=0.01),
            all_to_all,
            record("cl-00", "cl", scores, rate=0.0),
            record("sig-00", "sig", scores, rate=0.0),
            record("bpp-00", "bpp", scores),
        ]
    )
    lines = [line.split(" | ") for line in summary_table(columns(models)).splitlines()]
    counts = {row[2]: row[3].split("(")[1].split(")")[0] for row in lines if row[1] == "scan"}
    assert counts == {"all": "6/6", "six of Table 4": "2/2", "ten of the paper": "3/3", "rates <= 2%": "1/1"}


def test_half_of_few_clean_models_guarantees_less() -> None:
    few = [each for each in trial() if each["attack"] or each["key"] < "clean-10"]
    for column in columns(scored(few)):
        assert column.calibrated_on == 5
        assert column.rate == pytest.approx(1 / 6)


def test_a_clean_model_that_is_not_scored_stays_in_the_calibration() -> None:
    records = [each for each in trial() if each["attack"] or each["key"] < "clean-38"]
    calibration, _ = halves([model for model in scored(records) if model.is_clean])
    mute = next(each for each in records if each["key"] == calibration[0].name)
    mute["detections"]["collapse"]["score"] = None
    found = {column.detector: column for column in columns(scored(records))}
    for name in ("collapse", "scan"):
        # 19 models, one of them without a score: 5 % is guaranteed, and can be reached.
        assert (found[name].calibrated_on, found[name].rate) == (19, 0.05)
        assert "badnets-01" in {o.model.name for o in found[name].of(clean=False) if o.flagged}


def test_refusals_are_misses() -> None:
    refused = record("wanet-00", "wanet", {}, status="refused", problem="no")
    del refused["detections"]
    found = {column.detector: column for column in columns(scored([*trial(), refused]))}
    for name in ("scan", "collapse"):
        (outcome,) = found[name].of(clean=False, group="wanet")
        assert (outcome.flagged, outcome.statistic) == (False, -math.inf)


def test_a_refused_scan_is_a_refusal_by_all_of_its_detectors() -> None:
    refused = record("wanet-00", "wanet", {}, status="refused", problem="no")
    del refused["detections"]
    names = ("collapse", "mnp", "trigger_search")
    records = [*trial(), refused]
    for each in records:
        each["cell"]["settings"] = {name: {} for name in each.get("detections", names)}
    for column in columns(scored(records)):
        assert len(column.of(clean=False, group="wanet")) == 1


def test_the_area_under_the_curve() -> None:
    assert area_under_curve([0.0, 1.0], [2.0, 3.0]) == (1.0, 1.0, 1.0)
    area, low, high = area_under_curve([0.0, 1.0, 2.0, 3.0], [1.5, 2.0, 2.5, -math.inf])
    assert area == pytest.approx((2 + 2.5 + 3 + 0) / 16)
    assert 0 <= low < area < high <= 1
    assert math.isnan(area_under_curve([], [1.0])[0])
