"""The bf16 graph: traced here, checked by its types, and computed by ONNX Runtime on the CPU with every bf16 node emulated.

ONNX Runtime has no bf16 convolution for CPUs, so the file itself can only run on a GPU. The emulation computes each of its nodes in fp32
from bf16 inputs and rounds the result to bf16, which is what a GPU does, apart from the order of its sums.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from tiny_detector import BUCKETS, tiny_config, tiny_detector

from export import pictures
from export.agreement import Tally, answer_of, compare
from export.graph import ExportError, GraphOptions, build_graph, inference_copy
from export.precision import set_types
from export.verify import eager
from model.faster_rcnn import FasterRCNN
from service.providers import PROVIDER_NAMES, provider_stack, session_options, strict_session
from service.runtime import Detections

BF16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT


@pytest.fixture(scope="module")
def detector() -> FasterRCNN:
    return tiny_detector(seed=3)  # of five, the weights whose detections tie least: in others the number of threads decides a few percent


@pytest.fixture(scope="module")
def graph(detector: FasterRCNN) -> onnx.ModelProto:
    return build_graph(detector, GraphOptions(opset=22, precision="bf16"))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value; onnx's own strict inference, which also refuses a node that mixes types."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    known = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.input, *inferred.output]}
    return known | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every node that takes or gives bf16 computes in fp32 between casts; what passes from node to node is still bf16."""
    types, other = types_of(model), onnx.ModelProto()
    other.CopyFrom(model)
    del other.graph.node[:], other.graph.value_info[:]
    for index, node in enumerate(model.graph.node):
        narrow = [name for name in [*node.input, *node.output] if types.get(name) == BF16]
        wide = {name: f"{name}/fp32/{index}" for name in (narrow if node.op_type != "Cast" else [])}
        taken = [name for name in dict.fromkeys(node.input) if name in wide]
        other.graph.node.extend(helper.make_node("Cast", [name], [wide[name]], to=FP32) for name in taken)
        copied = other.graph.node.add()
        copied.CopyFrom(node)
        for names in (copied.input, copied.output):
            names[:] = [wide.get(name, name) for name in names]
        other.graph.node.extend(helper.make_node("Cast", [wide[name]], [name], to=BF16) for name in node.output if name in wide)
    for entry in other.opset_import:
        entry.version = 21  # 22 only added bf16 to these operators, and ONNX Runtime's CPU kernels of RoiAlign end here
    return other


def run(model: onnx.ModelProto, images: pictures.Picture, sizes_hw: np.ndarray) -> Detections:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # none may take the casts away
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Detections(*session.run(None, {"images": images, "image_sizes_hw": sizes_hw}))


def test_bf16_is_where_the_table_puts_it(graph: onnx.ModelProto) -> None:
    types = types_of(graph)
    kinds = Counter((node.op_type, types[node.output[0]]) for node in graph.graph.node)
    assert kinds["Conv", BF16] > 50
    assert kinds["Conv", FP32] == 2 * len(tiny_config().anchors.sizes), "RPN outputs, on every level"
    assert kinds["RoiAlign", FP32] == 1
    assert not kinds["RoiAlign", BF16]
    assert {types[value.name] for value in graph.graph.output} == {FP32, TensorProto.INT64}
    assert next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")) == 22


def test_bf16_graph_computes_what_the_network_in_bf16_does(detector: FasterRCNN, graph: onnx.ModelProto) -> None:
    height, width = BUCKETS[0]
    images = np.stack([pictures.street((height, width), 1), pictures.smear((height, width), 2), pictures.noise((height, width), 3)])
    sizes_hw = np.array([(height, width), (height - 5, width - 9), (height, width)])
    same_types = inference_copy(detector, "onnx")
    set_types(same_types, "bf16")
    answer = run(emulated(graph), images, sizes_hw)
    expected, exact = eager(same_types, images, sizes_hw), eager(detector, images, sizes_hw)
    near, far = (Tally.of(compare(answer_of(side, i), answer_of(answer, i), limit=100) for i in range(3)) for side in (expected, exact))
    total = int(exact.num_detections.sum())
    assert total > 100
    assert near.matched > 0.97 * total
    assert near.worst_box_px < 1.0
    assert 0.5 * total < far.matched < near.matched, "bf16 is not fp32, and random weights show it"


def test_bf16_needs_its_operator_set(detector: FasterRCNN) -> None:
    with pytest.raises(ExportError, match="bf16 needs operator set 22 or later, not 18"):
        build_graph(detector, GraphOptions(opset=18, precision="bf16"))


@pytest.mark.gpu
def test_bf16_file_itself_runs_on_a_gpu(detector: FasterRCNN, graph: onnx.ModelProto) -> None:
    if PROVIDER_NAMES["cuda"] not in ort.get_available_providers():
        pytest.skip("bf16 convolutions exist for CUDA alone, which this build of ONNX Runtime does not hold; requirements/dev-gpu.txt does")
    images = pictures.street(BUCKETS[0], 1)[None].copy()
    session = strict_session(graph.SerializeToString(), session_options("cuda"), provider_stack("cuda"))
    if session.get_providers()[0] != PROVIDER_NAMES["cuda"]:
        pytest.skip("CUDA's libraries did not load")
    answer = Detections(*session.run(None, {"images": images, "image_sizes_hw": np.array([BUCKETS[0]])}))
    exact = eager(detector, images, np.array([BUCKETS[0]]))
    assert compare(answer_of(exact, 0), answer_of(answer, 0), limit=100).pairs
