"""A scan as SARIF 2.1.0, the format that code scanning services read.

Source: OASIS Standard "Static Analysis Results Interchange Format (SARIF) Version 2.1.0", 2020. A backdoored
model is an error, an inconclusive scan a warning; a clean one has no result, since services such as GitHub's
make an alert of each, whatever its kind. The verdict and its numbers are the properties of the run.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any, Final
from urllib.parse import quote

from unbackdoor.report.documents import ScanDocument

SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"

_BACKDOOR, _INCONCLUSIVE = 0, 1
_RULES = (
    {
        "id": "UB001",
        "name": "BackdooredModel",
        "shortDescription": {"text": "The model shows evidence of a backdoor."},
        "fullDescription": {
            "text": "Images that carry the attacker's trigger would be classified as the attacker wants, "
            "while the model works as usual on all others."
        },
        "help": {
            "text": "Do not use this model. Get it from a source you trust, or remove the backdoor with "
            "`unbackdoor purify`, scan the result again and look at what it cost."
        },
        "defaultConfiguration": {"level": "error"},
        "properties": {"tags": ["security", "machine-learning"], "security-severity": "9.0"},
    },
    {
        "id": "UB002",
        "name": "InconclusiveScan",
        "shortDescription": {"text": "The scan could not tell whether the model is backdoored."},
        "fullDescription": {
            "text": "Evidence is missing, close to the threshold, or there were too few clean models or "
            "images to compare with."
        },
        "help": {
            "text": "Do not rely on this model yet: mend what the message names, or take other seeds and "
            "images where the model is close to the threshold, and scan again."
        },
        "defaultConfiguration": {"level": "warning"},
        "properties": {"tags": ["security", "machine-learning"], "security-severity": "5.0"},
    },
)

_OF_A_DETECTOR = {"name", "kind", "score", "threshold", "p_value", "verdict", "target_class", "decides"}


def sarif(document: ScanDocument) -> dict[str, Any]:
    """Return the SARIF log of one scan, as JSON values."""
    place = {"uri": _uri(document.model.path)}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "unbackdoor",
                        "version": document.tool_version,
                        "rules": [dict(rule) for rule in _RULES],
                    }
                },
                "invocations": [{"executionSuccessful": True, "endTimeUtc": _z(document.created)}],
                "artifacts": [
                    {
                        "location": place,
                        "roles": ["analysisTarget"],
                        "hashes": {"sha-256": document.model.sha256},
                    }
                ],
                # A service such as GitHub's shows every result as an alert, also one that says "pass".
                "results": [] if document.verdict == "clean" else [_result(document, place)],
                "properties": _properties(document),
            }
        ],
    }


def sarif_text(document: ScanDocument) -> str:
    """Return the SARIF log of one scan as the content of a file."""
    return json.dumps(sarif(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _result(document: ScanDocument, place: dict[str, str]) -> dict[str, Any]:
    index = _INCONCLUSIVE if document.verdict == "inconclusive" else _BACKDOOR
    target = "" if document.target_name is None else f" Suspected target: {document.target_name}."
    guarantee = f" {document.confidence.guarantee}" if document.confidence else ""
    return {
        "ruleId": _RULES[index]["id"],
        "ruleIndex": index,
        "kind": "fail",
        "level": "error" if document.verdict == "backdoored" else "warning",
        "message": {"text": _plain(f"{document.reason}{target}{guarantee}")},
        "locations": [
            # Code scanning services want a line, though a model has none.
            {"physicalLocation": {"artifactLocation": {**place, "index": 0}, "region": {"startLine": 1}}}
        ],
        "partialFingerprints": {"modelSha256/v1": document.model.sha256},
    }


def _plain(text: str) -> str:
    """Escape what a message of SARIF would read as a placeholder or a link (sections 3.11.5 and 3.11.6)."""
    braces = text.replace("{", "{{").replace("}", "}}")
    return re.sub(r"([\\\[\]])", r"\\\1", braces)


def _properties(document: ScanDocument) -> dict[str, Any]:
    """Return the numbers behind the verdict; pictures and long lists stay in the JSON document."""
    found: dict[str, Any] = {
        "verdict": document.verdict,
        "reason": document.reason,
        "targetClass": document.target_class,
        "images": document.data.images,
        "cleanAccuracy": document.clean_accuracy.value,
        "detectors": [row.model_dump(include=_OF_A_DETECTOR) for row in document.detectors],
        "limits": list(document.limits),
        "warnings": list(document.warnings),
    }
    if document.confidence is not None:
        found["confidence"] = document.confidence.model_dump()
    if document.trigger is not None:
        found["trigger"] = document.trigger.model_dump(
            include={"target_class", "l1_pixels", "image_fraction", "success", "success_seen"}
        )
    return found


def _uri(path: str) -> str:
    pure = PurePath(path)
    return pure.as_uri() if pure.is_absolute() else quote(pure.as_posix())


def _z(created: str) -> str:
    return created.replace("+00:00", "Z")
