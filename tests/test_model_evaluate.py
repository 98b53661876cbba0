"""Evaluating a checkpoint: boxes in the original frame, the same for every batch size, files and sentences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint, save_checkpoint
from model.config import DetectorConfig, InputConfig
from model.data.formats import open_dataset
from model.data.synthetic import CLASS_NAMES, write_voc
from model.evaluate import main
from model.faster_rcnn import FasterRCNN, build_detector
from model.inference import predict
from model.presets import mobilenet_v2_fpn
from model.roi_heads import Detections


class Corner(torch.nn.Module):
    """Stands where a detector does and answers one box: the lower right quarter of each picture, in the input frame."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.config = DetectorConfig(
            **{
                **{name: getattr(mobilenet_v2_fpn(CLASS_NAMES).detector, name) for name in ("class_names", "backbone", "anchors")},
                "input": InputConfig(short_side=64, long_side=90, buckets=((64, 96), (96, 64))),
            }
        )
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor, sizes_hw: torch.Tensor) -> Detections:
        self.seen.append(tuple(images.shape))
        height, width = sizes_hw[:, 0].float(), sizes_hw[:, 1].float()
        boxes = torch.stack([width / 2, height / 2, width, height], dim=1)[:, None]
        rows = boxes.expand(-1, 3, -1)
        count = torch.ones(len(images), dtype=torch.int64)
        return Detections(rows, torch.full(rows.shape[:2], 0.5), torch.ones(rows.shape[:2], dtype=torch.int64), count)


def test_boxes_return_to_the_original_frame(tmp_path: Path) -> None:
    dataset = open_dataset(write_voc(tmp_path, {"val": 5}), "val")
    corner = Corner()
    for record, found in zip(dataset.records, predict(corner, dataset, batch_size=2), strict=True):  # type: ignore[arg-type]
        height, width = record.size_hw
        np.testing.assert_allclose(found["boxes"], [[width / 2, height / 2, width, height]], rtol=1e-6)
        assert found["labels"].tolist() == [1]
    assert sorted(corner.seen) == [(1, 96, 64, 3), (2, 64, 96, 3), (2, 64, 96, 3)]
    only = predict(corner, dataset, indices=[4, 2])  # type: ignore[arg-type]
    assert [float(found["boxes"][0, 2]) for found in only] == [128, 96]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = mobilenet_v2_fpn(CLASS_NAMES).detector
    detector: FasterRCNN = build_detector(config)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, Checkpoint(detector.state_dict(), config, {}))
    return path


def test_command_prints_and_writes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "data", {"val": 3})
    numbers = []
    for batch_size in (1, 3):
        files = ["--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "report"), "--batch-size", str(batch_size)]
        assert main([str(checkpoint), "--data", str(root), "--threads", "1", "--device", "cpu", *files]) == 0
        numbers.append(json.loads((tmp_path / "a.json").read_text()))
    assert "VOC AP50" in capsys.readouterr().out
    assert numbers[0]["coco"] == pytest.approx(numbers[1]["coco"], abs=1e-6)
    assert numbers[0]["images"] == 3
    assert (tmp_path / "report" / "report.md").is_file()
    assert len(list((tmp_path / "report").glob("0*.png"))) == 3


def test_mistakes_get_a_sentence(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "data", {"val": 1})
    assert main([str(tmp_path / "absent.pt"), "--data", str(root)]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    assert main([str(checkpoint), "--data", str(root), "--split", "test"]) == 1
    assert "splits of this data set: val" in capsys.readouterr().err
    annotation = root / "Annotations" / "val_000.xml"
    annotation.write_text(annotation.read_text().replace("disc", "cube").replace("square", "cube").replace("triangle", "cube"))
    assert main([str(checkpoint), "--data", str(root)]) == 1
    assert "class 'cube' is not one of the classes" in capsys.readouterr().err


def test_an_interrupt_writes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model.evaluate.predict", interrupt)
    root = write_voc(tmp_path / "data", {"val": 1})
    assert main([str(checkpoint), "--data", str(root), "--device", "cpu", "--json", str(tmp_path / "a.json")]) == 130
    assert capsys.readouterr().err.rstrip().endswith("interrupted; no result was written")
    assert not (tmp_path / "a.json").exists()


def test_another_threshold_for_a_trained_detector(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "data", {"val": 2})
    common = [str(checkpoint), "--data", str(root), "--threads", "1", "--device", "cpu", "--json", str(tmp_path / "a.json")]
    assert main([*common, "--set", "detector.roi.score_thresh=0.999"]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["coco"]["AR_100"] == 0.0
    assert main([*common, "--set", "detector.roi.nms=1"]) == 1
    assert "nms_thresh" in capsys.readouterr().err
