"""Fixtures for tests that drive the system's Chromium: a page of a real server, watched for complaints and foreign requests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from page_server import OpenPage, PageServer

from docs.screenshots import CHROMIUM_FLAGS, DESKTOP, chromium_path

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page


@pytest.fixture(scope="module")
def page_host() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="install requirements/dev.txt: playwright drives the browser")
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium` (Debian) runs these tests")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, page_host: PageServer) -> Iterator[OpenPage]:
    """Opens a path of the server. At the end: nothing on the consoles but what `allow` matches, and no request to another origin."""
    contexts, complaints, foreign = [], [], []

    def listen(page: Page, origin: str, allow: str) -> None:
        page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
        page.on("console", lambda message: complaints.append(message.text) if _is_complaint(message, allow) else None)
        page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith((origin, "blob:")) else None)

    def open_page(
        path: str = "", *, viewport: dict[str, int] = DESKTOP, scheme: str = "light", at: PageServer = page_host, allow: str = ""
    ) -> Page:
        context = chromium.new_context(viewport=viewport, color_scheme=scheme, permissions=["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        listen(page, at.url, allow)
        page.goto(at.url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []


def _is_complaint(message: ConsoleMessage, allow: str) -> bool:
    return message.type in ("error", "warning") and not (allow and re.search(allow, message.text))


@pytest.fixture(scope="module")
def assert_accessible() -> Callable[[Page], None]:
    """Checks that axe finds nothing against WCAG on what a page shows now."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="install requirements/dev.txt: axe checks accessibility")

    def check(page: Page) -> None:
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()

    return check
