"""``unbackdoor tables``: tables, figures and a page from the records of a benchmark run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer


class Form(StrEnum):
    """What is printed."""

    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"


def tables(
    run: Path = typer.Argument(help="Folder of a run, as `unbackdoor bench --out` wrote it."),
    out: Path | None = typer.Option(None, help="Where to write; the folder of the run if not given."),
    form: Form = typer.Option(Form.MARKDOWN, "--format", help="What is printed."),
) -> None:
    """Print the tables of a run; write them in Markdown, LaTeX and CSV, the figures, and index.html."""
    from unbackdoor.bench.defend import is_older
    from unbackdoor.cli import console
    from unbackdoor.errors import InvalidInputError
    from unbackdoor.report.bench_page import write_run
    from unbackdoor.report.run import read_run
    from unbackdoor.report.tables import comma_separated, latex, markdown

    folder = out or run
    found = read_run(run, is_older)
    try:
        written = write_run(found, folder)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write into {folder}: {error.strerror}; choose another --out."
        ) from error
    print_as = {Form.MARKDOWN: markdown, Form.LATEX: latex, Form.CSV: comma_separated}[form]
    console.print_text("\n".join(print_as(table) for table in written.tables))
    console.note(f"wrote {written.page} and {len(written.files)} files beside it")
