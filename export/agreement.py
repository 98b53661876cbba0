"""Two answers to one picture, side by side: which boxes correspond, and how far apart they are.

N and M detections of the two answers. Everything is numpy, so that any two runtimes can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.runtime import Detections

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """The detections of one picture: boxes [N, 4], scores [N] descending, labels [N]."""

    boxes: Floats
    scores: Floats
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Agreement:
    """What the comparison of two answers to one picture found.

    Attributes:
        pairs: (row in the reference, row in the other) of detections with one label that overlap.
        worst_box_px, worst_score: largest differences over the pairs.
        missed, extra: detections of the reference and of the other answer without a partner, row to score.
        at_cut: detections without a partner that tie with the last place of a full answer, so that either choice is right.
        undecided: detections of the reference that rounding alone decides (see `export.stability`).
    """

    pairs: tuple[tuple[int, int], ...] = ()
    worst_box_px: float = 0.0
    worst_score: float = 0.0
    missed: Mapping[int, float] = field(default_factory=dict)
    extra: Mapping[int, float] = field(default_factory=dict)
    at_cut: int = 0
    undecided: int = 0


@dataclass(frozen=True)
class Tally:
    """Agreements added up over pictures."""

    matched: int = 0
    worst_box_px: float = 0.0
    worst_score: float = 0.0
    missed: int = 0
    extra: int = 0
    top_unmatched: float = 0.0
    at_cut: int = 0
    undecided: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.matched + other.matched,
            max(self.worst_box_px, other.worst_box_px),
            max(self.worst_score, other.worst_score),
            self.missed + other.missed,
            self.extra + other.extra,
            max(self.top_unmatched, other.top_unmatched),
            self.at_cut + other.at_cut,
            self.undecided + other.undecided,
        )

    @staticmethod
    def of(agreements: Iterable[Agreement]) -> Tally:
        """The sum."""
        return sum((_tally(one) for one in agreements), Tally())


def _tally(one: Agreement) -> Tally:
    return Tally(
        matched=len(one.pairs),
        worst_box_px=one.worst_box_px,
        worst_score=one.worst_score,
        missed=len(one.missed),
        extra=len(one.extra),
        top_unmatched=max([*one.missed.values(), *one.extra.values()], default=0.0),
        at_cut=one.at_cut,
        undecided=one.undecided,
    )


def answer_of(detections: Detections, index: int) -> Answer:
    """Picture `index` of a batch, without the padding rows."""
    count = int(detections.num_detections[index])
    return Answer(detections.boxes[index, :count], detections.scores[index, :count], detections.labels[index, :count])


def pairwise_iou(a: Floats, b: Floats) -> Floats:
    """IoU [N, M] of boxes [N, 4] and [M, 4]."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    sides = np.clip(np.minimum(a[:, None, 2:], b[None, :, 2:]) - top_left, 0, None)
    shared = sides[..., 0] * sides[..., 1]
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.asarray(shared / np.maximum(union, np.finfo(np.float32).tiny), dtype=np.float32)


def compare(reference: Answer, other: Answer, *, limit: int, min_iou: float = 0.5, score_tie: float = 1e-4) -> Agreement:
    """Pair the detections of two answers, best overlap first, and measure the pairs.

    Args:
        limit: detections an answer may hold; a full one was cut, and a tie at the cut is no disagreement.
        min_iou: overlap from which two boxes of one label are the same object.
        score_tie: scores this close are a tie.
    """
    overlap = pairwise_iou(reference.boxes, other.boxes) * (reference.labels[:, None] == other.labels[None, :])
    pairs = _pair(overlap, min_iou)
    rows, columns = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    missed, cut_a = _alone(reference, rows, other, limit, score_tie)
    extra, cut_b = _alone(other, columns, reference, limit, score_tie)
    return Agreement(
        pairs=tuple(pairs),
        worst_box_px=float(np.abs(reference.boxes[rows] - other.boxes[columns]).max(initial=0.0)),
        worst_score=float(np.abs(reference.scores[rows] - other.scores[columns]).max(initial=0.0)),
        missed=missed,
        extra=extra,
        at_cut=cut_a + cut_b,
    )


def _pair(overlap: Floats, min_iou: float) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    order = np.argsort(-overlap, axis=None, kind="stable")
    order = order[overlap.reshape(-1)[order] >= min_iou]
    free_rows, free_columns = np.ones(overlap.shape[0], bool), np.ones(overlap.shape[1], bool)
    for flat in order:
        row, column = divmod(int(flat), overlap.shape[1])
        if free_rows[row] and free_columns[column]:
            free_rows[row] = free_columns[column] = False
            pairs.append((row, column))
    return pairs


def _alone(answer: Answer, paired: list[int], other: Answer, limit: int, score_tie: float) -> tuple[dict[int, float], int]:
    alone = {row: float(answer.scores[row]) for row in range(len(answer)) if row not in set(paired)}
    cut = float(other.scores[-1]) + score_tie if len(other) == limit else -1.0
    return {row: score for row, score in alone.items() if score > cut}, sum(score <= cut for score in alone.values())
