"""The published file against eager PyTorch and against its own contract, on shapes that neither tracing nor verification used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from tiny_detector import Exported

from export import pictures
from export.agreement import Tally, answer_of, compare
from export.graph import graph_problems
from export.verify import contract_problems, eager
from service.runtime import Detections, OnnxRuntime


@pytest.fixture(scope="module")
def runtime(exported: Exported) -> Iterator[OnnxRuntime]:
    opened = OnnxRuntime(exported.file, provider="cpu")
    yield opened
    opened.close()


def drawn_batch(hw: tuple[int, int], size: int, seed: int) -> tuple[pictures.Picture, np.ndarray]:
    draw = (pictures.street, pictures.smear, pictures.noise)
    sizes_hw = np.array([[hw[0] - 3 * i, hw[1] - 5 * i] for i in range(size)], dtype=np.int64)
    return np.stack([draw[i % 3](hw, seed + i) for i in range(size)]), sizes_hw


@pytest.mark.parametrize(("hw", "size"), [((96, 192), 1), ((192, 96), 2), ((64, 320), 5), ((32, 32), 1), ((32, 64), 4)])
def test_equals_eager_on_new_shapes(exported: Exported, runtime: OnnxRuntime, hw: tuple[int, int], size: int) -> None:
    images, sizes_hw = drawn_batch(hw, size, seed=70)
    expected, answer = eager(exported.detector, images, sizes_hw), runtime.run(images, sizes_hw)
    assert contract_problems(answer, sizes_hw, runtime.manifest) == []
    assert expected.num_detections.sum() > 0
    found = Tally.of(compare(answer_of(expected, i), answer_of(answer, i), limit=100) for i in range(size))
    assert found.worst_box_px < 1e-3
    assert found.worst_score < 1e-4
    assert found.top_unmatched < 0.06


def test_eager_answer_keeps_the_contract_too(exported: Exported, runtime: OnnxRuntime) -> None:
    images, sizes_hw = drawn_batch((128, 160), 3, seed=80)
    assert contract_problems(eager(exported.detector, images, sizes_hw), sizes_hw, runtime.manifest) == []


def test_neighbours_and_padding_change_nothing(runtime: OnnxRuntime) -> None:
    images, sizes_hw = drawn_batch((128, 160), 3, seed=90)
    sizes_hw[:, 0] -= 20
    together = runtime.run(images, sizes_hw)
    for i in range(3):
        cleared = images[i : i + 1].copy()
        cleared[0, sizes_hw[i, 0] :] = 0
        cleared[0, :, sizes_hw[i, 1] :] = 0
        alone = runtime.run(cleared, sizes_hw[i : i + 1])
        for whole, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole[i : i + 1], single)


def test_zero_detections_are_zero_rows(runtime: OnnxRuntime) -> None:
    answer = runtime.run(np.zeros((2, 128, 160, 3), np.uint8), np.array([[0, 0], [128, 160]]))
    assert answer.num_detections[0] == 0
    assert not answer.boxes[0].any()
    assert not answer.scores[0].any()
    assert not answer.labels[0].any()


def test_interface_has_the_names_types_and_shapes_of_the_contract(exported: Exported) -> None:
    graph = onnx.load(exported.file).graph
    shapes = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim])
        for value in [*graph.input, *graph.output]
    }
    assert shapes == {
        "images": (onnx.TensorProto.UINT8, ["batch", "32*rows", "32*columns", 3]),
        "image_sizes_hw": (onnx.TensorProto.INT64, ["batch", 2]),
        "boxes": (onnx.TensorProto.FLOAT, ["batch", 100, 4]),
        "scores": (onnx.TensorProto.FLOAT, ["batch", 100]),
        "labels": (onnx.TensorProto.INT64, ["batch", 100]),
        "num_detections": (onnx.TensorProto.INT64, ["batch"]),
    }


def test_standard_operators_only(exported: Exported) -> None:
    model = onnx.load(exported.file)
    assert graph_problems(model) == []
    used = {node.op_type for node in model.graph.node}
    assert {"RoiAlign", "NonMaxSuppression", "TopK"} <= used
    assert used.isdisjoint({"If", "Loop", "NonZero", "BatchNormalization"})


def test_problems_of_a_foreign_graph_are_named() -> None:
    node = onnx.helper.make_node("NonZero", ["images"], ["boxes"])
    foreign = onnx.helper.make_node("Fancy", ["boxes"], ["more"], domain="com.example")
    graph = onnx.helper.make_graph(
        [node, foreign],
        "g",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [2])],
        [onnx.helper.make_tensor_value_info("more", onnx.TensorProto.INT64, [1, 2])],
    )
    problems = " ".join(graph_problems(onnx.helper.make_model(graph)))
    assert "NonZero" in problems
    assert "com.example::Fancy" in problems
    assert "expected ('images', 'image_sizes_hw')" in problems


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scores": [[0.5, 0.9, 0.0]]}, "scores do not descend"),
        ({"boxes": [[[0, 0, 50, 9], [1, 1, 2, 2], [0, 0, 0, 0]]]}, "leaves its picture"),
        ({"boxes": [[[0, 0, 0, 9], [1, 1, 2, 2], [0, 0, 0, 0]]]}, "a box is empty"),
        ({"labels": [[1, 4, 0]]}, "label lies outside"),
        ({"labels": [[1, 2, 2]]}, "not zero"),
        ({"num_detections": [4]}, "outside 0..D"),
        ({"scores": [[0.9, 0.04, 0.0]]}, "above the floor"),
        ({"scores": [[float("nan"), 0.4, 0.0]]}, "not finite"),
        ({"scores": [[0.9, 0.4]]}, "shape"),
    ],
)
def test_contract_breaches_are_named(runtime: OnnxRuntime, change: dict[str, list[object]], sentence: str) -> None:
    good = {
        "boxes": np.array([[[0, 0, 20, 9], [1, 1, 2, 2], [0, 0, 0, 0]]], np.float32),
        "scores": np.array([[0.9, 0.4, 0.0]], np.float32),
        "labels": np.array([[3, 1, 0]], np.int64),
        "num_detections": np.array([2], np.int64),
    }
    manifest = runtime.manifest.model_copy(update={"detections_per_image": 3})
    size = np.array([[10, 20]])
    assert contract_problems(Detections(**good), size, manifest) == []
    broken = {name: np.asarray(change.get(name, value), value.dtype) for name, value in good.items()}
    assert any(sentence in problem for problem in contract_problems(Detections(**broken), size, manifest))
