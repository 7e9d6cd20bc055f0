"""What the documentation says is what the code does, as far as it can be compared."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import typer

from unbackdoor import catalogue
from unbackdoor.attacks.registry import ATTACKS
from unbackdoor.bench.defend import settings_of
from unbackdoor.bench.methods import METHODS, configured
from unbackdoor.bench.store import Store
from unbackdoor.bench.suite import Grid, Places, Plan, Size, Suite, matching, read_suite, variants
from unbackdoor.cli.app import app
from unbackdoor.purify.registry import PURIFIERS
from unbackdoor.testing import check_purifier

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}


def _load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, DOCS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _example(page: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None, page
    return found[1]


@pytest.mark.parametrize("script", ["generate", "generate_ledger", "generate_suites"])
def test_generated_pages_are_made_from_the_code(script: str) -> None:
    module = _load(script)
    assert module.PAGE.read_text() == module.page(), f"run python docs/{script}.py"
    if script == "generate":
        assert module.DETECTORS_PAGE.read_text() == module.detectors_page(), "run python docs/generate.py"
        assert module.GRAPHS_PAGE.read_text() == module.graphs_page(), "run python docs/generate.py"


def test_the_ledger_speaks_of_every_purifier_and_of_no_other() -> None:
    facts = tomllib.loads((DOCS / "ledger.toml").read_text())
    assert set(facts) == set(PURIFIERS)
    assert all(entry["ours"] and entry["theirs"] and entry["bugs"] for entry in facts.values())


@dataclass(frozen=True)
class Silent:
    """Differs from its paper and does not say so."""

    name: ClassVar[str] = "silent"
    title: ClassVar[str] = "Silent"
    source: ClassVar[str] = "nowhere"
    needs: ClassVar[str] = "nothing"


def test_the_ledger_claims_faithfulness_for_no_method_by_itself() -> None:
    ledger = _load("generate_ledger")
    with pytest.raises(ValueError, match="docstring of Silent has no paragraph"):
        ledger._section(Silent, {"bugs": []})
    text = ledger.page()
    for name in ("gup", "onp", "bs-ar"):
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert "\nReconstructed" in section, name


def test_the_ledger_reads_past_records_of_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = _load("generate_ledger")
    store = Store(tmp_path / "records.jsonl")
    store.add({"key": "t", "kind": "training", "model": "badnets", "status": "ok"})
    usual = {"method": "ft", "paper": False, "options": {}, "settings": settings_of(PURIFIERS["ft"]())}
    store.add({"key": "a", "status": "ok", "cell": usual})
    # Of a default that is no longer there.
    store.add({"key": "b", "status": "ok", "cell": {**usual, "method": "clp"}})
    monkeypatch.setattr(ledger, "RECORDS", store.path)
    assert list(ledger.measured()) == ["ft"]


def test_every_attack_has_a_section() -> None:
    text = (DOCS / "reference" / "attacks.md").read_text()
    assert all(f"`{name}`" in text for name in ATTACKS)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_site_has_every_page_and_its_links_stay_within() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text()
    for name, page in PAGES.items():
        assert f": {name}\n" in nav, f"mkdocs.yml lacks {name}"
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            inside = "://" in link or (page.parent / link).resolve().is_relative_to(DOCS)
            assert inside, f"{name} links to {link}, which the site does not have"


def test_the_documented_purifier_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "documented_purifier.py").write_text(_example("how-to/add-a-method.md", "python"))
    monkeypatch.syspath_prepend(tmp_path)
    purifier = importlib.import_module("documented_purifier").Magnitude()
    check_purifier(purifier)
    entry = catalogue.entry("purifier", type(purifier))
    assert (entry.name, entry.summary) == ("magnitude", "Prune the filters with the smallest l_2 norms.")
    assert [option.path for option in catalogue.options_of(purifier)] == ["fraction"]


@pytest.mark.parametrize("page", [DOCS / "how-to" / "add-a-method.md", DOCS.parent / "CONTRIBUTING.md"])
def test_the_steps_to_a_new_method_cover_every_kind(page: Path) -> None:
    text = page.read_text()
    for word in ("CLASSES", "MODEL_DETECTORS", "SAMPLE_DETECTORS", "detect/registry.py", "snake_case"):
        assert word in text, word
    for check in ("check_purifier", "check_attack", "check_detector", "check_sample_detector"):
        assert check in text, check


def test_the_documented_suite_can_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(_example("how-to/run-the-benchmark.md", "toml"))
    suite = read_suite(str(path))
    plan = Plan.of(suite, "cpu", Places(tmp_path, tmp_path / "models"), suite.data)
    assert len(plan.expected()) == 2 * 2 * 2 * 2
    for grid in plan.grids:
        for method in matching(grid.methods, METHODS[grid.task], suite.name):
            for options in variants(grid, method):
                configured(grid.task, method, grid.paper, options)


def test_every_key_of_a_suite_is_documented_and_no_other() -> None:
    page = PAGES["how-to/run-the-benchmark.md"].read_text()
    rows = page.split("| table | key |")[1].split("\n\n")[0].splitlines()[2:]
    documented: dict[str, set[str]] = defaultdict(set)
    table = ""
    for row in rows:
        first, keys = row.split("|")[1:3]
        table = first.strip(" `") or table
        documented[table] |= set(re.findall(r"`(\w+)`", keys))
    assert documented == {
        # The reader gives the first two; the others are tables of their own.
        "suite": set(Suite.model_fields) - {"name", "source", "sizes", "grid"},
        "[sizes.NAME]": set(Size.model_fields),
        "[[grid]]": set(Grid.model_fields),
    }


def _options(command: Any, path: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401 - of typer's own kind
    for name, inner in getattr(command, "commands", {}).items():
        yield from _options(inner, f"{path} {name}")
    for each in command.params:
        # The word that switches off is worth a line only where the other one changes nothing.
        negations = each.secondary_opts if each.default is True else []
        yield from ((path, option) for option in (*each.opts, *negations) if option.startswith("--"))


def test_the_page_on_the_command_line_has_every_option() -> None:
    text = PAGES["reference/cli.md"].read_text()
    every = list(_options(typer.main.get_command(app)))
    assert (" bench", "--train") in every
    missing = [f"{path} {option}" for path, option in every if not re.search(rf"{option}(?![\w-])", text)]
    assert missing == [" --version"]


def test_the_glossary_has_the_words_that_verdicts_and_prices_rest_on() -> None:
    words = re.findall(r"^\| ([^|]+) \|", PAGES["glossary.md"].read_text(), re.MULTILINE)
    assert {"calibration", "exchangeable", "guard", "guarded walk"} <= set(words)


LOOK_UP = """
import importlib, inspect, json, pkgutil, sys, typing

def attribute(found, name):
    if inspect.isfunction(found):
        found = typing.get_type_hints(found)["return"]
    return getattr(found, name)

def look_up(code, members):
    found = importlib.import_module("unbackdoor")
    if code[0][0] == "unbackdoor":
        code = [(".".join(name for name, _ in code), code[-1][1])]
        found = pkgutil.resolve_name(code[0][0])
    for name, arguments in code:
        found = found if name == "ub" or "." in name else attribute(found, name)
        if arguments:
            known = inspect.signature(found).parameters
            # A function with **options takes any.
            missing = [each for each in arguments if each not in known and "options" not in known]
            assert not missing, f"{name} does not take {missing}"
    if inspect.ismodule(found):
        missing = [name for name in members if not hasattr(found, name)]
        assert not missing, f"{found.__name__} lacks {missing}"

problems = []
for code, members in json.load(sys.stdin):
    # What one name imported must not be there by chance for the next.
    part = f"unbackdoor.{code[1][0]}"
    for module in [*sys.modules]:
        if module in ("unbackdoor", part) or module.startswith(part + "."):
            del sys.modules[module]
    try:
        look_up(code, members)
    except Exception as error:
        problems.append(f"{'.'.join(name for name, _ in code)}: {error!r}")
print("\\n".join(problems))
"""


def _python_names() -> Iterator[tuple[list[tuple[str, list[str]]], list[str]]]:
    """Every dotted name of the first column, with the arguments of its calls, and the row's other names."""
    for row in PAGES["reference/python-api.md"].read_text().splitlines():
        if row.startswith("| `"):
            first, meaning = row.split("|")[1:3]
            members = re.findall(r"`(\w+)[^`]*`", meaning)
            for code in re.findall(r"`([^`]+)`", first):
                calls = re.findall(r"(\w+)(?:\(([^)]*)\))?", code)
                yield [(name, re.findall(r"\w+", arguments)) for name, arguments in calls], members


def test_every_python_name_is_there_in_a_fresh_interpreter() -> None:
    names = list(_python_names())
    assert [("ub", []), ("attacks", []), ("registry", []), ("ATTACKS", [])] in [code for code, _ in names]
    done = subprocess.run(
        [sys.executable, "-c", LOOK_UP], input=json.dumps(names), capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
