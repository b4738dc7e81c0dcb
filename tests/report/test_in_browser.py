"""The pages in a real browser: silent, shut off from every network, read by pointer and by keys, plain to see."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_run import SCRIPT

from kw_lightning.report.comparison import compare

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CONTRAST = """chart => {
    const part = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const text = part(getComputedStyle(chart.querySelector('svg text')).fill);
    const below = part(getComputedStyle(chart.closest('.card')).backgroundColor);
    return (Math.max(text, below) + 0.05) / (Math.min(text, below) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: '.[browser]'")
    path = os.environ.get("KW_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # tests may run as root
        yield found
        found.close()


class Window:
    """A page in a window, with what it says on the console and what it asks of a network."""

    def __init__(self, browser: Any, file: Path, *, media: str = "screen", **options: Any) -> None:
        self.context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 900}), **options)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.page.emulate_media(media=media)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def read(self) -> str:
        """Return what is shown beside the pointer."""
        return self.page.locator("#reading").inner_text() if self.page.locator("#reading").is_visible() else ""

    def chart(self, title: str) -> Any:
        return self.page.locator(f".chart[aria-label^='{title}']")

    def point(self, title: str, x: float, y: float) -> str:
        """Move the pointer to a place of a chart, in parts of its sides, and return what is read there."""
        chart = self.chart(title)
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        return self.read()


@pytest.fixture(scope="module")
def comparison(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compare([page.parent, page.parent], output=tmp_path_factory.mktemp("pages") / "comparison.html").path


@pytest.fixture
def window(browser: Any, page: Path) -> Iterator[Window]:
    found = Window(browser, page)
    yield found
    found.context.close()


def test_it_opens_silently_and_asks_nothing_of_a_network(browser: Any, page: Path, comparison: Path) -> None:
    for file in (page, comparison):
        window = Window(browser, file)
        assert window.said == []
        assert [url for url in window.asked if not url.startswith("data:")] == [file.as_uri()]
        assert "owned" not in window.page.title()
        assert window.page.locator("section").count() >= 2
        window.context.close()


def test_its_policy_runs_no_other_script_and_lets_no_request_out(window: Window) -> None:
    window.context.set_offline(False)
    window.page.evaluate(
        """() => {
            const image = document.createElement('img');
            image.setAttribute('onerror', "document.title = 'owned'");
            image.src = 'http://127.0.0.1:9/image.png';
            const script = document.createElement('script');
            script.textContent = "document.title = 'owned'";
            document.body.append(image, script);
        }"""
    )
    with pytest.raises(Exception, match="Failed to fetch"):
        window.page.evaluate("() => fetch('http://127.0.0.1:9/')")
    assert "owned" not in window.page.title()
    assert all("Content Security Policy" in told for told in window.said)
    assert len(window.said) >= 3


def test_a_pointer_reads_layer_mixture_cell_and_value(window: Window, page: Path) -> None:
    told = window.point("shelf: mean attention", 0.5, 0.5)
    found = re.fullmatch(r"(first|second), mixture (\d+), cell (\d+): mean α (-?[\d.e-]+)", told)
    assert found, told
    assert re.fullmatch(r"\d+ images? of .* taken for .*", window.point("Confusion matrix", 0.4, 0.4))
    assert re.fullmatch(r"(train|val)/loss, epoch [12]: [\d.]+", window.point("Loss", 0.3, 0.5))
    assert re.fullmatch(r"α from .*: [\d.]+% of the weights", window.point("shelf: weights", 0.7, 0.5))
    window.page.mouse.move(0, 0)
    assert window.read() == ""


def test_keys_reach_every_chart_and_read_it(window: Window) -> None:
    titles = window.page.locator(".chart").evaluate_all("charts => charts.map(chart => chart.ariaLabel)")
    reached: list[str] = []
    for _ in range(100):
        window.page.keyboard.press("Tab")
        label = window.page.evaluate(
            "() => document.activeElement.matches('.chart') && document.activeElement.ariaLabel"
        )
        if label:
            reached.append(label)
            first = window.read()
            assert first
            window.page.keyboard.press("ArrowRight")
            second = window.read()
            window.page.keyboard.press("ArrowDown")
            assert len({first, second, window.read()}) >= 2
            window.page.keyboard.press("Escape")
            assert window.read() == ""
        if window.page.evaluate("() => document.activeElement === document.body"):
            break
    assert reached == titles
    assert len(titles) == 7


def test_the_keys_read_the_values_of_the_matrix(window: Window, page: Path) -> None:
    with (page.parent / "confusion.csv").open(newline="", encoding="utf-8") as file:
        head, _, second, _ = csv.reader(file)
    window.chart("Confusion matrix").focus()
    window.page.keyboard.press("ArrowDown")
    assert window.read().startswith(f"{second[1]} image")
    assert f"of {SCRIPT} taken for {head[1]}" in window.read()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_text_has_contrast(browser: Any, page: Path, comparison: Path, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: '.[browser]'"
    ).Axe()
    for file in (page, comparison):
        window = Window(browser, file, color_scheme=scheme, bypass_csp=True)  # axe is a script of another's
        window.page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        found = axe.run(window.page).response
        assert [(each["id"], each["nodes"][0]["html"][:200]) for each in found["violations"]] == []
        for chart in window.page.locator(".chart").element_handles():
            assert chart.evaluate(CONTRAST) >= 4.5
        window.context.close()


def test_it_fits_a_phone_and_paper(browser: Any, page: Path, comparison: Path) -> None:
    for file in (page, comparison):
        phone = Window(browser, file, viewport={"width": 360, "height": 740}, has_touch=True)
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= 360
        phone.context.close()
    paper = Window(browser, page, media="print", color_scheme="dark")
    assert not paper.page.locator("nav").is_visible()
    assert paper.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert paper.page.pdf().startswith(b"%PDF")
    paper.context.close()
