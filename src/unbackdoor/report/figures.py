"""The figures of a benchmark, drawn by matplotlib: files (SVG, PNG) and inline SVG of the page.

The file is drawn in the colours of paper, the inline form in those of the page, light or dark.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unbackdoor.extras import require
from unbackdoor.report import plots
from unbackdoor.report.layouts.common import title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from unbackdoor.report.layouts.filters import Cloud
    from unbackdoor.report.layouts.sweeps import Line
    from unbackdoor.report.tables import Table


@dataclass(frozen=True)
class Colours:
    """What lines and letters are drawn in."""

    ink: str
    muted: str


PAGE = Colours(plots.INK, plots.MUTED)
"""Placeholders that ``plots.inline`` replaces by the variables of the page."""

PAPER = Colours("#1b2128", "#5d6876")
"""For files."""

LINE_COLOURS = ("#2563b8", "#d9467a", "#0f8a6d", "#b3700a", "#7a52c7", "#6b7280", "#c2410c", "#0891b2")
"""Of middle lightness, so that they show on white and on black."""

MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Drawing:
    """A figure before it is drawn.

    Args:
        name: For file names.
        title: Caption.
        description: What it shows, for those who do not see it.
        size: Inches.
        draw: Draws into an empty figure.
    """

    name: str
    title: str
    description: str
    size: tuple[float, float]
    draw: Callable[[Figure, Colours], None]

    def inline(self) -> str:
        """Return the text of an inline SVG element whose colours are those of the page."""
        return plots.inline(
            self._saved("svg", PAGE, transparent=True).decode(),
            name=f"figure-{self.name}", title=self.title, description=self.description,
        )  # fmt: skip

    def svg(self) -> str:
        """Return an SVG file."""
        return self._saved("svg", PAPER, facecolor="white").decode()

    def png(self) -> bytes:
        """Return a PNG file."""
        return self._saved("png", PAPER, facecolor="white", dpi=200)

    def _saved(self, kind: str, colours: Colours, **options: Any) -> bytes:  # noqa: ANN401 - matplotlib's
        matplotlib = require("matplotlib", extra="plots")
        figures = require("matplotlib.figure", extra="plots")
        chosen = {plots.INK: colours.ink, plots.MUTED: colours.muted}
        style = {
            name: chosen.get(value, value) if isinstance(value, str) else value
            for name, value in plots.STYLE.items()
        }
        with matplotlib.rc_context(style):
            figure: Figure = figures.Figure(figsize=self.size, layout="constrained")
            self.draw(figure, colours)
            output = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(output, format=kind, metadata=metadata, **options)
        return output.getvalue()


def filter_clouds(clouds: Sequence[Cloud]) -> Drawing:
    """Draw BLC over CLC, a point a filter, coloured by its norm: Fig. 1 of the MNP paper."""
    models = list(dict.fromkeys(cloud.model for cloud in clouds))
    depths = list(dict.fromkeys(cloud.depth for cloud in clouds))

    def draw(figure: Figure, colours: Colours) -> None:
        grid = figure.subplots(len(depths), len(models), squeeze=False)
        for row, depth in enumerate(depths):
            for column, model in enumerate(models):
                axes = grid[row][column]
                here = [c for c in clouds if (c.model, c.depth) == (model, depth)]
                points = _cloud(axes, here[0], colours) if here else None
                axes.set_title(f"{title_of(model)}, {depth}", color=colours.ink)
                if column == 0:
                    axes.set_ylabel("BLC")
                if row == len(depths) - 1:
                    axes.set_xlabel("CLC")
                if points is not None:
                    bar = figure.colorbar(points, ax=axes, fraction=0.06, pad=0.02)
                    bar.outline.set_visible(False)
                    bar.ax.tick_params(labelsize=7)

    total = sum(len(cloud.clc) for cloud in clouds)
    return Drawing(
        name="fig1",
        title="Clean and backdoor loss change of each filter, coloured by the norm of its weights",
        description=f"{total} filters of {len(models)} models; a panel for each model and depth.",
        size=(2.6 * len(models) + 0.4, 2.4 * len(depths)),
        draw=draw,
    )


def _cloud(axes: Axes, cloud: Cloud, colours: Colours) -> Any:  # noqa: ANN401 - an artist
    order = sorted(range(len(cloud.norm)), key=cloud.norm.__getitem__)  # large norms on top
    x, y, norm = ([values[i] for i in order] for values in (cloud.clc, cloud.blc, cloud.norm))
    axes.axhline(0, color=colours.muted, linewidth=0.6, zorder=0)
    axes.axvline(0, color=colours.muted, linewidth=0.6, zorder=0)
    for scale, axis, values in ((axes.set_xscale, axes.xaxis, x), (axes.set_yscale, axes.yaxis, y)):
        # Most filters do next to nothing: linear about them, logarithmic beyond.
        sizes = sorted(abs(value) for value in values)
        linear = max(sizes[int(0.7 * (len(sizes) - 1))], 1e-4)
        scale("symlog", linthresh=linear, linscale=1)
        axis.set_ticks(_ticks(values, linear))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=7)
    axes.minorticks_off()
    return axes.scatter(x, y, c=norm, s=7, cmap="plasma_r", linewidths=0, alpha=0.85, rasterized=len(x) > 600)


def _ticks(values: Sequence[float], linear: float) -> list[float]:
    """Return 0 and the outermost power of ten of each side, where that is far enough from 0 to be read."""

    def place(value: float) -> float:
        size = abs(value) / linear
        return math.copysign(size if size < 1 else 1 + math.log10(size), value)

    span = place(max(*values, 0.0)) - place(min(*values, 0.0))
    ticks = [0.0]
    for sign in (-1, 1):
        largest = max(sign * value for value in values)
        if largest > 0:
            tick = sign * 10.0 ** math.floor(math.log10(largest))
            ticks += [tick] if abs(place(tick)) > 0.15 * span else []
    return ticks


def sweep(name: str, title: str, quantity: str, lines: Sequence[Line]) -> Drawing:
    """Draw CA and ASR over a quantity, a line a model and setting; spaced evenly, as in the paper."""
    xs = sorted({x for line in lines for x in line.xs})

    def draw(figure: Figure, colours: Colours) -> None:
        panels = figure.subplots(1, 2)
        for axes, values, label in zip(panels, ("accuracy", "success"), ("CA", "ASR"), strict=True):
            for number, line in enumerate(lines):
                axes.plot(
                    [xs.index(x) for x in line.xs], getattr(line, values), label=line.label,
                    color=LINE_COLOURS[number % len(LINE_COLOURS)], marker=MARKERS[number % len(MARKERS)],
                    markersize=4, linewidth=1.2, linestyle="--" if "paper" in line.label else "-",
                )  # fmt: skip
            axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
            axes.set_xlabel(quantity)
            axes.set_ylabel(f"{label} (%)")
            axes.set_ylim(-3, 103)
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2,
            frameon=False,
            fontsize=8,
        )

    return Drawing(
        name=name,
        title=title,
        description=f"CA and ASR, {len(lines)} lines over {len(xs)} values of {quantity}.",
        size=(7.2, 3.0 + 0.16 * len(lines)),
        draw=draw,
    )


def trade_off(summary: Table) -> Drawing:
    """Draw the ASR that methods leave over the clean accuracy that they cost."""
    points = [
        (row[0].text, row[5].values[0], row[2].values[0])
        for row in summary.rows
        if not math.isnan(row[5].values[0]) and not math.isnan(row[2].values[0])
    ]

    def draw(figure: Figure, colours: Colours) -> None:
        axes = figure.add_subplot()
        for number, (name, x, y) in enumerate(points):
            axes.plot(
                [x], [y], marker=MARKERS[number % len(MARKERS)], markersize=6, linestyle="none", label=name,
                color=LINE_COLOURS[number % len(LINE_COLOURS)],
            )  # fmt: skip
        axes.set_xlabel("clean accuracy lost (points)")
        axes.set_ylabel("attack success left (%)")
        axes.set_ylim(-3, 103)
        axes.margins(x=0.08)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)

    best = min(points, key=lambda point: point[2], default=("", 0.0, 0.0))
    return Drawing(
        name="trade-off",
        title="What methods leave of the attack, and what they cost",
        description=f"{len(points)} methods; the lowest attack success is {best[2]:.1f} % by {best[0]}.",
        size=(6.4, 3.4),
        draw=draw,
    )
