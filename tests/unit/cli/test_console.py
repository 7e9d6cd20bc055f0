from __future__ import annotations

import pytest

from unbackdoor.cli.console import QUIET_SECONDS, progress_bar, progress_lines


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_long_work_says_in_a_log_how_far_it_is_and_not_more_often_than_needed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    show = progress_lines(clock)
    for done in range(1, 101):
        clock.now += QUIET_SECONDS / 10
        show("search", done, 100)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"search: {done} of 100" for done in range(10, 101, 10)]


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    show = progress_lines(clock)
    for done in range(10):
        clock.now += QUIET_SECONDS / 10 - 0.01
        show("search", done, 10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("hidden", [True, False])
def test_without_a_terminal_there_is_no_bar(
    hidden: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unbackdoor.cli.console.QUIET_SECONDS", 0.0)
    with progress_bar(hidden=hidden) as progress:
        progress("search", 1, 2)
    assert capsys.readouterr().err == ("" if hidden else "search: 1 of 2\n")
