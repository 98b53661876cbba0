"""The evaluation of a file or service as a command: what it refuses before the work, how its failures read, what an interrupt leaves."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from colour_pictures import write_colours
from service_onnx import write_model
from test_export_remote import answering, good

from export.evaluate import AHEAD, main
from model import evaluate as model_evaluate
from service.images import Prepared

PLACES = [("--json", "none/numbers.json"), ("--json", "thesis.txt/numbers.json"), ("--json", "data"), ("--report", "thesis.txt/report")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_model(tmp_path / "repository")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "data")


@pytest.fixture
def _terminal() -> Iterator[None]:
    """SIGTERM is heard, whoever runs the tests, and ends nothing where the command does not hear it."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def run(file: Path, data: Path, *more: str) -> int:
    return main([str(file), "--data", str(data), "--provider", "cpu", *more])


@pytest.mark.parametrize(
    ("target", "option", "value", "kind"),
    [
        ("http://127.0.0.1:9", "--provider", "auto", "a file"),
        ("http://127.0.0.1:9", "--repository", "model_repository", "a file"),
        ("model.onnx", "--concurrency", "4", "a service"),
        ("model.onnx", "--api-key", "", "a service"),
    ],
)
def test_an_option_of_the_other_kind_is_a_mistake_even_with_its_default(
    target: str, option: str, value: str, kind: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([target, "--data", str(data), option, value]) == 1
    assert capsys.readouterr().err == f"error: {option} belongs to {kind}, but {target} is none\n"


def test_help_states_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("looked up (model_repository)", "execution provider (default: auto)", "at a time (default: 4)"):
        assert words in told


@pytest.mark.parametrize(("option", "place"), PLACES)
def test_places_that_cannot_be_written_are_refused_before_the_work(
    option: str, place: str, file: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / "thesis.txt").write_text("years of work")
    monkeypatch.setattr("export.evaluate.OnnxRuntime", lambda *_, **__: pytest.fail("ran"))
    assert run(file, data, option, str(data.parent / place)) == 1
    assert f"error: {option} {data.parent / place} " in capsys.readouterr().err
    assert model_evaluate.main([str(data / "best.pt"), "--data", str(data), option, str(data.parent / place)]) == 1
    assert f"error: {option} {data.parent / place} " in capsys.readouterr().err
    assert (data.parent / "thesis.txt").read_text() == "years of work"


def test_a_report_folder_is_made_with_those_above_it(file: Path, data: Path) -> None:
    report = data.parent / "reports" / "first"
    assert run(file, data, "--report", str(report), "--json", str(data.parent / "numbers.json")) == 0
    assert (report / "report.json").read_text() == (data.parent / "numbers.json").read_text()
    assert not list(report.glob(".*"))


def test_a_file_that_does_not_run_is_told_with_picture_and_cause(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_model(data.parent / "spoilt", runs=False), data) == 1
    told = capsys.readouterr().err
    assert f"error: blobs@1 failed on {data / '0.png'}: " in told
    assert "Reshape" in told
    assert "request id" not in told


def test_a_picture_that_cannot_be_decoded_is_named(file: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:-30])
    assert run(file, data) == 1
    assert f"error: blobs@1 failed on {data / '3.png'}: the PNG is truncated" in capsys.readouterr().err


def test_decoded_pictures_are_let_go(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_colours(tmp_path / "many", sizes=((90, 60),) * (4 * AHEAD))
    held = []

    def progress(done: int) -> None:
        held.append(sum(type(thing) is Prepared for thing in gc.get_objects()))

    monkeypatch.setattr("export.evaluate.progress_bar", lambda *_: _Bar(progress))
    assert run(file, data) == 0
    assert len(held) == 4 * AHEAD
    assert max(held) <= AHEAD + 2


class _Bar:
    def __init__(self, progress: object) -> None:
        self._progress = progress

    def __enter__(self) -> object:
        return self._progress

    def __exit__(self, *_: object) -> None:
        return


# -- interrupts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize("place", ["export.evaluate.answer_one", "model.evaluation.save_samples"])
def test_an_interrupt_writes_nothing(
    place: str, file: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """During the pictures, and while the report is written; an earlier report stays as it was."""
    earlier = data.parent / "earlier"
    assert run(file, data, "--report", str(earlier)) == 0
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    monkeypatch.setattr(place, lambda *_: signal.raise_signal(signal.SIGTERM))
    for report in (earlier, data.parent / "reports" / "new"):
        capsys.readouterr()
        assert run(file, data, "--report", str(report), "--json", str(data.parent / "numbers.json")) == 130
        assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before
    assert not (data.parent / "reports").exists()
    assert not (data.parent / "numbers.json").exists()


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize("mood", ["silent", "busy"])
def test_an_interrupt_does_not_wait_for_a_service(mood: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two requests are under way: one waits for an answer, or for its next try in half a minute."""
    over = threading.Event()

    def reply(path: str, number: int) -> tuple[int, dict[str, str], bytes] | None:
        if path == "/v1/models/m":
            status, headers, body = good(path)
            return status, headers, body.replace(b'["a"]', b'["red", "green", "blue"]')
        if path.startswith("/v1/models"):
            return good(path)
        if number == 4:  # two to describe, then both pictures
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if mood == "silent":
            over.wait(30)
            return None
        return 503, {"retry-after": "30"}, b"{}"

    with answering(reply) as url:
        started = time.monotonic()
        status = main([url, "--data", str(data), "--concurrency", "2"])
        seconds = time.monotonic() - started
        over.set()
    assert status == 130
    assert seconds < 10
    assert "interrupted; nothing was written" in capsys.readouterr().err
