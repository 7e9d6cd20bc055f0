from __future__ import annotations

from pathlib import Path

import pytest

from unbackdoor.bench.spec import jobs, read_spec
from unbackdoor.errors import InvalidInputError

SPEC = """
[defaults]
epochs = 16
twin = "clean"
set = ["recipe.nesterov=true"]

[models.badnets]
attack = "badnets"
seed = 3
set = ["target_class=2"]

[models.plain]
attack = "blend"
seed = 0
epochs = 24
plain = true
arch = "vgg16_bn"
width = 64

[models.clean]
attack = "none"
seed = 0
"""


def test_options_of_a_model_come_after_the_defaults_unless_it_is_plain(tmp_path: Path) -> None:
    path, out = tmp_path / "models.toml", tmp_path / "models"
    path.write_text(SPEC)
    found = jobs(read_spec(path), "data", out)
    assert found["badnets"].settings == ("recipe.nesterov=true", "target_class=2")
    assert (found["badnets"].epochs, found["badnets"].width, found["badnets"].seed) == (16, 16, 3)
    assert found["plain"].settings == ()
    assert (found["plain"].arch, found["plain"].width, found["plain"].epochs) == ("vgg16_bn", 64, 24)
    assert (found["badnets"].twin, found["clean"].twin) == (out / "clean", None)


def test_a_clean_twin_is_looked_for_when_a_job_starts(tmp_path: Path) -> None:
    path, out = tmp_path / "models.toml", tmp_path / "models"
    path.write_text(SPEC)
    found = jobs(read_spec(path), "data", out)
    (out / "clean").mkdir(parents=True)
    assert found["badnets"].ready().twin is None
    (out / "clean" / "card.json").touch()
    assert found["badnets"].ready() == found["badnets"]
    assert found["clean"].ready() == found["clean"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[models", "cannot be read as a list of models"),
        ("x = 1", r"must have a table \[models.NAME\]"),
        ('[models.a]\nattack = "sig"', "model a needs an attack"),
        ('[models.a]\nattack = "sig"\nseed = 0\nrate = 1', "a says rate, which means nothing"),
    ],
)
def test_what_is_no_specification_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=sentence):
        read_spec(path)


def test_the_specifications_of_the_project_can_be_read() -> None:
    root = Path(__file__).parents[3]
    benchmarks = root / "benchmarks"
    for path in (root / "zoo/zoo.toml", benchmarks / "imagenet12.toml", benchmarks / "more_models.toml"):
        assert jobs(read_spec(path), "data", Path("out"))
