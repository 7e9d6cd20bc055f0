"""Print where the reader may have left, as ``head -1`` does: the exit code has to tell the verdict still.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from typing import IO

import typer


def echo(text: str, *, err: bool = False) -> None:
    """Print a line as it is, to stderr if ``err``; once nobody reads it, print nothing."""
    try:
        typer.echo(text, err=err)
    except BrokenPipeError:
        silence(sys.stderr if err else sys.stdout)


def silence(stream: IO[str]) -> None:
    """Let a stream whose reader left lead to nowhere, so that no later write, nor that at exit, fails."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream in memory has none, and no reader either
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
