"""Non-maximum suppression with fixed shapes: S independent sets of N boxes in, a keep mask out.

Two exact strategies with one signature, so that a detector can be run eagerly and exported from the same code:
`greedy_nms` (torchvision's kernel, set by set) and `dense_nms` (all pairs, standard ops only, no data-dependent shape).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from model import boxes as box_ops

INVALID_SCORE = -1.0
"""Rows with this score (or below) are padding: they suppress nothing and are never kept."""

NMS = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""(boxes [S, N, 4], scores [S, N] descending, groups int64 [S, N] or None, iou_thresh) -> keep bool [S, N].

Boxes of different groups (classes) never suppress each other. A box falls to a better one if their IoU is strictly above the threshold.
"""

DENSE_ITERATIONS = 16
"""Rounds of `dense_nms`. On real pictures 11 were enough (benchmarks/results/runtime.md); `dense_nms_rounds` measures them."""


def greedy_nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> Tensor:
    """Greedy NMS by torchvision's kernel."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for index in range(boxes.shape[0]):
        valid = scores[index] > INVALID_SCORE
        for group in [valid] if groups is None else [valid & (groups[index] == g) for g in torch.unique(groups[index][valid])]:
            rows = group.nonzero()[:, 0]
            keep[index, rows[torchvision_nms(boxes[index, rows], scores[index, rows], iou_thresh)]] = True
    return keep


def suppression_matrix(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> Tensor:
    """Bool `[S, N, N]`: row j, if kept, suppresses column i. Strictly upper triangular in score order."""
    valid = scores > INVALID_SCORE
    matrix = box_ops.iou(boxes, boxes) > iou_thresh
    matrix = matrix & (valid[:, :, None] & valid[:, None, :])
    if groups is not None:
        matrix = matrix & (groups[:, :, None] == groups[:, None, :])
    rank = torch.arange(boxes.shape[1], device=boxes.device)
    return matrix & (rank[:, None] < rank[None, :])


def dense_nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> Tensor:
    """Greedy NMS as the fixed point of k_i = valid_i and no kept j suppresses i, after DENSE_ITERATIONS rounds.

    Every round settles at least one more box in score order, and the fixed point is unique; iterates bound it from both sides alternately.
    """
    return certified_dense_nms(boxes, scores, groups, iou_thresh)[0]


def certified_dense_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`dense_nms` that says where it is done, and that can be taken up where it was left.

    Whether box i is kept depends on better boxes alone, so after t rounds the first t boxes are right whatever the first mask was:
    any mask may start, a good one only saves rounds. A round that changes nothing has reached the fixed point, of which there is one.

    Args:
        start: bool [S, N], for instance the mask that an earlier call left; None starts from all valid boxes.

    Returns:
        keep bool [S, N], and changed float [S]: how many boxes the last round still changed. 0 certifies greedy NMS, exactly.
    """
    suppresses = suppression_matrix(boxes, scores, groups, iou_thresh).to(boxes.dtype)
    valid = scores > INVALID_SCORE
    previous = keep = valid if start is None else start & valid
    for _ in range(DENSE_ITERATIONS):
        previous, keep = keep, _round(suppresses, keep, valid)
    return keep, (keep ^ previous).to(boxes.dtype).sum(dim=1)


def dense_nms_rounds(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> tuple[Tensor, int]:
    """The keep mask and how many rounds it took until nothing changed, that last look included."""
    suppresses = suppression_matrix(boxes, scores, groups, iou_thresh).to(boxes.dtype)
    valid = scores > INVALID_SCORE
    keep, rounds = valid, 0
    while True:
        following, rounds = _round(suppresses, keep, valid), rounds + 1
        if torch.equal(following, keep):
            return keep, rounds
        keep = following


def _round(suppresses: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    # a matrix product of 0/1 values counts the suppressors: exact in fp32 up to 2^24 boxes
    suppressors = torch.matmul(keep[:, None, :].to(suppresses.dtype), suppresses)[:, 0]
    return valid & (suppressors < 0.5)
