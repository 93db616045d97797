"""The report in a real browser: everything is rendered, nothing fails, links and hover work, at two widths.

The layout is compared with ``layout.json`` beside this file: where each part and each kind of picture lies and how wide
it is, as shares of the window, with room for other fonts. ``pytest --update-golden`` writes it anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitlower import report as write

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (bitlower[test])")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 400)
TOLERANCE = 0.04
"""Of places and widths, as a share of the window's width."""
BOXES = """() => {
  const share = (element) => {
    const box = element.getBoundingClientRect();
    return [box.left / innerWidth, box.width / innerWidth].map((value) => Math.round(1000 * value) / 1000);
  };
  const first = (selector) => share(document.querySelector(selector));
  return {
    header: first("header h1"), nav: first("nav"), main: first("main"),
    section: first("#ledger"), figure: first("#ledger figure"), svg: first("#ledger svg"),
    facts: first("#verdict .facts"), fact: first("#verdict .fact"), pair: first("#tensors .pair"),
    scroll: first("#depth .scroll"),
  };
}"""


PARTS = """() => [...document.querySelectorAll("section")].map(
  (e) => [e.id, e.getBoundingClientRect().height, e.innerText.length])"""
PICTURES = """() => [...document.querySelectorAll("figure > svg")].map((e) => {
  const box = e.getBoundingClientRect();
  const marks = [...e.querySelectorAll("path, rect, circle")].filter((m) => m.checkVisibility());
  return [e.querySelector("title").textContent, Math.min(box.width, box.height), marks.length];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the system."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("there is no Chromium on this machine (on Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(artifacts: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the comparison of both artifacts, which has all parts."""
    return write(artifacts.plain, artifacts.other, output=tmp_path_factory.mktemp("page") / "r.html").as_uri()


class Visit:
    """A page that is open, with what went wrong on it."""

    def __init__(self, browser: Any, address: str, width: int = 1280, **settings: Any) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **settings)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *error: object) -> None:
        requests = self.requests
        self.page.close()
        if error[0] is None:
            assert not self.problems
            assert len(requests) == 1, "the page loads nothing but itself"


@pytest.mark.parametrize("width", WIDTHS)
def test_every_part_is_rendered_and_nothing_runs_over(browser: Any, address: str, width: int) -> None:
    with Visit(browser, address, width) as page:
        parts = page.evaluate(PARTS)
        assert len(parts) == page.locator("nav a").count() == 12
        for name, height, letters in parts:
            assert height > 60, name
            assert letters > 80, name
        pictures = page.evaluate(PICTURES)
        assert len(pictures) > 20
        for title, least, marks in pictures:
            assert least > 60, title
            assert marks > 1, title
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """() => [...document.querySelectorAll("h1, h2, h3, p, dl, figcaption, summary, pre")]
            .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth && !e.closest(".scroll"))
            .map((e) => e.textContent)"""
        )
        assert outside == []


def test_links_lead_to_pages_of_tensors_and_back(browser: Any, address: str) -> None:
    with Visit(browser, address) as page:
        page.locator("#depth table.map a").first.click()
        anchor = page.evaluate("location.hash")
        assert anchor.startswith("#tensor-")
        heading = page.locator(anchor)
        assert 0 <= heading.bounding_box()["y"] < 900
        weight = page.locator("#depth table.map a").first.evaluate("e => e.parentElement.dataset.said")
        assert weight in heading.inner_text()
        heading.locator("a.back").click()
        assert page.evaluate("location.hash") == "#tensors"
        page.locator("#depth svg a").first.focus()
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash").startswith("#tensor-")


def test_hover_and_focus_say_what_a_mark_is(browser: Any, address: str) -> None:
    with Visit(browser, address) as page:
        tip = page.locator("#tip")
        assert tip.is_hidden()
        page.locator("#ledger rect.cost").first.hover()
        assert "→" in tip.inner_text()
        page.locator("#widths table.map td[data-said]").first.hover()
        assert "the scheme" in tip.inner_text()
        page.locator("#depth svg a").first.focus()
        assert "dB" in tip.inner_text()
        page.keyboard.press("Escape")
        assert tip.is_hidden()


def test_tables_sort_and_filter(browser: Any, address: str) -> None:
    with Visit(browser, address) as page:
        table = page.locator("#tensors .scroll table").first
        column = [head.inner_text().split(" ")[0] for head in table.locator("thead th").all()].index("rounding")
        table.locator("thead th button").nth(column).click()
        cells = table.evaluate("(e, place) => [...e.tBodies[0].rows].map((row) => row.cells[place].innerText)", column)
        values = [float(cell) for cell in cells]
        assert values == sorted(values)
        page.locator("#tensors input.filter").first.fill("query")
        shown = table.evaluate("e => [...e.tBodies[0].rows].filter((r) => r.checkVisibility()).map((r) => r.innerText)")
        assert shown
        assert all("query" in text for text in shown)
        assert len(shown) < len(values)


def test_the_keyboard_reaches_the_report_first(browser: Any, address: str) -> None:
    with Visit(browser, address) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        tree = page.locator("body").aria_snapshot()
        assert all(name in tree for name in ("navigation", "main", "img", "heading", "region"))


def test_the_text_is_there_without_scripts(browser: Any, address: str) -> None:
    with Visit(browser, address, java_script_enabled=False) as page:
        assert page.locator("section").count() > 8
        assert "relative error" in page.locator("#ledger table").first.text_content()
        assert page.locator("#ledger rect.cost title").first.text_content()


def brightness(page: Any, selector: str, what: str) -> float:
    """Of a colour from 0 to 1, by the sRGB luminance of WCAG 2.2."""
    color = page.evaluate(
        """([selector, what]) => {
          const context = document.createElement("canvas").getContext("2d");
          context.fillStyle = getComputedStyle(document.querySelector(selector))[what];
          context.fillRect(0, 0, 1, 1);
          return [...context.getImageData(0, 0, 1, 1).data];
        }""",
        [selector, what],
    )
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(browser: Any, address: str, scheme: str) -> None:
    """A contrast of 4.5 to 1 at least (WCAG 2.2, success criterion 1.4.3), of headings, notes, links and dark cells."""
    with Visit(browser, address, color_scheme=scheme) as page:
        ground = brightness(page, "section", "backgroundColor")
        assert (ground > 0.5) == (scheme == "light")
        for selector in ("h2", ".about", "nav a", "summary", ".meaning"):
            low, high = sorted((ground, brightness(page, selector, "color")))
            assert (high + 0.05) / (low + 0.05) >= 4.5, selector
        for cell in ("td.heat.dark", "td.heat:not(.dark)"):
            if page.query_selector(cell):
                low, high = sorted(brightness(page, cell, what) for what in ("backgroundColor", "color"))
                assert (high + 0.05) / (low + 0.05) >= 3.9, cell
        assert page.evaluate("getComputedStyle(document.querySelector('#depth .line')).stroke") != "none"


def test_it_prints(browser: Any, address: str, tmp_path: Path) -> None:
    with Visit(browser, address, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.locator("nav").is_hidden()
        assert page.locator(".filter").first.is_hidden()
        assert page.locator("#ledger table").nth(1).is_visible()
        assert brightness(page, "body", "backgroundColor") > 0.95
        data = page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert data.startswith(b"%PDF")
        assert data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") > 3


def test_the_layout_is_as_recorded(browser: Any, address: str, request: pytest.FixtureRequest) -> None:
    boxes = {}
    for width in WIDTHS:
        with Visit(browser, address, width) as page:
            boxes[str(width)] = page.evaluate(BOXES)
    path = Path(__file__).with_name("layout.json")
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps(boxes, indent=1) + "\n")
    for width, recorded in json.loads(path.read_text()).items():
        assert boxes[width].keys() == recorded.keys()
        for name, box in recorded.items():
            assert boxes[width][name] == pytest.approx(box, abs=TOLERANCE), f"{name} at {width}"
