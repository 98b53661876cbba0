"""The linter finds what is planted, says nothing about sound data, and repairs a copy alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.data.__main__ import main
from model.data.check import anchor_reach, anchor_shapes
from model.data.formats import open_dataset
from model.data.records import RawBox
from model.data.repair import mend_box
from model.data.synthetic import write_coco, write_csv, write_voc


def kinds(report: Path) -> dict[str, set[str]]:
    """kind -> pictures, over all splits."""
    content = json.loads(report.read_text())
    rows = [row for split in content["splits"].values() for row in split["faults"] + split["notes"]] + content["duplicates"]
    return {kind: {row["image"] for row in rows if row["kind"] == kind} for kind in {row["kind"] for row in rows}}


def digests(root: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def change(root: Path, name: str, old: str, new: str) -> None:
    path = root / "Annotations" / f"{name}.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    root = write_voc(tmp_path / "data", {"train": 9, "val": 3}, (40, 60))
    images = root / "JPEGImages"
    box = "<object><name>disc</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>"
    change(root, "train_000", "</annotation>", box.format(5, 6, 5, 6))
    change(root, "train_001", "</annotation>", box.format(20, 6, 80, 30))
    change(root, "train_002", "</annotation>", box.format(90, 6, 99, 30))
    change(root, "train_003", "</annotation>", box.format(1, 1, 3, 30))
    change(root, "train_004", "<width>60</width>", "<width>61</width>")
    (images / "train_005.png").write_bytes((images / "train_005.png").read_bytes()[:300])
    Image.open(images / "train_006.png").save(images / "other.jpg")
    (images / "other.jpg").rename(images / "train_006.png")
    (images / "val_000.png").write_bytes((images / "train_007.png").read_bytes())
    change(root, "val_000", (root / "Annotations/val_000.xml").read_text(), (root / "Annotations/train_007.xml").read_text())
    Image.open(images / "val_001.png").convert("L").save(images / "val_001.png")
    change(root, "train_008", "</annotation>", box.format(30, 6, 10, 20))
    return root


def test_everything_planted_is_found(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    assert main(["check", str(faulty), "--json", str(tmp_path / "report.json"), "--pictures", str(pictures)]) == 1
    found = kinds(tmp_path / "report.json")
    assert found["zero area"] == {"train_000", "train_008"}
    assert found["over the border"] == {"train_001"}
    assert found["outside"] == {"train_002"}
    assert found["tiny box"] == {"train_003"}
    assert found["wrong size"] == {"train_004"}
    assert found["truncated image"] == {"train_005"}
    assert found["mistyped image"] == {"train_006"}
    assert found["duplicate across splits"] == {"val_000"}
    assert found["grey picture"] == {"val_001"}
    assert "6 faults that training stops at" not in capsys.readouterr().err
    assert {"train_train_000.png", "train_train_002.png"} <= {path.name for path in pictures.iterdir()}


def test_unknown_classes_against_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path, {"train": 3}, (40, 60))
    assert main(["check", str(root), "--classes", "disc,square,triangle"]) == 0
    assert main(["check", str(root), "--classes", "disc"]) == 1
    assert "unknown class" in capsys.readouterr().out


@pytest.mark.parametrize("write", [write_voc, write_coco, write_csv])
def test_sound_data_has_no_fault(write: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(write(tmp_path, {"train": 3, "val": 2}, (40, 60)))]) == 0
    assert "no faults" in capsys.readouterr().out


def test_a_split_that_holds_others_is_no_duplicate(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 2, "val": 2}, (40, 60))
    lists = root / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    assert main(["check", str(root)]) == 0
    (lists / "val.txt").write_text((lists / "val.txt").read_text() + "train_000\n")
    assert main(["check", str(root), "--split", "train", "--split", "val"]) == 1


def test_fix_writes_a_copy_that_training_accepts(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(faulty)
    out = tmp_path / "fixed"
    main(["check", str(faulty), "--fix", str(out)])
    assert digests(faulty) == before
    dataset = open_dataset(out, "train")
    by_id = {record.image_id: record for record in dataset.records}
    assert set(by_id) == {f"train_{i:03d}" for i in (0, 1, 2, 3, 4, 6, 7, 8)}
    np.testing.assert_array_equal(by_id["train_001"].boxes[-1], [20, 6, 60, 30])
    np.testing.assert_array_equal(by_id["train_008"].boxes[-1], [10, 6, 30, 20])
    assert by_id["train_004"].size_hw == (40, 60)
    assert main(["check", str(out), "--split", "train"]) == 0
    assert main(["check", str(faulty), "--fix", str(faulty / "inside")]) == 2
    assert "outside the data set" in capsys.readouterr().err


@pytest.mark.parametrize(("write", "data_format"), [(write_coco, "coco"), (write_csv, "csv")])
def test_fix_keeps_the_format(write: type, data_format: str, tmp_path: Path) -> None:
    root = write(tmp_path / "data", {"train": 3}, (40, 60))
    assert main(["check", str(root), "--fix", str(tmp_path / "out")]) == 0
    before, after = (open_dataset(path, "train", data_format=data_format) for path in (root, tmp_path / "out"))
    assert before.class_names == after.class_names
    for a, b in zip(before.records, after.records, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_mending_by_hand() -> None:
    assert mend_box(RawBox("a", (30, 5, 10, 25)), (40, 60)) == (RawBox("a", (10, 5, 30, 25)), "corners swapped")
    assert mend_box(RawBox("a", (-5, 5, 70, 25), area=3), (40, 60)) == (RawBox("a", (0, 5, 60, 25)), "cut at the border")
    assert mend_box(RawBox("a", (5, 5, 5, 5)), (40, 60)) == (RawBox("a", (5, 5, 5, 5)), "")


def test_anchor_reach_by_hand() -> None:
    shapes = anchor_shapes([[10.0], [20.0]], [1.0, 4.0])
    np.testing.assert_allclose(shapes, [[10, 10], [20, 5], [20, 20], [40, 10]])
    np.testing.assert_allclose(anchor_reach(np.array([[10.0, 10], [10, 5], [100, 2]]), shapes), [1, 0.5, 2 * 40 / (200 + 400 - 80)])


def test_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "absent")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.data
def test_faults_of_the_real_sets(detection_data: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert (
        main(["check", str(detection_data / "bccd"), "--split", "train", "--split", "val", "--split", "test", "--json", str(report)]) == 1
    )
    content = json.loads(report.read_text())
    found = kinds(report)
    assert found["zero area"] == {"BloodImage_00338", "BloodImage_00343"}
    assert "duplicate across splits" not in found
    truncated = sum(row["kind"] == "truncated box" for split in content["splits"].values() for row in split["notes"])
    assert truncated == 1131
    assert main(["check", str(detection_data / "coco128"), "--json", str(report)]) == 0
    content, found = json.loads(report.read_text()), kinds(report)
    assert found["no objects"] == {"226111"}
    assert "494273" in found["grey picture"]
    notes = [row["kind"] for split in content["splits"].values() for row in split["notes"]]
    assert notes.count("crowd") == 20
    assert notes.count("tiny box") == 14


@pytest.mark.data
def test_awkward_pictures_in_a_data_set(detection_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    names = ["png_renamed.jpg", "text_renamed.jpg", "truncated_jpeg.jpg", "zero_byte.jpg", "broken_data_stream.png", "cat.jpg"]
    for name in names:
        (root / "images" / name).write_bytes((detection_data / "awkward" / name).read_bytes())
    (root / "train.csv").write_text("".join(f"{name},1,1,10,10,thing\n" for name in names))
    main(["check", str(root), "--json", str(tmp_path / "report.json")])
    found = kinds(tmp_path / "report.json")
    assert found["mistyped image"] == {"png_renamed.jpg"}
    assert found["unreadable image"] == {"text_renamed.jpg", "zero_byte.jpg"}
    assert found["truncated image"] == {"truncated_jpeg.jpg", "broken_data_stream.png"}
