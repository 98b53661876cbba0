"""The README's pictures of the pages: `python docs/screenshots.py` photographs the service with the bundled model.

Needs the test dependencies and the system's Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "screenshots"
SAMPLE = ROOT / "service" / "pages" / "sample.jpg"

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",  # root in a container has no user namespaces
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
COLOURS, PALETTE_ROUNDS = 256, 5  # a palette has half the bytes; refined by k-means it differs nowhere that one can see
READY_WITHIN_S = 60
LOAD_CLIENTS = 2
PAUSE_S = 0.12  # between a client's pictures


def chromium_path() -> str | None:
    """The system's Chromium, or None."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running_service() -> Iterator[str]:
    """The service as `make serve` starts it, on a free port; yields its address."""
    port = free_port()
    environment = {**os.environ, "DETECTOR_HOST": "127.0.0.1", "DETECTOR_PORT": str(port), "DETECTOR_DRAIN_SECONDS": "0"}
    process = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when /readyz answers 200."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the service did not become ready within {READY_WITHIN_S} s (exit code {process.poll()}); see its log above")


@contextmanager
def load(url: str, pictures: Sequence[bytes], *, pause_s: float) -> Iterator[None]:
    """Two clients that post these in turns with a pause between, until the end of the block; pages are watched under it."""
    ended = threading.Event()

    def post() -> None:
        with httpx.Client(timeout=30) as client:
            for picture in itertools.cycle(pictures):
                if ended.wait(pause_s):
                    return
                client.post(f"{url}v1/detect", content=picture, headers={"content-type": "application/octet-stream"})

    threads = [threading.Thread(target=post) for _ in range(LOAD_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def keep(page: Page, name: str) -> None:
    """Write docs/screenshots/<name>.png with a palette."""
    path = OUT / f"{name}.png"
    page.screenshot(path=path)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(COLOURS, kmeans=PALETTE_ROUNDS)
    small.save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1024:.0f} KiB")


def open_page(browser: Browser, address: str, viewport: dict[str, int], scheme: str) -> Page:
    """One page of its own, light or dark."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(address)
    return page


def shoot_playground(browser: Browser, url: str) -> None:
    """The sample with its boxes: desktop light and dark, phone."""
    for name, viewport, scheme in (
        ("playground", DESKTOP, "light"),
        ("playground-dark", DESKTOP, "dark"),
        ("playground-phone", PHONE, "light"),
    ):
        page = open_page(browser, url, viewport, scheme)
        page.locator("#welcome [data-do=sample]").click()
        page.locator(".box").first.wait_for()
        page.locator("#progress").wait_for(state="hidden")
        page.mouse.move(1, 1)
        keep(page, name)
        page.context.close()


def shoot_dashboard(browser: Browser, url: str, watch_s: float) -> None:
    """The dashboard after it has watched some load."""
    with load(url, [SAMPLE.read_bytes()] * 40 + [b"no picture"], pause_s=PAUSE_S):
        pages = [(scheme, open_page(browser, f"{url}dashboard", DESKTOP, scheme)) for scheme in ("light", "dark")]
        pages[0][1].wait_for_timeout(watch_s * 1000)
        for scheme, page in pages:
            keep(page, "dashboard" if scheme == "light" else "dashboard-dark")


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="a service that runs already; unset starts one")
    parser.add_argument("--watch-seconds", type=float, default=150, help="how long the dashboard watches before its picture [150]")
    options = parser.parse_args()
    chromium = chromium_path()
    if chromium is None:
        raise SystemExit("no Chromium found; install it (Debian: apt-get install chromium)")
    OUT.mkdir(parents=True, exist_ok=True)
    with running_service() if options.url is None else _given(options.url) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        shoot_playground(browser, url)
        shoot_dashboard(browser, url, options.watch_seconds)
        browser.close()


@contextmanager
def _given(url: str) -> Iterator[str]:
    yield url.rstrip("/") + "/"


if __name__ == "__main__":
    main()
