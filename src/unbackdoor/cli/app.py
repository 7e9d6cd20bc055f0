"""The ``unbackdoor`` command: every error on purpose is one line, and exit codes mean something."""

from __future__ import annotations

import sys
import traceback

import typer

from unbackdoor.cli.attack import attack
from unbackdoor.cli.bench import bench
from unbackdoor.cli.calibrate import calibrate
from unbackdoor.cli.demo import demo
from unbackdoor.cli.evaluate import evaluate
from unbackdoor.cli.graph import graph
from unbackdoor.cli.methods import methods
from unbackdoor.cli.pipes import echo
from unbackdoor.cli.purify import purify
from unbackdoor.cli.report import report
from unbackdoor.cli.scan import scan
from unbackdoor.cli.screen import screen
from unbackdoor.cli.tables import tables
from unbackdoor.cli.zoo import zoo
from unbackdoor.errors import UnbackdoorError

EXIT_ERROR = 2
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find and remove backdoors in PyTorch image classifiers, given a few hundred clean images.",
)
for command in (scan, calibrate, purify, screen, evaluate, attack, methods, bench, tables, report, demo):
    app.command()(command)
app.add_typer(zoo, name="zoo")
app.add_typer(graph, name="graph")


def _version(show: bool) -> None:
    if show:
        from unbackdoor import __version__

        echo(f"unbackdoor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    try:
        app()
    except UnbackdoorError as error:
        echo(f"error: {error}", err=True)
        sys.exit(EXIT_ERROR)
    except SystemExit as leaving:
        # Typer turns Ctrl-C into this exit code without a word.
        if leaving.code == EXIT_INTERRUPTED:
            echo("interrupted", err=True)
        # Typer turns a pipe that broke into 1, which means backdoored, and there is no verdict.
        if isinstance(leaving.__context__, BrokenPipeError):
            sys.exit(EXIT_ERROR)
        raise
    except KeyboardInterrupt:
        echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except Exception:  # noqa: BLE001 - the last resort of the process
        # A bug of ours: its traceback is wanted, but never the exit code 1, which means backdoored.
        echo(traceback.format_exc() + "internal error: please report the lines above", err=True)
        sys.exit(EXIT_INTERNAL)
