from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time

import pytest

import unbackdoor


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", unbackdoor.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(unbackdoor, name) is not None
    assert name in dir(unbackdoor)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Skan'"):
        _ = unbackdoor.Skan


def test_importing_the_package_does_not_import_torch() -> None:
    done = run("-c", "import sys, unbackdoor; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert (done.stdout.strip(), done.stderr) == ("False False", "")


@pytest.mark.parametrize(
    "command", [[], ["scan"], ["purify"], ["evaluate"], ["attack"], ["report"], ["demo"]]
)
def test_help_does_not_import_torch(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from unbackdoor.cli.app import main\n"
        f"sys.argv = ['unbackdoor', *{command!r}, '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as leave:\n"
        "    assert not leave.code, leave.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Usage: unbackdoor" in done.stdout


def test_help_is_quick() -> None:
    # The best of three: other work on the machine can only slow it down.
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert run("-m", "unbackdoor", "--help").returncode == 0
        seconds.append(time.perf_counter() - started)
        if min(seconds) < 1:
            break
    assert min(seconds) < 1


def test_version() -> None:
    done = run("-m", "unbackdoor", "--version")
    assert done.stdout.strip() == f"unbackdoor {unbackdoor.__version__}"
    try:
        installed = importlib.metadata.version("unbackdoor")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, so there is no version to compare with")
    assert installed == unbackdoor.__version__
