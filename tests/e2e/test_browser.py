"""The report and the page in a real browser: no console errors, the hover shows the plan's weights."""

import shutil
import threading
from pathlib import Path

import pytest

from eval import analyse, serve
from eval.page.render import render
from eval.routing import corpus as corpora
from eval.routing import forward_passes, translation
from eval.run.record import Run
from tests.eval import tiny_routed
from tests.eval.conftest import TinyModel, tiny_model

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser")) if path), None)
DRIVER = shutil.which("chromedriver")
selenium = pytest.importorskip("selenium", reason="needs selenium (requirements-dev.txt)")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]
assert tiny_model  # the fixture of the unit tests

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1100,900",
    # whatever a page asks of any other host fails, and shows up in the console
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    driver.implicitly_wait(20)
    yield driver
    problems = driver.get_log("browser")
    driver.quit()
    assert problems == []


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def hover(browser, element) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser).move_to_element(element).perform()


def shown_experts(browser) -> dict[str, dict[int, float]]:
    """Layer -> expert -> weight, as the open detail of a token shows them."""
    lines = browser.find_elements("css selector", "#token-detail:not([hidden]) .experts")
    return {
        line.get_attribute("data-layer"): {
            int(expert.get_attribute("data-expert")): float(expert.text.split()[1])
            for expert in line.find_elements("css selector", "span")
        }
        for line in lines
    }


def as_weights(row: list[float]) -> dict[int, float]:
    return dict(zip(row[1::2], row[2::2], strict=True))


@pytest.fixture
def report_page(tmp_path) -> tuple[Path, dict]:
    loaded = tiny_routed.hand_routed()
    source, target = ["▁a b ▁12 ,", "▁a"], ["b", "▁a ▁a"]
    analysis = {"schema": 1, "checkpoint": analyse.describe(loaded), "data": {"sentences": 2}, "history": None}
    analysis |= forward_passes.observe(loaded, corpora.from_lines(loaded, source, target), max_tokens=100)
    routed = translation.routing_of(loaded, source, target)
    analysis["explorer"] = [
        {"id": i, **sentence, "translation": f"number {i}", "reference": "a reference", "score": -1.0}
        for i, sentence in enumerate(routed)
    ]
    analysis["problems"] = analyse.problems(analysis)
    page = tmp_path / "report.html"
    page.write_text(render([Run("r", analysis)], title="r"), encoding="utf-8")
    return page, analysis


def test_report_shows_figures_and_the_weights_of_the_plan(browser, report_page):
    page, analysis = report_page
    browser.get(page.as_uri())
    assert len(browser.find_elements("css selector", ".plot .main-svg")) > 5
    assert "3 of 4 experts are dead" in find(browser, "[role=alert]").text
    sentence = analysis["explorer"][0]
    for index in (1, 4):
        hover(browser, find(browser, f'.card[data-id="0"] .token[data-side=source][data-index="{index}"]'))
        shown = shown_experts(browser)
        assert shown == {
            label: pytest.approx(as_weights(sentence["routing"][label][index]), abs=5e-4)
            for label in sentence["routing"]
        }


def test_report_is_used_by_keyboard_filter_and_theme(browser, report_page):
    from selenium.webdriver.common.keys import Keys

    page = report_page[0]
    browser.get(page.as_uri())
    first = find(browser, '.card[data-id="0"] .token[data-side=source]')
    browser.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("data-index") == "1"
    assert shown_experts(browser)["encoder 0"] == {1: 0.6, 0: 0.25}
    find(browser, "input[type=search]").send_keys("number 1")
    cards = browser.find_elements("css selector", ".card")
    assert [card.get_attribute("data-id") for card in cards] == ["1"]
    before = find(browser, "body").value_of_css_property("background-color")
    find(browser, "#theme").click()
    assert find(browser, "body").value_of_css_property("background-color") != before
    width = browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    )
    assert width == {}
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_a_translation_is_made_through_the_page(browser, tiny_model: TinyModel):
    arguments = ["--checkpoint", tiny_model.checkpoint, "--data", tiny_model.data, "--subwords", tiny_model.subwords]
    args = serve._parser().parse_args([*map(str, arguments), "--device", "cpu", "--beam", "2"])
    server = serve.Server(("127.0.0.1", 0), serve.build_page(args))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        text = tiny_model.source[0]
        browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
        find(browser, "#text").send_keys(text)
        find(browser, "#submit").click()
        token = find(browser, ".token[data-side=target][data-index='1']")
        found = server.page.translator.translate([text])[0]
        assert find(browser, "#translation").text == found.text
        hover(browser, token)
        pieces = " ".join(server.page.translator.encode(text))
        routed = translation.routing_of(server.page.loaded, [pieces], [" ".join(found.tokens)])[0]
        want = as_weights(routed["routing"]["decoder 0"][1])
        assert shown_experts(browser) == {"decoder 0": pytest.approx(want, abs=1e-3)}
        assert "FLOPs" in find(browser, "#cost").text
    finally:
        server.shutdown()
        server.server_close()
