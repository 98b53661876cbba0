"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from onnx import ModelProto
    from tiny_detector import Exported

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def detection_data() -> Path:
    """The folder of real images, annotations and weights: DETECTION_DATA, else ../shared/data beside the checkout, if there is one.

    What the tests look for in it (each folder is described where it is used; without the folder exactly these tests skip):

    - bccd/: Shenggan/BCCD_Dataset (VOC layout), 364 photographs of blood cells
    - coco128/, coco_json/, eval_ref/: a few COCO photographs with their annotations; ground truth, detections and the figures that
      pycocotools and two other published evaluations print for them
    - weights/: ImageNet weights of MobileNetV2 as torchvision state dicts, mobilenet_v2_features_imagenet.pth and the classifier
    - awkward/, exif_orientation/: picture files that decoders stumble over, with INDEX.tsv and expected.json
    """
    path = Path(os.environ.get("DETECTION_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set DETECTION_DATA to the folder that holds bccd/, coco128/, ...")
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A published version of the tiny detector; one export serves all tests."""
    from tiny_detector import export_tiny  # torch, only for the tests that need it

    return export_tiny(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def dense_graph(exported: Exported) -> ModelProto:
    """The tiny detector's graph with dense NMS, which takes half a minute to trace; nobody may change it."""
    from export.graph import GraphOptions, build_graph

    return build_graph(exported.detector, GraphOptions(nms="dense"))
