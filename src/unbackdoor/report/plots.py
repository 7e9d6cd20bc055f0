"""The plots of a report, drawn by matplotlib and returned as the text of inline SVG elements.

Every colour is a CSS variable of the page (``--ink``, ``--accent`` ...), so that plots follow light, dark and
printed pages; every plot is as wide as a phone, so that its text stays readable there. The argument ``key``
keeps the ids of several plots on one page apart.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

from unbackdoor.extras import require
from unbackdoor.report.documents import LayerRow, Scatter, Suppression, WalkStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.7, 3.1
"""Size in inches; at 72 points an inch this is about the width of a phone."""

MAX_VECTOR_POINTS = 3000
"""A scatter of more points is drawn as pixels: the page would grow by some 30 bytes a point."""

MAX_BARS = 24
"""More bars than this are cut to the largest, or the first, ones."""

MAX_DRAWN = 1e30
"""Points at larger numbers, which no measurement gives, are left out."""

Numbers = Sequence[float | None]

# Colours that occur nowhere else, replaced by CSS variables in the finished SVG.
INK, MUTED, ACCENT, BAD = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "--ink", MUTED: "--muted", ACCENT: "--accent", BAD: "--bad"}

DEPTH_COLOURS = ("#2f7ed8", "#8a63d2", "#d9467a", "#e8853a")
"""From the first layer to the last: of middle lightness, so that they show on white and on black."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unbackdoor",
    "text.parse_math": False,  # names come from untrusted files, and a $ in them is no formula
    "font.size": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.0,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


def scatter(data: Scatter, *, key: str = "plot") -> tuple[str, str]:
    """Draw saliency over magnitude, one point a filter, coloured by layer depth.

    Returns:
        Two plots on the same axes: before and after clean suppression.
    """
    return (
        _scatter(data, data.magnitude, data.saliency, data.rho, when="before", key=key),
        _scatter(data, data.magnitude_after, data.saliency_after, data.rho_after, when="after", key=key),
    )


def _scatter(data: Scatter, x: Numbers, y: Numbers, rho: float | None, *, when: str, key: str) -> str:
    saliency = _known((*data.saliency, *data.saliency_after))

    def draw(axes: Axes) -> None:
        _points(axes, data, x, y)
        _signed_log(axes, saliency, linear=_most(saliency))
        _pad(axes, _known((*data.magnitude, *data.magnitude_after)))
        axes.set_xlabel("filter magnitude")
        axes.set_ylabel("saliency (rise of the clean loss)")

    correlation = "" if rho is None else f" Their rank correlation is {rho:.2f}."
    return _plot(
        draw,
        name=f"{key}-scatter-{when}",
        title=f"Magnitude and saliency {when} suppression",
        description=f"{len(data.layer_of)} filters in {len(data.layers)} layers.{correlation}",
    )


def class_share(
    suppression: Suppression, names: Sequence[str], target: int | None, *, key: str = "plot"
) -> str:
    """Draw which classes the suppressed model sends the clean images to; ``target`` is highlighted."""
    share = suppression.class_share
    order = sorted(range(len(share)), key=lambda index: -share[index])[: MAX_BARS // 2]
    labels = [names[index] if index < len(names) else f"class {index}" for index in order]

    def draw(axes: Axes) -> None:
        colours = [BAD if index == target else ACCENT for index in order]
        _bars(axes, [share[index] for index in order], labels, colours)
        axes.axvline(1 / len(share), color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(_percent)
        axes.set_xlabel("share of the clean images")

    return _plot(
        draw,
        name=f"{key}-class-share",
        title="Classes predicted by the suppressed model",
        description=f"Largest: {labels[0]} with {share[order[0]]:.0%}; even shares are {1 / len(share):.1%}.",
        height=_height_of(len(order)),
    )


def shift_share(suppression: Suppression, *, key: str = "plot") -> str:
    """Draw how far the predictions of the suppressed model are from the true classes, modulo classes."""
    share = suppression.shift_share
    order = sorted(range(len(share)), key=lambda index: -share[index])[: MAX_BARS // 2]
    labels = ["true class" if index == 0 else f"true class + {index}" for index in order]

    def draw(axes: Axes) -> None:
        _bars(axes, [share[index] for index in order], labels, [ACCENT] * len(order))
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(_percent)
        axes.set_xlabel("share of the clean images")

    return _plot(
        draw,
        name=f"{key}-shift-share",
        title="Predicted class relative to the true class",
        description=f"Largest: {labels[0]} with {share[order[0]]:.0%}.",
        height=_height_of(len(order)),
    )


def accuracy_course(suppression: Suppression, *, key: str = "plot") -> str:
    """Draw the clean accuracy during suppression."""
    accuracy = suppression.accuracy
    known = len(suppression.steps) == len(accuracy)
    moments, unit = (suppression.steps, "steps") if known else (range(len(accuracy)), "checks")

    def draw(axes: Axes) -> None:
        axes.plot(moments, accuracy, color=ACCENT, linewidth=1.5, marker="o", markersize=3)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(_percent)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(f"{unit} of suppression")
        axes.set_ylabel("clean accuracy")

    return _plot(
        draw,
        name=f"{key}-accuracy-course",
        title="Clean accuracy during suppression",
        description=f"From {accuracy[0]:.0%} to {accuracy[-1]:.0%} in {moments[-1]} {unit}.",
    )


def removed_by_layer(layers: Sequence[LayerRow], *, key: str = "plot") -> str:
    """Draw how many filters each layer lost; of many layers only those that lost most."""
    rows = list(layers)
    if len(rows) > MAX_BARS:
        most = sorted(rows, key=lambda row: -row.removed)[:MAX_BARS]
        rows = [row for row in rows if row.removed and row in most]
    total, touched = sum(row.removed for row in layers), sum(row.removed > 0 for row in layers)

    def draw(axes: Axes) -> None:
        bars = _bars(axes, [row.removed for row in rows], [row.name for row in rows], [ACCENT] * len(rows))
        for row, y in zip(rows, bars, strict=True):
            axes.annotate(
                f"{row.removed} of {row.filters}",
                (row.removed, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=MUTED,
            )
        axes.margins(x=0.3)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("removed filters")

    return _plot(
        draw,
        name=f"{key}-removed-by-layer",
        title="Removed filters by layer, from input to output",
        description=f"{total} filters removed in {touched} of {len(layers)} layers.",
        height=_height_of(len(rows)),
    )


def walk(steps: Sequence[WalkStep], *, key: str = "plot") -> str:
    """Draw the change of the clean loss per candidate: dots were removed, crosses kept."""
    changes = _known([step.loss_change for step in steps])
    removed = _known([step.loss_change for step in steps if not step.kept])

    def draw(axes: Axes) -> None:
        for kept, colour, marker, label in ((False, ACCENT, "o", "removed"), (True, BAD, "x", "kept")):
            chosen = [
                (step.rank + 1, step.loss_change)
                for step in steps
                if step.kept is kept and _drawable(step.loss_change)
            ]
            axes.plot(
                [rank for rank, _ in chosen],
                [change for _, change in chosen],
                color=colour,
                marker=marker,
                markersize=4,
                linestyle="none",
                label=f"{label} ({len(chosen)})",
            )
        axes.axhline(0, color=MUTED, linewidth=0.6)
        _signed_log(axes, changes, linear=max(map(abs, removed), default=0.0))
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("candidate, most suspicious first")
        axes.set_ylabel("change of the clean loss")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)

    kept = sum(step.kept for step in steps)
    return _plot(
        draw,
        name=f"{key}-walk",
        title="Change of the clean loss for each candidate filter",
        description=f"{len(steps) - kept} candidates removed, {kept} kept.",
    )


def _plot(
    draw: Callable[[Axes], None], *, name: str, title: str, description: str, height: float = HEIGHT
) -> str:
    matplotlib = require("matplotlib", extra="plots")
    figures = require("matplotlib.figure", extra="plots")
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser draws the text: that matplotlib's own font lacks a letter only blurs its layout.
        warnings.filterwarnings("ignore", message="Glyph")
        figure: Figure = figures.Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, dpi=180)
    return inline(text.getvalue(), name=name, title=title, description=description)


def inline(svg: str, *, name: str, title: str, description: str) -> str:
    """Make a stand-alone SVG file fit for a page: no prolog, no outside names, unique ids, CSS colours."""
    size = re.search(r'viewBox="([^"]+)"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r' d="[^"]*"', lambda m: _shorter(m[0]), body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    return (
        f'<svg class="plot" role="img" viewBox="{size[1] if size else ""}" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(_printable(description))}</desc>{body}'
    )


def _shorter(path: str) -> str:
    path = re.sub(r"(\.\d\d)\d+", r"\1", path)
    path = re.sub(r"M (\S+ \S+) \nL \1 (?:\n|(?=\"))", r"M\1h0", path)  # the points of a scatter
    return path.replace(" \n", " ")


def _points(axes: Axes, data: Scatter, magnitude: Numbers, saliency: Numbers) -> None:
    paths = require("matplotlib.path", extra="plots")
    patches = require("matplotlib.patches", extra="plots")
    colours = require("matplotlib.colors", extra="plots")
    depth = colours.LinearSegmentedColormap.from_list("depth", DEPTH_COLOURS)
    dense = len(data.layer_of) > MAX_VECTOR_POINTS
    drawn: dict[int, list[tuple[float, float]]] = {}
    for layer, x, y in zip(data.layer_of, magnitude, saliency, strict=True):
        if _drawable(x) and _drawable(y):
            drawn.setdefault(layer, []).append((x, y))
    for index, points in sorted(drawn.items()):
        colour = colours.to_hex(depth(index / max(1, len(data.layers) - 1)))
        if dense:
            flat = ([x for x, _ in points], [y for _, y in points])
            axes.plot(*flat, "o", color=colour, markersize=2, markeredgewidth=0, alpha=0.6, rasterized=True)
            continue
        # A line of no length with round caps is a dot: a quarter of the bytes of a marker.
        vertices = [point for point in points for _ in range(2)]
        codes = [paths.Path.MOVETO, paths.Path.LINETO] * len(points)
        dots = patches.PathPatch(
            paths.Path(vertices, codes),
            fill=False,
            edgecolor=colour,
            linewidth=3,
            capstyle="round",
            alpha=0.6,
        )
        dots.get_path().should_simplify = False
        axes.add_patch(dots)


def _bars(axes: Axes, values: Sequence[float], labels: Iterable[str], colours: Sequence[str]) -> range:
    rows = range(len(values))
    axes.barh(rows, values, color=colours, height=0.7)
    axes.set_yticks(rows, [_label(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(values) - 0.4, -0.6)
    return rows


def _signed_log(axes: Axes, values: Sequence[float], *, linear: float) -> None:
    """Make the y axis linear between plus and minus ``linear``, logarithmic beyond; show ``values``."""
    low, high = min((0.0, *values)), max((0.0, *values))
    largest = max(-low, high)
    if largest < 1 / MAX_DRAWN:
        axes.set_ylim(-1.0, 1.0)
        return
    linear = max(linear, largest / 1000)
    axes.set_yscale("symlog", linthresh=linear, linscale=1.5)
    ends = [low * 1.15 - linear / 10, high * (1.15 if high <= linear else 2.0) + linear / 10]
    axes.set_ylim(*ends)
    decades = [10.0**power for power in range(-12, 13) if linear / 3 <= 10.0**power <= largest * 2]
    ticks = [0.0, *decades, *(-value for value in decades)]
    axes.set_yticks([tick for tick in ticks if ends[0] <= tick <= ends[1]])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _most(values: Sequence[float]) -> float:
    """Return the size that nine tenths of ``values`` do not exceed."""
    sizes = sorted(abs(value) for value in values)
    return sizes[int(0.9 * (len(sizes) - 1))] if sizes else 0.0


def _known(values: Numbers) -> list[float]:
    return [value for value in values if _drawable(value)]


def _drawable(value: float | None) -> TypeGuard[float]:
    # The arithmetic of axes overflows well before the numbers do.
    return value is not None and abs(value) < MAX_DRAWN


def _pad(axes: Axes, values: Sequence[float]) -> None:
    if values:
        low, high = min(values), max(values)
        gap = (high - low) * 0.04 or 0.5
        axes.set_xlim(low - gap, high + gap)


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.0f} %"


def _height_of(bars: int) -> float:
    return max(1.5, 0.7 + 0.21 * bars)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _label(text: str, limit: int = 22) -> str:
    text = " ".join(_printable(text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
