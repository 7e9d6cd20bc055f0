"""``unbackdoor demo``: the whole story on embedded data, in about two minutes."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o


def demo(
    out: Path = typer.Option(Path("demo"), help="Folder for the models, documents and report.html."),
    seed: o.Seed = 1,
) -> None:
    """Train a clean and an infected model on handwritten digits; scan, purify, scan again, report."""
    import torch

    from unbackdoor.cli import console, story

    # Sums in another order make other models: a fixed number of threads tells the same story everywhere.
    torch.set_num_threads(2)
    with console.progress_bar(hidden=False) as progress:
        story.tell(out, seed=seed, progress=progress, say=console.note)
