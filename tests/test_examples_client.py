"""The examples that users copy, against the real process."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from PIL import Image
from service_fakes import picture
from service_onnx import write_model
from test_service_server import Process, free_port, service

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


client = load("client")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository)
    with service(repository) as process:
        yield process


def test_one_picture_many_pictures_drawn_pictures(server: Process, tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(picture(90, 60))
    with client.Detector(server.url) as detector:
        answer = detector.detect(file, score_threshold=0.5)
        assert (answer.model, answer.version, answer.width, answer.height) == ("blobs", "1", 90, 60)
        assert [(found.class_name, found.class_id) for found in answer.detections] == [("red", 1)]
        assert answer.detections[0].box == pytest.approx((45, 0, 90, 60), abs=0.01)
        assert answer.timing_ms["total"] > 0
        assert detector.detect(file, score_threshold=0.1, classes=["green", "blue"]).detections == ()
        good, bad = detector.detect_many([file, b"no picture at all, only text"])
        assert good.detections == answer.detections
        assert (bad.status, bad.code) == (415, "unsupported_type")
        with Image.open(io.BytesIO(detector.draw(file, media_type="image/webp"))) as drawn:
            assert (drawn.format, drawn.size) == ("WEBP", (90, 60))


def test_refusals_are_typed(server: Process) -> None:
    with client.Detector(server.url) as detector:
        with pytest.raises(client.DetectorError, match="did you mean 'score_threshold'") as caught:
            detector.detect(picture(), score_treshold=0.5)
        assert (caught.value.status, caught.value.code) == (422, "bad_option")
        assert caught.value.request_id


def test_asyncio(server: Process) -> None:
    async def ask() -> None:
        async with client.AsyncDetector(server.url) as detector:
            answers = await asyncio.gather(*(detector.detect(picture(60 + i, 60)) for i in range(8)))
            assert [answer.width for answer in answers] == list(range(60, 68))
            good, bad = await detector.detect_many([picture(), b"\xff\xd8"])
            assert (good.model, bad.code) == ("blobs", "bad_image")
            assert (await detector.draw(picture())).startswith(b"\xff\xd8")
            with pytest.raises(client.DetectorError, match="nowhere"):
                await detector.detect(picture(), model="nowhere")

    asyncio.run(ask())


def scripted(*answers: tuple[int, dict[str, str]] | type[Exception]) -> httpx.MockTransport:
    """A service in a bad moment: one answer a request, then a good one."""
    good = {
        "model": {"name": "blobs", "version": "1"}, "image": {"width": 9, "height": 6}, "detections": [], "timing_ms": {"total": 1.0},
    }  # fmt: skip
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        if not left:
            return httpx.Response(200, json=good)
        now = left.pop(0)
        if isinstance(now, type):
            raise now("gone")
        return httpx.Response(now[0], headers=now[1], json={"status": now[0], "code": "busy", "detail": "come back"})

    return httpx.MockTransport(answer)


def pauses_of(monkeypatch: pytest.MonkeyPatch, *answers: Any, tries: int = 5, asynchronous: bool = False) -> tuple[list[float], Any]:
    """How long the client waited before each retry, and what came in the end."""
    pauses: list[float] = []

    async def note(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(client.time, "sleep", pauses.append)
    monkeypatch.setattr(client.random, "uniform", lambda low, high: 0.0)
    transport = scripted(*answers)
    if asynchronous:

        async def ask() -> Any:
            async with client.AsyncDetector("http://detector", tries=tries) as detector:
                detector._http = httpx.AsyncClient(base_url="http://detector", transport=transport)
                monkeypatch.setattr(client.asyncio, "sleep", note)
                return await detector.detect(b"x")

        return pauses, asyncio.run(ask())
    with client.Detector("http://detector", tries=tries) as detector:
        detector._http = httpx.Client(base_url="http://detector", transport=transport)
        return pauses, detector.detect(b"x")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_retry_waits_as_long_as_asked(monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    busy, unready = (429, {"retry-after": "7"}), (503, {"retry-after": "2"})
    pauses, answer = pauses_of(monkeypatch, busy, unready, (429, {}), httpx.ConnectError, asynchronous=asynchronous)
    assert pauses == [7.0, 2.0, 0.8, 1.6]
    assert answer.model == "blobs"


def test_retry_after_as_a_date_or_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    later = client.datetime.now(client.UTC) + timedelta(seconds=30)
    date = format_datetime(later, usegmt=True)
    pauses, _ = pauses_of(monkeypatch, (429, {"retry-after": date}), (429, {"retry-after": "soon"}), (429, {"retry-after": "9999"}))
    assert 25 <= pauses[0] <= 30
    assert pauses[1:] == [0.4, client.MAX_WAIT_S]


def test_gives_up_after_its_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(client.DetectorError) as busy:
        pauses_of(monkeypatch, *[(429, {"retry-after": "1"})] * 3, tries=3)
    assert (busy.value.status, busy.value.code) == (429, "busy")
    with pytest.raises(httpx.ConnectError):
        pauses_of(monkeypatch, *[httpx.ConnectError] * 2, tries=2)


def test_what_cannot_pass_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(client.DetectorError):
        pauses_of(monkeypatch, (422, {}))


def test_a_proxys_error_is_an_error_too() -> None:
    with pytest.raises(client.DetectorError, match="Bad Gateway") as caught:
        client._checked(httpx.Response(502, text="<h1>Bad Gateway</h1>"))
    assert caught.value.code == "http_error"


def test_nobody_there() -> None:
    with client.Detector(f"http://127.0.0.1:{free_port()}", tries=1) as detector, pytest.raises(httpx.ConnectError):
        detector.detect(picture())


def test_command_line(server: Process, tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(picture(90, 60))
    command = [sys.executable, EXAMPLES / "client.py", file, "--url", server.url, "--score-threshold", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "1 found by blobs@1" in done.stdout
    assert done.stdout.split("\n")[1].split()[0] == "red"


def test_a_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    file, url = tmp_path / "red.png", f"http://127.0.0.1:{free_port()}"
    file.write_bytes(picture())
    result = subprocess.run(
        [sys.executable, EXAMPLES / "client.py", file, file, "--url", url], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"{url} does not answer: ")
    assert "red.png" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_httpx_it_says_what_to_install() -> None:
    program = f"import runpy, sys; sys.modules['httpx'] = None; runpy.run_path({str(EXAMPLES / 'client.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (1, "this client needs httpx: python -m pip install httpx\n")


def test_the_command_goes_on_after_a_picture_without_an_answer(server: Process, tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "red.png").write_bytes(picture(90, 60))
    files = [tmp_path / "empty.png", tmp_path / "missing.png", tmp_path / "red.png"]
    result = subprocess.run(
        [sys.executable, EXAMPLES / "client.py", *files, "--url", server.url], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "empty.png: 400 empty_body" in result.stderr
    assert "missing.png: [Errno 2]" in result.stderr
    assert "Traceback" not in result.stderr
    assert "red.png: 1 found by blobs@1" in result.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="the script is made of curl lines")
def test_curl_lines(server: Process, tmp_path: Path) -> None:
    command = ["sh", EXAMPLES / "detect.sh", server.url, EXAMPLES / "blood_smear.jpg", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"detections":[{') == 6
    assert done.stdout.count("== ") == 8
    assert '"model_name":"blobs"' in done.stdout
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (640, 480))


@pytest.mark.skipif(shutil.which("curl") is None, reason="the script is made of curl lines")
def test_curl_lines_leave_nothing_where_they_are_run(server: Process, tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    command = ["sh", EXAMPLES / "detect.sh", server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=here, env={**os.environ, "TMPDIR": str(elsewhere)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(here.iterdir()) == []
    (drawn,) = elsewhere.glob("*/drawn.png")
    assert f"as PNG: {drawn}" in done.stdout


def test_blood_smear_is_drawn_the_same_each_time() -> None:
    smear = load("make_blood_smear")
    first, second, other = smear.draw_smear(3), smear.draw_smear(3), smear.draw_smear(4)
    assert first.size == (640, 480)
    assert first.tobytes() == second.tobytes() != other.tobytes()
