from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import pytest

from unbackdoor import catalogue
from unbackdoor.attacks.registry import ATTACKS
from unbackdoor.detect.registry import MODEL_DETECTORS, SAMPLE_DETECTORS
from unbackdoor.errors import InvalidInputError
from unbackdoor.graph.attacks import ATTACKS as GRAPH_ATTACKS
from unbackdoor.graph.detect import RIGBD
from unbackdoor.graph.purify import PURIFIERS as GRAPH_PURIFIERS
from unbackdoor.purify import FP, GUP, NAD
from unbackdoor.purify.registry import PURIFIERS
from unbackdoor.settings import configure
from unbackdoor.train import Recipe

EVERY = [
    pytest.param(kind, cls, id=f"{kind}-{name}")
    for kind, known in (
        ("attack", ATTACKS),
        ("purifier", PURIFIERS),
        ("model detector", MODEL_DETECTORS),
        ("sample detector", SAMPLE_DETECTORS),
        ("graph attack", GRAPH_ATTACKS),
        ("graph detector", {RIGBD.name: RIGBD}),
        ("graph purifier", GRAPH_PURIFIERS),
    )
    for name, cls in known.items()
]


@pytest.mark.parametrize(("kind", "cls"), EVERY)
def test_texts_say_what_can_be_typed(kind: str, cls: type[Any]) -> None:
    text = catalogue.description(cls)
    # Settings of the paper can be had without Python, too.
    assert "paper()" not in text or "--paper" in text or "paper = true" in text
    for each in (text, *(option.text for option in catalogue.options_of(cls()))):
        assert not re.search(r"\b[A-Z]\w*\(\w+=", each), each


@dataclass(frozen=True)
class Part:
    """A part.

    Args:
        depth: How deep,
            in metres.
    """

    depth: float = 1e-4


@dataclass(frozen=True)
class Dig:
    """Dig
    a hole.

    More about it.

    Args:
        part: Its part.
        mode: How.
        tools: With what.

    Raises:
        tools: not an argument
    """

    name: ClassVar[str] = "dig_it"
    title: ClassVar[str] = "Digging"
    source: ClassVar[str] = "folklore"
    needs: ClassVar[str] = "a spade"

    part: Part = field(default_factory=Part)
    mode: Literal["slow", "fast"] = "slow"
    tools: tuple[str, ...] = ()
    count: int | None = None


def test_options_are_read_off_fields_and_docstrings() -> None:
    assert catalogue.options_of(Dig()) == [
        catalogue.Option("part.depth", "float", "0.0001", "How deep, in metres."),
        catalogue.Option("mode", "slow | fast", "slow", "How."),
        catalogue.Option("tools", "list of str", "[]", "With what."),
        catalogue.Option("count", "int or none", "none", ""),
    ]


def test_a_method_is_described_by_its_class() -> None:
    entry = catalogue.entry("purifier", Dig)
    assert entry == catalogue.Entry("purifier", "dig-it", "Digging", "folklore", "a spade", "Dig a hole.")
    assert catalogue.description(Dig) == "Dig\na hole.\n\nMore about it."


@pytest.mark.parametrize("name", ["dig_it", "dig-it", "DIG-IT"])
def test_names_are_found_with_dashes_too(name: str) -> None:
    assert catalogue.find("purifier", {"dig_it": Dig}, name) is Dig


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'dig-it'"):
        catalogue.find("purifier", {"dig_it": Dig}, "dig-in")


def test_unknown_settings_of_a_paper_are_said() -> None:
    with pytest.raises(InvalidInputError, match="not known"):
        catalogue.configured("purifier", {"dig_it": Dig}, "dig-it", paper=True)


@pytest.mark.parametrize(("kind", "cls"), EVERY)
def test_every_method_says_what_it_is_and_what_each_option_means(kind: str, cls: type[Any]) -> None:
    entry = catalogue.entry(kind, cls)
    assert all((entry.title, entry.source, entry.needs, entry.summary))
    undocumented = [option.path for option in catalogue.options_of(cls()) if not option.text]
    assert not undocumented


@pytest.mark.parametrize(("kind", "cls"), EVERY)
def test_every_default_can_be_given_back_as_text(kind: str, cls: type[Any]) -> None:
    for option in catalogue.options_of(cls()):
        value = _value(cls(), option.path)
        assert _value(configure(cls(), [f"{option.path}={option.default}"]), option.path) == value


@pytest.mark.parametrize("method", [FP(), GUP()], ids=["fp", "gup"])
def test_a_part_that_may_be_left_out_is_and_comes_back(method: FP | GUP) -> None:
    without = configure(method, ["recipe=none"])
    assert without == replace(method, recipe=None)
    assert method.recipe is not None
    assert configure(without, ["recipe.epochs=3"]).recipe == replace(method.recipe, epochs=3)
    with pytest.raises(InvalidInputError, match=r"set one of recipe\.epochs"):
        configure(without, ["recipe=3"])
    with pytest.raises(InvalidInputError, match="option 'selection' has parts"):
        configure(method, ["selection=none"])


def test_lists_of_parts_are_json() -> None:
    text = '[{"epochs": 3, "nesterov": true}, {"schedule": "constant"}]'
    found = configure(NAD(), [f"teacher={text}"]).teacher
    assert found == (Recipe(epochs=3, nesterov=True), Recipe(schedule="constant"))
    assert configure(NAD(), ["betas=2", "layers=[]"]) == replace(NAD(), betas=(2.0,))
    for odd, sentence in (
        ("2", "takes a JSON list of objects with some of epochs"),
        ("(epochs=2)", "takes a JSON list"),
        ('[{"epoch": 3}]', "did you mean 'teacher.epochs'"),
        ('[{"epochs": "many"}]', "option 'teacher.epochs' cannot be 'many'"),
    ):
        with pytest.raises(InvalidInputError, match=sentence):
            configure(NAD(), [f"teacher={odd}"])


def _value(method: object, path: str) -> object:
    for name in path.split("."):
        assert name in {f.name for f in fields(method)}  # type: ignore[arg-type]
        method = getattr(method, name)
    return method
