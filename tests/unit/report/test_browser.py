"""The page of a run in a real browser: from disk, without a network, by mouse, keyboard and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from unbackdoor.report.bench_page import write_run
from unbackdoor.report.run import read_run

from .runs import make_run

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver
    from selenium.webdriver.remote.webelement import WebElement

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("matplotlib", reason="the extra plots is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("chromium and its driver are not installed", allow_module_level=True)

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    driver.get(write_run(read_run(folder), folder).page.as_uri())
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def _fresh(browser: WebDriver) -> None:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(1280, 900)
    browser.refresh()


def texts(browser: WebDriver, selector: str) -> list[str]:
    from selenium.webdriver.common.by import By

    return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]


def one(browser: WebDriver, selector: str) -> WebElement:
    from selenium.webdriver.common.by import By

    return browser.find_element(By.CSS_SELECTOR, selector)


def test_it_loads_nothing_and_says_nothing_in_the_console(browser: WebDriver) -> None:
    assert browser.get_log("browser") == []  # type: ignore[attr-defined]
    loaded = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert [name for name in browser.execute_script(loaded) if not name.startswith("data:")] == []
    assert "7 of 8" in one(browser, ".tiles").text
    assert len(texts(browser, "figure svg")) == 1


def test_tables_are_sorted_both_ways_with_missing_values_last(browser: WebDriver) -> None:
    column = "#list tbody td:nth-child(11)"
    before = texts(browser, column)
    button = one(browser, "#list thead th:nth-child(11) button")
    button.click()
    up = texts(browser, column)
    numbers = sorted(float(text) for text in before if text)
    assert [float(text) for text in up if text] == numbers
    assert up[len(numbers) :] == [""] * (len(up) - len(numbers))
    assert one(browser, "#list thead th:nth-child(11)").get_attribute("aria-sort") == "ascending"
    button.click()
    down = texts(browser, column)
    assert [float(text) for text in down if text] == numbers[::-1]
    assert down[len(numbers) :] == [""] * (len(up) - len(numbers))


def test_printed_rows_stay_below_their_measured_ones_and_averages_at_the_end(browser: WebDriver) -> None:
    button = one(browser, "#table-ours thead th:nth-child(4) button")
    button.click()
    button.click()
    heads = texts(browser, "#table-ours tbody th")
    assert heads == ["clean", "Blend", "Blend", "BadNets", "BadNets"]
    assert texts(browser, "#table-ours tbody td:nth-child(2)") == ["measured"] + ["measured", "paper"] * 2
    assert texts(browser, "#table-ours tfoot th") == ["Average"] * 3


def test_an_entry_of_a_table_opens_its_record(browser: WebDriver) -> None:
    one(browser, "#table-ours tbody button.open[data-keys=k0]").click()
    assert "badnets: mnp" in one(browser, "#detail-title").text


def test_filters_narrow_the_list_and_say_how_far(browser: WebDriver) -> None:
    from selenium.webdriver.support.ui import Select

    assert one(browser, "#matches").text == "8 of 8"
    Select(one(browser, "select[name=method]")).select_by_visible_text("ft-sam")
    assert set(texts(browser, "#list tbody td:nth-child(2)")) == {"ft-sam"}
    one(browser, "input[name=text]").send_keys("BLEND")
    assert texts(browser, "#list tbody th") == ["blend"]
    assert one(browser, "#matches").text == "1 of 8"


def test_an_answer_opens_and_closes_by_keyboard_alone(browser: WebDriver) -> None:
    from selenium.webdriver.common.keys import Keys

    button = one(browser, "#list tbody tr[data-method=mnp] button.open")
    browser.execute_script("arguments[0].focus()", button)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    dialog = one(browser, "dialog")
    assert dialog.get_attribute("open") is not None
    assert "badnets: mnp" in one(browser, "#detail-title").text
    for words in ("attack success", "1.50 %", "guarded walk: 3 of 3", "--only 'badnets mnp"):
        assert words in dialog.text
    assert "guard.per filter" not in dialog.text
    one(browser, "dialog summary").send_keys(Keys.ENTER)
    assert "guard.per filter" in dialog.text
    assert len(texts(browser, ".curves figcaption")) == 2
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    assert browser.switch_to.active_element == button


def test_a_refusal_shows_its_reason_as_text_never_as_markup(browser: WebDriver) -> None:
    one(browser, "#list tr[data-status=refused] button.open").click()
    assert "<b>no</b> batch norms" in one(browser, "#detail-body pre").text


def test_it_fits_a_phone(browser: WebDriver) -> None:
    # No window of Chromium is as narrow as a phone.
    metrics = {"width": 375, "height": 812, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.execute_script("return document.documentElement.clientWidth") == 375
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) <= 0
    assert not one(browser, "#list th.extra").is_displayed()
    one(browser, "#list button.open").click()
    assert one(browser, "dialog").size["width"] <= 375
    assert browser.execute_script(wide) <= 0
