"""Region proposal network: objectness and deltas at every anchor, and the proposals that survive NMS.

B images, L levels, A anchors per cell, N_l = H_l * W_l * A anchors of a level, N of an image, P proposals an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import boxes as box_ops
from model.config import RPNConfig
from model.matching import Samples, match, sample
from model.nms import INVALID_SCORE, NMS
from model.precision import at_least_fp32
from model.ranking import PADDING, take_rows, top_rows

WORTH_CELLS = 4
"""Where maps have fewer cells a sample, whole maps take no longer than the cells around the samples: 700 cells 4 to 9 % less of a step."""


class RPNOutput(NamedTuple):
    """Raw predictions a level: `logits[l]` is `[B, N_l]`, `deltas[l]` is `[B, N_l, 4]`."""

    logits: list[Tensor]
    deltas: list[Tensor]


class Proposals(NamedTuple):
    """`boxes` `[B, P, 4]` in the input frame, best first; `valid` bool `[B, P]`, false in unfilled slots (whose boxes are zero)."""

    boxes: Tensor
    valid: Tensor


class RPN(nn.Module):
    """3x3 convolutions and two 1x1 siblings, shared by all levels."""

    def __init__(self, channels: int, anchors_per_cell: int, config: RPNConfig) -> None:
        super().__init__()
        hidden = config.hidden or channels
        widths = [channels] + [hidden] * config.conv_depth
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths))
        self.cls_logits = nn.Conv2d(hidden, anchors_per_cell, 1)
        self.bbox_pred = nn.Conv2d(hidden, anchors_per_cell * 4, 1)
        for layer in [*self.convs, self.cls_logits, self.bbox_pred]:
            assert isinstance(layer, nn.Conv2d)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # these layers have a bias

    def forward(self, features: Sequence[Tensor]) -> RPNOutput:
        """Logits and deltas at every anchor of every level, in the anchors' order (cell by cell, row-major)."""
        logits, deltas = [], []
        for feature in features:
            hidden = feature
            for conv in self.convs:
                hidden = F.relu(conv(hidden))
            logits.append(self.cls_logits(hidden).permute(0, 2, 3, 1).flatten(1))  # [B, A, H, W] -> [B, H*W*A]
            moved = self.bbox_pred(hidden).permute(0, 2, 3, 1)  # [B, 4A, H, W] -> [B, H, W, 4A]
            deltas.append(moved.reshape(moved.shape[0], -1, 4))
        return RPNOutput(logits, deltas)

    def at(self, features: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives at some anchors, on large maps computed from the cells around them alone.

        A loss looks at 256 of the hundred thousand anchors of an image. Sent back through whole maps, the zeros of all others cost as much
        as a gradient does: on a CPU a tenth of a ResNet-50-FPN's step.

        Args:
            features: `[B, C, H_l, W_l]` of each level.
            rows: `[B, S]` into the anchors of all levels.

        Returns:
            Logits `[B, S]` and deltas `[B, S, 4]`.
        """
        cells = sum(feature.shape[2] * feature.shape[3] for feature in features)
        if cells <= WORTH_CELLS * rows.shape[1]:
            whole = self(features)
            return torch.cat(whole.logits, dim=1).gather(1, rows), take_rows(torch.cat(whole.deltas, dim=1), rows)
        per_cell = self.cls_logits.out_channels
        hidden, on_map = cell_patches(features, rows // per_cell, reach=len(self.convs))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            on_map = on_map[..., 1:-1, 1:-1]
            # beyond the map the next convolution sees zeros, not what this one would give there
            hidden = F.relu(F.conv2d(hidden, conv.weight, conv.bias)) * on_map.to(hidden.dtype)
        anchor = (rows % per_cell).reshape(-1, 1)
        logits = self.cls_logits(hidden).flatten(1).gather(1, anchor)  # [B * S, A, 1, 1] -> [B * S, 1]
        deltas = self.bbox_pred(hidden).reshape(-1, per_cell, 4).gather(1, anchor[..., None].expand(-1, 1, 4))
        return logits.reshape(rows.shape), deltas.reshape(*rows.shape, 4)


def cell_patches(features: Sequence[Tensor], cells: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Square pieces of the maps around cells, zero beyond the border.

    Args:
        features: `[B, C, H_l, W_l]` of each level.
        cells: `[B, S]` into the cells of all levels, row-major, finest level first.
        reach: cells on each side; k = 2 * reach + 1.

    Returns:
        `[B * S, C, k, k]`, differentiable in the features, and bool `[B * S, 1, k, k]`: which of them lie on the map.
    """
    steps = torch.arange(-reach, reach + 1, device=cells.device)
    images = torch.arange(len(cells), device=cells.device)[:, None, None, None]
    patches: Tensor | None = None
    on_map = torch.zeros(*cells.shape, len(steps), len(steps), dtype=torch.bool, device=cells.device)
    first = 0
    for feature in features:  # every cell on every level, and a choice: no shape depends on where the cells are
        height, width = feature.shape[2:]
        local = cells - first
        first = first + height * width
        y = torch.div(local, width, rounding_mode="floor")[..., None] + steps  # [B, S, k]
        x = (local % width)[..., None] + steps
        here = ((y >= 0) & (y < height))[..., :, None] & ((x >= 0) & (x < width))[..., None, :]
        here = here & ((local >= 0) & (local < height * width))[..., None, None]
        index = (images * height + y.clamp(0, height - 1)[..., :, None]) * width + x.clamp(0, width - 1)[..., None, :]
        taken = F.embedding(index, feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])) * here[..., None].to(feature.dtype)
        patches = taken if patches is None else patches + taken
        on_map = on_map | here
    if patches is None:
        raise ValueError("the RPN needs at least one feature map")
    return patches.flatten(0, 1).permute(0, 3, 1, 2), on_map.flatten(0, 1)[:, None]


def propose(
    output: RPNOutput, anchors: Sequence[Tensor], image_sizes_hw: Tensor, config: RPNConfig, nms: NMS, *, training: bool
) -> Proposals:
    """The best boxes after per-level NMS.

    Only the top candidates of each level are decoded. Every level is padded to the same number of candidates, so that one NMS call
    serves the whole batch and no shape depends on the data.
    """
    pre_top_n = config.pre_nms_top_n_train if training else config.pre_nms_top_n_test
    post_top_n = config.post_nms_top_n_train if training else config.post_nms_top_n_test
    candidates = [
        _decode_level(logits, deltas, level_anchors, image_sizes_hw, config, pre_top_n)
        for logits, deltas, level_anchors in zip(output.logits, output.deltas, anchors, strict=True)
    ]
    boxes, logits, scores = (torch.stack(parts, dim=1) for parts in zip(*candidates, strict=True))  # [B, L, k, 4] and twice [B, L, k]
    batch = boxes.shape[0]
    keep = nms(boxes.flatten(0, 1), scores.flatten(0, 1), None, config.nms_thresh).reshape(logits.shape)
    best, index = top_rows(torch.where(keep, logits, PADDING).reshape(batch, -1), post_top_n)
    valid = best > PADDING
    kept_boxes = take_rows(boxes.reshape(batch, -1, 4), index)
    return Proposals(torch.where(valid[..., None], kept_boxes, 0.0), valid)


def _decode_level(
    logits: Tensor, deltas: Tensor, anchors: Tensor, image_sizes_hw: Tensor, config: RPNConfig, top_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes `[B, k, 4]`, logits and scores `[B, k]` of one level's best anchors; a row that does not count has PADDING and INVALID_SCORE.

    Logits rank them: scores near 1 are so coarse that sure anchors would tie by the hundred, and every runtime orders ties as it likes.
    """
    best, index = top_rows(at_least_fp32(logits), top_n)
    boxes = box_ops.decode_deltas(take_rows(at_least_fp32(deltas), index), take_rows(anchors, index))
    boxes = box_ops.clip(boxes, image_sizes_hw)
    scores = best.sigmoid()
    good = (best > PADDING) & box_ops.wider_than(boxes, config.min_size) & (scores >= config.score_thresh)
    return boxes, torch.where(good, best, PADDING), torch.where(good, scores, INVALID_SCORE)


def rpn_loss(
    rpn: RPN,
    features: Sequence[Tensor],
    anchors: Sequence[Tensor],
    gt_boxes: Tensor,
    gt_valid: Tensor,
    image_sizes_hw: Tensor,
    config: RPNConfig,
    *,
    normal: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Objectness and box losses over a random sample of anchors, both divided by the number of sampled anchors.

    Args:
        gt_boxes: `[B, G, 4]` in the input frame.
        gt_valid: bool `[B, G]`.
        normal: mean and deviation `[4]` of wanted deltas, where the network predicts them normalised.

    Returns:
        Two scalars; the box loss is exactly 0 where there is no ground truth.
    """
    all_anchors = torch.cat(list(anchors))
    with torch.no_grad():
        samples, matched = _sample_anchors(all_anchors, gt_boxes, gt_valid, image_sizes_hw, config)
        gt_rows = matched.gather(1, samples.rows).clamp(min=0)
        wanted = box_ops.encode_deltas(_safe(take_rows(gt_boxes, gt_rows), samples.foreground), take_rows(all_anchors, samples.rows))
        wanted = wanted if normal is None else (wanted - normal[0]) / normal[1]
    count = samples.valid.sum().clamp(min=1)
    logits, deltas = (at_least_fp32(raw) for raw in rpn.at(features, samples.rows))
    cls = F.binary_cross_entropy_with_logits(logits, samples.foreground.float(), weight=samples.valid.float(), reduction="sum")
    reg = F.smooth_l1_loss(deltas, wanted, beta=config.smooth_l1_beta, reduction="none").sum(-1)
    return cls / count, config.reg_weight * torch.where(samples.foreground, reg, 0.0).sum() / count


def _sample_anchors(
    anchors: Tensor, gt_boxes: Tensor, gt_valid: Tensor, image_sizes_hw: Tensor, config: RPNConfig
) -> tuple[Samples, Tensor]:
    """The anchors to learn from, and what every anchor is matched to, `[B, N]`."""
    eligible = box_ops.inside(anchors, image_sizes_hw) if config.inside_only else None
    matched = match(
        anchors,
        gt_boxes,
        gt_valid,
        fg_iou_thresh=config.fg_iou_thresh,
        bg_iou_thresh=config.bg_iou_thresh,
        allow_low_quality=True,
        eligible=eligible,
    )
    return sample(matched, config.samples_per_image, config.positive_fraction, eligible=eligible), matched


def _safe(boxes: Tensor, used: Tensor) -> Tensor:
    """Unit boxes where a row is not used, so that log(width) stays finite and no NaN can leak through a mask."""
    return torch.where(used[..., None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
