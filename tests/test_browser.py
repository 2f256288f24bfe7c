"""The report of real runs in a real browser: opened from a file, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import run, write_data

import report

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
SMALL = {"slices": 20, "volumes": 8, "prototypes": 3, "pictures": 2, "queries": 2, "examples": 1, "map": "pca"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    chosen = Options()
    chosen.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        chosen.add_argument(flag)
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=chosen, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """The report of two runs on tiny data."""
    out = tmp_path_factory.mktemp("phantoms")
    data = write_data(out / "data")
    (data / "Volumes").rename(data / 'V"o<i>lumes')
    for script in ("ssl_swav2D", "ssl_swav3D"):
        run(script, data, out, epochs=2)
    runs = [str(out / "runs" / script) for script in ("ssl_swav2D", "ssl_swav3D")]
    report.main(report.Config(runs, str(out / "report.html"), **SMALL))
    return out / "report.html"


@pytest.fixture
def page(browser, phantoms) -> webdriver.Chrome:
    opened(browser, phantoms)
    return browser


def opened(browser, path: Path, width: int = 1200, dark: bool = False) -> None:
    shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
    features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    media = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get(path.as_uri())


def draw_all(browser) -> int:
    """Open what is folded, draw what is drawn when it comes into sight; the number of figures."""
    browser.execute_script("all('details').forEach((d) => (d.open = true)); all('.plot').forEach(draw);")
    return len(browser.find_elements(By.CSS_SELECTOR, ".plot .main-svg:first-child"))


def shown(browser, selector: str) -> list:
    return [e for e in browser.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]


def button(browser, key: str, value: str):
    found = browser.find_elements(By.CSS_SELECTOR, f".filters button[data-key={key}]")
    return next(b for b in found if b.get_attribute("data-value") == value)


def check_complete(browser) -> None:
    """No error in the console, every picture there, every figure drawn, nothing asked of any network."""
    figures = draw_all(browser)
    assert figures == len(browser.find_elements(By.CSS_SELECTOR, ".plot")) > 0
    assert browser.get_log("browser") == []
    empty = "return [...document.images].filter((i) => !(i.complete && i.naturalWidth > 0)).map((i) => i.outerHTML)"
    assert browser.execute_script(empty) == []
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in asked if not name.startswith(("data:", "blob:"))] == []


def test_the_page_is_complete(page):
    check_complete(page)


def test_a_click_filters_by_data_set(page):
    button(page, "dataset", "Images").click()
    sets = {e.get_attribute("data-dataset") for e in shown(page, ".prototype .picture")}
    assert sets == {"Images"}
    assert button(page, "dataset", "Images").get_attribute("aria-pressed") == "true"
    draw_all(page)
    visible = page.execute_script(
        "return all('.map').flatMap((m) => m.data.filter((t) => t.visible === true).map((t) => t.meta))"
    )
    assert set(visible) == {"Images"}
    button(page, "dataset", "").click()
    assert {e.get_attribute("data-dataset") for e in shown(page, ".prototype .picture")} == {"Images", 'V"o<i>lumes'}


def test_a_click_filters_by_run_level_and_prototype(page):
    everything = len(shown(page, ".prototype"))
    button(page, "run", "ssl_swav3D").click()
    of_run = len(shown(page, ".prototype"))
    button(page, "level", "inter").click()
    of_level = len(shown(page, ".prototype"))
    assert everything > of_run > of_level > 0
    button(page, "run", "").click()
    button(page, "level", "").click()
    only = shown(page, "button.only")[0]
    only.click()
    wanted = only.get_attribute("data-value")
    assert {e.get_attribute("data-prototype") for e in shown(page, ".prototype")} == {wanted}
    count = len(shown(page, ".prototype"))
    assert page.find_element(By.ID, "status").text == f"{count} prototype{'s' * (count != 1)} shown"
    only.click()
    assert len(shown(page, ".prototype")) == everything


def test_the_table_shows_differing_options_until_all_are_asked_for(page):
    page.execute_script("all('details').forEach((d) => (d.open = true))")
    rows = shown(page, ".options tbody tr")
    assert rows
    assert all("differs" in row.get_attribute("class") for row in rows)
    page.find_element(By.ID, "differences").click()
    assert len(shown(page, ".options tbody tr")) > len(rows)


def test_the_keyboard_reaches_everything_in_order(page):
    page.execute_script("document.body.focus()")

    def press(key: str) -> dict:
        page.switch_to.active_element.send_keys(key)
        return page.execute_script(
            "const e = document.activeElement, o = getComputedStyle(e);"
            "return {text: e.textContent.trim(), id: e.id, outline: o.outlineStyle, kind: e.className}"
        )

    order = [press(Keys.TAB) for _ in range(4)]
    assert [e["text"] for e in order] == ["Skip to the content", "Dark", "Runs", "Options"]
    assert all(e["outline"] != "none" for e in order)
    first = shown(page, ".prototype .picture")[:2]
    page.execute_script("arguments[0].focus()", first[0])
    assert press(Keys.ARROW_RIGHT)["kind"] == "picture"
    assert page.switch_to.active_element == first[1]
    press(Keys.ARROW_LEFT)
    assert page.switch_to.active_element == first[0]
    press(Keys.ENTER)
    dialog = page.find_element(By.ID, "item")
    assert dialog.is_displayed()
    assert first[0].get_attribute("data-label") in dialog.text
    press(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert page.switch_to.active_element == first[0]


def test_a_point_of_the_map_shows_its_item(page):
    draw_all(page)
    page.execute_script(
        "const m = document.querySelector('.map'); m.emit('plotly_click', {points: [{...m.data[0], data: m.data[0],"
        "customdata: m.data[0].customdata[0]}]})"
    )
    label = page.execute_script("return document.querySelector('.map').data[0].customdata[0][1]")
    assert label in page.find_element(By.ID, "item").text
    assert page.execute_script("return document.querySelector('#item img').naturalWidth") > 0


def test_no_figure_offers_to_upload_itself(page):
    draw_all(page)
    titles = page.execute_script("return all('.modebar-btn').map((b) => b.dataset.title)")
    assert set(titles) == {"Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Download plot as a PNG"}


def test_a_phone_need_not_scroll_sideways(browser, phantoms):
    opened(browser, phantoms, width=390)
    draw_all(browser)
    width = "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(browser.execute_script(width)) <= 390
    assert browser.get_log("browser") == []


def test_dark_follows_the_system_and_the_button(browser, phantoms):
    def colours() -> tuple[str, str]:
        script = (
            "const t = document.querySelector('.plot .xtick text');"
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(t).fill]"
        )
        return tuple(browser.execute_script(script))

    opened(browser, phantoms)
    draw_all(browser)
    light = colours()
    browser.find_element(By.ID, "theme").click()
    dark = colours()
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    opened(browser, phantoms, dark=True)
    draw_all(browser)
    assert colours() == dark
    assert browser.find_element(By.ID, "theme").get_attribute("aria-pressed") == "true"


def test_the_report_of_a_run_on_real_slices(browser, shared, tmp_path):
    for name in ("LUNA2016_Lung", "LiTS2017_Liver"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in sorted((shared / "slices_png" / name).glob("*.png"))[:12]:
            (tmp_path / "data" / name / file.name).symlink_to(file)
    run("ssl_deepcluster2D", tmp_path / "data", tmp_path, epochs=1)
    runs = [str(tmp_path / "runs" / "ssl_deepcluster2D")]
    report.main(report.Config(runs, str(tmp_path / "report.html"), **SMALL))
    opened(browser, tmp_path / "report.html")
    check_complete(browser)
    assert len(shown(browser, ".prototype .picture")) > 0
