from __future__ import annotations

import pytest

from unbackdoor import errors


def test_every_error_can_be_caught_as_one() -> None:
    for name in (
        "InvalidInputError", "UnsupportedModelError", "UnsafeFileError", "MismatchedCheckpointError",
        "MissingDependencyError",
    ):  # fmt: skip
        assert issubclass(getattr(errors, name), errors.UnbackdoorError)


@pytest.mark.parametrize(
    ("cls", "builtin"), [(errors.InvalidInputError, ValueError), (errors.MissingDependencyError, ImportError)]
)
def test_errors_are_what_python_calls_them(cls: type[Exception], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="what to do"):
        raise cls("what to do")
