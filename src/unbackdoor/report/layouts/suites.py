"""Which tables and figures the layout of a suite has."""

from __future__ import annotations

from unbackdoor.report.figures import Drawing, filter_clouds, sweep, trade_off
from unbackdoor.report.layouts.defences import cost_table, defence_tables, sok_tables, summary_table
from unbackdoor.report.layouts.detection import detection_tables
from unbackdoor.report.layouts.filters import clouds, filter_table
from unbackdoor.report.layouts.grid import grid_tables
from unbackdoor.report.layouts.rates import rate_table
from unbackdoor.report.layouts.sweeps import lines, over_images, over_option, sweep_table
from unbackdoor.report.run import Run
from unbackdoor.report.tables import Table

LAYOUTS = (
    "table1",
    "table2",
    "table3",
    "table4",
    "fig1",
    "fig3",
    "fig4",
    "runtime",
    "ablations",
    "sok",
    "defences",
    "smoke",
)


def tables_of(run: Run) -> list[Table]:
    """Return the tables of a run; those of an unknown layout show everything there is."""
    layout = str(run.plan.get("layout", ""))
    if layout in ("table1", "table2"):
        return [*grid_tables(run, layout), _summary(run)]
    if layout == "table3":
        return [rate_table(run), _summary(run)]
    if layout == "table4":
        return detection_tables(run)
    if layout == "fig1":
        return [filter_table(run)]
    if layout == "fig3":
        title = "MNP with few and many clean images"
        return [sweep_table(run, over_images, name="fig3", title=title, quantity="images")]
    if layout == "fig4":
        return [
            sweep_table(run, over_option(path), name=f"fig4-{name}", title=f"MNP over {name}", quantity=name)
            for path, name in (("lambda1", "lambda"), ("suppression.mu", "mu"))
        ]
    if layout == "runtime":
        return [cost_table(run, run.answers)]
    if layout == "sok":
        return sok_tables(run)
    if layout == "defences":
        return defence_tables(run)
    return _everything(run)


def _everything(run: Run) -> list[Table]:
    tables = [*grid_tables(run), *detection_tables(run, "")]
    tables += [filter_table(run)] if clouds(run.answers) else []
    return [*tables, _summary(run)] if any(a.task == "purify" for a in run.answers) else tables


def _summary(run: Run) -> Table:
    # What was measured for waking backdoors is, but for that, the same again.
    answers = [a for a in run.answers if a.task == "purify" and not a.cell.get("reactivate")]
    return summary_table(run, answers, name="summary", title="Methods over all models")


def figures_of(run: Run) -> list[Drawing]:
    """Return the figures of a run."""
    layout = str(run.plan.get("layout", ""))
    drawings: list[Drawing] = []
    if found := clouds(run.answers):
        drawings.append(filter_clouds(found))
    if layout == "fig3" and (course := lines(run.answers, over_images)):
        drawings.append(sweep("fig3", "MNP with few and many clean images", "clean images", course))
    if layout == "fig4":
        for path, name in (("lambda1", "lambda"), ("suppression.mu", "mu")):
            if course := lines(run.answers, over_option(path)):
                drawings.append(sweep(f"fig4-{name}", f"MNP over {name}", name, course))
    if layout in ("table1", "table2", "ablations", "defences", "smoke", "") and any(
        a.task == "purify" and a.ok and a.attack for a in run.answers
    ):
        drawings.append(trade_off(_summary(run)))
    return drawings
