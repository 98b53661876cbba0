"""Training of one part of a detector for a number of steps, as the paper's stages do: SGD, one fall of the rate, mirroring.

B images of a batch, P proposals an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.config import InputConfig
from model.data.images import resized_hw
from model.data.loader import Batch, collate
from model.data.records import DetectionSet, Record
from model.data.transforms import Example, Geometry, apply_geometry
from model.fast_rcnn import Boxes, FastRCNN, pad_proposals, to_input_frame
from model.faster_rcnn import FasterRCNN, Targets
from model.paper_normal import DeltaNormal
from model.paper_resume import StageFile, StageInterrupted
from model.random_state import seed_everything
from model.rpn import Proposals, rpn_loss
from model.stopping import Interruption
from model.trainer import TrainingError

READ_AHEAD = 4
BIAS_LR_FACTOR = 2.0


@dataclass(frozen=True)
class Recipe:
    """One stage. The defaults are the paper's; `decay_at` is the part of the steps after which the rate falls to a tenth."""

    steps: int
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_at: float = 0.75
    batch_size: int = 1
    hflip: float = 0.5
    clip_norm: float = 10.0


class Loaded(NamedTuple):
    """A training batch; `proposals` are in the input frame, mirrored with their pictures; None where the stage needs none."""

    batch: Batch
    proposals: Proposals | None


Objective = Callable[[Loaded], dict[str, Tensor]]
"""Losses by name of a batch on the detector's device."""


def rpn_objective(detector: FasterRCNN, *, normal: DeltaNormal | None = None) -> Objective:
    """The two losses of the RPN alone.

    Args:
        normal: where its deltas are learned normalised; the layer must speak so too (`model.paper_normal`).
    """

    def losses(loaded: Loaded) -> dict[str, Tensor]:
        images, sizes_hw, (boxes, labels), _ = loaded.batch
        levels = detector.backbone(detector.normalize(images, sizes_hw))
        anchors = detector.anchors(levels, (images.shape[1], images.shape[2]))
        cls, reg = rpn_loss(detector.rpn, levels, anchors, boxes, labels > 0, sizes_hw, detector.config.rpn, normal=normal)
        return {"rpn_cls": cls, "rpn_reg": reg}

    return losses


def fast_objective(detector: FasterRCNN, *, background_low: float = 0.0, normal: DeltaNormal | None = None) -> Objective:
    """The two losses of the detection head on the proposals that come with a batch; `normal` as in `rpn_objective`."""
    fast = FastRCNN(detector, background_low=background_low, normal=normal)

    def losses(loaded: Loaded) -> dict[str, Tensor]:
        if loaded.proposals is None:
            raise ValueError("Fast R-CNN learns on proposals, but none were given")
        result = fast(loaded.batch.images, loaded.batch.image_sizes_hw, loaded.proposals, loaded.batch.targets)
        assert isinstance(result, dict)
        return result

    return losses


def paper_init(*layers: nn.Module) -> None:
    """Class scores from N(0, .01), box deltas from N(0, .001), no bias."""
    for layer, deviation in zip(layers, (0.01, 0.001), strict=True):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)


def train_stage(
    detector: FasterRCNN,
    learning: Sequence[nn.Module],
    objective: Objective,
    dataset: DetectionSet,
    recipe: Recipe,
    *,
    seed: int,
    proposals: Sequence[NDArray[np.floating]] | None = None,
    progress: Callable[[int, float], object] | None = None,
    kept: StageFile | None = None,
) -> float:
    """Trains `learning` in place, all else frozen.

    Args:
        proposals: original frame, [P, 4] a record.
        progress: called with (steps done, loss).
        kept: file of the running stage: gone on with to the bit where it is there, written on Ctrl-C and now and then.

    Returns:
        Mean loss of the last tenth of the steps.

    Raises:
        TrainingError: a loss that is no number, with the pictures' names.
        StageInterrupted: Ctrl-C or SIGTERM, where `kept` is given; otherwise Ctrl-C stays KeyboardInterrupt.
    """
    seed_everything(seed)
    device = next(detector.parameters()).device
    with _only(detector, learning) as parameters, Interruption() if kept is not None else nullcontext() as interruption:
        optimizer = _optimizer(parameters, recipe)
        losses = [] if kept is None else kept.restore(detector, optimizer)
        for loaded in _batches(dataset, detector.config.input, recipe, seed, proposals, start=len(losses)):
            losses.append(_step(objective, _moved(loaded, device), optimizer, recipe, done=len(losses)))
            if progress is not None:
                progress(len(losses), losses[-1])
            if kept is not None and interruption is not None:
                _keep(kept, detector, optimizer, losses, asked=interruption.asked, steps=recipe.steps)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _keep(kept: StageFile, detector: FasterRCNN, optimizer: torch.optim.Optimizer, losses: list[float], *, asked: bool, steps: int) -> None:
    if asked or kept.due():
        kept.save(detector, optimizer, losses)
    if asked:
        raise StageInterrupted(len(losses), steps, kept.path)


def _step(objective: Objective, loaded: Loaded, optimizer: torch.optim.Optimizer, recipe: Recipe, *, done: int) -> float:
    """One step of SGD; its loss."""
    falls = done >= recipe.decay_at * recipe.steps
    for group in optimizer.param_groups:
        group["lr"] = group["initial"] * (0.1 if falls else 1.0)
    total = torch.stack(list(objective(loaded).values())).sum()
    loss = float(total.detach())
    if not np.isfinite(loss):
        names = ", ".join(loaded.batch.image_ids)
        raise TrainingError(f"step {done + 1}: the loss is {loss} on {names}; try a lower rate than {recipe.lr:g}, --lr")
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    if recipe.clip_norm:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], recipe.clip_norm)
    optimizer.step()
    return loss


@contextmanager
def _only(detector: FasterRCNN, learning: Sequence[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Freezes all but `learning`; frozen parts are in evaluation mode, so that no running statistic moves either."""
    chosen = {id(parameter) for module in learning for parameter in module.parameters()}
    frozen = [parameter for parameter in detector.parameters() if parameter.requires_grad and id(parameter) not in chosen]
    detector.eval()
    for module in learning:
        module.train()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield [parameter for parameter in detector.parameters() if parameter.requires_grad]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        detector.eval()


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": weights, "initial": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": vectors, "initial": recipe.lr * BIAS_LR_FACTOR, "weight_decay": 0.0},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=recipe.lr, momentum=recipe.momentum, fused=True)


def _batches(
    dataset: DetectionSet, frame: InputConfig, recipe: Recipe, seed: int, proposals: Sequence[NDArray[np.floating]] | None, *, start: int
) -> Iterator[Loaded]:
    """The same batches for the same seed, from step `start` on; pictures are read a few steps ahead."""
    rng = np.random.default_rng(seed)
    needed = recipe.steps * recipe.batch_size
    rounds = -(-needed // len(dataset))
    order = np.concatenate([rng.permutation(len(dataset)) for _ in range(rounds)])[:needed].reshape(recipe.steps, -1)
    flips = rng.random(order.shape) < recipe.hflip
    with ThreadPoolExecutor(2) as pool:
        ahead: list[Future[Loaded]] = []
        for rows, turned in zip(order[start:], flips[start:], strict=True):
            ahead.append(pool.submit(_load, dataset, frame, rows.tolist(), turned.tolist(), proposals))
            if len(ahead) > READ_AHEAD:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def _load(
    dataset: DetectionSet, frame: InputConfig, rows: list[int], flips: list[bool], proposals: Sequence[NDArray[np.floating]] | None
) -> Loaded:
    records = [dataset.records[row] for row in rows]
    examples = [_example(record, frame, hflip=flip) for record, flip in zip(records, flips, strict=True)]
    batch = collate(examples, [record.image_id for record in records])
    if proposals is None:
        return Loaded(batch, None)
    boxes = [
        _placed(proposals[row], record, example, hflip=flip)
        for row, record, example, flip in zip(rows, records, examples, flips, strict=True)
    ]
    return Loaded(batch, pad_proposals(boxes))


def _example(record: Record, frame: InputConfig, *, hflip: bool) -> Example:
    height, width = record.size_hw
    size_hw = resized_hw(record.size_hw, frame.short_side, frame.long_side)
    return apply_geometry(record, Geometry((0.0, 0.0, float(width), float(height)), size_hw, hflip=hflip), min_visible=0.0)


def _placed(boxes: NDArray[np.floating], record: Record, example: Example, *, hflip: bool) -> Boxes:
    height, width = example.image.shape[:2]
    placed = to_input_frame(boxes, record.size_hw, (height, width))
    return np.stack([width - placed[:, 2], placed[:, 1], width - placed[:, 0], placed[:, 3]], axis=1) if hflip else placed


def _moved(loaded: Loaded, device: torch.device) -> Loaded:
    images, sizes_hw, targets, names = loaded.batch
    batch = Batch(images.to(device), sizes_hw.to(device), Targets(targets.boxes.to(device), targets.labels.to(device)), names)
    given = loaded.proposals
    return Loaded(batch, None if given is None else Proposals(given.boxes.to(device), given.valid.to(device)))
