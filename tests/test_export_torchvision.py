"""Torchvision's detectors from a state dict to a verified, served version: `python -m export torchvision:NAME`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.error import URLError

import pytest
from torchvision_networks import save_network

from export.__main__ import main
from export.pictures import street
from model import presets
from service.images import assemble, prepare_pixels
from service.runtime import OnnxRuntime

SMALL = "mobilenet_v3_large_320_fpn"
BUCKETS = ((256, 320), (320, 256))
"""Two instead of five, and small: what is proved is the path from torchvision's names to the served file."""


@pytest.fixture
def small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = dataclasses.replace(presets.SMALL_INPUT, short_side=256, long_side=320, buckets=BUCKETS)
    monkeypatch.setattr("model.presets.SMALL_INPUT", frame)
    monkeypatch.setattr("model.presets.COCO_INPUT", frame)


def left_behind(repository: Path) -> list[Path]:
    return sorted(repository.rglob("*")) if repository.exists() else []


@pytest.mark.usefixtures("small_inputs")
@pytest.mark.parametrize("name", [SMALL])
def test_torchvisions_weights_become_a_verified_version(name: str, tmp_path: Path) -> None:
    weights, repository = save_network(name, tmp_path / "given.pth"), tmp_path / "models"
    command = [f"torchvision:fasterrcnn_{name}", "--weights", str(weights), "--name", "coco", "--repository", str(repository)]
    assert main(command) == 0
    runtime = OnnxRuntime(repository / "coco" / "1" / "model.onnx", provider="cpu")
    manifest = runtime.manifest
    assert (manifest.architecture, manifest.class_names[0], len(manifest.class_names)) == (name, "person", 80)
    assert manifest.training.command == f"python -m model.pretrained {name}"
    assert manifest.parity["passed"] is True
    assert manifest.parity["matched"] > 300, "the proof must see detections"
    prepared = prepare_pixels(street((150, 200), seed=1), manifest.input)
    answer = runtime.run(*assemble([prepared]))
    assert answer.num_detections[0] > 0
    assert answer.labels.max() <= 80
    runtime.close()


def test_without_a_network_one_sentence_and_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    assert main(["torchvision:fasterrcnn_resnet50_fpn", "--name", "coco", "--repository", str(tmp_path / "models")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: cannot fetch torchvision's FasterRCNN_ResNet50_FPN_Weights.COCO_V1")
    assert "--weights FILE" in message
    assert left_behind(tmp_path / "models") == []


def test_unknown_network_lists_the_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torchvision:yolo", "--name", "coco", "--repository", str(tmp_path / "models")]) == 1
    assert "expected one of mobilenet_v3_large_320_fpn" in capsys.readouterr().err


def test_weights_belong_to_torchvisions_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path / "best.pt"), "--weights", "file.pth", "--name", "coco", "--repository", str(tmp_path / "models")]
    assert main(command) == 1
    assert "--weights belongs to torchvision:NAME" in capsys.readouterr().err
