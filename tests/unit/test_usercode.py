"""Methods of the user's own, named as files. Loading itself is tested with architectures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.defend import is_older, settings_of
from unbackdoor.bench.detecting import judges_models
from unbackdoor.bench.methods import METHODS, configured
from unbackdoor.bench.suite import Grid, methods_of, variants
from unbackdoor.catalogue import dashed
from unbackdoor.detect.registry import MODEL_DETECTORS, SAMPLE_DETECTORS
from unbackdoor.detect.scan import Scan
from unbackdoor.errors import InvalidInputError, UnsupportedModelError
from unbackdoor.purify.registry import purifier_named
from unbackdoor.usercode import fingerprint, names_code

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md"
SAID = 'name, title, source, needs = "mine", "Mine", "me", "nothing"'
METHOD = f"""
from dataclasses import dataclass, field

from unbackdoor.types import Detection, Purified


@dataclass(frozen=True)
class Mine:
    '''Leave it as it is.

    Args:
        share: In [0, 1].
    '''

    {SAID}
    share: float = 0.5
    steps: list = field(default_factory=list)

    def purify(self, model, clean, *, generator, progress=None):
        return Purified(model, None, {{}}, {{}})


@dataclass(frozen=True)
class Sure:
    {SAID}

    def score(self, model, clean, *, generator, progress=None):
        return Detection(0.5, 1.0, "fixed")


class Plain:
    {SAID}

    def purify(self, model, clean, *, generator, progress=None): ...


@dataclass(frozen=True)
class Silent:
    name = "silent"

    def purify(self, model, clean, *, generator, progress=None): ...


@dataclass(frozen=True)
class Lazy:
    {SAID}


@dataclass(frozen=True)
class Needy(Lazy):
    share: float

    def purify(self, model, clean, *, generator, progress=None): ...


@dataclass(frozen=True)
class Taken(Mine):
    name = "mnp"


@dataclass(frozen=True)
class Loud(Mine):
    name = "My Method"


def function(): ...
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_method.py"
    path.write_text(METHOD)
    return path


@pytest.mark.parametrize("spec", ["mine.py:Mine", "package.module:Mine", r"C:\folder\mine.py:Mine"])
def test_code_is_told_from_names(spec: str) -> None:
    assert names_code(spec)
    assert dashed(spec) == spec
    assert not names_code("i_bau")
    assert not names_code(r"C:\models\a.py")
    assert dashed("i_bau") == "i-bau"


def test_a_purifier_of_the_users_own(file: Path) -> None:
    method = purifier_named(f"{file}:Mine")
    assert (method.name, method.share) == ("mine", 0.5)
    with pytest.raises(InvalidInputError, match="settings of the paper behind mine are not known"):
        purifier_named(f"{file}:Mine", paper=True)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Plain", "is no dataclass; its fields are to be its options"),
        ("function", "is no dataclass"),
        ("Silent", "has no title and no source and no needs; give the class that"),
        ("Lazy", r"has no purify\(\); give"),
        ("Sure", r"has no purify\(\); give"),
        ("Needy", "has no default for share; give it one"),
        ("Taken", "is named 'mnp', which belongs to a method of this package; change its name"),
        ("Loud", "is named 'My Method', which is not in snake_case; change its name"),
        (
            "Absent",
            "has no class 'Absent'; it has Mine, Sure, Plain, Silent, Lazy, Needy, Taken, Loud, function",
        ),
    ],
)
def test_what_is_no_method_is_refused(file: Path, name: str, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence) as error:
        purifier_named(f"{file}:{name}")
    assert str(error.value).startswith("purifier ")
    assert "\n" not in str(error.value)


def test_code_that_fails_is_said(file: Path) -> None:
    file.write_text("import no_such_module")
    with pytest.raises(UnsupportedModelError, match="cannot be imported: ModuleNotFoundError"):
        purifier_named(f"{file}:Mine")


def test_a_scan_runs_a_detector_of_the_users_own(file: Path) -> None:
    scan = Scan(others=(f"{file}:Sure",))
    assert scan.detectors()["mine"].score(None, None, generator=None).score == 0.5
    with pytest.raises(InvalidInputError, match=r"model detector .* has no score\(\)"):
        Scan(others=(f"{file}:Mine",))


def test_a_benchmark_asks_code_by_where_it_is_and_what_it_says(file: Path) -> None:
    spec = f"{file}:Mine"
    grid = Grid(models=("badnets",), methods=("clp", spec, "c*p"), scale={spec: ("share",)})
    assert methods_of(grid, "mine.toml") == ["clp", spec]
    assert variants(grid, spec) == [{}, {"share": "0.25"}, {"share": "1"}]
    assert variants(grid, "clp") == [{}]
    with pytest.raises(InvalidInputError, match=r"mine.toml names 'nothing'"):
        methods_of(Grid(models=(), methods=("nothing",)), "mine.toml")

    settings = settings_of(configured("purify", spec, False, {"share": "0.75"}))
    assert settings["share"] == "0.75"
    cell = Cell("badnets", "0", "cifar10", spec, options={"share": "0.75"}, settings=settings).describe()
    assert not is_older(cell)
    file.write_text(METHOD + "\n# mended\n")
    assert is_older(cell), "changed code is another question"
    file.unlink()
    assert is_older(cell)


@pytest.mark.parametrize("task", METHODS)
def test_methods_of_the_package_have_no_fingerprint(task: str) -> None:
    assert all(fingerprint(cls) is None for cls in METHODS[task].values())


def test_detectors_say_what_they_judge() -> None:
    assert all(judges_models(cls()) for cls in MODEL_DETECTORS.values())
    assert not any(judges_models(cls()) for cls in SAMPLE_DETECTORS.values())


def test_the_method_of_the_guide_is_one(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    path = tmp_path / "magnitude.py"
    path.write_text(code)
    method: Any = purifier_named(f"{path}:Magnitude")
    assert (method.name, method.fraction) == ("magnitude", 0.02)
