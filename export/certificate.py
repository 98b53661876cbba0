"""The dense NMS of an exported graph: it proves by itself that an answer is exact, and can be taken up where it stopped.

A dense graph runs a fixed number of rounds, since a loop would wait for the host. So it has, besides the contract's four outputs,

- `nms_converged` bool [B]: the last round of every suppression of this image changed nothing, which makes the answer exact;
- `nms_state` bool [B, C]: the masks in which the suppressions were left;
- an optional input `nms_start` bool [1 or B, C] with a default of all ones: the masks from which they start.

Any mask may start (`model.nms.certified_dense_nms` says why), so `nms_state` given back as `nms_start` continues the image: every run
settles at least as many boxes of each suppression as it has rounds, until the certificate holds. That is how the service finishes such
an image exactly, with the one file that it has; who never gives the input loses nothing.

B images, S = B * sets suppressions of N boxes each, C all boxes that are suppressed in one image, both stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset18
from torch import Tensor, nn

from model.faster_rcnn import FasterRCNN
from model.nms import certified_dense_nms, dense_nms
from service.unsettled import NMS_START

op: Any = opset18  # typed as graph values, while plain lists become constants


@torch.library.custom_op("detector::starting_masks", mutates_args=())
def starting_masks(start: Tensor, scores: Tensor, sets: int, offset: int) -> Tensor:
    """One suppression's part of the packed starting masks. An operator of its own because `start` may have one row for all images.

    Args:
        start: bool [1 or B, C].
        scores: [B * sets, N], for its shape.
        offset: first column of the part, which is `sets * N` wide.

    Returns:
        bool [B * sets, N].
    """
    count = scores.shape[1]
    part = start[:, offset : offset + sets * count].reshape(-1, sets, count)
    return part.expand(scores.shape[0] // sets, sets, count).reshape(-1, count).clone()


@starting_masks.register_fake
def _(start: Tensor, scores: Tensor, sets: int, offset: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def translate_starting_masks(start: Any, scores: Any, sets: int, offset: int) -> Any:
    """The standard ONNX operators for `detector::starting_masks`: a slice, spread over the images."""
    shape = op.Shape(scores)
    count = op.Slice(shape, [1], [2])  # [1]: N
    first = op.Constant(value_ints=[offset])
    part = op.Slice(start, first, op.Add(first, op.Mul(count, op.Constant(value_ints=[sets]))), [1])
    part = op.Reshape(part, op.Concat(op.Constant(value_ints=[-1, sets]), count, axis=0))  # [1 or B, sets, N]
    images = op.Div(op.Slice(shape, [0], [1]), op.Constant(value_ints=[sets]))
    spread = op.Expand(part, op.Concat(images, op.Constant(value_ints=[1, 1]), axis=0))
    return op.Reshape(spread, shape)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.detector.starting_masks.default: translate_starting_masks}
"""For `torch.onnx.export(custom_translation_table=...)`."""


class ResumableNMS:
    """The strategy for one pass through a detector: dense NMS from given masks, which remembers masks and certificates.

    Args:
        start: bool [1 or B, C].
        sets: how many suppressions an image has in each call that will come.
    """

    def __init__(self, start: Tensor, sets: Sequence[int]) -> None:
        self._start = start
        self._sets = list(sets)
        self._states: list[Tensor] = []
        self._changed: list[Tensor] = []
        self._offset = 0

    def __call__(self, boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> Tensor:
        sets, count = self._sets[len(self._states)], int(boxes.shape[1])
        start = starting_masks(self._start, scores, sets, self._offset)
        keep, changed = certified_dense_nms(boxes, scores, groups, iou_thresh, start)
        self._states.append(keep.reshape(-1, sets * count))
        self._changed.append(changed.reshape(-1, sets).sum(dim=1))
        self._offset += sets * count
        return keep

    def certificate(self) -> tuple[Tensor, Tensor]:
        """`nms_converged` bool [B] and `nms_state` bool [B, C] of the calls so far."""
        return torch.stack(self._changed).sum(dim=0) < 0.5, torch.cat(self._states, dim=1)


class CertifiedDetector(nn.Module):
    """A detector with dense NMS and the certificate's input and outputs, ready to be traced."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector
        config = detector.config
        self.sets = (len(config.anchors.sizes), 1)  # one suppression a level, one for all classes
        final = max(config.roi.candidates_per_image, config.roi.detections_per_image)
        self.state_width = self.sets[0] * config.rpn.pre_nms_top_n_test + final

    def forward(self, images: Tensor, image_sizes_hw: Tensor, nms_start: Tensor) -> tuple[Tensor, ...]:
        """The four outputs of the contract, `nms_converged` and `nms_state`."""
        nms = ResumableNMS(nms_start, self.sets)
        self.detector.nms = nms
        try:
            return (*self.detector(images, image_sizes_hw), *nms.certificate())
        finally:
            self.detector.nms = dense_nms


def name_weights_as_alone(model: onnx.ModelProto) -> None:
    """Give the weights, in place, the names that the detector has for them: other tools know the parts of the network by those."""
    prefix = "detector."
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.removeprefix(prefix)
    for node in model.graph.node:
        node.input[:] = [name.removeprefix(prefix) for name in node.input]


def make_start_optional(model: onnx.ModelProto, state_width: int) -> None:
    """Give the graph's input `nms_start` its default: all ones, one row for every image."""
    default = np.ones((1, state_width), bool)
    model.graph.initializer.append(onnx.numpy_helper.from_array(default, NMS_START))


def state_width(model: onnx.ModelProto) -> int | None:
    """C of a graph with dense NMS; None where there is no certificate."""
    return next((int(value.dims[1]) for value in model.graph.initializer if value.name == NMS_START), None)
