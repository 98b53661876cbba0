"""Readers: exact boxes from each format, faults named, real sets counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.data.formats import guess_format, list_splits, open_dataset
from model.data.records import DataError
from model.data.synthetic import CLASS_NAMES, draw_scene, write_coco, write_csv, write_voc


@pytest.mark.parametrize(("name", "write"), [("voc", write_voc), ("coco", write_coco), ("csv", write_csv)])
def test_every_format_gives_back_the_scenes(name: str, write: Callable[..., Path], tmp_path: Path) -> None:
    root = write(tmp_path, {"train": 4, "val": 2}, (40, 60))
    assert guess_format(root) == name
    assert list_splits(root) == ("train", "val")
    dataset = open_dataset(root, "train", class_names=CLASS_NAMES)
    for i, record in enumerate(dataset.records):
        scene = draw_scene(i, (40, 60) if i % 3 != 2 else (60, 40))
        assert record.size_hw == scene.image.shape[:2]
        np.testing.assert_array_equal(record.boxes, scene.boxes)
        np.testing.assert_array_equal(record.labels, scene.labels)
        np.testing.assert_allclose(record.areas, np.prod(scene.boxes[:, 2:] - scene.boxes[:, :2], axis=1))
    assert len(open_dataset(root, "train+val", class_names=CLASS_NAMES)) == 6


def voc_folder(root: Path, objects: str, size: str = "<size><width>60</width><height>40</height></size>") -> Path:
    write_voc(root, {"train": 1}, (40, 60))
    (root / "Annotations" / "train_000.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return root


def voc_object(box: tuple[float, float, float, float], name: str = "disc", difficult: int = 0) -> str:
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((5, 6, 5, 20), "image 'train_000', box 1: width is 0 and height 14"),
        ((20, 20, 10, 30), "width is -10 and height 10"),
        ((70, 6, 80, 20), "lies outside the picture of 60 x 40"),
        ((50, 6, 64, 20), "is 4 px over the border of 60 x 40"),
        ((float("nan"), 6, 64, 20), "coordinates are (nan, 6.0, 64.0, 20.0)"),
    ],
)
def test_a_faulty_box_is_an_error_that_names_it_and_skip_bad_leaves_it_out(
    box: tuple[float, float, float, float], words: str, tmp_path: Path
) -> None:
    root = voc_folder(tmp_path, voc_object((1, 2, 30, 35)) + voc_object(box))
    with pytest.raises(DataError) as error:
        open_dataset(root, "train")
    assert words in str(error.value)
    assert "--skip-bad" in str(error.value)
    dataset = open_dataset(root, "train", skip_bad=True)
    np.testing.assert_array_equal(dataset.records[0].boxes, [[1, 2, 30, 35]])
    assert len(dataset.skipped) == 1


def test_rounding_over_the_border_is_cut_without_a_word(tmp_path: Path) -> None:
    dataset = open_dataset(voc_folder(tmp_path, voc_object((-0.5, 2, 60.6, 40.9))), "train")
    np.testing.assert_array_equal(dataset.records[0].boxes, [[0, 2, 60, 40]])


def test_difficult_and_crowd_are_kept_apart(tmp_path: Path) -> None:
    dataset = open_dataset(voc_folder(tmp_path, voc_object((1, 2, 30, 35), difficult=1) + voc_object((3, 2, 30, 35))), "train")
    assert dataset.records[0].difficult.tolist() == [True, False]
    assert dataset.records[0].plain.tolist() == [False, True]


def test_unknown_class_with_a_given_list(tmp_path: Path) -> None:
    root = voc_folder(tmp_path, voc_object((1, 2, 30, 35), name="cube"))
    with pytest.raises(DataError, match="class 'cube' is not one of the classes"):
        open_dataset(root, "train", class_names=CLASS_NAMES)
    assert open_dataset(root, "train").class_names == ("cube",)


def test_an_annotation_without_size_takes_the_pictures(tmp_path: Path) -> None:
    assert open_dataset(voc_folder(tmp_path, voc_object((1, 2, 30, 35)), size=""), "train").records[0].size_hw == (40, 60)


def test_wrong_size_and_broken_files_are_left_out_by_skip_bad(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 5}, (40, 60))
    images, annotations = root / "JPEGImages", root / "Annotations"
    (images / "train_000.png").write_bytes((images / "train_000.png").read_bytes()[:200])
    (images / "train_001.png").unlink()
    annotations.joinpath("train_003.xml").write_text("<annotation><object>")
    size = "<width>60</width><height>40</height>"
    text = annotations.joinpath("train_004.xml").read_text()
    assert size in text
    annotations.joinpath("train_004.xml").write_text(text.replace(size, "<width>80</width><height>40</height>"))
    dataset = open_dataset(root, "train", skip_bad=True)
    assert [record.image_id for record in dataset.records] == ["train_002"]
    assert sorted(fault.kind for fault in dataset.skipped) == ["bad annotation", "missing image", "truncated image", "wrong size"]


def test_coco_faults_and_gaps(tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"val": 2}, (40, 60))
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 30, "bbox": [1, 2, 10, 20], "area": 150.5, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 10, "bbox": [5, 6, 30, 20], "area": 7, "iscrowd": 1},
        {"id": 3, "image_id": 1, "category_id": 99, "bbox": [5, 6, 30, 20]},
        {"id": 4, "image_id": 77, "category_id": 10, "bbox": [5, 6, 30, 20]},
        {"id": 5, "image_id": 2, "category_id": 10, "bbox": [5, 6, 30]},
    ]
    path.write_text(json.dumps(content))
    dataset = open_dataset(root, "val", skip_bad=True)
    record = dataset.records[0]
    np.testing.assert_array_equal(record.boxes, [[1, 2, 11, 22], [5, 6, 35, 26]])
    assert record.labels.tolist() == [3, 1]
    assert record.crowd.tolist() == [False, True]
    assert record.areas.tolist() == [150.5, 7]
    assert sorted(fault.kind for fault in dataset.skipped) == ["bad annotation", "bad annotation", "unknown class"]
    path.write_text("{")
    with pytest.raises(DataError, match="is not a COCO annotation file"):
        open_dataset(root, "val")


def test_csv_without_header_and_pictures_without_objects(tmp_path: Path) -> None:
    root = write_csv(tmp_path, {"train": 2}, (40, 60))
    (root / "train.csv").write_text("train_000.png,1,2,30,35,disc\ntrain_001.png,,,,,\n")
    dataset = open_dataset(root, "train")
    assert [len(record.boxes) for record in dataset.records] == [1, 0]
    (root / "train.csv").write_text("image,xmin,ymin,xmax,class\n")
    with pytest.raises(DataError, match="ymax"):
        open_dataset(root, "train")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root / "absent", "there is no folder"),
        (lambda root: root, "is no data set that is known here"),
    ],
)
def test_no_data_set_is_a_sentence(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(make(tmp_path), "train")


@pytest.mark.data
def test_bccd_counts_and_faults(detection_data: Path) -> None:
    root = detection_data / "bccd"
    with pytest.raises(DataError, match=r"image 'BloodImage_00343', box 3: width is 0 and height 0"):
        open_dataset(root, "train")
    names = ("Platelets", "RBC", "WBC")
    counts = {split: open_dataset(root, split, class_names=names, skip_bad=True) for split in ("train", "val", "test")}
    assert [(len(d), sum(len(r.boxes) for r in d.records)) for d in counts.values()] == [(205, 2804), (87, 1137), (72, 945)]
    assert [fault.image_id for d in counts.values() for fault in d.skipped] == ["BloodImage_00343", "BloodImage_00338"]


@pytest.mark.data
def test_coco128_counts(detection_data: Path) -> None:
    dataset = open_dataset(detection_data / "coco128", "val2017")
    assert (len(dataset), len(dataset.class_names), sum(len(r.boxes) for r in dataset.records)) == (128, 80, 1172)
    assert sum(int(record.crowd.sum()) for record in dataset.records) == 12
