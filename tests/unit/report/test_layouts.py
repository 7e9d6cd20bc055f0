"""Records in, tables out: every number worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench.suite import Places, Plan, read_suite
from unbackdoor.errors import InvalidInputError
from unbackdoor.report.layouts.defences import stability_tables
from unbackdoor.report.layouts.filters import clouds, rank_correlation
from unbackdoor.report.layouts.suites import LAYOUTS, figures_of, tables_of
from unbackdoor.report.run import Run, read_run
from unbackdoor.report.tables import Table, comma_separated, markdown, shown

from .runs import cell, detected, make_run, purified, rate, write

Records = list[tuple[str, dict[str, Any]]]
NOT_VALID = {"valid": False}


def run_of(folder: Path, layout: str, records: Records, **plan: object) -> Run:
    write(folder, layout, records, **plan)
    return read_run(folder)


def rows(table: Table) -> dict[tuple[str, ...], list[str]]:
    """Return the texts of rows by their leading texts."""
    found = {}
    for row in table.rows:
        texts = [shown(entry, column) for entry, column in zip(row, table.columns, strict=True)]
        lead = sum(not column.parts for column in table.columns)
        found[tuple(texts[:lead])] = texts[lead:]
    return found


def test_the_grid_sets_the_papers_values_below_and_averages_infected_models_only(tmp_path: Path) -> None:
    make_run(tmp_path)
    grid, summary = tables_of(read_run(tmp_path))
    assert [column.title for column in grid.columns] == [
        "model",
        "source",
        "No defence",
        "MNP",
        "FT-SAM",
        "CLP",
    ]
    found = rows(grid)
    assert found["BadNets", "measured"] == [
        "86.00 / 100.00",
        "85.00 / 1.50",
        "83.00 / 10.00",
        "84.00 / 90.00",
    ]
    assert found["BadNets", "paper"] == ["92.43 / 100.00", "92.11 / 0.47", "-", "91.54 / 1.34"]
    assert found["Blend", "measured"][-1] == "refused"
    assert found["clean", "measured"][1] == "86.00 / -"
    assert found["Average", "measured"] == ["86.00 / 100.00", "84.50 / 1.75", "82.50 / 20.00", "-"]
    assert found["Average", "paper, printed"] == ["94.42 / 98.83", "92.23 / 4.03", "-", "88.68 / 21.41"]
    assert found["Average", "paper, computed"] == ["92.94 / 99.43", "92.23 / 4.03", "-", "88.48 / 21.42"]
    best = [entry.best for entry in grid.rows[0]]
    assert best == [False, False, False, True, False, False]
    assert grid.command == "unbackdoor bench mine --size cpu --data CIFAR10_FOLDER"
    assert next(iter(rows(summary))) == ("mnp",)
    assert rows(summary)["mnp",][1] == "1.75"


def test_the_command_that_repeats_a_run_says_what_was_given(tmp_path: Path) -> None:
    given = {
        "suite": "my suites/mine.toml", "zoo": "other", "models": "elsewhere/models",
        "part": ["a b"], "seeds": [0, 2],
    }  # fmt: skip
    make_run(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "given": given, "data": "digits"}))
    run = read_run(tmp_path)
    command = "unbackdoor bench 'my suites/mine.toml' --size cpu --zoo other --models elsewhere/models"
    command += " --part 'a b' --seeds 0 --seeds 2"
    assert run.command == command
    assert run.command_for(run.answers[0]) == f"{command} --only 'badnets mnp seed 0'"


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ({"out": "runs/mine-cpu", "models": "runs/models"}, ""),
        ({"out": "smoke", "models": "models"}, " --out smoke"),
        ({"out": "smoke", "models": "runs/models"}, " --out smoke --models runs/models"),
        ({"out": "/home/me/runs/a run", "models": "/home/me/runs/models"}, " --out 'a run'"),
        ({"out": "/home/me/x", "models": "/data/m", "zoo": "/data/z"}, " --out x --zoo z --models m"),
        ({"models": "models"}, " --models models"),
        ({"out": "x", "models": "models", "only": ["badnets *"]}, " --out x --only 'badnets *'"),
    ],
)
def test_the_command_goes_on_with_the_run_where_it_lies(
    tmp_path: Path, given: dict[str, Any], command: str
) -> None:
    make_run(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    given = {"suite": "/home/me/mine.toml", "zoo": "zoo", **given}
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "given": given, "data": "digits"}))
    run = read_run(tmp_path)
    assert run.command == f"unbackdoor bench mine.toml --size cpu{command}"
    assert run.command_for(run.answers[0]).count("--only") == 1


def test_draws_are_averaged_and_what_is_missing_is_said(tmp_path: Path) -> None:
    records: Records = [
        ("ours", purified(cell("badnets", "mnp", seed=seed), ca=ca, asr=asr))
        for seed, ca, asr in ((0, 0.80, 0.02), (1, 0.84, 0.04))
    ]
    records.append(("ours", {"cell": cell("badnets", "mnp", seed=2), "status": "missing"}))
    run = run_of(tmp_path, "table1", records, missing_models=["lira"])
    grid = tables_of(run)[0]
    assert rows(grid)["BadNets", "measured"][1] == "82.00 / 3.00 (2 of 3)"
    assert "1 of 3 questions are not answered yet." in grid.notes
    assert "Models not trained yet: lira." in grid.notes


def test_draws_without_a_result_are_said_and_win_nothing(tmp_path: Path) -> None:
    refused: list[dict[str, Any]] = [
        {"cell": cell("badnets", "mnp", seed=seed), "status": state, "attack": "badnets", "problem": "x"}
        for seed, state in ((1, "refused"), (2, "failed"))
    ]
    records: Records = [
        ("ours", purified(cell("badnets", "mnp"), ca=0.85, asr=0.0)),
        *(("ours", each) for each in refused),
        *(("ours", purified(cell("badnets", "ft", seed=seed), ca=0.84, asr=0.1)) for seed in range(3)),
        *(("ours", {**each, "cell": {**each["cell"], "method": "clp"}}) for each in refused),
    ]
    grid = tables_of(run_of(tmp_path, "table1", records))[0]
    assert rows(grid)["BadNets", "measured"][1:] == [
        "85.00 / 0.00 (1 of 3)",
        "84.00 / 10.00",
        "failed, refused",
    ]
    assert rows(grid)["Average", "measured"][1] == "85.00 / 0.00 (1 of 3)"
    # Whoever lacks results could have the lowest mean with them.
    assert not any(entry.best for entry in grid.rows[0])
    assert grid.rows[0][3].keys == ("k0", "k1", "k2")
    assert "2 of 8 questions were refused; their records say why." in grid.notes
    assert "2 of 8 questions ended in a failure; their records say why." in grid.notes
    lines = comma_separated(grid).splitlines()
    assert lines[0].endswith(",CLP ASR,remarks")
    assert lines[1].endswith(',85,0,84,10,"failed, refused","failed, refused",MNP: 1 of 3')


def test_the_lowest_is_marked_where_nobody_else_could_win(tmp_path: Path) -> None:
    missing: dict[str, Any] = {"cell": cell("badnets", "clp"), "status": "missing"}
    records: Records = [
        ("ours", purified(cell("badnets", "mnp"), ca=0.85, asr=0.0)),
        ("ours", purified(cell("badnets", "ft"), ca=0.84, asr=0.1)),
    ]
    cases: tuple[tuple[Records, bool], ...] = (
        ([], True),
        ([("ours", missing)], False),
        ([("ours", {**missing, "status": "refused"})], True),
    )
    for number, (more, won) in enumerate(cases):
        grid = tables_of(run_of(tmp_path / str(number), "table1", records + more))[0]
        assert [entry.best for entry in grid.rows[0][3:5]] == [won, False]


def test_answers_of_earlier_defaults_are_marked(tmp_path: Path) -> None:
    records: Records = [
        ("ours", purified(cell("badnets", "mnp"), ca=0.85, asr=0.0)),
        ("ours", purified(cell("badnets", "ft"), ca=0.84, asr=0.1)),
    ]
    write(tmp_path, "table1", records)
    run = read_run(tmp_path, lambda asked: asked["method"] == "mnp")
    grid, summary = tables_of(run)
    assert rows(grid)["BadNets", "measured"][1:] == ["85.00 / 0.00 (earlier default)", "84.00 / 10.00"]
    assert rows(summary)["mnp",][1] == "0.00 (earlier default)"
    assert "Of earlier defaults, as their options say: MNP. The command asks with today's." in grid.notes
    assert [answer.older for answer in run.answers] == [True, False]
    assert "earlier" not in markdown(tables_of(read_run(tmp_path))[0])


def test_numbers_of_clean_images_are_not_averaged_over(tmp_path: Path) -> None:
    records: Records = [
        ("mine", purified(cell("badnets", "clp", clean_images=images), ca=0.8, asr=success))
        for images, success in ((50, 0.9), (500, 0.1))
    ]
    grid, summary = tables_of(run_of(tmp_path, "", records))
    assert [column.title for column in grid.columns[3:]] == ["CLP [50 images]", "CLP [500 images]"]
    assert rows(grid)["BadNets", "measured"][1:] == ["80.00 / 90.00", "80.00 / 10.00"]
    assert list(rows(summary)) == [("clp, 500 images",), ("clp, 50 images",)]


def test_a_summary_says_how_many_answers_it_rests_on(tmp_path: Path) -> None:
    records: Records = [
        ("mine", purified(cell("badnets", "clp"), ca=0.8, asr=0.2)),
        ("mine", {"cell": cell("blend", "clp"), "status": "missing"}),
    ]
    summary = tables_of(run_of(tmp_path, "", records))[1]
    assert rows(summary)["clp",][1] == "20.00 (1 of 2)"


def test_each_table_says_what_its_own_means_are_over(tmp_path: Path) -> None:
    records: Records = [
        ("no attack", purified(cell("clean", "ft", seed=7), ca=0.80, asr=None)),
        ("clean images", purified(cell("badnets", "ft", clean_images=50), ca=0.70, asr=0.5)),
        ("clean images", {"cell": cell("badnets", "mnp", clean_images=50), "status": "missing"}),
    ]
    tables = {table.name: table for table in tables_of(run_of(tmp_path, "sok", records))}
    assert "over seeds 7 of draw and method, 500 clean images" in tables["no-attack"].notes[0]
    assert len(tables["no-attack"].notes) == 1
    assert "over seeds 0 of draw and method, 50 clean images" in tables["clean-images-infected"].notes[0]
    assert "1 of 2 questions are not answered yet." in tables["clean-images-infected"].notes


def test_the_names_of_a_suites_variants_head_its_columns(tmp_path: Path) -> None:
    suite = read_suite("ablations")
    places = Places(Path(__file__).parents[3] / "zoo", tmp_path)
    cells = Plan.of(suite, "cpu", places, "data").describe()["cells"]
    records: Records = [
        ("|".join(each["parts"]), purified(each["cell"], ca=0.8, asr=0.1))
        for each in cells.values()
        if each["cell"]["model"] == "badnets"
    ]
    names = {f"k{i}": each.get("name", "") for i, each in enumerate(
        each for each in cells.values() if each["cell"]["model"] == "badnets"
    )}  # fmt: skip
    write(tmp_path, "ablations", records)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for key, name in names.items():
        plan["cells"][key]["name"] = name
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    default, objectives, summary = tables_of(read_run(tmp_path))
    assert [column.title for column in default.columns[3:]] == [
        "MNP", "MNP [guard off]", "MNP [patches alone]", "MNP [faint changes alone]", "MNP [warps alone]",
        "MNP [suppression alone]", "MNP [all ways always]", "MNP [suppression acts on little evidence]",
        "MNP [guard asks for no benefit]",
        "MNP [no relearning]", "MNP [relearning always]", "MNP [relearning once]",
        "MNP [relearning whole or not at all]", "MNP [relearning alone]",
    ]  # fmt: skip
    titles = [column.title for column in objectives.columns]
    assert {"MNP [no suppression]", "MNP [no penalty]", "MNP [no preserving]"} <= set(titles)
    assert ("mnp [no penalty, guard off]",) in rows(summary)


def test_poison_rates_find_their_column_by_what_was_poisoned(tmp_path: Path) -> None:
    records: Records = []
    for model, poisoned, rule in (
        ("a", 250, "all_to_one"),
        ("b", 5000, "all_to_one"),
        ("c", 5000, "all_to_all"),
    ):
        one = purified(cell(model, "mnp"), ca=0.8, asr=0.1)
        records.append(("ours", {**one, "trained": {"poisoned": poisoned, "label_rule": {"rule": rule}}}))
    table = tables_of(run_of(tmp_path, "table3", records))[0]
    assert table.columns[2].title == "0.5 %, no defence"
    found = rows(table)
    assert found["BadNets-A2O", "measured"][:2] == ["86.00 / 100.00", "80.00 / 10.00"]
    assert found["BadNets-A2O", "measured"][2] == "-"
    assert found["BadNets-A2O", "measured"][7] == "80.00 / 10.00"
    assert found["BadNets-A2A", "measured"][7] == "80.00 / 10.00"
    assert found["BadNets-A2A", "paper"][7] == "92.07 / 0.97"


def test_detection_counts_misses_targets_and_false_alarms(tmp_path: Path) -> None:
    records: Records = [
        ("d", detected(cell("badnets", "nc", task="detect", seed=0), attack="badnets", score=0.9)),
        ("d", detected(cell("badnets", "nc", task="detect", seed=1), attack="badnets", score=0.8, target=3)),
        ("d", detected(cell("blend", "nc", task="detect"), attack="blend", score=0.1)),
        ("d", {"cell": cell("blend", "nc", task="detect", seed=1), "status": "refused", "attack": "blend"}),
        ("d", detected(cell("clean", "nc", task="detect"), attack=None, score=0.7)),
        ("d", detected(cell("clean-2", "nc", task="detect"), attack=None, score=0.2)),
        ("d", detected(cell("sig", "nc", task="detect"), attack="sig", score=0.9) | {"trained": NOT_VALID}),
    ]
    rates, scores = tables_of(run_of(tmp_path, "table4", records))
    found = rows(rates)
    assert found["NC", "measured"] == [
        "2/2 [34.2, 100.0]",
        "0/2 [0.0, 65.8]",
        "-",
        "2/4 [15.0, 85.0]",
        "50.00",
        "1/2 [9.5, 90.5]",
        "16.67",
        "1.0",
    ]
    assert [found["NC", "paper"][place] for place in (0, 1, 3)] == ["100.00", "20.50", "51.33"]
    assert rates.columns[4].title == "SIG (attack did not take)"
    assert "2 infected and 2 clean models" in rates.notes[0]
    assert rates.notes[1] == "1 of 7 questions were refused; their records say why."
    assert rates.notes[2].startswith("Models whose attack did not take, in no mean over models")
    assert rows(scores)["BadNets",] == ["0.850 / 0.500"]


def test_an_attack_that_did_not_take_is_marked_and_in_no_average(tmp_path: Path) -> None:
    def three(part: str, **changes: object) -> Records:
        weak = purified(cell("blend", "mnp", **changes), ca=0.6, asr=0.0)
        weak["trained"] = {**weak["trained"], "valid": False}
        return [
            (part, purified(cell("badnets", "mnp", **changes), ca=0.85, asr=0.1)),
            (part, weak),
            (part, purified(cell("clean", "mnp", **changes), ca=0.86, asr=None)),
        ]

    grid, summary = tables_of(run_of(tmp_path / "grid", "table1", three("ours")))
    found = rows(grid)
    assert found["Blend (attack did not take)", "measured"][1] == "60.00 / 0.00"
    assert found["Average", "measured"][1] == "85.00 / 10.00"
    assert not any(entry.best for entry in grid.rows[2])
    assert rows(summary)["mnp",][:3] == ["1", "10.00", "10.00"]
    note = "Models whose attack did not take, in no mean over models and no detection rate: 1 (blend)."
    assert note in grid.notes
    assert note in summary.notes
    sok = [*three("low rates"), *three("clean images", clean_images=50)]
    tables = {table.name: table for table in tables_of(run_of(tmp_path / "sok", "sok", sok))}
    assert tables["low-rates"].columns[2].title == "Blend (attack did not take)"
    assert rows(tables["clean-images-infected"])["mnp",][0] == "85.00 / 10.00"
    rates = tables_of(run_of(tmp_path / "rates", "table3", three("ours")[1:2]))[0]
    assert rows(rates)["BadNets-A2O", "measured"][6:8] == [
        "86.00 / 100.00",
        "60.00 / 0.00 (attack did not take)",
    ]


def test_what_is_missing_of_a_clean_model_is_no_infected_one(tmp_path: Path) -> None:
    def three(part: str, **changes: object) -> Records:
        missing = {"cell": cell("clean", "mnp", seed=1, **changes), "status": "missing"}
        return [
            (part, purified(cell("badnets", "mnp", **changes), ca=0.85, asr=0.1)),
            (part, purified(cell("badnets", "mnp", seed=1, **changes), ca=0.83, asr=0.3)),
            (part, purified(cell("clean", "mnp", **changes), ca=0.86, asr=None)),
            (part, missing),
        ]

    grid = tables_of(run_of(tmp_path / "grid", "table1", three("ours")))[0]
    assert rows(grid)["Average", "measured"][1] == "84.00 / 20.00"
    sok = tables_of(run_of(tmp_path / "sok", "sok", three("clean images", clean_images=50)))
    tables = {table.name: table for table in sok}
    assert rows(tables["clean-images-infected"])["mnp",][0] == "84.00 / 20.00"
    assert rows(tables["clean-images-clean"])["mnp",][0] == "86.00 / - (1 of 2)"
    # A draw of Table 3 that is missing belongs to the rate of the model's others.
    short: Records = [
        ("ours", purified(cell("badnets", "mnp"), ca=0.85, asr=0.1)),
        ("ours", {"cell": cell("badnets", "mnp", seed=1), "status": "missing"}),
    ]
    rates = tables_of(run_of(tmp_path / "rates", "table3", short))[0]
    assert rows(rates)["BadNets-A2O", "measured"][7] == "85.00 / 10.00 (1 of 2)"


def test_models_whose_attack_did_not_take_are_in_no_mean_and_are_named(tmp_path: Path) -> None:
    awake = {"retuned_success": rate(0.9), "queried_success": rate(0.3), "queried_without_trigger": rate(0.2)}
    weak = purified(cell("blend", "ft", reactivate=True), ca=0.8, asr=0.0, reactivated=awake)
    weak["trained"] = {**weak["trained"], "valid": False}
    good = purified(cell("badnets", "ft", reactivate=True), ca=0.8, asr=0.5, reactivated=awake)
    (asleep,) = tables_of(run_of(tmp_path / "asleep", "defences", [("asleep", good), ("asleep", weak)]))
    assert rows(asleep)["ft",][-1] == "50.00 / 90.00 / 30.00 / 20.00"
    few = [("clean images", {**each, "cell": {**each["cell"], "clean_images": 50}}) for each in (good, weak)]
    tables = {table.name: table for table in tables_of(run_of(tmp_path / "sok", "sok", few))}
    assert any("(blend)" in note for note in tables["clean-images-infected"].notes)


def ablated(model: str) -> dict[str, Any]:
    layer = {"magnitude": [1.0, 2.0, 3.0, 4.0], "clc": [0.1, -0.1, 0.2, -0.2], "blc": [-1.0, 1.0, 2.0, -2.0]}
    other = {"magnitude": [1.0, 1.0], "clc": [0.0, 1.0], "blc": [5.0, 5.0]}
    return {
        "cell": cell(model, "ablate", task="ablate"), "status": "ok", "attack": model,
        "filters": {"a": layer, "b": other, "c": other, "d": other, "e": other},
        "cost": {"seconds": 1.0, "forward_images": 0, "backward_images": 0},
    }  # fmt: skip


def test_filters_are_counted_by_kind_in_shallow_and_deep_layers(tmp_path: Path) -> None:
    run = run_of(tmp_path, "fig1", [("filters", ablated("badnets"))])
    assert [(cloud.depth, len(cloud.clc)) for cloud in clouds(run.answers)] == [("shallow", 4), ("deep", 2)]
    (table,) = tables_of(run)
    found = rows(table)
    # Clean, backdoor, hybrid, redundant: one of each.
    assert found["BadNets", "shallow"][:5] == ["4", "25.0", "25.0", "25.0", "25.0"]
    assert found["BadNets", "shallow"][5] == "-0.40"
    assert found["BadNets", "shallow"][7:] == ["2.000", "1.000"]
    assert found["BadNets", "deep"][5] == "-"
    assert [figure.name for figure in figures_of(run)] == ["fig1"]


def test_filters_without_which_a_loss_is_not_finite_are_left_out(tmp_path: Path) -> None:
    record = ablated("badnets")
    record["filters"]["a"]["blc"] = [-1.0, None, 2.0, -2.0]
    run = run_of(tmp_path, "fig1", [("filters", record)])
    shallow, _ = clouds(run.answers)
    assert (shallow.clc, shallow.blc, shallow.norm) == ((0.1, 0.2, -0.2), (-1.0, 2.0, -2.0), (1.0, 3.0, 4.0))
    assert rows(tables_of(run)[0])["BadNets", "shallow"][0] == "3"


def test_rank_correlation_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the extra detect is not installed")
    a, b = [3.0, 1.0, 2.0, 2.0, 5.0, 2.0], [0.1, 0.4, 0.4, 0.2, 0.9, 0.3]
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(rank_correlation(a, [1.0] * 6))


@pytest.mark.parametrize(
    ("layout", "changes", "names", "head"),
    [
        ("fig3", [{"clean_images": 50}, {"clean_images": 500}], ["fig3"], "images 50"),
        (
            "fig4",
            [{"options": {"lambda1": "0", "lambda2": "0"}}, {"options": {"suppression.mu": "0.1"}}],
            ["fig4-lambda", "fig4-mu"],
            "lambda 0",
        ),
    ],
)
def test_sweeps_have_a_column_a_value(
    tmp_path: Path, layout: str, changes: list[dict[str, Any]], names: list[str], head: str
) -> None:
    records: Records = [("ours", purified(cell("badnets", "mnp", **c), ca=0.8, asr=0.1)) for c in changes]
    run = run_of(tmp_path, layout, records)
    tables = tables_of(run)
    assert [table.name for table in tables] == names
    assert tables[0].columns[2].title == head
    assert rows(tables[0])["BadNets", "our settings"][0] == "80.00 / 10.00"
    assert [figure.name for figure in figures_of(run)] == names


def test_costs_stand_beside_the_papers_seconds_the_cheapest_first(tmp_path: Path) -> None:
    slow = purified(cell("badnets", "rnp"), ca=0.8, asr=0.1)
    slow["cost"] = {**slow["cost"], "seconds": 60.0}
    records: Records = [("ours", slow), ("ours", purified(cell("badnets", "clp"), ca=0.8, asr=0.1))]
    (table,) = tables_of(run_of(tmp_path, "runtime", records))
    found = rows(table)
    assert list(found) == [("clp",), ("rnp",)]
    assert found["clp",] == ["2.5", "6.0 / 4.0", "800", "80.00 / 10.00", "-"]
    assert found["rnp",][-1] == "71"
    assert "Measured on a processor, 1 threads." in table.notes


def test_stability_is_the_mean_absolute_move_from_the_defaults(tmp_path: Path) -> None:
    def one(options: dict[str, str], seed: int, ca: float, asr: float) -> tuple[str, dict[str, Any]]:
        return "options", purified(cell("badnets", "mnp", options=options, seed=seed), ca=ca, asr=asr)

    records: Records = [
        one({}, 0, 0.80, 0.10), one({}, 1, 0.82, 0.02),
        one({"a": "1"}, 0, 0.78, 0.20), one({"a": "1"}, 1, 0.83, 0.02), one({"a": "4"}, 0, 0.80, 0.00),
    ]  # fmt: skip
    run = run_of(tmp_path, "sok", records)
    methods, options = stability_tables(run, run.of("options"))
    assert rows(options)["MNP", "a=1"] == ["1.50", "5.00", "0"]
    assert rows(options)["MNP", "a=4"] == ["0.00", "10.00", "0"]
    assert rows(methods)["MNP",][:5] == ["1", "1.00", "6.67", "10.00", "0"]


def test_a_setting_that_breaks_a_method_is_counted(tmp_path: Path) -> None:
    broken = {"status": "failed", "problem": "x", "attack": "badnets"}
    records: Records = [
        ("options", purified(cell("badnets", "mnp"), ca=0.8, asr=0.1)),
        ("options", purified(cell("badnets", "mnp", options={"a": "1"}), ca=0.8, asr=0.3)),
        ("options", {"cell": cell("badnets", "mnp", options={"a": "4"}), **broken}),
        ("options", {"cell": cell("badnets", "mnp", options={"b": "4"}), **broken, "status": "refused"}),
        ("options", {"cell": cell("badnets", "mnp", options={"b": "5"}), "status": "missing"}),
    ]
    run = run_of(tmp_path, "sok", records)
    methods, options = stability_tables(run, run.of("options"))
    assert rows(methods)["MNP",][:5] == ["2", "0.00", "20.00", "20.00", "2"]
    assert rows(options)["MNP", "a=4"] == ["-", "-", "1"]
    assert rows(options)["MNP", "b=5"] == ["-", "-", "0"]


def test_a_planned_suite_has_its_default_answers_in_the_stability_table(tmp_path: Path) -> None:
    suite = read_suite("sok")
    grids = [grid.model_copy(update={"methods": ("clp",)}) for grid in suite.grid]
    places = Places(Path(__file__).parents[3] / "zoo", tmp_path)
    plan = Plan.of(suite.model_copy(update={"grid": grids}), "cpu", places, "data").describe()
    cells = plan["cells"]
    records = [
        ("|".join(each["parts"]), purified(each["cell"], ca=0.8, asr=0.2 if each["cell"]["options"] else 0.1))
        for each in cells.values()
    ]
    tables = {table.name: table for table in tables_of(run_of(tmp_path, "sok", records))}
    assert rows(tables["stability"])["CLP",][:4] == ["3", "0.00", "10.00", "10.00"]
    assert len(tables["stability-options"].rows) == 6
    assert {"BadNets", "Blend"} <= {column.title for column in tables["architectures"].columns}


def test_what_the_review_asks_for_has_its_tables(tmp_path: Path) -> None:
    records: Records = [
        ("no attack", purified(cell("clean", "ft"), ca=0.80, asr=None)),
        ("low rates", purified(cell("badnets-1pct", "ft"), ca=0.80, asr=0.5)),
        ("architectures", purified(cell("badnets-vgg", "ft"), ca=0.80, asr=0.5)),
        ("clean images", purified(cell("badnets", "ft", clean_images=50), ca=0.70, asr=0.5)),
        ("clean images", purified(cell("clean", "ft", clean_images=50), ca=0.75, asr=None)),
    ]
    tables = {table.name: table for table in tables_of(run_of(tmp_path, "sok", records))}
    assert rows(tables["no-attack"])["ft",] == ["86.00", "80.00", "6.00", "7.0", "2.5", "6.0 / 4.0"]
    assert rows(tables["low-rates"])["ft",] == ["80.00 / 50.00", "2.5", "6.0 / 4.0"]
    assert rows(tables["low-rates"])["no defence",][0] == "86.00 / 100.00"
    assert rows(tables["clean-images-infected"])["ft",][0] == "70.00 / 50.00"
    assert rows(tables["clean-images-clean"])["ft",][0] == "75.00 / -"
    assert {"architectures", "stability", "stability-options"} <= set(tables)


def test_defences_have_rates_and_averages_of_each_part_and_what_wakes_backdoors(tmp_path: Path) -> None:
    awake = {"retuned_success": rate(0.9), "queried_success": rate(0.3), "queried_without_trigger": rate(0.2)}
    asleep = cell("badnets", "ft", reactivate=True)
    records: Records = [
        ("ten attacks", purified(cell("badnets", "ft"), ca=0.80, asr=0.5)),
        ("ten attacks", purified(cell("badnets", "mnp"), ca=0.85, asr=0.1)),
        ("ten attacks", purified(cell("clean", "mnp"), ca=0.85, asr=None)),
        ("asleep", purified(asleep, ca=0.80, asr=0.5, reactivated=awake)),
        ("asleep", {"cell": {**asleep, "method": "mnp"}, "status": "missing"}),
    ]
    run = run_of(tmp_path, "defences", records)
    tables = {table.name: table for table in tables_of(run)}
    assert list(tables) == ["ten-attacks-summary", "ten-attacks", "asleep"]
    assert rows(tables["ten-attacks"])["mnp",][:2] == ["85.00 / 10.00 / 90.00", "85.00 / - / -"]
    assert [row[1].best for row in tables["ten-attacks"].rows] == [False, False, True]
    assert rows(tables["ten-attacks-summary"])["mnp",][:5] == ["1", "10.00", "10.00", "90.00", "1.00"]
    assert rows(tables["asleep"])["ft",] == ["50.00 / 90.00 / 30.00 / 20.00"] * 2
    assert rows(tables["asleep"])["mnp",] == ["-", "-"]
    assert [figure.name for figure in figures_of(run)] == ["trade-off"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "nobody's"])
def test_a_run_without_any_answer_is_shown_all_the_same(tmp_path: Path, layout: str) -> None:
    task: Callable[[str], str] = lambda name: {"table4": "detect", "fig1": "ablate"}.get(name, "purify")  # noqa: E731
    question = cell("badnets", "mnp", task=task(layout), options={"lambda1": "0"})
    run = run_of(tmp_path, layout, [("ours", {"cell": question, "status": "missing"})])
    assert tables_of(run)
    figures_of(run)


@pytest.mark.parametrize("text", ["{", '{"cells": 3}', "[]"])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read as the plan of a run"):
        read_run(tmp_path)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InvalidInputError, match="cannot be read as the plan of a run"):
        read_run(tmp_path)
