"""An append-only file of records, one JSON line each, that several runners on one machine can share.

A record is written by one ``write`` of one line under a lock, so that none is torn; a line that a crash cut
off is skipped when read and closed before the next is written. Who works on a cell holds a lock file, which
the system releases when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """The records in one file.

    Args:
        path: The ``.jsonl`` file; it and its folder are made when the first record is added.
    """

    path: Path

    def records(self) -> dict[str, Record]:
        """Return all records by key; of several with one key, the last."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        records = [record for line in lines if (record := _parsed(line)) is not None]
        return {record["key"]: record for record in records}

    def add(self, record: Record) -> None:
        """Append one record; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Say whether this process may work on the cell ``key``: False if another one does.

        The cell may have been finished in the meantime: look at ``records`` again inside the block.
        """
        folder = self.path.with_suffix(".locks")
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / key
        with lock.open("w") as file:
            if not locked(file, lock):
                yield False
                return
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)


class Follower:
    """Reads what was added to a store since it last looked, by whomever.

    Args:
        store: Its file may not exist yet.
    """

    def __init__(self, store: Store) -> None:
        self._path = store.path
        self._position = 0

    def new(self) -> list[Record]:
        """Return the records added since the last call, the oldest first."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            text = file.read()
        # A line without an end is being written, or was cut off and will be closed by the next writer.
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        return [record for line in whole.splitlines() if (record := _parsed(line)) is not None]


def _parsed(line: bytes | str) -> Record | None:
    """Return the record in a line; None for one that a crash cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("key"), str) else None


def locked(file: IO[str], path: Path) -> bool:
    """Lock ``file`` if nobody has it, and if it is still the one that others find at ``path``."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
