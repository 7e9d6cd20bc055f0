"""What would a scan say of the clean models of a calibration, each compared with the others alone?

    python benchmarks/leave_one_out.py src/unbackdoor/detect/calibrations/cifar10_resnet18_w16.json

At most a share alpha of them can be flagged, whatever they score: that is how the threshold is made. What the
table shows is which ones, and by which detector, so that one learns what a suspect must not be like.

`--scored FILE` judges the models of another calibration, such as the same ones by other images; each is
compared with all models of the first but itself:

    python benchmarks/leave_one_out.py src/unbackdoor/detect/calibrations/cifar10_resnet18_w16.json \
      --scored results/trial-zoo-again/calibration.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unbackdoor.bench.tables import markdown
from unbackdoor.detect.calibration import CalibrationSet, ScoredModel, read_calibration
from unbackdoor.detect.evidence import DECIDING, REQUIRED
from unbackdoor.detect.joint import combine
from unbackdoor.detect.verdict import VERDICTS, ground_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--scored", type=Path, help="a calibration whose models are judged; else the same")
    parser.add_argument("--deciding", nargs="+", default=DECIDING)
    parser.add_argument("--alpha", type=float, default=0.05)
    options = parser.parse_args()
    calibration = read_calibration(options.calibration)
    suspects = read_calibration(options.scored) if options.scored else calibration
    print(leave_one_out(calibration, suspects, options.deciding, options.alpha))


def leave_one_out(
    calibration: CalibrationSet, suspects: CalibrationSet, deciding: tuple[str, ...], alpha: float
) -> str:
    """Return a table with a row for each suspect, the most suspicious first."""
    judged = []
    for model, scores in _scores(suspects, deciding):
        others = [row for other, row in _scores(calibration, deciding) if other.sha256 != model.sha256]
        joint = combine(others, scores, alpha)
        complete = all(scores[each] > float("-inf") for each in REQUIRED)
        verdict = VERDICTS[ground_of(joint, complete=complete, alpha=alpha)]
        leading = max(joint.scaled, key=lambda each: joint.scaled[each])
        told = [f"{scores[each]:.3f} ({joint.scaled[each]:.1f})" for each in deciding]
        row = [model.name, verdict, f"{joint.p_value:.3f}", str(joint.n), leading, *told]
        judged.append((joint.p_value, row))
    judged.sort(key=lambda pair: pair[0])
    return markdown(["model", "verdict", "p", "others", "furthest by", *deciding], [row for _, row in judged])


def _scores(
    calibration: CalibrationSet, deciding: tuple[str, ...]
) -> list[tuple[ScoredModel, dict[str, float]]]:
    models = [model for model in calibration.models if set(deciding) <= set(model.scores)]
    return list(zip(models, calibration.rows(deciding), strict=True))


if __name__ == "__main__":
    main()
