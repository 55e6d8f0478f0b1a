"""The HTML page in a real browser: no error, search, pan and zoom, members, sections."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import depcut
from depcut.timing.clock import Speedup, Timing
from depcut.timing.comparison import Comparison, Figures

pytestmark = pytest.mark.sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *(Block() for _ in range(6)), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, x = net(), torch.randn(2, 8)
    plan = depcut.analyze(model, x).plan(0.4)
    slim = plan.apply(model)
    times = [Timing.of([seconds] * 6) for seconds in (2e-3, 1e-3)]
    both = [Figures(1000, 4000, 900, times[0]), Figures(500, 2000, 450, times[1])]
    compared = Comparison(*both, Speedup.between(*times), "one thread", 2)
    path = tmp_path_factory.mktemp("page") / "page.html"
    plan.to_html(path, depcut.report(slim), compared)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync.sync_playwright() as started:
        running = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, opened; what the browser complained about, or asked the network for, fails."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda one: wrong.append(one.url) if "page.html" not in one.url else None)
    opened.goto(page_file.as_uri())
    opened.wait_for_selector("#view[transform]")
    yield opened
    opened.close()
    assert [text for text in wrong if not text.startswith("data:")] == []


def transform(page: Any) -> str:
    return str(page.get_attribute("#view", "transform"))


def test_search_narrows_rows_and_boxes(page: Any) -> None:
    rows = page.locator("#layers tbody")
    total = rows.count()
    page.fill("#search", "up")
    shown = page.locator("#layers tbody:not([hidden])")
    assert 0 < shown.count() < total
    assert all("up" in text for text in shown.all_inner_texts())
    assert page.locator(".box.hit").count() > 0
    assert page.locator(".box.faded").count() > 0
    assert page.inner_text("#found").endswith("found")
    page.fill("#search", "no such layer")
    assert page.inner_text("#found") == "0 found"
    page.press("#search", "Escape")
    assert page.locator("#layers tbody:not([hidden])").count() == total
    assert page.locator(".box.hit, .box.faded").count() == 0


def test_search_finds_one_of_the_repeated_layers(page: Any) -> None:
    page.fill("#search", "3.down")
    assert page.locator("#layers tr.one:visible code").all_inner_texts()[0] == "3.down"
    before = transform(page)
    page.press("#search", "Enter")
    assert transform(page) != before


def test_the_graph_moves_and_scales(page: Any) -> None:
    graph = page.locator("#graph")
    graph.scroll_into_view_if_needed()
    frame = graph.bounding_box()
    x, y = frame["x"] + frame["width"] - 30, frame["y"] + 30
    start = transform(page)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 80, y + 40, steps=4)
    page.mouse.up()
    moved = transform(page)
    assert moved != start
    assert moved.partition("scale")[2] == start.partition("scale")[2]
    page.mouse.wheel(0, -300)
    page.wait_for_function("before => view.getAttribute('transform') != before", arg=moved)
    assert transform(page).partition("scale")[2] != moved.partition("scale")[2]
    page.click("[data-zoom=fit]")
    assert transform(page) == start
    page.click("[data-zoom='1.3']")
    assert transform(page) != start


def test_a_click_shows_the_members_of_a_group(page: Any) -> None:
    assert not page.is_visible("#detail")
    box = page.locator(".box.group", has_text="x6")
    box.click()
    assert page.is_visible("#detail")
    page.locator("#detail summary", has_text="2.up").click()
    members = page.locator("#detail details[open] li").all_inner_texts()
    assert any("2.up.weight dimension 0, narrowed" in member for member in members)
    assert any("2.down.weight dimension 1, reads" in member for member in members)
    assert page.locator(".line.lit").count() >= 2
    page.click("#detail .close")
    assert not page.is_visible("#detail")


def test_the_keyboard_reaches_the_groups(page: Any) -> None:
    page.locator(".box.group").first.focus()
    page.keyboard.press("Enter")
    assert page.is_visible("#detail")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail")


def test_sections_collapse_and_repeated_layers_unfold(page: Any) -> None:
    assert page.is_visible("#frozen .body")
    page.click("#frozen > summary")
    assert not page.is_visible("#frozen .body")
    page.click("nav >> text=Frozen dimensions")
    assert page.is_visible("#frozen .body")
    assert page.locator("tr.one:visible").count() == 0
    page.locator(".unfold").first.click()
    assert page.locator("tr.one:visible").count() == 6


def test_light_and_dark(page: Any) -> None:
    def colour() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = colour()
    page.click("#theme")
    dark = colour()
    assert dark != light
    page.click("#theme")
    assert colour() == light
