"""The load tool against small real servers: what it sends, when, what it counts, and that a stalling server cannot hide."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.load import check_host, main
from benchmarks.load_client import TIMED_OUT, Client, Exchange, parse_target
from benchmarks.load_pictures import Picture, bad_pictures, draw_pictures, read_pictures, resized_pictures
from benchmarks.load_report import warning_of
from benchmarks.load_run import Load, Records, poisson_arrivals, run_load
from benchmarks.load_search import find_rate, parse_objective
from benchmarks.load_stats import Summary, percentiles, read_summary, summarise

PICTURE = Picture("a.jpg", "image/jpeg", b"\xff\xd8 stands for a picture")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
Handle = Callable[[bytes], Awaitable[bytes]]
"""Body of a request -> bytes of the answer; empty closes the connection without one."""


async def serve(handle: Handle) -> tuple[asyncio.Server, str]:
    """A keep-alive HTTP server on a free port, and its URL."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length is not None
                answer = await handle(await reader.readexactly(int(length[1])))
                writer.write(answer)
                if not answer or b"Connection: close" in answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/detect"


def loaded(handle: Handle, load: Load, pictures: list[Picture] | None = None) -> Records:
    async def run() -> Records:
        server, url = await serve(handle)
        async with server:
            return await run_load(url, pictures or [PICTURE], load)

    return asyncio.run(run())


async def answer_ok(_body: bytes) -> bytes:
    return OK


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    arrivals = poisson_arrivals((200.0, 200.0), 100.0, np.random.default_rng(1))
    assert len(arrivals) == pytest.approx(20_000, abs=5 * 20_000**0.5)
    gaps = np.diff(arrivals)
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential gaps


def test_a_ramp_goes_linearly_between_its_rates() -> None:
    arrivals = poisson_arrivals((10.0, 90.0), 100.0, np.random.default_rng(2))
    tenths, _ = np.histogram(arrivals, bins=10, range=(0, 100))
    expected = 10 * (10 + 80 * (np.arange(10) + 0.5) / 10)
    assert np.all(np.abs(tenths - expected) < 5 * np.sqrt(expected))
    assert arrivals.max() <= 100


def test_open_loop_counts_a_stall_for_everyone_who_was_due_meanwhile() -> None:
    gate = asyncio.Lock()
    served = 0

    async def stalls_once(_body: bytes) -> bytes:
        nonlocal served
        async with gate:
            served += 1
            if served == 20:
                await asyncio.sleep(0.5)
        return OK

    load = Load(rate=(200.0, 200.0), seconds=1.5, warm_up_s=0.0)
    records = loaded(stalls_once, load)
    latency_ms = (records.done - records.scheduled) * 1e3
    assert (records.status == 200).all()
    # 100 requests are due within the 500 ms; a client that waits for answers would have noticed one
    assert (latency_ms > 100).sum() > 50
    assert latency_ms.max() > 450


def test_closed_loop_keeps_its_clients_busy_and_never_more() -> None:
    now, most = 0, 0

    async def counting(_body: bytes) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.002)
        now -= 1
        return OK

    records = loaded(counting, Load(clients=(7, 7), seconds=0.5, warm_up_s=0.0))
    assert most == 7
    assert len(records.status) > 7 * 20


def test_a_ramp_of_clients_ends_higher_than_it_starts() -> None:
    active: list[int] = []
    now = 0

    async def counting(_body: bytes) -> bytes:
        nonlocal now
        now += 1
        active.append(now)
        await asyncio.sleep(0.005)
        now -= 1
        return OK

    loaded(counting, Load(clients=(1, 9), seconds=1.0, warm_up_s=0.0))
    assert max(active[: len(active) // 10]) <= 3
    assert max(active) == 9


def test_refusals_failures_and_timeouts_are_told_apart() -> None:
    async def moody(body: bytes) -> bytes:
        if body == b"busy":
            return b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
        if body == b"gone":
            return b""
        if body == b"slow":
            await asyncio.sleep(5)
        if body == b"nonsense":
            return b"NOT HTTP AT ALL\r\n\r\n"
        return OK

    async def run() -> dict[bytes, Exchange]:
        server, url = await serve(moody)
        target = parse_target(url)
        assert target.hostname is not None
        assert target.port is not None
        bodies = [b"busy", b"gone", b"slow", b"nonsense", b"fine"]
        requests = [b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body) for body in bodies]
        client = Client(target.hostname, target.port, requests, max_connections=8, timeout_s=0.3, keep_bodies=True)
        ended: asyncio.Queue[Exchange] = asyncio.Queue()
        for index in range(len(bodies)):
            client.fire(Exchange(index, 0.0, ended.put_nowait))
        exchanges = [await ended.get() for _ in bodies]
        client.close()
        server.close()
        return {bodies[exchange.picture]: exchange for exchange in exchanges}

    found = asyncio.run(run())
    assert {body: exchange.status for body, exchange in found.items()} == {
        b"busy": 429,
        b"gone": 0,
        b"slow": TIMED_OUT,
        b"nonsense": 0,
        b"fine": 200,
    }
    assert found[b"busy"].retry_after
    assert not found[b"fine"].retry_after
    assert found[b"fine"].body == b"{}"


def test_a_keep_alive_connection_that_was_closed_meanwhile_is_replaced() -> None:
    connections = 0

    async def run() -> list[int]:
        nonlocal connections

        async def closes_without_telling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
            await reader.read(10)  # takes the next request's first bytes and hangs up on it
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(closes_without_telling, "127.0.0.1", 0)
        client = Client(*server.sockets[0].getsockname()[:2], [b"POST / HTTP/1.1\r\n\r\n"], max_connections=1, timeout_s=5)
        ended: asyncio.Queue[Exchange] = asyncio.Queue()
        statuses = []
        for _ in range(3):
            client.fire(Exchange(0, 0.0, ended.put_nowait))
            statuses.append((await ended.get()).status)
        client.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)  # the server's side of the last connection
        return statuses

    assert asyncio.run(run()) == [200, 200, 200]
    assert connections == 3


def test_requests_beyond_the_connections_wait_in_line() -> None:
    async def run() -> tuple[list[int], int]:
        server, url = await serve(answer_ok)
        port = parse_target(url).port
        assert port is not None
        client = Client("127.0.0.1", port, [b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"], max_connections=2, timeout_s=5)
        ended: asyncio.Queue[Exchange] = asyncio.Queue()
        for _ in range(20):
            client.fire(Exchange(0, 0.0, ended.put_nowait))
        outstanding = client.outstanding
        statuses = [(await ended.get()).status for _ in range(20)]
        client.close()
        server.close()
        return statuses, outstanding

    assert asyncio.run(run()) == ([200] * 20, 20)


def test_a_dead_server_is_counted_and_not_called_in_a_busy_loop() -> None:
    async def run() -> Records:
        server, url = await serve(answer_ok)
        server.close()
        await server.wait_closed()
        return await run_load(url, [PICTURE], Load(clients=(2, 2), seconds=0.3, warm_up_s=0.0))

    records = asyncio.run(run())
    assert (records.status == 0).all()
    assert 2 <= len(records.status) <= 20


def test_bad_pictures_are_counted_apart_and_an_answer_to_one_is_an_error() -> None:
    async def decodes(body: bytes) -> bytes:
        if body.startswith(b"\xff\xd8") or body == b"":
            return OK
        return b"HTTP/1.1 422 Unprocessable Content\r\nContent-Length: 0\r\n\r\n"

    pictures = [PICTURE, Picture("text", "image/jpeg", b"text", good=False), Picture("empty", "image/jpeg", b"", good=False)]
    load = Load(rate=(400.0, 400.0), seconds=1.0, warm_up_s=0.0, bad_share=0.5)
    summary = summarise(loaded(decodes, load, pictures), load)
    assert summary.bad_pictures == pytest.approx(200, abs=75)
    assert 0 < summary.errors < summary.bad_pictures  # the empty ones that were answered with 200
    assert summary.statuses["422"] + summary.errors == summary.bad_pictures


def test_summary_counts_what_came_after_the_warm_up() -> None:
    times = np.arange(10.0)
    status = np.array([200, 200, 200, 429, 200, 503, 500, 200, 200, 200])
    records = Records(times, times, times + 0.5, status, status == 429, np.ones(10, dtype=bool), 0.1)
    summary = summarise(records, Load(rate=(1.0, 1.0), seconds=10.0, warm_up_s=2.0))
    assert summary.requests == 8
    assert summary.statuses == {"200": 5, "429": 1, "500": 1, "503": 1}
    assert summary.errors == 1
    assert summary.offered_per_s == pytest.approx(1.0)
    assert summary.answered_per_s == pytest.approx(5 / 8)
    assert summary.latency_ms["p99.9"] == pytest.approx(500.0)
    assert summary.refusals_with_retry_after == 0.5
    assert [row["answered"] for row in summary.timeline] == [1, 1, 1, 0, 1, 0, 0, 1, 1, 1]
    assert warning_of(summary) is None


def test_percentiles_are_values_that_occurred() -> None:
    values = np.arange(1.0, 1001.0)
    found = percentiles(values)
    assert found["p50"] == 501
    assert found["p99.9"] == 1000
    assert found["max"] == 1000
    assert percentiles(np.array([])) == {}


def summary_at(rate: float, *, p99_ms: float, refused: int = 0) -> Summary:
    statuses = {"200": 1000} | ({"429": refused} if refused else {})
    return Summary("", {}, 1, rate, rate, 1000, statuses, {"p99": p99_ms}, {}, 1.0, 0, 0, 0.0, 0.1, [], [])


@pytest.mark.parametrize("capacity", [0.9, 37.0, 480.0])
def test_find_rate_comes_within_its_resolution_of_the_capacity(capacity: float) -> None:
    async def measure(rate: float) -> Summary:
        return summary_at(rate, p99_ms=20.0 if rate <= capacity else 300.0)

    found = asyncio.run(find_rate(measure, parse_objective("p99=100"), start=10.0))
    assert 0.9 * capacity <= found.rate <= capacity
    assert len(found.tried) < 16


def test_find_rate_does_not_count_a_rate_that_was_refused() -> None:
    async def measure(rate: float) -> Summary:
        return summary_at(rate, p99_ms=20.0, refused=5 if rate > 50 else 0)

    assert asyncio.run(find_rate(measure, parse_objective("p99=100"), start=10.0)).rate == pytest.approx(50, rel=0.06)


@pytest.mark.parametrize("text", ["p99", "p98=100", "99=100", "p99=fast"])
def test_an_objective_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a percentile"):
        parse_objective(text)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/x", "http://localhost/x", "http://127.8.9.1/x", "http://[::1]:8000/x"])
def test_this_machine_may_be_loaded(url: str) -> None:
    check_host(url, owned=False)


@pytest.mark.parametrize("url", ["http://192.0.2.7/v1/detect", "http://example.org/v1/detect"])
def test_another_machine_needs_a_word(url: str) -> None:
    with pytest.raises(ValueError, match="--i-own-this-host"):
        check_host(url, owned=False)
    check_host(url, owned=True)


def test_only_plain_http_is_loaded() -> None:
    with pytest.raises(ValueError, match="expected http://"):
        parse_target("https://127.0.0.1/v1/detect")


def test_drawn_pictures_are_jpegs_of_their_size_and_the_same_each_time() -> None:
    pictures = draw_pictures([(48, 64), (80, 40)], per_size=2)
    assert [Image.open(io.BytesIO(picture.body)).size for picture in pictures] == [(64, 48), (64, 48), (40, 80), (40, 80)]
    assert pictures == draw_pictures([(48, 64), (80, 40)], per_size=2)
    resized = resized_pictures(pictures, [(30, 20), (10, 50)])
    assert [Image.open(io.BytesIO(picture.body)).size for picture in resized] == [(30, 20), (10, 50)] * 2
    assert all(not picture.good for picture in bad_pictures(pictures))


def test_pictures_are_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "b.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "inner" / "A.JPG", "JPEG")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert [(p.name, p.content_type) for p in read_pictures(tmp_path)] == [("b.png", "image/png"), ("A.JPG", "image/jpeg")]
    with pytest.raises(ValueError, match="holds no picture"):
        read_pictures(tmp_path / "nothing")


@pytest.fixture
def server_url() -> Iterator[str]:
    """A server on its own thread, for commands that run their own event loop."""
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, str]] = []
    ready = threading.Event()

    async def run() -> None:
        server, url = await serve(answer_ok)
        stop = asyncio.Event()
        started.append((asyncio.get_running_loop(), stop, url))
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10)
    loop, stop, url = started[0]
    yield url
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)


def test_the_command_reports_and_compares(server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    short = ["--pictures", str(tmp_path), "--seconds", "0.6", "--warm-up", "0.1"]
    before, after, page, plot = (tmp_path / name for name in ("before.json", "after.json", "report.html", "plot.svg"))
    assert main([server_url, *short, "--rate", "100", "--json", str(before), "--html", str(page), "--plot", str(plot)]) == 0
    assert main([server_url, *short, "--clients", "2", "--sizes", "8x6", "--json", str(after)]) == 0
    assert read_summary(before).statuses == {"200": read_summary(before).requests}
    assert json.loads(after.read_text())["load"]["clients"] == [2, 2]
    assert "data:image/png;base64," in page.read_text()
    assert "src=" in page.read_text()
    assert "http" not in re.sub(r"base64,[^\"]*", "", page.read_text())
    assert plot.stat().st_size > 1000
    capsys.readouterr()
    assert main(["--compare", str(before), str(after), "--html", str(page)]) == 0
    assert "second / first" in capsys.readouterr().out


def test_the_command_finds_a_rate(server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    arguments = [server_url, "--pictures", str(tmp_path), "--seconds", "0.2", "--warm-up", "0", "--find-rate"]
    assert main([*arguments, "p50=0.0001"]) == 2
    assert "no rate held" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give the URL"),
        (["http://127.0.0.1:9/"], "choose one of"),
        (["http://127.0.0.1:9/", "--rate", "5", "--clients", "2"], "choose one of"),
        (["http://192.0.2.7/", "--rate", "5"], "--i-own-this-host"),
        (["http://127.0.0.1:9/", "--rate", "5", "--seconds", "1", "--warm-up", "2"], "leave nothing after"),
    ],
)
def test_arguments_that_make_no_sense_are_explained(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", [["--rate", "0"], ["--clients", "-3"], ["--sizes", "640"], ["--find-rate", "fast"]])
def test_option_values_are_checked(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["http://127.0.0.1:9/", *option])
    assert "expected" in capsys.readouterr().err
