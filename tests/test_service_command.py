from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from service_fakes import picture
from service_onnx import write_model

from service import logs
from service.__main__ import main
from service.command import drawn_names, find_pictures


@pytest.fixture(autouse=True)
def _loggers_as_before():
    """main() sets the process's loggers up; other tests read theirs."""
    loggers = [logging.getLogger(name) for name in logs.ROOT_LOGGERS]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "repository")
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    (pictures / "a.png").write_bytes(picture(90, 60, (220, 30, 30)))
    (pictures / "b.jpg").write_bytes(picture(60, 90, (30, 30, 220), kind="JPEG"))
    (pictures / "deep" / "a.png").write_bytes(picture(120, 120, (30, 220, 30)))
    (pictures / "notes.txt").write_text("no picture")
    return tmp_path


def detect(folder, *arguments) -> tuple[int, list[dict]]:
    output = folder / "lines.jsonl"
    code = main(["--model-repository", str(folder / "repository"), "--provider", "cpu", "detect", *arguments, "--output", str(output)])
    lines = output.read_text().splitlines() if output.exists() else []
    return code, [json.loads(line) for line in lines]


def test_a_folder_gives_one_line_a_picture_in_order(folder):
    code, lines = detect(folder, str(folder / "pictures"))
    assert code == 0
    assert [(Path(line["file"]).name, line["detections"][0]["class"]) for line in lines] == [
        ("a.png", "red"),
        ("b.jpg", "blue"),
        ("a.png", "green"),
    ]
    assert lines[0]["image"] == {"width": 90, "height": 60}
    assert lines[0]["detections"][0]["box"] == [45.0, 0.0, 90.0, 60.0]


def test_options_are_those_of_the_api(folder):
    _, lines = detect(
        folder, str(folder / "pictures" / "b.jpg"), "--score-threshold", "0.1", "--classes", "red", "--box-format", "normalized"
    )
    assert [(d["class"], d["box"]) for d in lines[0]["detections"]] == [("red", [0.0, 0.0, 0.25, 0.25])]


def test_drawn_pictures_and_failures(folder):
    code, lines = detect(folder, str(folder / "pictures" / "*.*"), "--draw", str(folder / "drawn"))
    assert code == 1
    assert [line.get("error", {}).get("code") for line in lines] == [None, None, "unsupported_type"]
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == ["a.png", "b.jpg"]
    with Image.open(folder / "drawn" / "b.jpg") as drawn:
        assert drawn.size == (60, 90)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing-here-*.jpg"], "matches no picture"),
        (["pictures", "--classes", "purple"], "purple"),
        (["pictures", "--model", "x"], "blobs@1"),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    code, _ = detect(folder, *arguments)
    assert code == 2
    assert words in capsys.readouterr().err


def test_without_a_model_it_says_so(tmp_path, capsys):
    assert main(["--model-repository", str(tmp_path), "detect", "x.jpg"]) == 3
    assert "python -m export" in capsys.readouterr().err


def test_names_of_drawn_pictures_do_not_collide():
    assert drawn_names([Path("x/a.png"), Path("y/a.png"), Path("a.tiff"), Path("b.JPG")]) == ["a.png", "a-2.png", "a.jpg", "b.jpg"]


def test_files_keep_the_order_of_the_arguments(folder):
    found = find_pictures([str(folder / "pictures" / "notes.txt"), str(folder / "pictures" / "deep")])
    assert [path.name for path in found] == ["notes.txt", "a.png"]


def test_a_key_is_printed_once_and_its_line_holds_only_a_digest(capsys):
    assert main(["key", "alice"]) == 0
    key_line, file_line = capsys.readouterr().out.splitlines()
    assert key_line.split()[-1].startswith("det_")
    assert key_line.split()[-1] not in file_line


def test_classes_may_be_repeated_and_options_stand_before_or_behind_the_command(folder, capsys):
    _, lines = detect(folder, str(folder / "pictures"), "--classes", "red", "--classes", "blue", "--provider", "cpu")
    assert [len(line["detections"]) for line in lines] == [1, 1, 0]
    assert "3 pictures in" in capsys.readouterr().err
    output = folder / "behind.jsonl"
    behind = ["--output", str(output), "--model-repository", str(folder / "repository"), "--provider", "cpu"]
    assert main(["detect", str(folder / "pictures" / "a.png"), *behind]) == 0
    assert len(output.read_text().splitlines()) == 1


def test_pictures_that_cannot_be_read_are_told_of(folder, capsys):
    (folder / "pictures" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    code, lines = detect(folder, str(folder / "pictures"))
    assert code == 1
    assert [line["error"]["code"] for line in lines if "error" in line] == ["unsupported_type"]
    assert "4 pictures in" in (told := capsys.readouterr().err)
    assert "1 of them without an answer" in told


def test_drawings_of_an_earlier_run_are_no_pictures_and_originals_are_safe(folder, capsys):
    pictures = folder / "pictures"
    for _ in range(2):
        code, lines = detect(folder, str(pictures), "--draw", str(pictures / "drawn"))
        assert (code, len(lines)) == (0, 3)
    before = (pictures / "a.png").read_bytes()
    assert detect(folder, str(pictures / "a.png"), "--draw", str(pictures))[0] == 2
    assert "would replace" in capsys.readouterr().err
    assert (pictures / "a.png").read_bytes() == before


def test_places_that_cannot_be_written_are_sentences(folder, capsys):
    picture_file = str(folder / "pictures" / "a.png")
    common = ["--model-repository", str(folder / "repository"), "--provider", "cpu", "detect", picture_file]
    assert main([*common, "--output", str(folder / "nowhere" / "lines.jsonl")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert main([*common, "--draw", picture_file]) == 2
    assert "--draw" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_the_command_quietly(folder):
    """As `| head -1` does."""
    from test_service_server import ROOT, environment

    many = [str(folder / "pictures" / "a.png")] * 1_000  # more than a pipe holds
    command = [sys.executable, "-m", "service", "detect", *many, "--box-format", "normalized", "--provider", "cpu"]
    variables = environment(model_repository=folder / "repository")
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b'{"file":')
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


def test_an_interruption_keeps_the_lines_so_far(folder):
    from test_service_server import ROOT, environment

    many, output = [str(folder / "pictures" / "a.png")] * 20_000, folder / "lines.jsonl"
    command = [sys.executable, "-m", "service", "detect", *many, "--output", str(output), "--provider", "cpu"]
    variables = environment(model_repository=folder / "repository")
    with subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (output.exists() and output.stat().st_size) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = process.stderr.read()
        assert process.wait(60) == 130, told
    assert "interrupted; the lines so far are written" in told
    assert "Traceback" not in told
    assert all(json.loads(line)["image"] for line in output.read_text().splitlines())
