"""How far two versions agree on pictures: which detections over a score both give, which only one, and how far apart the common ones are.

A is the version before, B the version after. All boxes are in the original frame; labels of both count the same classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.agreement import Answer, compare, pairwise_iou
from model.metrics.predictions import Prediction

UNLIMITED = 1_000_000
"""No answer is full, so no tie at its end is forgiven: what one version drops is a difference."""


@dataclass(frozen=True)
class Pair:
    """One object as both versions see it.

    Attributes:
        a, b: rows of the two predictions.
        box_px: largest difference of an edge. score: B's minus A's.
    """

    a: int
    b: int
    label: int
    iou: float
    box_px: float
    score: float


@dataclass(frozen=True)
class PictureAgreement:
    """Two versions on one picture, over the score threshold.

    Attributes:
        pairs: detections that both give.
        missed: rows that only A gives, with B's score for the same object, 0 where B has nothing there.
        extra: rows that only B gives, with A's score for it.
        renamed: (row of A, row of B) among those, where the place is the same and the class is not.
        disagreement: scores that would have to change to agree, plus (1 - IoU) of the pairs; what pictures are ranked by.
    """

    pairs: tuple[Pair, ...]
    missed: Mapping[int, float]
    extra: Mapping[int, float]
    renamed: tuple[tuple[int, int], ...]
    disagreement: float

    @property
    def differs(self) -> bool:
        """Whether a client that cuts at the threshold sees another set of objects."""
        return bool(self.missed or self.extra)


@dataclass(frozen=True)
class ClassAgreement:
    """The same added up over pictures for one class: counts, and the worst and the mean of the pairs."""

    name: str
    both: int
    missed: int
    extra: int
    worst_box_px: float
    worst_score: float
    mean_iou: float


def agree(a: Prediction, b: Prediction, *, score_threshold: float) -> PictureAgreement:
    """Hold B's detections of a picture against A's.

    Detections over the threshold are paired first, class by class, best overlap first. What is left looks for a partner among the other
    version's weaker detections, since a score that slips under the threshold is a smaller change than an object that is gone.
    """
    answers = _answer(a), _answer(b)
    sure = [np.flatnonzero(answer.scores >= score_threshold) for answer in answers]
    weak = [np.flatnonzero(answer.scores < score_threshold) for answer in answers]
    found = compare(_rows(answers[0], sure[0]), _rows(answers[1], sure[1]), limit=UNLIMITED)
    pairs = tuple(_pair(answers[0], answers[1], int(sure[0][i]), int(sure[1][j])) for i, j in found.pairs)
    alone_a, alone_b = sure[0][sorted(found.missed)], sure[1][sorted(found.extra)]
    missed = _weak_partners(answers[0], alone_a, answers[1], weak[1])
    extra = _weak_partners(answers[1], alone_b, answers[0], weak[0])
    slipped = sum(float(answers[0].scores[row]) - partner for row, partner in missed.items())
    slipped += sum(float(answers[1].scores[row]) - partner for row, partner in extra.items())
    moved = sum(abs(pair.score) + 1 - pair.iou for pair in pairs)
    return PictureAgreement(pairs, missed, extra, _renamed(answers[0], alone_a, answers[1], alone_b), slipped + moved)


def agree_by_class(
    agreements: Sequence[PictureAgreement], a: Sequence[Prediction], b: Sequence[Prediction], class_names: Sequence[str]
) -> list[ClassAgreement]:
    """One row a class, then one for all of them."""
    pairs = [pair for one in agreements for pair in one.pairs]
    missed = [int(a[i]["labels"][row]) for i, one in enumerate(agreements) for row in one.missed]
    extra = [int(b[i]["labels"][row]) for i, one in enumerate(agreements) for row in one.extra]
    rows = [
        _add_up(name, [pair for pair in pairs if pair.label == label], missed.count(label), extra.count(label))
        for label, name in enumerate(class_names, start=1)
    ]
    return [*rows, _add_up("all", pairs, len(missed), len(extra))]


def _add_up(name: str, pairs: Sequence[Pair], missed: int, extra: int) -> ClassAgreement:
    return ClassAgreement(
        name=name,
        both=len(pairs),
        missed=missed,
        extra=extra,
        worst_box_px=max((pair.box_px for pair in pairs), default=0.0),
        worst_score=max((abs(pair.score) for pair in pairs), default=0.0),
        mean_iou=float(np.mean([pair.iou for pair in pairs])) if pairs else 1.0,
    )


def _answer(prediction: Prediction) -> Answer:
    return Answer(
        np.asarray(prediction["boxes"], np.float32).reshape(-1, 4),
        np.asarray(prediction["scores"], np.float32),
        np.asarray(prediction["labels"], np.int64),
    )


def _rows(answer: Answer, rows: NDArray[np.intp]) -> Answer:
    return Answer(answer.boxes[rows], answer.scores[rows], answer.labels[rows])


def _pair(a: Answer, b: Answer, i: int, j: int) -> Pair:
    iou = float(pairwise_iou(a.boxes[[i]], b.boxes[[j]])[0, 0])
    return Pair(i, j, int(a.labels[i]), iou, float(np.abs(a.boxes[i] - b.boxes[j]).max()), float(b.scores[j] - a.scores[i]))


def _weak_partners(answer: Answer, alone: NDArray[np.intp], other: Answer, weak: NDArray[np.intp]) -> dict[int, float]:
    """For each row that stands alone: the score of the other version's weaker detection of the same object, or 0."""
    found = compare(_rows(answer, alone), _rows(other, weak), limit=UNLIMITED)
    scores = dict.fromkeys((int(row) for row in alone), 0.0)
    return scores | {int(alone[i]): float(other.scores[weak[j]]) for i, j in found.pairs}


def _renamed(a: Answer, alone_a: NDArray[np.intp], b: Answer, alone_b: NDArray[np.intp]) -> tuple[tuple[int, int], ...]:
    """Detections without a partner of their class that lie on one of another class."""
    nameless = [
        Answer(answer.boxes[rows], answer.scores[rows], np.zeros(len(rows), np.int64)) for answer, rows in ((a, alone_a), (b, alone_b))
    ]
    return tuple((int(alone_a[i]), int(alone_b[j])) for i, j in compare(nameless[0], nameless[1], limit=UNLIMITED).pairs)
