"""What the documentation says is what the code does, as far as it can be compared."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from unbackdoor.attacks.registry import ATTACKS
from unbackdoor.bench.store import Store
from unbackdoor.purify.registry import PURIFIERS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}


def _load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, DOCS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    store.add({"key": "a", "status": "ok", "cell": {"method": "ft", "paper": False, "options": {}}})
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
