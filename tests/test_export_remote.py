"""Evaluating a running service: the real process over HTTP, and small servers that misbehave on purpose."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from colour_pictures import write_colours
from service_onnx import write_model
from test_service_server import Process

from export.evaluate import main
from export.remote import RemoteDetector, RemoteError
from service.auth import make_key

KEY, KEY_LINE = make_key("evaluator")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Two models behind a key; room for one image at a time, so that concurrent requests meet 429."""
    folder = tmp_path_factory.mktemp("service")
    write_model(folder / "repository")
    write_model(folder / "repository", name="cells", version="4", class_names=["x", "y", "z"])
    (folder / "keys").write_text(KEY_LINE + "\n")
    process = Process(folder / "repository", api_keys_file=folder / "keys", max_queue_images=1, canary_seconds=0, max_image_pixels=20_000)
    process.until_ready()
    yield process
    process.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "data")


def test_service_and_file_have_one_ap(server: Process, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The true box is one edge off in one picture, so that AP is neither 0 nor 1, and the same either way."""
    table = data / "test.csv"
    table.write_text(table.read_text().replace("4.png,75.0,0,150,90", "4.png,60.0,0,150,90"))
    remote, local = tmp_path / "remote.json", tmp_path / "local.json"
    where = ["--data", str(data), "--split", "test"]
    asked = [server.url, *where, "--api-key", KEY, "--concurrency", "4", "--json", str(remote), "--report", str(tmp_path / "report")]
    assert main(asked) == 0
    assert "over HTTP with 4 requests at a time" in capsys.readouterr().out
    file = write_model(tmp_path / "repository")
    named = ["blobs@1", "--repository", str(file.parent.parent.parent)]
    assert main([*named, *where, "--provider", "cpu", "--json", str(local), "--report", str(tmp_path / "local")]) == 0
    over_http, direct = json.loads(remote.read_text()), json.loads(local.read_text())
    assert 0.5 < direct["coco"]["AP"] < 1
    assert over_http["coco"] == pytest.approx(direct["coco"], abs=1e-3)
    assert (over_http["model"], direct["file"]) == ("blobs@1", str(file))
    assert over_http["speed"]["p95_ms"] >= over_http["speed"]["p50_ms"] > 0
    assert over_http["speed"]["service_infer_mean_ms"] > 0
    assert direct["speed"]["network_p50_ms"] > 0
    for report in ("report", "local"):
        assert {"report.md", "report.json", "confusion.png"} <= {path.name for path in (tmp_path / report).iterdir()}
    assert "service_queue_mean_ms" in (tmp_path / "report" / "report.md").read_text()


def test_another_model_by_name_with_the_key_in_a_file(server: Process, data: Path, tmp_path: Path) -> None:
    table = data / "test.csv"
    for name, other in {"red": "x", "green": "y", "blue": "z"}.items():
        table.write_text(table.read_text().replace(name, other))
    (tmp_path / "key").write_text(KEY + "\n")
    result = tmp_path / "numbers.json"
    arguments = ["--data", str(data), "--model", "cells@4", "--api-key", f"@{tmp_path / 'key'}", "--json", str(result)]
    assert main([server.url + "/", *arguments]) == 0
    assert json.loads(result.read_text())["model"] == "cells@4"
    assert json.loads(result.read_text())["coco"]["AP"] == pytest.approx(1)


def test_a_refused_picture_is_an_error_or_left_out(server: Process, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_colours(tmp_path / "data", sizes=((90, 60), (200, 150), (60, 90)))
    arguments = [server.url, "--data", str(data), "--api-key", KEY]
    assert main(arguments) == 1
    assert "1 pictures were refused, the first: image '1.png'" in capsys.readouterr().err
    assert main([*arguments, "--skip-bad"]) == 0
    shown = capsys.readouterr().out
    assert "skipped image '1.png'" in shown
    assert "2 pictures" in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--api-key", "wrong"], "answered 401"),
        (["--api-key", KEY, "--model", "cells@5"], "serves cells@4, not @5"),
        (["--api-key", KEY, "--model", "nothing"], "is not served"),
        (["--exact-padding"], "--exact-padding belongs to a file"),
        (["--api-key", "@/nowhere/key"], "/nowhere/key"),
    ],
)
def test_mistakes_are_sentences(server: Process, data: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([server.url, "--data", str(data), *more]) == 1
    assert words in capsys.readouterr().err


def test_options_of_a_service_are_none_of_a_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.onnx", "--data", str(data), "--model", "blobs"]) == 1
    assert "--model belongs to a service" in capsys.readouterr().err


# -- servers that misbehave ----------------------------------------------------------------------------------------------------

MODEL = {"name": "m", "version": "1", "versions": [{"version": "1", "class_names": ["a"], "detections_per_image": 5}]}
ANSWER = {"model": {"name": "m", "version": "1"}, "detections": [], "timing_ms": {"decode": 1, "queue": 1, "infer": 1}}
Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def answering(reply: Callable[[str, int], Reply | None]) -> Iterator[str]:
    """A server that answers request number n to a path as told; None closes the connection without a word."""
    lock, counts = threading.Lock(), {"n": 0}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            with lock:
                counts["n"] += 1
                number = counts["n"]
            answer = reply(self.path, number)
            if answer is None:
                self.close_connection = True
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            return

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}"
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def good(path: str, **changes: object) -> Reply:
    if path == "/v1/models":
        return 200, {}, json.dumps({"models": [{"name": "m"}]}).encode()
    if path == "/v1/models/m":
        return 200, {}, json.dumps(MODEL).encode()
    return 200, {}, json.dumps({**ANSWER, **changes}).encode()


def test_retry_after_is_honoured_and_a_broken_connection_is_made_anew() -> None:
    def reply(path: str, number: int) -> Reply | None:
        if number == 3:
            return 429, {"retry-after": "0"}, b"{}"
        return None if number == 4 else good(path)

    with answering(reply) as url:
        detector = RemoteDetector(url)
        assert len(detector.detect(b"picture").prediction["scores"]) == 0
        assert detector.retries == 2
        detector.close()


def test_patience_ends() -> None:
    def reply(path: str, number: int) -> Reply:
        return good(path) if path.startswith("/v1/models") else (503, {"retry-after": "3"}, b'{"detail": "draining"}')

    with answering(reply) as url:
        detector = RemoteDetector(url, patience_s=1)
        with pytest.raises(RemoteError, match="busy for 1 s, at last 503: draining"):
            detector.detect(b"picture")
        detector.close()


def test_a_version_that_changes_on_the_way_is_an_error() -> None:
    with answering(lambda path, number: good(path, model={"name": "m", "version": "2"})) as url:
        detector = RemoteDetector(url)
        with pytest.raises(RemoteError, match="m@1 answered at first and m@2 now"):
            detector.detect(b"picture")
        detector.close()


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[1, 2]"])
def test_something_else_at_that_address(body: bytes, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(lambda path, number: (200, {}, body)) as url:
        assert main([url, "--data", str(data)]) == 1
    assert "is it this project's service?" in capsys.readouterr().err


def test_nobody_at_that_address(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(lambda path, number: None) as url:
        pass
    assert main([url, "--data", str(data)]) == 1
    assert "cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://host", "http://", "host:80"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="expected http"):
        RemoteDetector(url)
