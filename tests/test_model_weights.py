from pathlib import Path

import pytest
import torch
from model_fakes import tiny_config
from torchvision.models import mobilenet_v2

from model.faster_rcnn import build_detector
from model.weights import WeightsError


def test_imagenet_weights_come_from_a_file(tmp_path: Path) -> None:
    source = mobilenet_v2()
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    detector = build_detector(tiny_config(), tmp_path / "whole.pth")
    torch.testing.assert_close(detector.backbone.body.features[0][0].weight, source.features[0][0].weight)
    torch.save(source.features.state_dict(), tmp_path / "features.pth")
    detector = build_detector(tiny_config(), tmp_path / "features.pth")
    torch.testing.assert_close(detector.backbone.body.features[5].conv[0][0].weight, source.features[5].conv[0][0].weight)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--backbone-weights"):
        build_detector(tiny_config(), tmp_path / "none.pth")
    torch.save({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match="has no weights for"):
        build_detector(tiny_config(), tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="is no state dict"):
        build_detector(tiny_config(), tmp_path / "list.pth")


def test_the_real_weights_load(detection_data: Path) -> None:
    detector = build_detector(tiny_config(), detection_data / "weights" / "mobilenet_v2_features_imagenet.pth").eval()
    assert all(torch.isfinite(level).all() for level in detector.backbone(torch.randn(1, 3, 64, 96)))
