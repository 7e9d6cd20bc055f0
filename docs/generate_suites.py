"""Write docs/reference/suites.md from the suites that come with the package.

    python docs/generate_suites.py

A test compares the committed page with what this makes.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unbackdoor.bench.suite import Grid, Places, Plan, Suite, read_suite, suite_names
from unbackdoor.catalogue import dashed

PAGE = Path(__file__).parent / "reference" / "suites.md"
ZOO = Path(__file__).parent.parent / "zoo"

HEAD = """# Suites

Made by `python docs/generate_suites.py` from `src/unbackdoor/bench/suites/*.toml`; change those.

`unbackdoor bench SUITE --data FOLDER --out RUN` runs one, `unbackdoor tables RUN` shows what came of it;
[how to](../how-to/run-the-benchmark.md). Each has a size for a CPU, most have the paper's, which needs a GPU, and six of the large ones have a `small` one. A
question is one method with its options on one model with some clean images and a seed; it is answered once and its
record says everything. Models that are not in the zoo are trained by the suite, once, into a folder that all suites
beside it share.

**Detectors in `table4`.** Detectors of models see clean images. Those of training sets (AC, SC) see what the model
was trained on, clean images and those of the poison plan with the trigger and their new labels, and each says by its
own [documented rule](detectors.md#detectors-of-training-sets-and-inputs) what that means for the model. What the plan does not hold is left out: perturbations beside the trigger (CL, FC),
weaker triggers and covers of training (SIG, Adap-Blend, Adap-Patch), and decoys that are drawn anew in each epoch (WaNet, IAB, BPP, DFST). STRIP judges inputs: it counts as having found the backdoor if it flags at least half of the
triggered test images at the threshold that one clean one in a hundred exceeds.

**A suite of your own** is a TOML file of the same form: `unbackdoor bench mine.toml --data FOLDER`. Sizes name lists
of models, `zoo` (`zoo.toml` in the folder of `--zoo`) or one of those below; grids name models and methods by name or
pattern, with `options` as `--set` takes them and `names` for what tables call them, `paper`, `clean_images`, `seeds`, and `scale`, which halves and doubles
options one at a time. `oracle = true` adds to each pruning method CA and ASR after 0, 1, 2, 5, 10, 20, 30, 50 and 100
filters in the order of its scores; that uses the trigger, so it judges an order and is no result of a defence. There is no
curve for methods whose answer is no mask of filters: FP on residual networks (inputs of the head), NC with
`mitigation=prune` (the same) and TSBD (single weights). MNP's order here leaves its tie-breaks out: filters whose masks
are equal go by layer and index, as with all methods.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *(_section(read_suite(name)) for name in suite_names()), _lists()])


def _section(suite: Suite) -> str:
    lines = [f"## {suite.name}", "", f"**{suite.title}.** {suite.text.strip()}", ""]
    lines += [
        "| size | models | of these trained by it | questions a seed | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, size in suite.sizes.items():
        plan = Plan.of(suite, name, Places(ZOO, Path("models")), "data")
        own = [job for job in plan.jobs.values() if job.out.parent.name != "zoo"]
        seeds = ", ".join(map(str, size.seeds))
        lines.append(
            f"| `{name}`: {size.text} | {len(plan.jobs)} | {len(own)} | {_questions(plan)} | {seeds} |"
        )
    few = (
        f"- size {name} asks only what fits {_listed(size.only)}"
        for name, size in suite.sizes.items()
        if size.only
    )
    return "\n".join([*lines, "", *(_grid(grid) for grid in suite.grid), *few, ""])


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)


def _questions(plan: Plan) -> int:
    """Return how many questions the draw with the most has."""
    return max(Counter(cell.seed for cell in plan.expected()).values())


def _grid(grid: Grid) -> str:
    methods = ", ".join("all purifiers" if name == "*" else dashed(name) for name in grid.methods)
    words = [f"{methods} on {', '.join(grid.models)}"]
    words += ["settings of the papers"] if grid.paper else []
    plural = "s" if len(grid.options) > 1 else ""
    words += [f"{len(grid.options)} variant{plural}"] if plural or grid.options[0] else []
    words += ["options halved and doubled"] if grid.scale else []
    words += [f"{', '.join(map(str, grid.clean_images))} clean images"] if grid.clean_images != (500,) else []
    words += ["oracle curves"] if grid.oracle else []
    words += [f"size {', '.join(grid.sizes)} only"] if grid.sizes else []
    return f"- *{grid.part or grid.task}*: {'; '.join(words)}"


def _lists() -> str:
    folder = Path(__file__).parent.parent / "src" / "unbackdoor" / "bench" / "suites" / "models"
    lines = ["## Lists of models", ""]
    for path in sorted(folder.glob("*.toml")):
        comments = [line.removeprefix("#").strip() for line in _head(path.read_text())]
        models = ", ".join(tomllib.loads(path.read_text())["models"])
        lines.append(f"- **{path.stem}**: {' '.join(comments).partition(' By hand:')[0]} Models: {models}.")
    return "\n".join([*lines, ""])


def _head(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


if __name__ == "__main__":
    PAGE.write_text(page())
