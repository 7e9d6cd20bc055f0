from __future__ import annotations

import json
from typing import Any

from unbackdoor.report.documents import EvaluateDocument, PurifyDocument, ScanDocument
from unbackdoor.report.values import (
    MAX_DEPTH,
    MAX_LISTED,
    Grid,
    Shown,
    chance,
    duration,
    entries,
    interval,
    number,
    percent,
)


def one(document: ScanDocument | PurifyDocument, **values: object) -> Shown:
    (shown,) = entries(values, document)
    return shown


def test_numbers_are_short() -> None:
    assert percent(0.94118) == "94.1\u202f%"
    assert percent(None) == "–"
    assert [number(value) for value in (None, 0, 2.0, 4800, -0.4567, 1.23e-7, 1e300)] == [
        "–",
        "0",
        "2",
        "4,800",
        "−0.457",
        "1.23e-07",
        "1e+300",
    ]
    assert [chance(value) for value in (None, 0.0, 0.0421, 1.0)] == [
        "not calibrated",
        "< 0.001",
        "0.042",
        "1.000",
    ]
    assert [duration(value) for value in (0.04, 9.94, 59.4, 200.2, 7260)] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "3 min 20 s",
        "2 h 1 min",
    ]


def test_intervals_name_their_images(scan: ScanDocument) -> None:
    assert interval(scan.clean_accuracy) == "91.8–95.9\u202f%, n = 500"


def test_values_become_text_or_images(scan: ScanDocument, before: EvaluateDocument) -> None:
    image = before.examples[0].clean_png
    rows = entries(
        {
            "mask_png": image,
            "fake_png": "not an image",
            "top_classes": [1, 0.123456, "cat", None],
            "long": "x" * 5000,
            "converged": True,
            "empty": [],
            "nothing": {},
        },
        scan,
    )
    assert (rows[0].name, rows[0].image, rows[0].text) == ("mask", image, "")
    assert [row.text for row in rows[1:3]] == ["not an image", "1, 0.123, cat, –"]
    assert rows[3].text.endswith("… (5,000 characters in all)")
    assert [row.text for row in rows[4:]] == ["yes", "none", "none"]


def test_lists_of_all_classes_name_them(scan: ScanDocument) -> None:
    grid = one(scan, target_concentration=[0.77, *[0.0256] * 9]).grid
    assert grid is not None
    assert (grid.head, grid.whole) == (("class", "target concentration"), 10)
    assert grid.rows[:2] == (("0 (airplane)", "0.77"), ("1 (automobile)", "0.0256"))
    assert grid.rows[9][0] == "9 (truck)"
    assert one(scan, mask_norm_per_class=[1] * 10).grid is not None
    both = one(scan, statistics={"norm": [1] * 10, "mean": [None] * 10}).grid
    assert both is not None
    assert (both.head, both.rows[3]) == (("class", "norm", "mean"), ("3 (cat)", "1", "–"))
    shifts = one(scan, shift_concentration=[0.5] * 9).grid
    assert shifts is not None
    assert (shifts.head[0], shifts.rows[0][0], shifts.rows[8][0]) == ("classes further", "+1", "+9")


def test_lists_that_are_about_something_else_are_given_no_classes(scan: ScanDocument) -> None:
    # The course of ten epochs is no list of ten classes, nor are nine values.
    assert one(scan, accuracy=[0.5] * 10).text == ", ".join(["0.5"] * 10)
    assert one(scan, class_share=[0.5] * 9).text == ", ".join(["0.5"] * 9)
    assert [each.name for each in one(scan, statistics={"norm": [1] * 9}).parts] == ["norm"]
    unnamed = scan.model_copy(update={"data": scan.data.model_copy(update={"class_names": ()})})
    grid = one(unnamed, margins=[1] * 10).grid
    assert grid is not None
    assert grid.rows[3] == ("3", "1")


def test_alike_things_are_rows_of_a_table(scan: ScanDocument) -> None:
    success = {"value": 0.96, "low": 0.87, "high": 0.99, "successes": 52, "n": 54}
    grid = one(
        scan,
        refined=[{"target_class": 3, "l1_pixels": 1.8394, "held_out_success": success}, {"target_class": 12}],
    ).grid
    space = "\u202f"
    assert grid == Grid(
        ("target class", "l1 pixels", "held out success"),
        (("3 (cat)", "1.84", f"96.0{space}% (87.0–99.0{space}%, n = 54)"), ("12", "", "")),
        2,
    )
    assert one(scan, success={**success, "successes": 60}).parts  # no rate


def test_all_else_is_nested(scan: ScanDocument) -> None:
    shown = one(scan, scan={"search": {"first_steps": 120, "betas": [0.5, 0.9]}, "fast": False})
    search, fast = shown.parts
    assert (shown.name, search.name, fast) == ("scan", "search", Shown("fast", text="no"))
    assert search.parts == (Shown("first steps", text="120"), Shown("betas", text="0.5, 0.9"))
    pairs = one(scan, pairs=[[1, 2], [3]])
    assert pairs.parts == (Shown("1", text="1, 2"), Shown("2", text="3"))
    assert [part.name for part in one(scan, mixed=[{"a": {"b": [{"c": {"d": 1}}]}}, 2]).parts] == ["1", "2"]


def test_what_is_long_or_deep_is_cut(scan: ScanDocument) -> None:
    many = MAX_LISTED + 50
    grid = one(scan, triggers=[{"steps": 1}] * many).grid
    assert grid is not None
    assert (len(grid.rows), grid.whole) == (MAX_LISTED, many)
    nested = one(scan, options={str(i): [i, []] for i in range(many)})
    assert (len(nested.parts), nested.whole) == (MAX_LISTED, many)
    deep: Any = [1.23456]
    for _ in range(MAX_DEPTH + 20):
        deep = {"in": deep, "and": {"x": 1}}
    found = one(scan, deep=deep)
    for _ in range(MAX_DEPTH):
        found = found.parts[0]
    assert "1.23," not in found.text
    assert found.text.startswith('{"in": {"in": ')
    json.loads(found.text)
