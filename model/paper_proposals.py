"""What an RPN proposes on a whole data set, whole or with one of its parts taken away (the paper's Table 2).

N anchors of an image, P proposals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.records import DetectionSet
from model.fast_rcnn import read_input, to_input_frame
from model.faster_rcnn import FasterRCNN
from model.nms import INVALID_SCORE
from model.rpn import RPNOutput, propose


@dataclass(frozen=True)
class ProposalOptions:
    """How proposals are taken.

    Attributes:
        top_n: boxes kept a picture, best first.
        pre_nms_top_n: candidates a level before NMS; None: every anchor, as alternating training does.
        nms: without, the best `top_n` candidates are kept as they overlap.
        cls: without, nothing ranks the candidates: a random `top_n` of them, and no NMS, which needs scores.
        reg: without, the anchors themselves are proposed.
    """

    top_n: int
    pre_nms_top_n: int | None = None
    nms: bool = True
    cls: bool = True
    reg: bool = True


def keep_all(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_thresh: float) -> Tensor:
    """No suppression."""
    return scores > INVALID_SCORE


@torch.inference_mode()
def rpn_proposals(
    detector: FasterRCNN,
    dataset: DetectionSet,
    options: ProposalOptions,
    *,
    seed: int = 0,
    progress: Callable[[int, float | None], object] | None = None,
) -> list[NDArray[np.float32]]:
    """Proposals of every picture, original frame, best first: [P, 4] each.

    Args:
        seed: of the random choice where `options.cls` is off.
        progress: called with (pictures done, None).
    """
    device = next(detector.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    frame = detector.config.input
    detector.eval()
    found = []
    for record in dataset.records:
        image, size_hw = read_input(record, frame.short_side, frame.long_side)
        boxes = propose_one(detector, image.to(device), size_hw.to(device), options, generator)
        height, width = size_hw[0].tolist()
        found.append(to_input_frame(boxes.cpu().numpy(), (height, width), record.size_hw))  # the way back
        if progress is not None:
            progress(len(found), None)
    return found


def propose_one(detector: FasterRCNN, image: Tensor, size_hw: Tensor, options: ProposalOptions, generator: torch.Generator) -> Tensor:
    """Proposals `[P, 4]` of a batch of one, input frame."""
    levels = detector.backbone(detector.normalize(image, size_hw))
    anchors = detector.anchors(levels, (image.shape[1], image.shape[2]))
    logits, deltas = detector.rpn(levels)
    if not options.cls:
        logits = [torch.randn(level.shape, generator=generator).to(level.device) for level in logits]
    if not options.reg:
        deltas = [torch.zeros_like(level) for level in deltas]
    every = max(len(level) for level in anchors)
    config = replace(detector.config.rpn, pre_nms_top_n_test=min(options.pre_nms_top_n or every, every), post_nms_top_n_test=options.top_n)
    nms = detector.nms if options.nms and options.cls else keep_all
    proposals = propose(RPNOutput(logits, deltas), anchors, size_hw, config, nms, training=False)
    return proposals.boxes[0][proposals.valid[0]]
