"""The real process on a real socket: `python -m service` with a tiny model file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fakes import WAIT_S, FakeRuntime, make_settings, picture
from service_onnx import write_model

from service.app import create_app
from service.auth import make_key
from service.server import make_server

ROOT = Path(__file__).resolve().parent.parent
PNG = {"content-type": "image/png"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**settings: Any) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DETECTOR_")}
    return {**clean, **{f"DETECTOR_{name.upper()}": str(value) for name, value in settings.items()}}


class Process:
    """A running service: its address, and what it logged."""

    def __init__(self, repository: Path, **settings: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log: list[str] = []
        given = {"host": "127.0.0.1", "port": self.port, "model_repository": repository, "drain_seconds": 0, **settings}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=ROOT, env=environment(**given), stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def until_ready(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/readyz").status_code == 200:
                    return
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.05)
        raise AssertionError("never ready: " + "".join(self.log))

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        connection.settimeout(WAIT_S)
        return connection

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def service(repository: Path, **settings: Any) -> Iterator[Process]:
    process = Process(repository, **settings)
    try:
        process.until_ready()
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Process]:
    """One process for the tests that only talk to it."""
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository)
    with service(
        repository, header_timeout_ms=400, body_timeout_ms=1000, max_header_bytes=4096, max_connections=30, access_log=True
    ) as process:
        yield process


def exchange(process: Process, data: bytes) -> bytes:
    """Send, then read to the end of the connection."""
    with process.connect() as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def test_a_picture_over_the_wire(shared):
    response = httpx.post(shared.url + "/v1/detect", content=picture(90, 60), headers={**PNG, "x-request-id": "from-outside.1"})
    assert response.status_code == 200
    assert response.json()["detections"][0]["class"] == "red"
    assert response.headers["x-request-id"] == "from-outside.1"
    assert "server" not in response.headers


def test_the_log_is_json_and_names_the_request_and_its_trace(shared):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {**PNG, "x-request-id": "logged-1", "traceparent": f"00-{trace}-00f067aa0ba902b7-01", "authorization": "Bearer secret-key"}
    httpx.post(shared.url + "/v1/detect?score_threshold=0.1", content=picture(), headers=headers)
    end = time.monotonic() + WAIT_S
    while not (lines := [line for line in shared.log if "logged-1" in line]) and time.monotonic() < end:
        time.sleep(0.01)
    record = json.loads(lines[0])
    assert record["trace_id"] == trace
    assert (record["route"], record["status"], record["model"]) == ("/v1/detect", 200, "blobs@1")
    assert record["timing_ms"]["total"] > 0
    assert "secret" not in "".join(shared.log)


def test_a_slow_body_gets_408(shared):
    head = b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\nabc"
    with shared.connect() as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_slow_headers_are_cut_off(shared):
    assert exchange(shared, b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Slow").startswith(b"HTTP/1.1 408")
    assert exchange(shared, b"").startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 7_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 5_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: " + b"a" * 5_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Endless: " + b"a" * 9_000,
    ],
)
def test_oversize_headers_get_431(shared, head):
    with contextlib.suppress(ConnectionError):  # the server may close while we still send
        assert exchange(shared, head).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", b"400"),
        (b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\nzz\r\n", b"400"),
        (b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\nContent-Type: image/png\r\n\r\nabc", b"413"),
    ],
)
def test_raw_nonsense_gets_a_client_error(shared, data, status):
    with shared.connect() as connection:
        connection.sendall(data)
        head = connection.recv(65536)
        assert head.startswith(b"HTTP/1.1 " + status)
        assert b"application/problem+json" in head
    assert httpx.get(shared.url + "/healthz").status_code == 200


def test_pipelined_requests_are_answered_in_order(shared):
    bodies = [picture(90, 60, colour) for colour in ((220, 30, 30), (30, 220, 30), (30, 30, 220))]
    head = b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = exchange(shared, b"".join(head % len(body) + body for body in bodies) + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert re.findall(rb'"class":"(\w+)"', answer) == [b"red", b"green", b"blue"]


@pytest.mark.parametrize("size", [150_000, 3_000_000], ids=["handed over whole", "handed over in pieces"])
def test_a_body_may_come_in_pieces(shared, size):
    body = picture(90, 60) + bytes(size)  # what lies behind a picture is ignored
    with shared.connect() as connection:
        for _ in range(2):  # the connection stays usable
            connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(body))
            for start in range(0, len(body), 70_001):
                connection.sendall(body[start : start + 70_001])
                time.sleep(0.002)
            answer = b""
            while b'"timing_ms"' not in answer:
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b'"class":"red"' in answer


def test_a_half_closed_client_harms_nobody(shared):
    with shared.connect() as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nabc")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert httpx.get(shared.url + "/healthz").status_code == 200


def test_an_endless_chunked_body_is_cut_at_the_limit(tmp_path):
    write_model(tmp_path)
    with service(tmp_path, max_upload_bytes=100_000) as process:

        def chunks():
            for _ in range(100):
                yield b"x" * 10_000

        response = httpx.post(process.url + "/v1/detect", content=chunks(), headers=PNG)
        assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_a_refused_body_is_not_read_for_ever(shared):
    with shared.connect() as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\nContent-Type: image/png\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")

        def send_on() -> None:
            end = time.monotonic() + WAIT_S
            while time.monotonic() < end:
                connection.sendall(b"x" * 1000)
                time.sleep(0.01)

        with pytest.raises(ConnectionError):
            send_on()


def test_a_refused_body_that_ends_soon_leaves_the_connection_usable(shared):
    body = b"x" * 40_000
    refused = b"POST /v1/detect?nonsense=1 HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(body)
    with shared.connect() as connection:
        connection.sendall(refused)
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 422")
        connection.sendall(body + b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        while b'{"alive":true}' not in answer:
            answer += connection.recv(65536)
        assert answer.count(b"HTTP/1.1 200") == 1


def test_too_many_connections_are_told_and_the_rest_goes_on(shared):
    held = [shared.connect() for _ in range(30)]
    try:
        response = httpx.get(shared.url + "/healthz")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
    finally:
        for connection in held:
            connection.close()
    end = time.monotonic() + WAIT_S
    while httpx.get(shared.url + "/healthz").status_code != 200:
        assert time.monotonic() < end


def test_vanished_clients_are_counted_and_the_next_is_served(shared):
    data = picture(1500, 1000)
    head = f"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n".encode()

    def cancelled() -> float:
        text = httpx.get(shared.url + "/metrics").text
        return sum(float(value) for value in re.findall(r"^detector_cancelled_total{[^}]*} (\S+)$", text, re.M))

    before, end = cancelled(), time.monotonic() + WAIT_S
    while cancelled() == before:
        connections = [shared.connect() for _ in range(20)]
        for connection in connections:
            connection.sendall(head + data)
            connection.close()
        assert time.monotonic() < end
    assert httpx.post(shared.url + "/v1/detect", content=picture(), headers=PNG).status_code == 200


def test_term_loses_no_accepted_request(tmp_path):
    """Readiness goes first, requests go on for drain_seconds, then what is in flight is finished and the process ends with 0."""
    write_model(tmp_path)

    async def scenario(process: Process) -> tuple[list[int], int, bool]:
        statuses: list[int] = []
        stop = asyncio.Event()

        async def client() -> None:
            async with httpx.AsyncClient(timeout=WAIT_S) as session:
                while not stop.is_set():
                    response = await session.post(process.url + "/v1/detect", content=picture(), headers=PNG)
                    statuses.append(response.status_code)

        clients = [asyncio.create_task(client()) for _ in range(4)]
        while len(statuses) < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        process.process.send_signal(signal.SIGTERM)
        async with httpx.AsyncClient() as session:
            while (ready := await session.get(process.url + "/readyz")).status_code == 200:
                pass
            at_term, alive = len(statuses), await session.get(process.url + "/healthz")
            while len(statuses) < at_term + 20:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)
        return statuses, ready.status_code, alive.status_code == 200

    with service(tmp_path, drain_seconds=3) as process:
        statuses, ready, alive = asyncio.run(scenario(process))
        assert (set(statuses), ready, alive) == ({200}, 503, True)
        assert process.stop() == 0


def test_term_finishes_a_request_whose_body_is_still_coming(tmp_path):
    write_model(tmp_path)
    data = picture()
    head = f"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with service(tmp_path) as process, process.connect() as connection:
        connection.sendall(head + data[:50])
        while "detector_inflight_requests 2.0" not in httpx.get(process.url + "/metrics").text:
            time.sleep(0.01)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # the listening socket is closed by now; whether it is does not change what follows
        connection.sendall(data[50:])
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.split(b"\r\n\r\n")[0]
        assert process.stop() == 0


def test_operations_have_their_own_port_and_the_main_one_has_none_of_them(tmp_path):
    write_model(tmp_path)
    operations = free_port()
    with service(tmp_path, operations_port=operations) as process:
        assert httpx.get(process.url + "/metrics").status_code == 404
        assert "detector_images_total" in httpx.get(f"http://127.0.0.1:{operations}/metrics").text
        assert httpx.get(f"http://127.0.0.1:{operations}/readyz").status_code == 200
        assert process.stop() == 0


def test_a_free_port_is_taken_and_told(tmp_path):
    write_model(tmp_path)
    process = Process(tmp_path, port=0)
    try:
        end = time.monotonic() + WAIT_S
        while not (told := [json.loads(line) for line in process.log if "listening" in line]):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.url = f"http://127.0.0.1:{told[0]['port']}"
        process.until_ready()
    finally:
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("host", "keyed", "open_to_all"), [("0.0.0.0", False, True), ("::", False, True), ("0.0.0.0", True, False), ("127.0.0.1", False, False)]
)
def test_an_api_that_is_open_to_all_says_so(host, keyed, open_to_all, tmp_path, caplog):
    (tmp_path / "keys").write_text(make_key("alice")[1])
    settings = make_settings(host=host, port=0, api_keys_file=tmp_path / "keys" if keyed else None)
    server = make_server(create_app(settings, runtime=FakeRuntime()), settings)
    server.listener.close()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == int(open_to_all)
    assert all("whoever reaches port" in line and "DETECTOR_HOST=127.0.0.1" in line for line in told)


def start_and_read(arguments: list[str], **settings: Any) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "service", *arguments], cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_help_names_every_setting():
    code, text = start_and_read(["--help"])
    assert code == 0
    assert "DETECTOR_MAX_QUEUE_IMAGES" in text


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "words"),
    [
        (["--model-repository", "/nonexistent"], {}, 3, "python -m export CHECKPOINT"),
        ([], {"prot": "1"}, 2, "did you mean DETECTOR_PORT"),
        ([], {"provider": "tensorrt"}, 2, "DETECTOR_PROVIDER=auto"),
        ([], {"api_keys_file": "/nonexistent/keys"}, 2, "cannot be read"),
    ],
)
def test_a_start_that_cannot_be_says_why_in_one_sentence(tmp_path, arguments, settings, code, words):
    write_model(tmp_path)
    given = {"model_repository": tmp_path, "port": free_port(), "host": "127.0.0.1", **settings}
    found_code, text = start_and_read(arguments, **given)
    assert (found_code, "Traceback" in text) == (code, False), text
    assert words in text


def test_a_taken_port_is_told(tmp_path):
    write_model(tmp_path)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, text = start_and_read(["--port", str(port), "--host", "127.0.0.1"], model_repository=tmp_path)
    assert code == 2
    assert "choose another with --port" in text


def test_a_file_that_is_no_model_ends_the_start_with_its_reason(tmp_path):
    path = tmp_path / "blobs" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage" * 1000)
    code, text = start_and_read([], model_repository=tmp_path, port=free_port(), host="127.0.0.1")
    assert code == 3
    assert "cannot open it" in text
    assert "Traceback" not in text
