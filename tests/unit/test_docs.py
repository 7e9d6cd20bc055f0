"""What the documentation says is what the code does, as far as it can be compared."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from unbackdoor.attacks.registry import ATTACKS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}


def test_the_pages_of_methods_are_made_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python docs/generate.py"
    assert module.GRAPHS_PAGE.read_text() == module.graphs_page(), "run python docs/generate.py"


def test_every_attack_has_a_section() -> None:
    text = (DOCS / "reference" / "attacks.md").read_text()
    assert all(f"`{name}`" in text for name in ATTACKS)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
