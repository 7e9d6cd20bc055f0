from __future__ import annotations

import pytest

from unbackdoor.report.published import Published, mean, paper

WRONG = {
    "table1": {
        "none": (92.936, 99.431),
        "clp": (88.478, 21.416),
        "rnp": (91.130, 5.774),
        "nc": (91.392, 72.896),
        "i_bau": (87.687, 21.723),
    },
    "table2": {"i_bau": (81.588, 24.242), "mnp": (88.682, 4.495)},
}
"""Averages that the paper prints wrongly, as they are."""


def table(name: str) -> Published:
    found = paper(name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_printed_averages_are_those_of_the_rows_but_for_the_known_errors(name: str) -> None:
    found = table(name)
    wrong = {}
    for column in found.columns:
        printed, computed = found.printed_average(column), found.computed_average(column)
        assert printed is not None
        assert computed is not None
        if computed != pytest.approx(printed, abs=0.0051):
            wrong[column] = computed
    assert set(wrong) == set(WRONG[name])
    for column, values in wrong.items():
        assert values == pytest.approx(WRONG[name][column], abs=0.001)


def test_averages_of_detection_are_right() -> None:
    found = table("table4")
    for name, printed in found.row_averages.items():
        assert mean(found.rows[name]) == pytest.approx(printed, abs=0.0051)


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "runtime"])
def test_all_places_are_filled_with_percentages_or_seconds(name: str) -> None:
    found = table(name)
    for row in found.rows.values():
        assert len(row) == len(found.columns)
        assert all(0 <= value <= 100 for values in row for value in values)


def test_places_by_name() -> None:
    found = table("table1")
    assert found.at("fc", "rnp") == (89.39, 1.55)
    assert found.at("fc", "tsbd") is None
    assert found.at("bpp", "rnp") is None
    assert found.printed_average("tsbd") is None
    assert table("table3").printed_average("500") is None
    assert paper("table9") is None
    # 10 % in Table 3 is BadNets of Table 1.
    assert table("table3").at("all_to_one_mnp", "5000") == found.at("badnets", "mnp")
