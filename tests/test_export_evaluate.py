"""AP of a file through the service's preprocessing, against AP of the network through training's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_detector import CLASS_NAMES, Exported

from export import pictures
from export.evaluate import evaluate_file, main, predict_file
from model.data.images import choose_bucket, pad_batch, read_rgb, resized_hw
from model.data.records import DetectionSet, Record
from model.faster_rcnn import FasterRCNN
from model.inference import predict
from model.metrics.report import evaluate_detections
from service import images as service_images
from service.images import ImageLimits, assemble, prepare
from service.manifest import InputSpec
from service.runtime import OnnxRuntime

SIZES = ((150, 200), (201, 140), (97, 97), (64, 300))
INPUT_SIZES = ((120, 160), (160, 111), (128, 128), (34, 160))
"""Sizes that the resize rule leaves alone."""


@pytest.fixture(scope="module")
def runtime(exported: Exported) -> OnnxRuntime:
    return OnnxRuntime(exported.file, provider="cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    """Drawn pictures that both sides have to decode and resize; nothing is annotated."""
    return drawn(tmp_path_factory.mktemp("drawn"), SIZES, "jpg")


def drawn(folder: Path, sizes: tuple[tuple[int, int], ...], suffix: str) -> DetectionSet:
    records = []
    for index, hw in enumerate(sizes):
        path = folder / f"{index}.{suffix}"
        Image.fromarray(pictures.smear(hw, 200 + index)).save(path, quality=95)
        records.append(record(path, hw, np.zeros((0, 4)), np.zeros(0, np.int64)))
    return DetectionSet("drawn", CLASS_NAMES, tuple(records))


def annotated(detector: FasterRCNN, dataset: DetectionSet) -> DetectionSet:
    """The truth is every other thing that the network finds with confidence, so that its AP is neither 0 nor 1."""
    truth = [
        record(r.path, r.size_hw, f["boxes"][:12:2].astype(np.float64), f["labels"][:12:2].astype(np.int64))
        for r, f in zip(dataset.records, predict(detector, dataset), strict=True)
    ]
    return dataset.with_records(truth)


def record(path: Path, hw: tuple[int, int], boxes: np.ndarray, labels: np.ndarray) -> Record:
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    no = np.zeros(len(boxes), bool)
    return Record(path.stem, path, hw, boxes, labels, areas, no, no)


def test_file_and_network_have_one_ap(exported: Exported, runtime: OnnxRuntime, tmp_path: Path) -> None:
    """On pictures that neither side resizes: a network with random weights makes another picture of a rounded pixel."""
    dataset = annotated(exported.detector, drawn(tmp_path, INPUT_SIZES, "png"))
    done: list[int] = []
    mine = evaluate_file(runtime, dataset, progress=done.append)
    reference = evaluate_detections(dataset, predict(exported.detector, dataset))
    assert done == [1, 2, 3, 4]
    assert 0.1 < reference.ap < 0.95
    assert abs(mine.ap - reference.ap) < 0.005
    assert abs(mine.voc_ap50 - reference.voc_ap50) < 0.005


def test_predictions_lie_in_the_original_frame(runtime: OnnxRuntime, dataset: DetectionSet) -> None:
    for found, hw in zip(predict_file(runtime, dataset), SIZES, strict=True):
        assert len(found["scores"]) > 0
        assert found["boxes"].min() >= 0
        assert (found["boxes"] <= np.array([hw[1], hw[0], hw[1], hw[0]])).all()
        assert found["boxes"][:, 2].max() > 0.5 * hw[1]


def test_exact_padding_is_another_shape(runtime: OnnxRuntime, dataset: DetectionSet) -> None:
    """The thin picture fills little of its bucket, so its answers must move a little, and nothing may break."""
    bucket, exact = predict_file(runtime, dataset)[-1], predict_file(runtime, dataset, exact_padding=True)[-1]
    assert len(exact["scores"]) > 0
    assert not np.array_equal(bucket["boxes"][:3], exact["boxes"][:3])


def test_command_line(tmp_path: Path, exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    for index, hw in enumerate(SIZES[:2]):
        Image.fromarray(pictures.smear(hw, index)).save(tmp_path / f"{index}.jpg")
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 6, 20, 30], "area": 600, "iscrowd": 0} for i in (1, 2)]
    images = [{"id": i, "file_name": f"{i - 1}.jpg", "height": SIZES[i - 1][0], "width": SIZES[i - 1][1]} for i in (1, 2)]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_test.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    for path in list(tmp_path.glob("*.jpg")):
        (tmp_path / "test").mkdir(exist_ok=True)
        path.rename(tmp_path / "test" / path.name)
    result = tmp_path / "report.json"
    assert main([str(exported.file), "--data", str(tmp_path), "--split", "test", "--provider", "cpu", "--json", str(result)]) == 0
    assert "2 pictures" in capsys.readouterr().out
    assert json.loads(result.read_text())["images"] == 2


def test_missing_data_is_a_sentence(tmp_path: Path, exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(exported.file), "--data", str(tmp_path / "none"), "--provider", "cpu"]) == 1
    assert "error:" in capsys.readouterr().err


# -- one resize rule in training and serving -----------------------------------------------------------------------------------


ROUNDING = 0.35
"""Levels on average: the service resizes in SIMD, which rounds in fewer bits than Pillow does in training, up or down alike."""


def worst_mean_difference(data: bytes, path: Path, spec: InputSpec) -> float:
    """Levels by which the two sides' pixels differ on average; their frames must be the same."""
    prepared = prepare(data, spec, ImageLimits())
    size_hw = resized_hw(prepared.original_hw, spec.short_side, spec.long_side)
    trained = read_rgb(path, size_hw=size_hw, expected_hw=prepared.original_hw)
    assert prepared.pixels.shape == trained.shape
    assert choose_bucket(size_hw, spec.buckets) == prepared.bucket
    assert assemble([prepared])[0][0].shape == pad_batch([trained], prepared.bucket)[0].shape
    return float(np.abs(prepared.pixels.astype(np.int16) - trained).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("hw", "most"), [((90, 131), ROUNDING), ((1500, 2100), ROUNDING), ((700, 333), 1.5)])
def test_service_and_training_prepare_alike(tmp_path: Path, runtime: OnnxRuntime, hw: tuple[int, int], most: float, kind: str) -> None:
    """Equal but for rounding, and where a JPEG with an odd side is decoded at half its size: then by half a pixel of the last column."""
    buffer = io.BytesIO()
    Image.fromarray(pictures.street(hw, 3)).save(buffer, kind)
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(buffer.getvalue())
    assert worst_mean_difference(buffer.getvalue(), path, runtime.manifest.input) <= most


@pytest.mark.data
def test_service_and_training_prepare_real_photographs_alike(detection_data: Path) -> None:
    spec = InputSpec(short_side=384, long_side=640, buckets=[(384, 384), (384, 512), (512, 384), (384, 640), (640, 384)])
    photographs = sorted((detection_data / "bccd" / "JPEGImages").glob("*.jpg"))[:3] + sorted(
        (detection_data / "exif_orientation").glob("*.jpg")
    )
    assert len(photographs) > 10
    for path in photographs:
        with Image.open(path) as opened:
            has_profile = "icc_profile" in opened.info
        # the service converts colours to sRGB, training takes them as stored: a few levels, and only where a profile says otherwise
        assert worst_mean_difference(path.read_bytes(), path, spec) <= (16 if has_profile else ROUNDING), path.name


@pytest.mark.parametrize("hw", [(1, 1), (3, 1000), (480, 640), (333, 500), (641, 479), (97, 97)])
def test_one_rule_for_every_size(hw: tuple[int, int]) -> None:
    spec = InputSpec(short_side=128, long_side=160, buckets=[(128, 160)])
    assert service_images.resized_hw(hw, spec) == resized_hw(hw, 128, 160)
