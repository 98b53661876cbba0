"""The dashboard in a real Chromium: it moves under load, tells the truth when the service is gone, and computes as Prometheus does."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from page_server import KnownRuntime, OpenPage, PageServer, png
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from docs import screenshots

playwright_api = pytest.importorskip("playwright.sync_api", reason="install requirements/dev.txt: playwright drives the browser")
Page, expect = playwright_api.Page, playwright_api.expect

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser


def inked_pixels(page: Page, selector: str) -> int:
    """Pixels of a canvas that are blue, as its line and the area below it are."""
    with Image.open(io.BytesIO(page.locator(selector).screenshot())) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return int(((pixels[..., 2] - pixels[..., 0]) > 12).sum())


def load(host: PageServer) -> contextlib.AbstractContextManager[None]:
    """Clients that post pictures and things that are none, until the end."""
    return screenshots.load(host.url, [png(), png()[:60]], pause_s=0.02)


def test_dashboard_moves_under_load(open_page: OpenPage, page_host: PageServer) -> None:
    page = open_page("dashboard")
    expect(page.locator("#seen")).to_have_text("Live")
    before = inked_pixels(page, "#fps-line")
    with load(page_host):
        expect(page.locator("#fps")).to_have_text(re.compile(r"[1-9]"), timeout=15_000)
        expect(page.locator("#p95")).to_have_text(re.compile(r"[1-9]"))
        expect(page.locator("#mistakes-rate")).to_have_text(re.compile(r"[1-9]"))
        expect(page.locator("#reasons")).to_contain_text("client error: bad image")
        expect(page.locator("#refused")).to_have_text("0.0")  # what was no picture was answered so
        expect(page.locator(".bad")).to_have_count(0)
        expect(page.locator("#batch-mean")).to_contain_text("mean 1")
        expect(page.locator("#fps-1m-span")).to_have_text(re.compile(r"^([6-9]|1\d) s$"), timeout=15_000)
        assert inked_pixels(page, "#fps-line") > before
    expect(page.locator("#models")).to_contain_text("blood-cells")
    expect(page.locator("#fps-line")).to_have_attribute("aria-label", re.compile(r"Frames per second over the last 5 minutes: now [1-9]"))
    expect(page).to_have_title(re.compile("fps"))


def test_dashboard_tells_refusals_from_mistakes_of_clients(open_page: OpenPage) -> None:
    busy = PageServer(max_queue_images=1, max_batch_size=1)
    try:
        page = open_page("dashboard", at=busy)
        expect(page.locator("#seen")).to_have_text(re.compile("Live"))
        first = busy.occupy(png())
        for _ in range(3):
            assert httpx.post(f"{busy.url}v1/detect", content=png()).status_code == 429
        assert httpx.post(f"{busy.url}v1/detect?colour=red", content=png()).status_code == 422
        expect(page.locator("#reasons")).to_contain_text("client error: bad request", timeout=15_000)
        expect(page.locator("#reasons tr", has_text="refused: queue full").locator(".bad")).to_have_text("3")
        expect(page.locator("#reasons .bad")).to_have_count(1)
        expect(page.locator("#refused")).to_have_text("75.0")  # 3 of 4, as the first is not through
        expect(page.locator(".figure.bad")).to_have_count(1)
        busy.runtime.gate.set()
        first.join()
    finally:
        busy.stop()


def test_dashboard_says_when_the_service_is_gone_and_when_it_is_back(open_page: OpenPage) -> None:
    fragile = PageServer()
    page = open_page("dashboard", at=fragile, allow="ERR_CONNECTION")
    expect(page.locator("#seen")).to_have_text(re.compile("Live"))
    fragile.stop()
    expect(page.locator(".notice")).to_contain_text("does not answer", timeout=15_000)
    expect(page.locator("#seen")).to_have_text(re.compile(r"Last seen .*ago"))
    expect(page.locator("#dashboard")).to_have_class(re.compile("stale"))
    expect(page).to_have_title(re.compile("No answer"))
    fragile.start()
    expect(page.locator("#events")).to_contain_text("The service answers again.", timeout=15_000)
    expect(page.locator(".notice")).to_have_count(0)
    fragile.stop()


def test_dashboard_reports_a_change_of_version(open_page: OpenPage) -> None:
    changing = PageServer()
    try:
        page = open_page("dashboard", at=changing)
        expect(page.locator("#models")).to_contain_text("blood-cells")
        changing.adopt(KnownRuntime(version="2"))
        expect(page.locator("#events")).to_contain_text("blood-cells version 2 went into service on CPU.", timeout=15_000)
        expect(page.locator("#models tr")).to_have_count(2)
    finally:
        changing.stop()


def test_metrics_are_read_as_the_reference_parser_reads_them(open_page: OpenPage, page_host: PageServer) -> None:
    page_host.detect(png())
    text = httpx.get(f"{page_host.url}metrics").text + 'odd{a="x\\"y\\\\n\\n,b=}",c=""} +Inf\nplain 1e-3 1700000000000\n'
    page = open_page("dashboard")
    read = page.evaluate(
        """text => import("/static/prometheus.js").then(({ parseMetrics }) =>
            [...parseMetrics(text).values()].map(({ name, labels, value }) => [name, labels, String(value)]))""",
        text,
    )
    known = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    found = {(name, tuple(sorted(labels.items()))): float(value.replace("Infinity", "inf")) for name, labels, value in read}
    assert found.keys() == known.keys()
    assert all(found[key] == known[key] or (math.isnan(found[key]) and math.isnan(known[key])) for key in known)


@pytest.mark.parametrize(
    ("q", "buckets", "expected"),
    [
        (0.5, [[0.1, 0], [0.2, 10], [None, 10]], {"value": 0.15, "beyond": False}),  # linear inside its bucket
        (0.5, [[0.1, 4], [0.2, 4], [0.4, 8], [None, 8]], {"value": 0.1, "beyond": False}),
        (0.95, [[0.1, 5], [None, 10]], {"value": 0.1, "beyond": True}),  # above the last finite bound
        (0.95, [[0.1, 0], [None, 0]], None),  # nothing observed
        (0.99, [], None),
    ],
)
def test_quantile(open_page: OpenPage, q: float, buckets: list[list[float | None]], expected: dict[str, float] | None) -> None:
    found = open_page("docs").evaluate(
        """([q, buckets]) => import("/static/prometheus.js").then(({ quantile }) =>
            quantile(q, buckets.map(([bound, count]) => [bound ?? Infinity, count])))""",
        [q, buckets],
    )
    assert found == (pytest.approx(expected) if expected else None)


def test_rates_survive_a_restart_of_the_counters(open_page: OpenPage) -> None:
    found = open_page("docs").evaluate(
        """() => import("/static/prometheus.js").then(({ History, parseMetrics }) => {
            const history = new History(300);
            for (const [at, value] of [[0, 100], [10, 130], [20, 4], [30, 24]]) history.add(at, parseMetrics(`images_total ${value}`));
            const minute = history.window(60);
            return [history.window(10).rate("images_total"), minute.increase("images_total"), minute.seconds];
        })"""
    )
    assert found == [2, 30 + 4 + 20, 30]


def test_dashboard_stays_accessible_when_the_service_is_gone(open_page: OpenPage, assert_accessible: Callable[[Page], None]) -> None:
    gone = PageServer()
    page = open_page("dashboard", at=gone, scheme="dark", allow="ERR_CONNECTION")
    expect(page.locator("#seen")).to_have_text(re.compile("Live"))
    gone.stop()
    expect(page.locator("#dashboard")).to_have_class(re.compile("stale"), timeout=15_000)
    assert_accessible(page)
