"""Both exported NMS strategies against greedy NMS, ties, padding and groups included."""

from __future__ import annotations

import itertools
import warnings
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from export.nms import TRANSLATIONS, onnx_nms
from model.nms import INVALID_SCORE, dense_nms, greedy_nms

GROUPS = 4
THRESHOLD = 0.5


class Suppress(nn.Module):
    def __init__(self, strategy: str, *, grouped: bool) -> None:
        super().__init__()
        self.nms = onnx_nms(GROUPS) if strategy == "onnx" else dense_nms
        self.grouped = grouped

    def forward(self, boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
        keep = self.nms(boxes, scores, groups if self.grouped else None, THRESHOLD)
        return keep & (groups >= 0)  # uses the third input in both forms


@cache
def exported_model(strategy: str, grouped: bool) -> bytes:
    scenes, count = Dim("scenes"), Dim("count")
    example = (torch.rand(3, 20, 4), torch.rand(3, 20), torch.zeros(3, 20, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Suppress(strategy, grouped=grouped).eval(),
            example,
            dynamo=True,
            opset_version=18,
            dynamic_shapes=({0: scenes, 1: count},) * 3,
            input_names=["boxes", "scores", "groups"],
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    serialized: bytes = program.model_proto.SerializeToString()
    return serialized


@cache
def session(strategy: str, grouped: bool) -> ort.InferenceSession:
    return ort.InferenceSession(exported_model(strategy, grouped), providers=["CPUExecutionProvider"])


def scene(rng: np.random.Generator, shape: tuple[int, int], *, grid: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes on a coarse grid (so that IoUs repeat), scores of few levels (so that they tie), a padded tail."""
    corner = rng.integers(0, grid, (*shape, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, grid, (*shape, 2))], axis=2).astype(np.float32)
    scores = -np.sort(-rng.integers(0, levels, shape) / levels, axis=1).astype(np.float32)
    scores[:, shape[1] - int(rng.integers(0, shape[1] + 1)) :] = INVALID_SCORE
    return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(rng.integers(0, GROUPS, shape))


def exported_keep(strategy: str, grouped: bool, boxes: Tensor, scores: Tensor, groups: Tensor) -> np.ndarray:
    feed = {"boxes": boxes.numpy(), "scores": scores.numpy(), "groups": groups.numpy()}
    return session(strategy, grouped).run(None, feed)[0]


def by_hand(boxes: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Greedy NMS of one scene, word for word: earlier rows win ties."""
    keep = np.zeros(len(scores), bool)
    for i in range(len(scores)):
        if scores[i] <= INVALID_SCORE:
            continue
        rivals = [j for j in range(i) if keep[j] and groups[j] == groups[i]]
        keep[i] = all(one_iou(boxes[i], boxes[j]) <= THRESHOLD for j in rivals)
    return keep


def one_iou(a: np.ndarray, b: np.ndarray) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize(("strategy", "grouped"), list(itertools.product(("onnx", "dense"), (False, True))))
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), scenes=st.integers(1, 3), count=st.integers(1, 40), grid=st.integers(3, 30), levels=st.integers(1, 50)
)
def test_exported_equals_greedy_with_ties(strategy: str, grouped: bool, seed: int, scenes: int, count: int, grid: int, levels: int) -> None:
    boxes, scores, groups = scene(np.random.default_rng(seed), (scenes, count), grid=grid, levels=levels)
    kept = exported_keep(strategy, grouped, boxes, scores, groups)
    used = groups if grouped else torch.zeros_like(groups)
    for i in range(scenes):
        np.testing.assert_array_equal(kept[i], by_hand(boxes[i].numpy(), scores[i].numpy(), used[i].numpy()))
    np.testing.assert_array_equal(kept, greedy_nms(boxes, scores, groups if grouped else None, THRESHOLD).numpy())


def test_onnx_equals_greedy_on_a_crowd() -> None:
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 600, (2, 1000, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(20, 200, corner.shape)], axis=2).astype(np.float32))
    scores = torch.from_numpy(-np.sort(-rng.uniform(0, 1, (2, 1000))).astype(np.float32))
    groups = torch.from_numpy(rng.integers(0, GROUPS, (2, 1000)))
    for grouped in (False, True):
        expected = greedy_nms(boxes, scores, groups if grouped else None, THRESHOLD).numpy()
        assert 0.02 < expected.mean() < 0.9
        np.testing.assert_array_equal(exported_keep("onnx", grouped, boxes, scores, groups), expected)


@pytest.mark.parametrize("strategy", ["onnx", "dense"])
def test_all_padding_keeps_nothing(strategy: str) -> None:
    boxes, scores = torch.zeros(2, 6, 4), torch.full((2, 6), INVALID_SCORE)
    assert not exported_keep(strategy, True, boxes, scores, torch.zeros(2, 6, dtype=torch.int64)).any()


def test_selected_list_is_never_empty() -> None:
    """Otherwise operators behind NonMaxSuppression would see an axis of length 0."""
    model = onnx.load_from_string(exported_model("onnx", False))
    node = next(node for node in model.graph.node if node.op_type == "NonMaxSuppression")
    model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.INT64, [None, 3]))
    opened = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    empty = {
        "boxes": np.zeros((2, 6, 4), np.float32),
        "scores": np.full((2, 6), INVALID_SCORE, np.float32),
        "groups": np.zeros((2, 6), np.int64),
    }
    selected = opened.run([node.output[0]], empty)[0]
    assert selected.tolist() == [[0, 0, 6], [1, 0, 6]]  # the dummy box of each scene
