"""How the commands of export end when somebody ends them."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_onnx import write_model

from export import audit, engines
from export.__main__ import main
from export.console import interrupted, interruptible

ENDING = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(autouse=True)
def _usual_handlers() -> Iterator[None]:
    """As in a terminal, also where the tests themselves run under nohup."""
    before = {number: signal.getsignal(number) for number in ENDING}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_every_way_to_end_a_command_is_an_interrupt_and_only_within(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_a_second_signal_does_not_stop_the_tidying_up() -> None:
    tidied = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            tidied.append(True)

    with pytest.raises(KeyboardInterrupt), interruptible():
        work()
    assert tidied == [True]


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruptible():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_sentence_and_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert interrupted("nothing was [old]") == 130
    assert capsys.readouterr().err == "interrupted; nothing was [old]\n"


@pytest.mark.parametrize("number", ENDING)
def test_an_interrupted_measurement_is_a_sentence_and_leaves_no_scratch(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, scratch = write_model(tmp_path), tmp_path / "scratch"
    scratch.mkdir()
    held = []

    def end(*_: object) -> None:
        held.extend(scratch.iterdir())
        signal.raise_signal(number)

    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr("export.profiling._open", end)
    for command, sentence in ((lambda: main(["inspect", str(path)]), "not shown to the end"), (lambda: audit.main([str(path)]), "judged")):
        held.clear()
        assert command() == 130
        assert sentence in capsys.readouterr().err
        assert [folder.name.startswith("profile-") for folder in held] == [True]
        assert list(scratch.iterdir()) == []


def test_an_interrupted_build_of_engines_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "provider_candidates", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert engines.main([str(tmp_path)]) == 130
    assert "uses no engines that were not built to the end" in capsys.readouterr().err
