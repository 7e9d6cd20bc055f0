"""``unbackdoor report``: put the JSON documents of earlier commands on one HTML page."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    documents: list[Path] = typer.Argument(help="JSON files written with --json, in the order to show."),
    out: Path = typer.Option(Path("report.html"), help="The HTML file to write."),
    title: str = typer.Option("Backdoor report", help="Title of the page."),
) -> None:
    """Write one self-contained HTML page: verdicts, before and after, evidence, limits."""
    from unbackdoor.cli import show
    from unbackdoor.report.documents import read_document

    show.check_folder(out, *documents)
    show.write_page([read_document(path) for path in documents], out, title=title)
