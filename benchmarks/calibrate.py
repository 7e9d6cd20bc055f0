"""Score the clean models of `reference_models.py` and write the calibration that the package ships.

python benchmarks/calibrate.py --models runs/reference --data DIR --out calibration.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from unbackdoor import rng
from unbackdoor.data import draw_balanced, load_images
from unbackdoor.detect.collapse import Collapse
from unbackdoor.detect.exposure import Statistic, expose
from unbackdoor.detect.mnp import CorrelationRatio
from unbackdoor.detect.scan import calibration_options
from unbackdoor.models.loading import load_model
from unbackdoor.suppression import Suppression

DESCRIPTION = (
    "{n} clean ResNet-18 of width 16, trained by ourselves on 20,000 CIFAR-10 images each with varied seeds, "
    "weight decay, augmentation and learning rate; 500 clean training images for the scan"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pattern", default="calibration-*")
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    data = load_images(options.data, split="train")
    suppression, statistic = Suppression(), Statistic()
    scores: dict[str, list[float]] = {"collapse": [], "mnp": []}
    folders = sorted(f for f in options.models.glob(options.pattern) if (f / "card.json").exists())
    for index, folder in enumerate(folders):
        model = load_model(folder / "model.safetensors", "resnet18").model
        clean = draw_balanced(data, options.images, rng.generator(1000 + index))
        exposure = expose(model, clean, suppression, statistic, generator=rng.generator(index))
        collapse = Collapse(suppression).judge(exposure.suppressed)
        ratio = CorrelationRatio(suppression, statistic).judge(exposure)
        print(
            f"{folder.name}: collapse {collapse.score:.3f} {collapse.undetermined}, "
            f"1 - ratio {ratio.score:.3f}, accuracy {exposure.suppressed.accuracies[0]:.3f} -> "
            f"{exposure.suppressed.accuracies[-1]:.3f} in {exposure.suppressed.checks[-1].step} steps",
            flush=True,
        )
        scores["collapse"].append(round(collapse.score, 4))
        scores["mnp"].append(round(ratio.score, 4))
    document = {
        "version": 1,
        "description": DESCRIPTION.format(n=len(folders)),
        "options": calibration_options(suppression, statistic),
        "scores": scores,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
