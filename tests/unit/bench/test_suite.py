from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unbackdoor.bench.methods import METHODS, configured
from unbackdoor.bench.spec import jobs
from unbackdoor.bench.suite import (
    Places,
    Plan,
    _folder,
    _spec,
    fits_any,
    matching,
    read_suite,
    suite_names,
    variants,
)
from unbackdoor.bench.training import Job, _configured
from unbackdoor.errors import InvalidInputError

ROOT = Path(__file__).parents[3]
PLACES = Places(ROOT / "zoo", Path("models"))
WANTED = [
    *("ablations", "defences", "fig1", "fig3", "fig4", "runtime", "smoke", "sok"),
    *("table1", "table2", "table3", "table4"),
]

SUITE = """
title = "A suite"
text = "For tests."
layout = "smoke"
data = "cifar10"

[sizes.small]
text = "Two seeds."
models = ["zoo"]
seeds = [0, 1]

[sizes.large]
text = "One."
models = ["paper"]
seeds = [5]

[[grid]]
part = "one"
models = ["badnets", "clean"]
methods = ["clp", "ft-sam"]
clean_images = [50, 100]

[[grid]]
part = "scaled"
models = ["badnets"]
methods = ["i-bau"]
seeds = [1]
sizes = ["small"]

[grid.scale]
i-bau = ["outer_rate", "rounds"]

[[grid]]
part = "again"
models = ["badnets"]
methods = ["clp"]
clean_images = [50]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SUITE)
    return path


def test_the_suites_of_the_package_are_those_of_the_documentation() -> None:
    assert suite_names() == WANTED


@pytest.mark.parametrize("name", WANTED)
def test_every_suite_names_models_methods_and_options_that_exist(name: str) -> None:
    suite = read_suite(name)
    assert suite.name == name
    for size in suite.sizes:
        plan = Plan.of(suite, size, PLACES, "data")
        assert plan.jobs
        for grid in plan.grids:
            for method in matching(grid.methods, METHODS[grid.task], name):
                for options in variants(grid, method):
                    configured(grid.task, method, grid.paper, options)
        labels = [cell.label for cell in plan.expected()]
        for pattern in suite.sizes[size].only:
            assert any(fits_any(label, [pattern]) for label in labels), pattern
    assert set(suite.sizes) - {"small", "paper"} == {"cpu"}


@pytest.mark.parametrize(("name", "part"), [("ablations", "objectives"), ("fig4", "ours")])
def test_what_varies_suppression_is_asked_where_nothing_else_can_settle_it(name: str, part: str) -> None:
    (grid,) = [grid for grid in read_suite(name).grid if grid.part == part]
    methods = [configured(grid.task, "mnp", grid.paper, options) for options in grid.options]
    assert {method.exposures for method in methods} == {("suppression",)}


def test_every_list_of_models_can_be_trained() -> None:
    lists = [path.name.removesuffix(".toml") for path in (_folder() / "models").iterdir()]
    assert sorted(lists) == [
        "families", "families-paper", "imagenet12", "imagenet12-paper", "paper", "rates", "smoke"
    ]  # fmt: skip
    for name in lists:
        for job in jobs(_spec(name, PLACES), "data", Path("out")).values():
            _configured(job)


def test_cells_are_the_products_of_the_grids_seed_by_seed(suite: Path) -> None:
    plan = Plan.of(read_suite(str(suite)), "small", PLACES, "data")
    assert list(plan.jobs) == ["clean", "badnets"]
    assert plan.trainings() == []
    cells = list(plan.cells().values())
    one = [cell for parts, cell in cells if "one" in parts]
    assert len(one) == 2 * 2 * 2 * 2
    assert [cell.seed for cell in one] == [0] * 8 + [1] * 8
    scaled = [cell for parts, cell in cells if "scaled" in parts]
    assert [dict(cell.options) for cell in scaled] == [
        {}, {"outer_rate": "0.0005"}, {"outer_rate": "0.002"}, {"rounds": "2"}, {"rounds": "10"}
    ]  # fmt: skip
    assert {cell.seed for cell in scaled} == {1}
    again = [(parts, cell) for parts, cell in cells if "again" in parts]
    assert [parts for parts, _ in again] == [("one", "again")] * 2, "an equal question is asked once"
    assert len(cells) == len(one) + len(scaled)
    described = json.loads(json.dumps(plan.describe()))
    assert described["missing_models"] == []
    assert "--data CIFAR10_FOLDER" in described["commands"]["badnets"]


def test_a_plan_can_be_narrowed_to_parts_and_draws(suite: Path) -> None:
    read = read_suite(str(suite))
    whole = Plan.of(read, "small", PLACES, "data")
    assert Plan.of(read, "small", PLACES, "data", seeds=[0, 1]).cells() == whole.cells()
    few = Plan.of(read, "small", PLACES, "data", parts=["one"], seeds=[1])
    assert few.cells().keys() < whole.cells().keys()
    assert {(parts, cell.seed) for parts, cell in few.cells().values()} == {(("one",), 1)}
    described = few.describe()
    assert described["given"]["part"] == ["one"]
    assert described["given"]["seeds"] == [1]
    assert described["size_text"] == "Two seeds. Of this only part one and seeds 1."
    assert {"part", "seeds"}.isdisjoint(whole.describe()["given"])
    # The grid with seeds of its own has nothing for draw 0.
    first = Plan.of(read, "small", PLACES, "data", seeds=[0]).cells().values()
    assert {part for parts, _ in first for part in parts} == {"one", "again"}
    for narrow, problem in (({"parts": ["two"]}, "no part 'two'"), ({"seeds": [5]}, "no draw 5")):
        with pytest.raises(InvalidInputError, match=problem):
            Plan.of(read, "small", PLACES, "data", **narrow)


def test_a_size_can_ask_some_of_the_questions_alone(suite: Path) -> None:
    few = 'seeds = [0, 1]\nonly = ["clean ft_sam *", "badnets i-bau (*"]'
    suite.write_text(SUITE.replace("seeds = [0, 1]", few))
    plan = Plan.of(read_suite(str(suite)), "small", PLACES, "data")
    found = {cell.label for cell in plan.expected()}
    assert len(found) == 2 * 2 + 4
    assert {label.split()[:2] == ["clean", "ft-sam"] or "i-bau (" in label for label in found} == {True}
    assert len(Plan.of(read_suite(str(suite)), "large", PLACES, "data").expected()) == 2 * 2 * 2
    # Models of other questions are no business of this size, but must exist.
    suite.write_text(SUITE.replace("seeds = [0, 1]", 'seeds = [0]\nonly = ["clean *"]'))
    assert list(Plan.of(read_suite(str(suite)), "small", PLACES, "data").jobs) == ["clean"]
    suite.write_text(suite.read_text().replace('models = ["badnets"]', 'models = ["badnest"]'))
    with pytest.raises(InvalidInputError, match="names 'badnest'"):
        Plan.of(read_suite(str(suite)), "small", PLACES, "data")


def test_each_part_of_a_suite_has_the_default_cells_that_it_shares_with_others() -> None:
    ten = {"ft", "fp", "anp", "clp", "rnp", "nc", "i_bau", "ft_sam", "fst", "mnp"}
    cells = list(Plan.of(read_suite("sok"), "cpu", PLACES, "data").cells().values())
    usual = {
        part: {(c.model, c.method) for parts, c in cells if part in parts and not c.options}
        for part in ("architectures", "options")
    }
    usual["clean images"] = {
        (c.model, c.method) for parts, c in cells if "clean images" in parts and c.clean_images == 500
    }
    for part, models in (
        ("architectures", {"badnets", "blend", "clean"}),
        ("clean images", {"badnets", "blend", "wanet", "clean"}),
        ("options", {"badnets", "blend", "wanet"}),
    ):
        assert {(model, method) for model in models for method in ten} <= usual[part], part
    low = {c.method for parts, c in cells if "low rates" in parts and c.model == "badnets-0.5pct"}
    assert low > ten


def test_models_that_are_not_there_are_trained_clean_twins_first(suite: Path, tmp_path: Path) -> None:
    places = Places(tmp_path / "nowhere", tmp_path / "models")
    plan = Plan.of(read_suite(str(suite)), "large", places, "data")
    assert [training.label for training in plan.trainings()] == ["train clean", "train badnets"]
    assert plan.cells() == {}
    assert plan.jobs["badnets"].out == tmp_path / "models" / "paper" / "badnets"
    assert (plan.jobs["badnets"].width, plan.jobs["badnets"].epochs) == (64, 200)
    keys = {training.key for training in plan.trainings()}
    assert len(keys) == 2
    # A model that the run has trained is used from then on.
    trained(plan.jobs["badnets"])
    assert [training.label for training in plan.trainings()] == ["train clean"]
    assert {cell.model for _, cell in plan.cells().values()} == {"badnets"}


def trained(job: Job, **changes: object) -> None:
    """Put a model where the job would: that of the zoo, with another card."""
    shutil.copytree(ROOT / "zoo" / "badnets", job.out, dirs_exist_ok=True)
    card = json.loads((job.out / "card.json").read_text())
    (job.out / "card.json").write_text(json.dumps({**card, "job": {**job.describe(), **changes}}))


def test_a_model_that_was_trained_in_another_way_is_refused(suite: Path, tmp_path: Path) -> None:
    plan = Plan.of(read_suite(str(suite)), "large", Places(tmp_path, tmp_path / "models"), "data")
    trained(plan.jobs["badnets"], epochs=3, width=16)
    with pytest.raises(InvalidInputError, match=r"in another way than its list says \(width, epochs\); move"):
        plan.entries()
    old = {name: value for name, value in plan.jobs["badnets"].describe().items() if name != "stem"}
    trained(plan.jobs["badnets"])
    card = json.loads((plan.jobs["badnets"].out / "card.json").read_text())
    (plan.jobs["badnets"].out / "card.json").write_text(json.dumps({**card, "job": old}))
    assert list(plan.entries()) == ["badnets"], "an option that came later had its default"


def test_clean_twins_are_planned_though_no_question_is_about_them(tmp_path: Path) -> None:
    for name, size, twin in (("table1", "paper", "paper"), ("table2", "cpu", "imagenet12")):
        plan = Plan.of(read_suite(name), size, Places(tmp_path, tmp_path / "models"), "data")
        labels = [training.label for training in plan.trainings()]
        assert labels[0] == "train clean"
        assert plan.jobs["badnets"].twin == plan.jobs["clean"].out == tmp_path / "models" / twin / "clean"
        assert "clean" not in plan.asked
        assert "clean" not in plan.describe()["missing_models"]
        # Only what the questions at hand need.
        some = plan.trainings(plan.models_of(lambda label: label.startswith("blend fp")))
        assert [training.label for training in some] == ["train clean", "train blend"]
    zoo = Plan.of(read_suite("table1"), "cpu", PLACES, "data")
    assert zoo.jobs["badnets"].twin == ROOT / "zoo" / "clean"
    assert zoo.trainings() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("[sizes.small]", "[sizes.small"), "is no TOML file"),
        (("title", "titel"), "is no suite: title: Field required"),
        (('part = "one"', 'task = "x"'), "grid.0.task: Input should be 'purify', 'detect' or 'ablate'"),
        (("seeds = [5]", "seeds = 5"), "sizes.large.seeds"),
        (('part = "one"', 'names = ["a", "b"]'), "2 names for 1 options"),
        (('part = "one"', 'options = [{}, {}]\nnames = ["a", "a"]'), "two variants have one name"),
    ],
)
def test_what_is_no_suite_is_refused(suite: Path, change: tuple[str, str], sentence: str) -> None:
    assert SUITE.count(change[0]) >= 1
    suite.write_text(SUITE.replace(*change))
    with pytest.raises(InvalidInputError, match=sentence):
        read_suite(str(suite))


def test_questions_of_one_suite_have_labels_of_their_own() -> None:
    for name in ("smoke", "table4", "ablations", "defences"):
        cells = Plan.of(read_suite(name), "cpu", PLACES, "data").models_of
        labels: list[str] = []
        cells(lambda label, seen=labels: seen.append(label) is None)  # type: ignore[misc]
        assert labels
        assert len(set(labels)) == len(labels), name


def test_unknown_names_are_refused(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="unknown suite 'table9'; known are ablations, defences"):
        read_suite("table9")
    with pytest.raises(InvalidInputError, match="cannot be read as a suite"):
        read_suite(str(tmp_path / "none.toml"))
    with pytest.raises(InvalidInputError, match="has no size 'huge'; it has small, large"):
        Plan.of(read_suite(str(suite)), "huge", PLACES, "data")
    suite.write_text(SUITE.replace('"ft-sam"', '"nosuch"'))
    with pytest.raises(InvalidInputError, match="mine names 'nosuch'; known are mnp, ft"):
        Plan.of(read_suite(str(suite)), "small", PLACES, "data").cells()
    suite.write_text(SUITE.replace('"outer_rate", ', '"phase", '))
    with pytest.raises(InvalidInputError, match="'phase' of i_bau is no number"):
        Plan.of(read_suite(str(suite)), "small", PLACES, "data").cells()
