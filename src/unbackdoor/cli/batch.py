"""The work behind ``unbackdoor scan`` of several files: each is a task for the benchmark's executors.

Workers write the documents into the folder of the run, which all of them must see; this process keeps the
records, so that a run that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import unbackdoor
from unbackdoor.bench.cell import key_of
from unbackdoor.bench.executors.base import Executor, Record, Task
from unbackdoor.bench.records import recorded
from unbackdoor.bench.runner import drive
from unbackdoor.bench.store import Store
from unbackdoor.cli import console, inputs, show
from unbackdoor.cli.display import Display
from unbackdoor.cli.scanning import scan_document
from unbackdoor.cli.work import plain
from unbackdoor.compute import device_named
from unbackdoor.data import load_images
from unbackdoor.detect.calibration import shipped_calibrations
from unbackdoor.detect.scan import Scan
from unbackdoor.errors import InvalidInputError
from unbackdoor.report import documents as doc
from unbackdoor.types import LabelledImages, Progress, silent

VERSION = 1
"""Raised when the meaning of a task changes: old records are no answers to new questions."""

OUT = Path("runs") / "scan"

RECORDS = "scans.jsonl"

FEW = 3
"""Files named in front of a warning; the others are counted."""

RETRY = ("failed", "refused")
"""Records without a verdict: their files are tried again by the next run."""


@dataclass(frozen=True)
class FileScan:
    """One file to be scanned; a task.

    Args:
        path: The file.
        sha256: Of its content, empty where it cannot be read.
        options: Hash of everything else that decides the result.
    """

    path: Path
    sha256: str
    options: str

    @property
    def key(self) -> str:
        """The same content under the same name, scanned in the same way, is scanned once."""
        # What cannot be read is told apart by where it is.
        which = self.sha256 or str(self.path.absolute())
        return key_of({"version": VERSION, "file": which, "name": self.path.stem, "options": self.options})

    @property
    def label(self) -> str:
        """The path, on one line."""
        return " ".join(str(self.path).split())

    @property
    def group(self) -> str:
        """All take about the same time."""
        return "scan"

    @property
    def document(self) -> str:
        """Name of its documents without the ending; another for other content or options."""
        return f"{re.sub(r'[^A-Za-z0-9._-]', '_', self.path.stem)[:80]}-{self.key[:12]}"


@dataclass(frozen=True, eq=False)
class FileScanner:
    """Scans one file after the other, wherever; picklable.

    Args:
        model: How the files are opened; their path is that of the task.
        data: Where the clean images are.
        scan: The scan.
        seed: Draws the images and drives the scan.
        out: Where the documents are written.
    """

    model: inputs.ModelOptions
    data: inputs.DataOptions
    scan: Scan
    seed: int
    out: Path

    def tasks(self, paths: Sequence[Path]) -> list[FileScan]:
        """Return a task for each path; a file that cannot be read has one too."""
        options = self._options()
        return [FileScan(path, _sha256(inputs.model_file(path)), options) for path in paths]

    def __call__(self, task: FileScan) -> Record:
        """Scan one file; what is refused or fails is a record too."""
        about = {"key": task.key, "file": str(task.path), "sha256": task.sha256}
        return recorded(
            about,
            lambda log: self._scan(task, log),
            progress=silent,
            device=device_named(self.model.device),
        )

    def _scan(self, task: FileScan, progress: Progress) -> Record:
        loaded = inputs.open_model(replace(self.model, path=task.path))
        if loaded.checkpoint.sha256 != task.sha256:
            raise InvalidInputError(f"{task.path} was changed while it waited; scan it again.")
        data = inputs.drawn_clean(_images(self.data), self.data, loaded, seed=self.seed, hold_out=False)
        document = scan_document(
            loaded.model,
            data.learning,
            scan=self.scan,
            info=inputs.describe_model(loaded),
            data=data.info,
            seed=self.seed,
            warnings=(
                *data.warnings,
                *self.scan.other_images(loaded.model, data.learning, self.data.split or ""),
            ),
            progress=progress,
        )
        base = self.out / task.document
        doc.write_text(document.model_dump_json(indent=1) + "\n", f"{base}.json")
        show.write_page([document], Path(f"{base}.html"), title=show.title_of(document), quiet=True)
        return {
            "verdict": document.verdict,
            "reason": document.reason,
            "target_class": document.target_class,
            "target_name": document.target_name,
            "p_value": None if document.confidence is None else document.confidence.p_value,
            "document": f"{base.name}.json",
            "warnings": list(document.warnings),
        }

    def _options(self) -> str:
        scan, calibration = plain(asdict(self.scan)), self.scan.calibration
        if not self.scan.other_options:
            del scan["other_options"]  # scans from before the option keep their keys
        known = [calibration] if calibration else shipped_calibrations()
        about = {
            "tool": unbackdoor.__version__,
            "model": {k: v for k, v in asdict(self.model).items() if k not in {"path", "device"}},
            "data": asdict(self.data),
            "scan": scan,
            "seed": self.seed,
            "calibration": [hashlib.sha256(each.text().encode()).hexdigest() for each in known],
        }
        return key_of(about)


def scan_files(
    scanner: FileScanner, paths: Sequence[Path], executor: Executor
) -> list[tuple[FileScan, Mapping[str, Any]]]:
    """Scan the files that have no verdict yet, and return what came of each, in the order given.

    Args:
        scanner: How.
        paths: The files.
        executor: Where.

    Raises:
        InvalidInputError: If there are no such images, or the folder cannot be written.
    """
    load_images(scanner.data.path, split=scanner.data.split, limit=1)
    try:
        scanner.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write into {scanner.out}: {error.strerror}; choose another --out."
        ) from error
    store, tasks = Store(scanner.out / RECORDS), scanner.tasks(list(dict.fromkeys(paths)))
    with Display("files", _progress) as watcher:
        drive(tasks, scanner, store, executor, watcher=watcher, retry=RETRY)
    records = store.records()
    held = {"status": "open", "problem": "another run is scanning it"}
    return [(task, records.get(task.key, held)) for task in tasks]


def say(found: Sequence[tuple[FileScan, Mapping[str, Any]]], out: Path, *, as_json: bool) -> None:
    """Print what came of each file."""
    if as_json:
        console.print_text(_json(found))
        return
    for warning in warnings_of(found):
        console.warn(warning)
    for task, record in found:
        console.results.print(line_of(task, record), markup=False)
    console.note(f"documents: {out}")


def _json(found: Sequence[tuple[FileScan, Mapping[str, Any]]]) -> str:
    names = (
        *("status", "problem", "verdict", "target_class", "target_name", "p_value", "reason", "warnings"),
        "document",
    )
    return json.dumps(
        [
            {"file": str(task.path), "sha256": task.sha256}
            | {name: record[name] for name in names if name in record}
            for task, record in found
        ],
        indent=1,
    )


def warnings_of(found: Sequence[tuple[FileScan, Mapping[str, Any]]]) -> list[str]:
    """Return each warning once, with the files that it is about unless it is about all that were scanned."""
    scanned = [(task, record) for task, record in found if "verdict" in record]
    about: dict[str, list[str]] = {}
    for task, record in scanned:
        for warning in record.get("warnings", ()):
            about.setdefault(warning, []).append(task.label)
    lines = []
    for warning, labels in about.items():
        more = f" and {len(labels) - FEW} more" if len(labels) > FEW else ""
        whose = "" if len(labels) == len(scanned) else f"{', '.join(labels[:FEW])}{more}: "
        lines.append(f"{whose}{warning}")
    return lines


def line_of(task: FileScan, record: Mapping[str, Any]) -> str:
    """Return one line on a file."""
    if "verdict" not in record:
        return f"{task.label}: {record['status']}: {' '.join(str(record['problem']).split())}"
    target = record["target_class"]
    about = "" if target is None else f", suspected target {doc.class_words(target, record['target_name'])}"
    chance = "" if record["p_value"] is None else f", p = {record['p_value']:.3f}"
    why = f": {record['reason']}" if record["verdict"] == "inconclusive" else ""
    return f"{task.label}: {record['verdict']}{about}{chance}{why}"


def _progress(task: Task, record: Record) -> str:
    return f"{task.label}: {record.get('verdict', record['status'])}; {record.get('seconds', 0):.0f} s"


def _sha256(path: Path) -> str:
    """Return the hash of a file, or an empty text for what is no file or cannot be read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def _images(options: inputs.DataOptions) -> LabelledImages:
    """Read the images once a process."""
    return inputs.read_data(options)
