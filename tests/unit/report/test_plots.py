from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from unbackdoor.report import plots
from unbackdoor.report.documents import LayerRow, PurifyDocument, ScanDocument, WalkStep

matplotlib = pytest.importorskip("matplotlib", exc_type=ImportError)

HOSTILE = "<script>alert(1)</script> $\\frac$ \x00\n漢字 &amp;"


def all_plots(scan: ScanDocument, purify: PurifyDocument) -> dict[str, str]:
    assert scan.scatter is not None
    assert scan.suppression is not None
    before, after = plots.scatter(scan.scatter)
    return {
        "scatter before": before,
        "scatter after": after,
        "class share": plots.class_share(scan.suppression, scan.data.class_names, 3),
        "shift share": plots.shift_share(scan.suppression),
        "accuracy": plots.accuracy_course(scan.suppression),
        "layers": plots.removed_by_layer(purify.layers),
        "walk": plots.walk(purify.walk),
    }


def test_plots_are_valid_and_accessible_and_follow_the_page(
    scan: ScanDocument, purify: PurifyDocument
) -> None:
    before = dict(matplotlib.rcParams)
    for name, svg in all_plots(scan, purify).items():
        root = ElementTree.fromstring(svg)
        title, description = root.find("title"), root.find("desc")
        assert title is not None, name
        assert title.text, name
        assert description is not None, name
        assert description.text, name
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", root.get("viewBox", ""))
        assert "var(--ink)" in svg
        assert "http" not in svg, name
        assert "#010101" not in svg
        assert "background" not in svg
    assert dict(matplotlib.rcParams) == before


def test_ids_are_unique_and_references_point_somewhere(scan: ScanDocument, purify: PurifyDocument) -> None:
    text = "".join(all_plots(scan, purify).values())
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_few_points_stay_vectors_and_many_become_pixels(scan: ScanDocument) -> None:
    assert scan.scatter is not None
    content = scan.scatter.model_dump()
    columns = ("layer_of", "magnitude", "saliency", "magnitude_after", "saliency_after")
    few = type(scan.scatter).model_validate(content | {key: content[key][:1000] for key in columns})
    vectors, _ = plots.scatter(few)
    pixels, _ = plots.scatter(scan.scatter)
    assert "<image" not in vectors
    assert vectors.count("h0") == 1000
    assert len(vectors) < 60_000
    assert "data:image/png;base64" in pixels
    assert len(pixels) < 300_000


def test_missing_and_constant_numbers_can_be_drawn(scan: ScanDocument) -> None:
    assert scan.scatter is not None
    content = scan.scatter.model_dump() | {"layers": ["a", "b"], "layer_of": [0, 1], "rho": None}
    columns = ("magnitude", "saliency", "magnitude_after", "saliency_after")
    for values in ([None, None], [1.0, None], [0.0, 0.0], [2.0, 2.0], [1e-30, 1e29], [1e308, -1e308]):
        scatter = type(scan.scatter).model_validate(content | dict.fromkeys(columns, values))
        for svg in plots.scatter(scatter):
            ElementTree.fromstring(svg)


def test_names_are_text_and_nothing_else(scan: ScanDocument) -> None:
    assert scan.suppression is not None
    rows = [LayerRow(name=HOSTILE, filters=4, removed=2), LayerRow(name="b" * 500, filters=4, removed=0)]
    for svg in (plots.class_share(scan.suppression, [HOSTILE] * 10, 0), plots.removed_by_layer(rows)):
        root = ElementTree.fromstring(svg)
        assert "<script" not in svg
        assert any("<script>alert" in (text.text or "") for text in root.iter("text"))
        assert "b" * 30 not in svg


def test_the_target_alone_is_highlighted(scan: ScanDocument) -> None:
    assert scan.suppression is not None
    with_target = plots.class_share(scan.suppression, scan.data.class_names, 3)
    without = plots.class_share(scan.suppression, scan.data.class_names, None)
    assert with_target.count("var(--bad)") == 1
    assert "var(--bad)" not in without
    assert "Largest: cat with 74%" in with_target


@pytest.mark.parametrize("classes", [1, 2, 200])
def test_any_number_of_classes_fits(scan: ScanDocument, classes: int) -> None:
    assert scan.suppression is not None
    suppression = scan.suppression.model_copy(update={"class_share": (1 / classes,) * classes})
    svg = plots.class_share(suppression, (), None)
    assert svg.count("class ") - svg.count("<svg class ") == min(classes, plots.MAX_BARS // 2) + 1


def test_deep_networks_show_the_layers_that_lost_most() -> None:
    rows = [LayerRow(name=f"layer-{index}.", filters=64, removed=index % 3) for index in range(60)]
    svg = plots.removed_by_layer(rows)
    assert "layer-2." in svg
    assert "layer-0." not in svg
    assert svg.count("2 of 64") == 20


@pytest.mark.parametrize(
    "steps",
    [
        [WalkStep(rank=0, layer="a", filter=0, loss_change=0.0, kept=False)],
        [WalkStep(rank=0, layer="a", filter=0, loss_change=5.0, kept=True)],
        [WalkStep(rank=3, layer="a", filter=0, loss_change=None, kept=True)],
        [],
    ],
)
def test_short_walks_can_be_drawn(steps: list[WalkStep]) -> None:
    ElementTree.fromstring(plots.walk(steps))


def test_equal_input_gives_equal_text(scan: ScanDocument) -> None:
    assert scan.suppression is not None
    suppression = scan.suppression
    assert plots.accuracy_course(suppression) == plots.accuracy_course(suppression)
