"""Assignment of ground truth to anchors or RoIs, and the sampling of a training batch. Used by both stages.

B images, N candidates (anchors or RoIs), G ground-truth boxes, S samples of an image. No loop over images or candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model import boxes as box_ops

BACKGROUND = -1
IGNORED = -2


class Samples(NamedTuple):
    """A fixed number of candidates an image.

    Attributes:
        rows: `[B, S]` into the candidates, foreground first.
        foreground: bool `[B, S]`.
        valid: bool `[B, S]`; false where an image had too few candidates. Foreground implies valid.
    """

    rows: Tensor
    foreground: Tensor
    valid: Tensor


def match(
    candidates: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    allow_low_quality: bool,
    eligible: Tensor | None = None,
) -> Tensor:
    """The ground-truth row that each candidate learns from.

    Args:
        candidates: `[N, 4]` shared by all images, or `[B, N, 4]`.
        gt_boxes: `[B, G, 4]`; rows where `gt_valid` is false are padding.
        gt_valid: bool `[B, G]`.
        allow_low_quality: also match, to its own best box, every candidate that is the best (ties included) of some ground truth,
            however low their IoU: the RPN's rule (i) in the paper, section 3.1.2.
        eligible: bool `[B, N]`; other candidates match nothing and are the best of nothing.

    Returns:
        int64 `[B, N]`: a row of `gt_boxes`, BACKGROUND or IGNORED (between the two thresholds).
    """
    best_iou, best_row, low_quality = _best_pairs(candidates, gt_boxes, gt_valid, eligible, allow_low_quality)
    background = torch.full_like(best_row, BACKGROUND)
    ignored = torch.full_like(best_row, IGNORED)
    below = torch.where(best_iou < bg_iou_thresh, background, ignored)
    return torch.where((best_iou >= fg_iou_thresh) | low_quality, best_row, below)


def _best_pairs(
    candidates: Tensor, gt_boxes: Tensor, gt_valid: Tensor, eligible: Tensor | None, allow_low_quality: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Best IoU `[B, N]`, its row `[B, N]` and the low-quality mask `[B, N]`.

    Runs over the G rows, not over images or candidates: the pairwise matrix [B, G, N] is never held, which keeps
    8 images x 50 boxes x 270 k anchors far below 1 GB. Coordinates lie apart, each in one piece: a quarter of the memory traffic.
    """
    batch, rows = gt_valid.shape
    size = (batch, candidates.shape[-2])
    columns = candidates.movedim(-1, 0).contiguous()  # [..., N, 4] -> [4, ..., N]
    areas, gt_areas = box_ops.area(candidates), box_ops.area(gt_boxes)
    best_iou = candidates.new_zeros(size)
    best_row = torch.zeros(size, dtype=torch.int64, device=candidates.device)
    low_quality = torch.zeros(size, dtype=torch.bool, device=candidates.device)
    for row in range(rows):
        row_iou = _row_iou(gt_boxes[:, row], gt_areas[:, row, None], columns, areas)
        row_iou.masked_fill_(~gt_valid[:, row, None], 0.0)
        if eligible is not None:
            row_iou.masked_fill_(~eligible, 0.0)
        best_row.masked_fill_(row_iou > best_iou, row)
        torch.maximum(best_iou, row_iou, out=best_iou)
        if allow_low_quality:
            top = row_iou.amax(dim=1, keepdim=True)
            low_quality |= row_iou == top.masked_fill(top <= 0, torch.inf)
    return best_iou, best_row, low_quality


def _row_iou(gt: Tensor, gt_areas: Tensor, columns: Tensor, areas: Tensor) -> Tensor:
    """IoU `[B, N]` of one box an image, `[B, 4]`, with all candidates, `[4, B or nothing, N]`; as `box_ops.iou`, in place where it can."""
    width = torch.minimum(columns[2], gt[:, 2:3]).sub_(torch.maximum(columns[0], gt[:, 0:1])).clamp_(min=0)
    height = torch.minimum(columns[3], gt[:, 3:4]).sub_(torch.maximum(columns[1], gt[:, 1:2])).clamp_(min=0)
    intersection = width.mul_(height)
    union = (gt_areas + areas).sub_(intersection)
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))


def sample(
    matched: Tensor,
    samples_per_image: int,
    positive_fraction: float,
    *,
    eligible: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Samples:
    """A random subset with at most `positive_fraction` foreground, filled up with background.

    Args:
        matched: `[B, N]` from `match`.
        eligible: bool `[B, N]`; other candidates are never drawn.
    """
    foreground, background = matched >= 0, matched == BACKGROUND
    if eligible is not None:
        foreground, background = foreground & eligible, background & eligible
    limit = int(samples_per_image * positive_fraction)
    order = torch.rand(matched.shape, device=matched.device, generator=generator)
    count = min(samples_per_image, matched.shape[1])
    # each kind is ranked by a random key; foreground beyond the limit is pushed out of reach
    fg_key = torch.where(foreground, order, 2.0)
    fg_top = fg_key.topk(min(limit, matched.shape[1]), dim=1, largest=False)
    chosen_fg = torch.zeros_like(foreground).scatter(1, fg_top.indices, fg_top.values < 1.5)
    key = torch.where(chosen_fg, order - 2.0, torch.where(background, order, 2.0))
    index = key.topk(count, dim=1, largest=False, sorted=True).indices
    is_foreground = chosen_fg.gather(1, index)
    return Samples(index, is_foreground, is_foreground | background.gather(1, index))
