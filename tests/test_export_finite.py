"""A file whose numbers go wrong says so for each image: in every other respect such an answer looks like an empty picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_detector import Exported

from export import pictures
from export.graph import save
from service.errors import InferenceFailed
from service.inference import ImageDetections, split
from service.runtime import Detections, OnnxRuntime

HW = (128, 160)


def poisoned(source: onnx.ModelProto, weight: str, number: float) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[-1] = number
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, weight))
    return model


def ask(file: Path) -> list[ImageDetections | InferenceFailed]:
    runtime = OnnxRuntime(file, provider="cpu")
    images = np.stack([pictures.street(HW, seed) for seed in (1, 2)])
    answer: Detections = runtime.run(images, np.array([HW, HW], dtype=np.int64))
    runtime.close()
    return split(answer, 2)


@pytest.fixture(scope="module", params=["onnx", "dense"])
def written(
    request: pytest.FixtureRequest, exported: Exported, dense_graph: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Writes the tiny detector's graph with a poisoned weight."""
    published = OnnxRuntime(exported.file, provider="cpu")
    manifest = published.manifest
    published.close()
    model = onnx.load(str(exported.file)) if request.param == "onnx" else dense_graph
    folder = tmp_path_factory.mktemp("poisoned")

    def write(weight: str, number: float) -> Path:
        save(poisoned(model, weight, number), manifest, folder / "model.onnx")
        return folder / "model.onnx"

    return write


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["rpn.cls_logits.bias", "rpn.bbox_pred.bias", "head.cls_score.bias", "head.bbox_pred.bias"])
def test_a_broken_weight_is_an_error_of_every_image(written: Callable[..., Path], weight: str, number: float) -> None:
    assert [type(answer) for answer in ask(written(weight, number))] == [InferenceFailed, InferenceFailed]


def test_a_whole_weight_is_none(written: Callable[..., Path]) -> None:
    answers = ask(written("head.cls_score.bias", 0.25))
    assert all(isinstance(answer, ImageDetections) and len(answer.scores) > 0 for answer in answers)
