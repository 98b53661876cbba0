"""The pages in a real Chromium against a real server: no console errors, no request that leaves the origin, in every test."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from page_server import KNOWN, KnownRuntime, OpenPage, PageServer, png, show
from PIL import Image

from docs.screenshots import DESKTOP, PHONE
from service import drawing
from service.auth import make_key

playwright_api = pytest.importorskip("playwright.sync_api", reason="install requirements/dev.txt: playwright drives the browser")
Page, expect = playwright_api.Page, playwright_api.expect

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "service" / "pages"
ABOVE_HALF = sum(score >= 0.5 for *_, score in KNOWN)


def turned_jpeg(width: int = 640, height: int = 480) -> bytes:
    """A phone's picture: stored lying, upright portrait with a red upper left quarter, EXIF orientation 6."""
    upright = Image.open(io.BytesIO(png(height, width)))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    upright.rotate(90, expand=True).save(data, "JPEG", quality=95, exif=exif)
    return data.getvalue()


def give(page: Page, kind: str, picture: bytes, mime: str = "image/png") -> None:
    """Drop or paste a picture, as a browser event with the file inside."""
    page.evaluate(
        """([kind, bytes, mime]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "given.png", { type: mime }));
            const options = { bubbles: true, cancelable: true };
            window.dispatchEvent(kind === "drop" ? new DragEvent("drop", { ...options, dataTransfer: transfer })
                                                 : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        }""",
        [kind, list(picture), mime],
    )


def set_threshold(page: Page, value: float) -> None:
    page.locator("#threshold").fill(str(value))


# the playground


def test_policy_of_the_pages_allows_nothing_inline_and_nothing_foreign(page_host: PageServer) -> None:
    for path in ("", "dashboard", "docs"):
        answer = httpx.get(page_host.url + path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=|https?://", answer.text)


def test_sample_shows_the_boxes_that_the_service_found(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name="Try the sample").click()
    expect(page.locator(".box")).to_have_count(ABOVE_HALF)
    expect(page.locator("#rows tr")).to_have_count(ABOVE_HALF)
    expect(page.locator("#count")).to_have_text(f"{ABOVE_HALF} objects")
    expect(page.locator("#model-name")).to_have_text("blood-cells · version 1")
    frame = page.locator("#frame").bounding_box()
    box = page.locator(".box").first.bounding_box()
    assert frame is not None
    assert box is not None
    x1, y1, x2, y2 = KNOWN[0][:4]
    assert (box["x"] - frame["x"]) / frame["width"] == pytest.approx(x1, abs=0.01)
    assert (box["y"] - frame["y"]) / frame["height"] == pytest.approx(y1, abs=0.01)
    assert box["width"] / frame["width"] == pytest.approx(x2 - x1, abs=0.01)
    assert box["height"] / frame["height"] == pytest.approx(y2 - y1, abs=0.01)


def test_sample_is_the_example_picture() -> None:
    assert (PAGES / "sample.jpg").read_bytes() == (ROOT / "examples" / "blood_smear.jpg").read_bytes()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_picture_can_be_dropped_and_pasted(open_page: OpenPage, way: str) -> None:
    page = open_page()
    give(page, way, png())
    expect(page.locator(".box")).to_have_count(ABOVE_HALF)


def test_slider_and_classes_filter_without_asking_again(open_page: OpenPage) -> None:
    page = open_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/v1/detect" in request.url else None)
    show(page, png())
    for threshold in (0.05, 0.3, 0.85, 0.99):
        set_threshold(page, threshold)
        expected = sum(score >= threshold for *_, score in KNOWN)
        expect(page.locator(".box")).to_have_count(expected)
        expect(page.locator("#count")).to_have_text("1 object" if expected == 1 else f"{expected} objects")
    expect(page.locator("#empty")).to_contain_text("filtered out")
    set_threshold(page, 0.5)
    page.get_by_text("RBC", exact=True).first.click()
    expect(page.locator("#rows tr")).to_have_count(sum(score >= 0.5 and name != "RBC" for *_, name, score in KNOWN))
    assert len(asked) == 1
    assert "score_threshold=0.05" in asked[0]


def test_pointer_links_the_smallest_box_with_its_row(open_page: OpenPage) -> None:
    page = open_page()
    show(page, png(640, 480))
    frame = page.locator("#frame").bounding_box()
    assert frame is not None
    x1, y1, x2, y2 = KNOWN[2][:4]
    page.mouse.move(frame["x"] + frame["width"] * (x1 + x2) / 2, frame["y"] + frame["height"] * (y1 + y2) / 2)
    expect(page.locator("#rows tr.active")).to_have_text(re.compile("Platelets"))
    expect(page.locator(".box.active span")).to_have_text("Platelets 0.83")
    page.locator("#rows tr").nth(0).hover()
    expect(page.locator(".box.active span")).to_have_text("WBC 0.97")


def test_keyboard_alone_walks_through_the_detections(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#welcome [data-do=sample]").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".box")).to_have_count(ABOVE_HALF)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#rows tr')"):
            break
    expect(page.locator("#rows tr").nth(0)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#rows tr").nth(2)).to_be_focused()
    expect(page.locator("#rows tr").nth(2)).to_have_attribute("aria-selected", "true")
    expect(page.locator(".box.active span")).to_have_text("Platelets 0.83")
    page.keyboard.press("Home")
    expect(page.locator(".box.active span")).to_have_text("WBC 0.97")


@pytest.mark.parametrize(("stored_wh", "canvas_wh"), [((640, 480), [480, 640]), ((4000, 3000), [1800, 2400])], ids=["small", "12 Mpx"])
def test_turned_photograph_stands_upright_with_its_boxes(open_page: OpenPage, stored_wh: tuple[int, int], canvas_wh: list[int]) -> None:
    page = open_page()
    show(page, turned_jpeg(*stored_wh), "phone.jpg", "image/jpeg")
    height, width = stored_wh
    canvas = page.locator("#picture")
    assert canvas.evaluate("canvas => [canvas.width, canvas.height]") == canvas_wh
    red, green, *_ = canvas.evaluate("canvas => [...canvas.getContext('2d').getImageData(20, 20, 1, 1).data]")
    assert red > 190
    assert green < 60
    row = page.locator("#rows tr").nth(0)
    expect(row).to_contain_text(f"{round(0.10 * width)}, {round(0.10 * height)}")
    expect(row).to_contain_text(f"{round(0.20 * width)} × {round(0.30 * height)}")


def test_type_that_the_browser_cannot_show_still_gets_its_boxes(open_page: OpenPage) -> None:
    data = io.BytesIO()
    Image.open(io.BytesIO(png(96, 64))).save(data, "TIFF")
    page = open_page()
    show(page, data.getvalue(), "scan.tiff", "image/tiff")
    expect(page.locator(".box")).to_have_count(ABOVE_HALF)
    expect(page.locator("#notice-place")).to_contain_text("cannot show pictures of this type")


def test_something_else_than_a_picture_gives_the_sentence_of_the_service(open_page: OpenPage, page_host: PageServer) -> None:
    page = open_page(allow="status of 4")
    show(page, b"name,price\nbread,3\n", "list.csv", "text/csv")
    refused = httpx.post(f"{page_host.url}v1/detect", content=b"name,price\nbread,3\n", headers={"content-type": "text/csv"})
    expect(page.locator("#notice-place")).to_contain_text(refused.json()["detail"], ignore_case=True)
    expect(page.locator("#notice-place")).to_contain_text(refused.json()["code"])
    expect(page.locator("#count")).to_have_text("No answer")
    expect(page.locator("#frame")).to_be_hidden()
    expect(page.get_by_role("button", name="Choose a picture")).to_be_visible()


def test_overload_is_waited_for_in_plain_sight(open_page: OpenPage) -> None:
    busy = PageServer(max_queue_images=1, max_batch_size=1)
    try:
        page = open_page(at=busy, allow="status of 429")
        first = busy.occupy(png())
        page.locator("#file").set_input_files({"name": "slide.png", "mimeType": "image/png", "buffer": png()})
        expect(page.locator(".notice.wait")).to_contain_text(re.compile(r"Trying again in \d+ s"))
        expect(page.locator("#stage")).to_have_attribute("aria-busy", "true")
        busy.runtime.gate.set()
        first.join()
        expect(page.locator(".box")).to_have_count(ABOVE_HALF, timeout=15_000)
        expect(page.locator(".notice")).to_have_count(0)
    finally:
        busy.stop()


def test_service_that_is_gone_is_said_and_can_be_tried_again(open_page: OpenPage) -> None:
    gone = PageServer()
    page = open_page(at=gone, allow="ERR_CONNECTION")
    gone.stop()
    page.locator("#file").set_input_files({"name": "slide.png", "mimeType": "image/png", "buffer": png()})
    expect(page.locator(".notice")).to_contain_text("The service does not answer.")
    gone.start()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".box")).to_have_count(ABOVE_HALF)
    gone.stop()


def test_key_is_asked_for_and_used(open_page: OpenPage, tmp_path: Path) -> None:
    key, line = make_key("tester")
    (tmp_path / "keys").write_text(line + "\n")
    locked = PageServer(api_keys_file=tmp_path / "keys")
    try:
        page = open_page(at=locked, allow="status of 401")
        show(page, png())
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator(".box")).to_have_count(ABOVE_HALF)
        expect(page.locator("#snippet-code")).to_contain_text("$DETECTOR_API_KEY")
        assert key not in page.content()
        told = open_page("docs", at=locked)
        expect(told.locator("#post-v1-detect")).to_contain_text("Needs a key.")
        expect(told.locator("#get-healthz")).not_to_contain_text("Needs a key.")
    finally:
        locked.stop()


def test_model_can_be_picked_where_there_are_several(open_page: OpenPage) -> None:
    several = PageServer()
    try:
        several.adopt(KnownRuntime(name="parasites", known=KNOWN[:1]))
        page = open_page(at=several)
        expect(page.get_by_label("Model").locator("option")).to_have_text(["blood-cells · version 1", "parasites · version 1"])
        show(page, png())
        expect(page.locator(".box")).to_have_count(ABOVE_HALF)
        page.get_by_label("Model").select_option("parasites")
        expect(page.locator(".box")).to_have_count(1)
        expect(page.locator("#snippet-code")).to_contain_text("model=parasites")
    finally:
        several.stop()


def test_saved_json_and_picture_hold_what_is_shown(open_page: OpenPage) -> None:
    page = open_page()
    show(page, png(300, 200))
    set_threshold(page, 0.8)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save JSON").click()
    assert saved.value.suggested_filename == "slide.json"
    answer = json.loads(Path(saved.value.path()).read_text())
    assert [one["score"] for one in answer["detections"]] == [0.97, 0.9, 0.83]
    assert answer["image"] == {"width": 300, "height": 200}
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save picture").click()
    assert saved.value.suggested_filename == "slide-boxes.png"
    with Image.open(saved.value.path()) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape == (200, 300, 3)
    colour = page.evaluate("import('/static/palette.js').then(({ colourOf }) => colourOf('RBC'))")
    expected = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    left_edge = pixels[80, int(0.5 * 300) - 2 : int(0.5 * 300) + 3].astype(int)
    assert np.abs(left_edge - expected).sum(axis=1).min() < 12


def test_copied_snippets_run_and_find_the_same(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    show(page, png(), "o'clock.png")
    (tmp_path / "o'clock.png").write_bytes(png())
    page.get_by_role("button", name="Copy").click()
    curl = page.evaluate("navigator.clipboard.readText()")
    answer = subprocess.run(["bash", "-c", f"{curl} --silent"], cwd=tmp_path, capture_output=True, check=True, timeout=30)
    assert len(json.loads(answer.stdout)["detections"]) == ABOVE_HALF
    page.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Python")).to_have_attribute("aria-selected", "true")
    program = page.locator("#snippet-code").inner_text()
    printed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)
    assert len(printed.stdout.splitlines()) == ABOVE_HALF


def test_time_is_split_into_its_parts(open_page: OpenPage) -> None:
    page = open_page()
    show(page, png())
    expect(page.locator("#timing-legend dt")).to_have_text(["Decode", "Queue", "Infer", "Everything else"])
    assert page.evaluate(
        "import('/static/timing.js').then(({ timingParts }) => timingParts({ decode: 2, queue: 0.5, infer: 11, total: 15 }))"
    ) == {"decode": 2, "queue": 0.5, "infer": 11, "rest": 1.5}


def test_camera_shows_boxes_until_it_is_frozen(open_page: OpenPage) -> None:
    page = open_page()
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator(".box")).to_have_count(ABOVE_HALF)
    page.get_by_role("button", name="Freeze").click()
    expect(page.locator("#camera-button")).to_have_text("Camera")
    expect(page.get_by_role("button", name="Save picture")).to_be_enabled()
    expect(page.locator(".box")).to_have_count(ABOVE_HALF)


def test_colours_are_the_same_as_in_drawn_answers(open_page: OpenPage) -> None:
    page = open_page()
    names = ["RBC", "WBC", "Platelets", "traffic light", "Straßenbahn", "犬", ""]
    in_page = page.evaluate("names => import('/static/palette.js').then(({ colourOf }) => names.map(colourOf))", names)
    assert in_page == [drawing.colour_of(name) for name in names]


# all pages


def test_api_page_shows_every_route(open_page: OpenPage, page_host: PageServer) -> None:
    document = httpx.get(f"{page_host.url}openapi.json").json()
    page = open_page("docs")
    operations = [(path, verb) for path, verbs in document["paths"].items() for verb in verbs]
    expect(page.locator(".operation")).to_have_count(len(operations))
    detect = page.locator("#post-v1-detect")
    expect(detect).not_to_contain_text("Needs a key.")
    expect(page.locator("#post-v2-models-name-infer")).to_contain_text("NAME_tensor takes images")
    for option in ("score_threshold", "max_detections", "classes"):
        expect(detect).to_contain_text(option)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("path", ["", "dashboard", "docs"], ids=["playground", "dashboard", "docs"])
def test_pages_are_accessible_and_fit(
    open_page: OpenPage, assert_accessible: Callable[[Page], None], path: str, viewport: dict[str, int], scheme: str
) -> None:
    page = open_page(path, viewport=viewport, scheme=scheme)
    ready = {"": "#model-name:not(:empty)", "dashboard": "#models tr", "docs": ".operation"}[path]
    page.locator(ready).first.wait_for()
    if path == "":
        assert_accessible(page)
        show(page, png(640, 480))
        page.locator("#rows tr").first.focus()
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_dark_and_light_follow_the_system(open_page: OpenPage) -> None:
    shades = {}
    for scheme in ("light", "dark"):
        page = open_page(scheme=scheme)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("L")
        shades[scheme] = float(np.asarray(picture).mean())
    assert shades["light"] > 220
    assert shades["dark"] < 60
