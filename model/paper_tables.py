"""The accuracy tables of the paper, row by row: what was published, and how to measure it here.

Published: mean average precision on VOC07 test in per cent (Table 4: VOC12 test).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from model import boxes as box_ops
from model.alternate import RECALL_LIMITS
from model.config import DetectorConfig
from model.data.records import DetectionSet
from model.fast_rcnn import read_input
from model.faster_rcnn import FasterRCNN
from model.metrics.recall import proposal_recall
from model.paper_lab import Boxes, Lab
from model.paper_proposals import ProposalOptions

LAMBDA_TO_WEIGHT = 256 / 2400
"""The paper divides the box loss by about 2400 locations where this project divides by the 256 sampled anchors."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        published: None where the paper has no number.
        measure: the number on the data at hand.
        needs_union: it takes a second training set.
    """

    label: str
    published: float | None
    measure: Callable[[Lab], float]
    needs_union: bool = False


@dataclass(frozen=True)
class Table:
    """A table of one number a row. `preset` is the paper's network."""

    title: str
    unit: str
    preset: str
    rows: Callable[[DetectorConfig], Sequence[Row]]


# -- Table 2: proposals at training and at test --------------------------------------------------------------------------------


def table2_rows(config: DetectorConfig) -> list[Row]:
    """ZF on VOC07; EdgeBoxes is left out, its model file is not part of any library."""
    rows = [
        Row("SS 2000 at training and test", 58.7, lambda lab: lab.score_external(lab.fast(), lab.searched_boxes(lab.sets.test))),
        Row("RPN shared, 300", 59.9, lambda lab: lab.score_whole(lab.shared())),
        Row("RPN unshared, 300", 58.7, _unshared),
    ]
    rows += [_with_rpn(f"SS at training, RPN {n}", score, ProposalOptions(n)) for n, score in ((100, 55.1), (300, 56.8), (1000, 56.3))]
    rows.append(_with_rpn("... without NMS, 6000", 55.2, ProposalOptions(6000, nms=False)))
    rows += [
        _with_rpn(f"... without cls, random {n}", score, ProposalOptions(n, cls=False))
        for n, score in ((100, 44.6), (300, 51.4), (1000, 55.8))
    ]
    rows += [_with_rpn(f"... without reg, {n} anchors", score, ProposalOptions(n, reg=False)) for n, score in ((300, 52.1), (1000, 51.3))]
    rows.append(Row("SS at training, RPN of the other network, 300", 59.2, _borrowed))
    return rows


def _with_rpn(label: str, published: float, options: ProposalOptions) -> Row:
    def measure(lab: Lab) -> float:
        return lab.score_external(lab.fast(), lab.proposed(lab.rpn(), options), options.top_n)

    return Row(label, published, measure)


def _unshared(lab: Lab) -> float:
    rpn, detector = lab.unshared()
    return lab.score_external(detector, lab.proposed(rpn, ProposalOptions(300)), 300)


def _borrowed(lab: Lab) -> float:
    return lab.score_external(lab.fast(), lab.proposed(lab.rpn(lab.setup.rpn_preset), ProposalOptions(300)), 300)


# -- Tables 3 and 4: more data -------------------------------------------------------------------------------------------------


def table3_rows(config: DetectorConfig) -> list[Row]:
    return [
        Row("SS 2000, first set (07)", 66.9, _searched_first),
        Row("SS 2000, union (07+12)", 70.0, _searched_union, needs_union=True),
        Row("RPN unshared 300, first set (07)", 68.5, _unshared),
        Row("RPN shared 300, first set (07)", 69.9, lambda lab: lab.score_whole(lab.shared())),
        Row("RPN shared 300, union (07+12)", 73.2, _shared_union, needs_union=True),
    ]


def table4_rows(config: DetectorConfig) -> list[Row]:
    return [
        Row("SS 2000, first set (12)", 65.7, _searched_first),
        Row("SS 2000, union (07++12)", 68.4, _searched_union, needs_union=True),
        Row("RPN shared 300, first set (12)", 67.0, lambda lab: lab.score_whole(lab.shared())),
        Row("RPN shared 300, union (07++12)", 70.4, _shared_union, needs_union=True),
    ]


def _searched_first(lab: Lab) -> float:
    return lab.score_external(lab.fast(), lab.searched_boxes(lab.sets.test))


def _searched_union(lab: Lab) -> float:
    return lab.score_external(lab.fast(dataset=lab.sets.union, name="union"), lab.searched_boxes(lab.sets.test))


def _shared_union(lab: Lab) -> float:
    return lab.score_whole(lab.shared("union", dataset=lab.sets.union))


# -- Tables 8 and 9: anchors and lambda ----------------------------------------------------------------------------------------


def table8_rows(config: DetectorConfig) -> list[Row]:
    """Scales are the network's own smallest, middle and largest: 128, 256 and 512 unless --set changes them."""
    sizes = config.anchors.sizes[0]
    ratios = config.anchors.ratios
    small, middle = sizes[0], sizes[len(sizes) // 2]
    choices = (
        (f"1 scale {small:g}, 1 ratio", (small,), (1.0,), 65.8),
        (f"1 scale {middle:g}, 1 ratio", (middle,), (1.0,), 66.7),
        (f"1 scale {small:g}, 3 ratios", (small,), ratios, 68.8),
        (f"1 scale {middle:g}, 3 ratios", (middle,), ratios, 67.9),
        ("3 scales, 1 ratio", sizes, (1.0,), 69.8),
        ("3 scales, 3 ratios", sizes, ratios, 69.9),
    )
    return [
        _with_config(label, score, replace(config, anchors=replace(config.anchors, sizes=(s,), ratios=r))) for label, s, r, score in choices
    ]


def table9_rows(config: DetectorConfig) -> list[Row]:
    choices = ((0.1, 67.2), (1.0, 68.9), (10.0, 69.9), (100.0, 69.1))
    return [
        _with_config(f"lambda {weight:g}", score, replace(config, rpn=replace(config.rpn, reg_weight=weight * LAMBDA_TO_WEIGHT)))
        for weight, score in choices
    ]


def _with_config(label: str, published: float, config: DetectorConfig) -> Row:
    name = "".join(c if c.isalnum() or c == "." else "_" for c in label)
    return Row(label, published, lambda lab: lab.score_whole(lab.shared(name, config)))


# -- Table 1: what the anchors learn -------------------------------------------------------------------------------------------

LEARNED_SCALES, LEARNED_RATIOS = (128.0, 256.0, 512.0), (0.5, 1.0, 2.0)
LEARNED = (
    ("188 x 111", "416 x 229", "768 x 437"),
    ("113 x 114", "261 x 284", "499 x 501"),
    ("70 x 92", "174 x 332", "355 x 715"),
)
"""Published mean proposal sizes, width x height: ratios 2:1, 1:1 and 1:2 by scales 128, 256 and 512."""


def table1_rows(config: DetectorConfig) -> list[Row]:
    """Mean width and height of what each anchor proposes, over all positions of the test pictures, cut at the borders."""
    rows = []
    scales = config.anchors.sizes[0]
    for r, ratio in enumerate(config.anchors.ratios):
        for s, scale in enumerate(scales):
            known = LEARNED[r][s] if scales == LEARNED_SCALES and config.anchors.ratios == LEARNED_RATIOS else None
            sides: list[float | None] = [*map(float, known.split(" x "))] if known else [None, None]
            for axis, side in enumerate(("width", "height")):
                label = f"scale {scale:g}, height / width {ratio:g}: {side}"
                rows.append(Row(label, sides[axis], _learned_side(r * len(scales) + s, axis)))
    return rows


def _learned_side(anchor: int, axis: int) -> Callable[[Lab], float]:
    return lambda lab: float(lab.once("learned sizes", lambda: learned_sizes(lab.rpn(), lab.sets.test))[anchor, axis])


@torch.inference_mode()
def learned_sizes(rpn: FasterRCNN, dataset: DetectionSet) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Mean (width, height) of the proposals of each anchor: [A, 2], input frame."""
    frame, per_cell = rpn.config.input, rpn.anchors.anchors_per_cell[0]
    device = next(rpn.parameters()).device
    total, count = np.zeros((per_cell, 2)), 0
    for record in dataset.records:
        image, size_hw = (part.to(device) for part in read_input(record, frame.short_side, frame.long_side))
        levels = rpn.backbone(rpn.normalize(image, size_hw))
        anchors = rpn.anchors(levels, (image.shape[1], image.shape[2]))[0]
        boxes = box_ops.clip(box_ops.decode_deltas(rpn.rpn(levels).deltas[0], anchors[None]), size_hw)[0]
        sides = (boxes[:, 2:] - boxes[:, :2]).reshape(-1, per_cell, 2)
        total += sides.sum(dim=0).double().cpu().numpy()
        count += len(sides)
    return total / count


# -- recall of proposals -------------------------------------------------------------------------------------------------------


def recall_sources(lab: Lab) -> dict[str, Boxes]:
    """Proposals for the test pictures by where they come from."""
    return {
        "SS": lab.searched_boxes(lab.sets.test),
        "RPN": lab.once("most proposals", lambda: lab.proposed(lab.rpn(), ProposalOptions(RECALL_LIMITS[-1]))),
    }


def proposal_rows(config: DetectorConfig) -> list[Row]:
    """Recall at two overlaps and its mean over ten, by number of proposals: figure 4 of the paper as numbers."""
    return [
        Row(f"{name} {limit}: {shown}", None, _recall(name, limit, key))
        for name in ("SS", "RPN")
        for limit in RECALL_LIMITS
        for key, shown in (("recall_50", "recall at IoU 0.5"), ("recall_75", "recall at IoU 0.75"), ("AR", "average recall"))
    ]


def _recall(name: str, limit: int, key: str) -> Callable[[Lab], float]:
    def measure(lab: Lab) -> float:
        recalls = lab.once(f"recall {name}", lambda: proposal_recall(lab.sets.test, recall_sources(lab)[name], top_n=RECALL_LIMITS))
        return 100.0 * recalls[limit]["all"][key]

    return measure


TABLES: dict[str, Table] = {
    "table1": Table("Table 1: learned mean proposal sizes", "px, input frame", "zf", table1_rows),
    "table2": Table("Table 2: proposals at training and at test", "mAP %", "zf", table2_rows),
    "table3": Table("Table 3: VOC07 test, data of training", "mAP %", "vgg16", table3_rows),
    "table4": Table("Table 4: VOC12 test, data of training", "mAP %", "vgg16", table4_rows),
    "table8": Table("Table 8: scales and ratios of anchors", "mAP %", "vgg16", table8_rows),
    "table9": Table("Table 9: lambda", "mAP %", "vgg16", table9_rows),
    "proposals": Table("Recall of proposals", "%", "zf", proposal_rows),
}
"""Tables of numbers; table 5, the timings, is in `model.paper_speed`."""
