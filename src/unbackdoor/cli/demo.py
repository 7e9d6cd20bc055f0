"""``unbackdoor demo``: the whole story on embedded data, in about a minute."""

from __future__ import annotations

from pathlib import Path

import typer


def demo(
    out: Path = typer.Option(Path("demo"), help="Folder for the models, documents and report.html."),
    seed: int = typer.Option(0, help="Seed of everything."),
) -> None:
    """Train a clean and an infected model on handwritten digits; scan, purify, scan again, report."""
    from unbackdoor.cli import console, story

    with console.progress_bar(hidden=False) as progress:
        story.tell(out, seed=seed, progress=progress, say=console.note)
