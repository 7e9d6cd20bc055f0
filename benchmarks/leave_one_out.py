"""What would a scan say of the clean models of a calibration, each compared with the others alone?

    python benchmarks/leave_one_out.py src/unbackdoor/detect/calibrations/cifar10_resnet18_w16.json

At most a share alpha of them can be flagged, whatever they score: that is how the threshold is made. What the
table shows is which ones, and by which detector, so that one learns what a suspect must not be like.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unbackdoor.bench.tables import markdown
from unbackdoor.detect.calibration import CalibrationSet, read_calibration
from unbackdoor.detect.evidence import DECIDING, REQUIRED
from unbackdoor.detect.joint import combine
from unbackdoor.detect.verdict import VERDICTS, ground_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--deciding", nargs="+", default=DECIDING)
    parser.add_argument("--alpha", type=float, default=0.05)
    options = parser.parse_args()
    print(leave_one_out(read_calibration(options.calibration), options.deciding, options.alpha))


def leave_one_out(calibration: CalibrationSet, deciding: tuple[str, ...], alpha: float) -> str:
    """Return a table with a row for each model, the most suspicious first."""
    rows = calibration.rows(deciding)
    names = [model.name for model in calibration.models if set(deciding) <= set(model.scores)]
    judged = []
    for index, (name, scores) in enumerate(zip(names, rows, strict=True)):
        joint = combine([*rows[:index], *rows[index + 1 :]], scores, alpha)
        complete = all(scores[each] > float("-inf") for each in REQUIRED)
        verdict = VERDICTS[ground_of(joint, complete=complete, alpha=alpha)]
        leading = max(joint.scaled, key=lambda each: joint.scaled[each])
        told = [f"{scores[each]:.3f} ({joint.scaled[each]:.1f})" for each in deciding]
        judged.append((joint.p_value, [name, verdict, f"{joint.p_value:.3f}", leading, *told]))
    judged.sort(key=lambda pair: pair[0])
    return markdown(["model", "verdict", "p", "furthest by", *deciding], [row for _, row in judged])


if __name__ == "__main__":
    main()
