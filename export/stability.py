"""Which detections rounding alone decides: a tie in a ranking, an overlap exactly at a threshold.

Two correct runtimes may answer such a case differently, and so does PyTorch itself in fp64, or once its weights change in the last
digits, or once every layer rounds its results differently. Only what survives all of them is a fair reference. N detections of a picture.

Why both: of the 100 detections that a random ResNet-50-FPN gave in fp64, when scores near 1 still ranked the anchors (RPN logits of 7),
PyTorch in fp32 found 86, the others up to 23 px away, and ONNX Runtime 97, while copies with shaken weights found all that fp32 did:
shaking alone would have called it ONNX Runtime's fault. On a picture that keeps a network's activations near 1, all of them agreed within
5e-4 px.

Why layers too: where a picture is constant along a row, all its positions score exactly the same in PyTorch, in fp64 and with any weights,
and the first of them suppresses the others. A runtime that cuts the row into tiles rounds some positions otherwise, and the boxes of the
row come out one stride further. Only rounding that differs from position to position shows such a tie.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.agreement import Agreement, Answer, compare, pairwise_iou
from model.faster_rcnn import FasterRCNN

SHARE = 0.02
"""Of the weights, this many move to a neighbouring float: it changes answers about as much as another runtime does."""
ROUNDS = 8
"""Shaken copies that are asked, besides the one in fp64."""
BESIDE_IOU = 0.3
"""An extra box that overlaps an undecided one this much stands in its place."""


def shaken(detector: FasterRCNN, seed: int) -> FasterRCNN:
    """A copy whose weights differ in their last digits, and whose layers round each of their results up, down or not, by chance."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(detector)
    with torch.no_grad():
        for weight in other.parameters():
            draw = torch.rand(weight.shape, generator=generator)
            towards = torch.where(draw < SHARE / 2, -torch.inf, torch.where(draw < SHARE, torch.inf, weight))
            weight.copy_(torch.nextafter(weight, towards))
    for layer in other.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _layer, _inputs, output: _rounded_by_chance(output, generator))
    return other


def _rounded_by_chance(output: Tensor, generator: torch.Generator) -> Tensor:
    """Every element itself or one of its neighbours: less than two runtimes differ by that add up in another order."""
    ulp = torch.finfo(output.dtype).eps
    return output * torch.empty_like(output).uniform_(1 - ulp, 1 + ulp, generator=generator)


def exact(detector: FasterRCNN) -> FasterRCNN:
    """A copy that computes in fp64 with the same weights: what it answers differently, fp32's rounding decided."""
    return copy.deepcopy(detector).double()


def rivals_of(detector: FasterRCNN) -> Iterator[FasterRCNN]:
    """Networks that are as right as the given one, one at a time: in fp64, then shaken."""
    yield exact(detector)
    for seed in range(ROUNDS):
        yield shaken(detector, seed)


def judge(reference: Answer, answer: Answer, rivals: Sequence[Answer], *, limit: int, box_px: float, score: float) -> Agreement:
    """Compare as `compare` does, with every difference set aside that the rivals show as well.

    Args:
        rivals: answers of `rivals_of` the network to the same picture.
        box_px, score: differences from which a pair is no longer the same answer.
    """
    found = compare(reference, answer, limit=limit)
    stable: NDArray[np.bool_] = np.ones(len(reference), bool)
    seen: NDArray[np.bool_] = np.zeros(len(answer), bool)
    for rival in rivals:
        stable = stable & _survives(reference, rival, limit, box_px, score)
        seen = seen | _survives(answer, rival, limit, box_px, score)
    if stable.all():
        return found
    beside = pairwise_iou(answer.boxes, reference.boxes[~stable]).max(axis=1, initial=0.0) > BESIDE_IOU
    excused = set(np.flatnonzero(seen | beside).tolist())
    fair = [(row, column) for row, column in found.pairs if stable[row]]
    rows, columns = [row for row, _ in fair], [column for _, column in fair]
    return replace(
        found,
        worst_box_px=float(np.abs(reference.boxes[rows] - answer.boxes[columns]).max(initial=0.0)),
        worst_score=float(np.abs(reference.scores[rows] - answer.scores[columns]).max(initial=0.0)),
        missed={row: value for row, value in found.missed.items() if stable[row]},
        extra={row: value for row, value in found.extra.items() if row not in excused},
        undecided=int((~stable).sum()),
    )


def _survives(answer: Answer, rival: Answer, limit: int, box_px: float, score: float) -> NDArray[np.bool_]:
    """Bool [N]: which detections of `answer` the rival gives as well, within the tolerances."""
    same = np.zeros(len(answer), bool)
    for row, column in compare(answer, rival, limit=limit).pairs:
        moved = np.abs(answer.boxes[row] - rival.boxes[column]).max()
        same[row] = moved <= box_px and abs(answer.scores[row] - rival.scores[column]) <= score
    return same
