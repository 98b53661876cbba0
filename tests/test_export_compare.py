"""Two versions held against each other: agreement on boxes typed by hand, then the command on two files that differ in known ways."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from colour_pictures import write_colours
from PIL import Image
from service_onnx import write_model

from export.__main__ import main
from export.compare import common_classes
from export.compare_agreement import agree, agree_by_class
from export.target import find_version
from model.metrics.predictions import Prediction, empty_prediction

BOX, NEAR, FAR = (10, 20, 50, 80), (12, 20, 50, 80), (200, 100, 260, 180)


def prediction(*rows: tuple[tuple[int, int, int, int], float, int]) -> Prediction:
    return Prediction(
        boxes=np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], np.float32),
        labels=np.array([row[2] for row in rows], np.int64),
    )


def test_the_same_answer_agrees() -> None:
    same = prediction((BOX, 0.9, 1), (FAR, 0.6, 2), (NEAR, 0.2, 1))
    one = agree(same, same, score_threshold=0.5)
    assert [(pair.a, pair.b, pair.iou, pair.box_px, pair.score) for pair in one.pairs] == [(0, 0, 1, 0, 0), (1, 1, 1, 0, 0)]
    assert (dict(one.missed), dict(one.extra), one.renamed, one.disagreement, one.differs) == ({}, {}, (), 0, False)


def test_a_pair_tells_how_far_it_moved() -> None:
    (pair,) = agree(prediction((BOX, 0.9, 1)), prediction((NEAR, 0.7, 1)), score_threshold=0.5).pairs
    assert pair.box_px == 2
    assert pair.score == pytest.approx(-0.2)
    assert pair.iou == pytest.approx(38 / 40)


def test_a_score_that_slips_under_the_threshold_is_less_than_an_object_that_is_gone() -> None:
    before = prediction((BOX, 0.52, 1))
    slipped = agree(before, prediction((NEAR, 0.48, 1)), score_threshold=0.5)
    gone = agree(before, empty_prediction(), score_threshold=0.5)
    assert slipped.missed == {0: pytest.approx(0.48)}
    assert gone.missed == {0: 0.0}
    assert slipped.disagreement == pytest.approx(0.04)
    assert gone.disagreement == pytest.approx(0.52)
    back = agree(prediction((NEAR, 0.48, 1)), before, score_threshold=0.5)
    assert back.extra == {0: pytest.approx(0.48)}
    assert back.differs


def test_a_weak_neighbour_takes_nobodys_partner() -> None:
    """The weak box overlaps better; the sure ones belong together."""
    one = agree(prediction((BOX, 0.9, 1)), prediction((NEAR, 0.8, 1), (BOX, 0.1, 1)), score_threshold=0.5)
    assert [(pair.a, pair.b) for pair in one.pairs] == [(0, 0)]
    assert not one.differs


def test_another_class_in_the_same_place_is_a_new_name() -> None:
    one = agree(prediction((FAR, 0.9, 1), (BOX, 0.8, 1)), prediction((BOX, 0.9, 2)), score_threshold=0.5)
    assert (set(one.missed), set(one.extra), one.renamed) == ({0, 1}, {0}, ((1, 0),))


def test_classes_add_up() -> None:
    a, b = [prediction((BOX, 0.9, 1), (FAR, 0.8, 2)), empty_prediction()], [prediction((NEAR, 0.6, 1)), prediction((FAR, 0.7, 1))]
    agreements = [agree(x, y, score_threshold=0.5) for x, y in zip(a, b, strict=True)]
    one, two, every = agree_by_class(agreements, a, b, ("one", "two"))
    assert (one.name, one.both, one.missed, one.extra, one.worst_box_px) == ("one", 1, 0, 1, 2)
    assert (two.both, two.missed, two.extra, two.mean_iou) == (0, 1, 0, 1)
    assert (every.name, every.both, every.missed, every.extra) == ("all", 1, 1, 1)
    assert every.worst_score == pytest.approx(0.3)


# -- the command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Version 1 finds every object; 2 is less sure of them, under 0.5; 3 is 1 with its classes in another order; 9 is something else."""
    root = tmp_path / "repository"
    write_model(root, version="1")
    write_model(root, version="2", score=0.1)
    write_model(root, version="3", class_names=["green", "red", "blue"])
    write_model(root, name="cats", version="9", class_names=["cat", "dog", "cow"])
    return root


def run(repository: Path, a: str, b: str, *more: str) -> int:
    data = write_colours(repository.parent / "data")
    common = ["--repository", str(repository), "--provider", "cpu", "--out", str(repository.parent / "out")]
    return main(["compare", a, b, str(data), *common, *more])


def numbers(repository: Path) -> dict:
    return json.loads((repository.parent / "out" / "comparison.json").read_text())


def test_a_version_equals_itself(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repository, "blobs@1", str(repository / "blobs" / "1"), "--max-drop", "0", "--max-class-drop", "0") == 0
    found = numbers(repository)
    assert found["a"]["coco"] == found["b"]["coco"]
    assert found["a"]["coco"]["AP"] == pytest.approx(1)
    assert found["agreement"]["all"] == {
        "both": 5, "missed": 0, "extra": 0, "worst_box_px": 0, "worst_score": 0, "mean_iou": 1,
    }  # fmt: skip
    assert found["differing_images"] == 0
    assert found["a"]["speed"]["network_p50_ms"] > 0
    page = (repository.parent / "out" / "index.html").read_text()
    assert "agree on every picture" in page
    assert list((repository.parent / "out" / "pictures").iterdir()) == []
    assert "index.html" in capsys.readouterr().out


def test_what_falls_under_the_threshold_is_counted_drawn_and_named(repository: Path) -> None:
    assert run(repository, "blobs@1", "blobs@2", "--pictures", "2") == 0
    found = numbers(repository)
    assert found["b"]["coco"]["AP"] == pytest.approx(1)  # the order of the scores is the same
    assert (found["agreement"]["all"]["both"], found["agreement"]["all"]["missed"]) == (0, 5)
    assert [picture["disagreement"] for picture in found["pictures"]] == pytest.approx([0.5] * 5, abs=0.01)
    drawn = sorted((repository.parent / "out" / "pictures").iterdir())
    assert len(drawn) == 2
    page = (repository.parent / "out" / "index.html").read_text()
    assert all(f'src="pictures/{path.name}"' in page for path in drawn)
    with Image.open(drawn[0]) as picture:
        assert picture.width > picture.height


def test_a_lower_threshold_finds_them_again_and_replaces_the_report(repository: Path) -> None:
    assert run(repository, "blobs@1", "blobs@2", "--pictures", "0") == 0
    assert "agree on every picture" not in (repository.parent / "out" / "index.html").read_text()
    assert run(repository, "blobs@1", "blobs@2", "--score-threshold", "0.25") == 0
    agreement = numbers(repository)["agreement"]["all"]
    assert (agreement["both"], agreement["missed"]) == (5, 0)
    assert agreement["worst_score"] == pytest.approx(0.5, abs=0.01)
    assert shown(repository) == {path.name for path in (repository.parent / "out" / "pictures").iterdir()}
    assert len(shown(repository)) == 5
    assert {path.name for path in (repository.parent / "out").iterdir()} == {"index.html", "comparison.json", "pictures"}


def shown(repository: Path) -> set[str]:
    """The pictures on the page."""
    return set(re.findall(r'src="pictures/([^"]+)"', (repository.parent / "out" / "index.html").read_text()))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def _terminal() -> Iterator[None]:
    """SIGTERM is heard, whoever runs the tests, and ends nothing where the command does not hear it."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize("place", ["compare_pictures._titled", "compare_report._page"])
def test_an_interrupt_leaves_the_earlier_report_whole(
    place: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the pictures, and when all of them are drawn."""
    assert run(repository, "blobs@1", "blobs@2") == 0
    before = content(repository.parent / "out")
    calls = []

    def end(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 5 or "_page" in place:
            signal.raise_signal(signal.SIGTERM)
        return arguments[0]

    monkeypatch.setattr(f"export.{place}", end)
    assert run(repository, "blobs@1", "blobs@3") == 130
    assert "interrupted; no report was written; one that was there before is as it was" in capsys.readouterr().err
    assert len(calls) == (1 if "_page" in place else 5)
    assert content(repository.parent / "out") == before


@pytest.mark.usefixtures("_terminal")
def test_an_interrupted_first_report_leaves_no_folder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.compare_report._page", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert run(repository, "blobs@1", "blobs@2") == 130
    assert not (repository.parent / "out").exists()


def test_a_full_disk_leaves_the_earlier_report_whole(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> str:
        raise OSError("no space left on device")

    assert run(repository, "blobs@1", "blobs@2") == 0
    before = content(repository.parent / "out")
    monkeypatch.setattr("export.compare_report.to_dict", full)
    assert run(repository, "blobs@1", "blobs@3") == 1
    assert "no space left" in capsys.readouterr().err
    assert content(repository.parent / "out") == before


def test_names_that_look_like_markup_are_names(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[/x]", "[red]", ":smile:"]
    path = write_model(repository, name="odd", class_names=names)
    data = write_colours(repository.parent / "[odd]")
    table = (data / "test.csv").read_text()
    for before, after in zip(("red", "green", "blue"), names, strict=True):
        table = table.replace(before, after)
    (data / "test.csv").write_text(table)
    assert main(["compare", str(path), str(path), str(data), "--provider", "cpu", "--out", str(repository.parent / "out")]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("[odd]", *names))


def test_classes_are_compared_by_name_and_a_broken_bound_is_status_2(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Version 3 calls red green: its numbers are the same and its names are not."""
    assert run(repository, "blobs@1", "blobs@3", "--max-drop", "0.5", "--max-class-drop", "0.5") == 2
    found = numbers(repository)
    assert found["agreement"]["blue"]["both"] == 1
    assert sum(picture["renamed"] for picture in found["pictures"]) == 4
    assert len(found["bounds_broken"]) == 3  # all classes, red, green
    assert "AP of red falls by" in capsys.readouterr().err
    assert "AP falls by" in (repository.parent / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("blobs@1", "blobs@7", "which holds blobs@3, blobs@2, blobs@1, cats@9"),
        ("/nowhere/model.onnx", "blobs@1", "is no model file, version folder or version"),
        ("blobs@1", "cats", "no class in common"),
    ],
)
def test_mistakes_are_sentences(repository: Path, a: str, b: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repository, a, b) == 1
    assert words in capsys.readouterr().err
    assert not (repository.parent / "out").exists()


def test_a_folder_of_something_else_is_left_alone(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository.parent / "out").mkdir()
    (repository.parent / "out" / "thesis.txt").write_text("years of work")
    assert run(repository, "blobs@1", "blobs@1") == 1
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in (repository.parent / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("option", ["--max-drop", "--max-class-drop"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "half"])
def test_a_bound_that_cannot_break_is_refused(option: str, value: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="64"):
        run(repository, "blobs@1", "blobs@3", f"{option}={value}")
    assert f"argument {option}: expected hundredths of AP, 0 or more, for example 0.5; got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["abc", "nan", "1.5"])
def test_a_score_is_a_number_from_0_to_1(value: str, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="64"):
        run(repository, "blobs@1", "blobs@3", "--score-threshold", value)
    assert f"--score-threshold: expected a score from 0 to 1, got '{value}'" in capsys.readouterr().err


def test_a_file_that_does_not_run_is_named_with_the_cause(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(repository, version="4", runs=False)
    assert run(repository, "blobs@1", "blobs@4") == 1
    told = capsys.readouterr().err
    assert f"B, {path}, failed while it warmed up: " in told
    assert "Reshape" in told
    assert "request id" not in told


def test_a_picture_that_cannot_be_decoded_is_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = write_colours(repository.parent / "data") / "3.png"
    whole = picture.read_bytes()
    common = ["--repository", str(repository), "--provider", "cpu", "--out", str(repository.parent / "out")]
    picture.write_bytes(whole[:-30])
    assert main(["compare", "blobs@1", "blobs@2", str(picture.parent), *common]) == 1
    assert f"failed on {picture}: the PNG is truncated" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_picture(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository.parent / "thesis.txt").write_text("years of work")
    monkeypatch.setattr("export.compare.compare_versions", lambda *_, **__: pytest.fail("ran"))
    assert (
        main(
            [
                "compare",
                "blobs@1",
                "blobs@2",
                str(repository),
                "--repository",
                str(repository),
                "--out",
                str(repository.parent / "thesis.txt" / "out"),
            ]
        )
        == 1
    )
    assert "thesis.txt is no folder that may be written to" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_before_the_first_picture(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository.parent / "out").mkdir()
    (repository.parent / "out" / "thesis.txt").write_text("years of work")
    monkeypatch.setattr("export.compare.compare_versions", lambda *_, **__: pytest.fail("ran"))
    assert run(repository, "blobs@1", "blobs@1") == 1


def test_a_missing_data_set_is_named_as_this_command_calls_it(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "blobs@1", "blobs@2", "/nonexist", "--repository", str(repository), "--provider", "cpu"]) == 1
    told = capsys.readouterr().err
    assert "there is no folder /nonexist; DATA is" in told
    assert "--data" not in told


def test_ways_to_name_a_version(repository: Path) -> None:
    newest = repository / "blobs" / "3" / "model.onnx"
    for target in ("blobs", "blobs@3", str(repository / "blobs"), str(newest.parent), str(newest)):
        assert find_version(target, repository) == newest


def test_common_classes() -> None:
    assert common_classes(["red", "green"], ["green", "blue"]) == ("red", "green", "blue")


def test_without_a_bound_any_drop_is_status_0(repository: Path) -> None:
    assert run(repository, "blobs@1", "blobs@3") == 0
    found = numbers(repository)
    assert found["b"]["coco"]["AP"] < found["a"]["coco"]["AP"]
    assert found["bounds_broken"] == []
