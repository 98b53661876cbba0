"""Configuration of a training run: frozen dataclasses of plain values, as a preset gives them and as a run folder stores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training picture. Geometry and resize are one resampling; colour is drawn on uint8.

    Attributes:
        hflip, vflip: probabilities of mirroring left-right and top-down.
        rot90: probability of a quarter or half turn; only for pictures without an up (cells, aerial views).
        scale: bounds of the factor on the size that the resize rule gives, drawn uniformly in the logarithm. 0.1 to 2.0 with
            `crop_to_input` is the large-scale jitter of detectron2; (0.8, 1.2) or so suits most data.
        crop_to_input: what a scale above 1 makes larger than the resize rule allows is cut back at random to that size.
        short_sides: multi-scale training: every batch draws one of these as its short side, the long side in proportion; empty: the
            detector's own.
        crop: probability of a random crop before the resize; `crop_min` is the least kept part of each side.
        min_visible: a box that keeps less than this part of its area in a crop is dropped, the others are cut at the border.
        brightness, contrast, saturation: factors from 1 - v to 1 + v.  hue: turn of the colour circle, -v to v of a full turn.
        mosaic: probability of a picture put together from four.
        copy_paste: probability that objects of another picture are put into this one (where it is no mosaic).
    """

    hflip: float = 0.5
    vflip: float = 0.0
    rot90: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    crop_to_input: bool = True
    short_sides: tuple[int, ...] = ()
    crop: float = 0.0
    crop_min: float = 0.5
    min_visible: float = 0.3
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    mosaic: float = 0.0
    copy_paste: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """How a detector is trained.

    Attributes:
        epochs: passes over the training split.
        batch_size: pictures an optimizer step sees on all processes together, times `accumulate`.
        accumulate: batches whose gradients are added up before a step.
        optimizer: "sgd" (with momentum) or "adamw".
        lr: peak learning rate of the head; `backbone_lr_factor` scales it for the backbone, `bias_lr_factor` for biases.
        weight_decay: not applied to normalisation layers and biases.
        warmup_iterations: steps of linear warm-up, from `warmup_factor` times the rate.
        schedule: "cosine" to `final_lr_factor` times the rate, "multistep" times `gamma` after each epoch in `milestones`, or "constant".
        clip_norm: the gradient's largest norm; 0 leaves it alone.
        ema_decay: of the moving average of the weights that is validated and exported; 0 is off.
        amp: mixed precision on the device: "off", "bf16" or "fp16" (with loss scaling).
        group_by_aspect: batches hold pictures of one orientation, which saves padding.
        repeat_threshold: repeat-factor sampling (LVIS): classes in fewer than this part of the pictures are repeated; 0 is off.
        sync_bn: batch norm over all processes.
        validate_every: epochs between validations; the last epoch is always validated.
        early_stop_epochs: stop when validation AP has not risen for so many epochs; 0 is off.
        keep_last: how many checkpoints of the last epochs are kept beside best.pt.
        workers: loader processes; 0 loads in the training process.
        checkpoint_minutes: last.pt is written at every epoch's end and at least this often within an epoch.
        seed: of weights, order and augmentation. Augmentation depends only on (seed, epoch, picture), not on workers or a resume.
        loss_limit: a total loss above it counts as exploded.
    """

    epochs: int = 26
    batch_size: int = 8
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    backbone_lr_factor: float = 1.0
    bias_lr_factor: float = 1.0
    warmup_iterations: int = 1000
    warmup_factor: float = 0.001
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    final_lr_factor: float = 0.0
    clip_norm: float = 10.0
    ema_decay: float = 0.0
    amp: Literal["off", "bf16", "fp16"] = "off"
    augment: AugmentConfig = AugmentConfig()
    group_by_aspect: bool = True
    repeat_threshold: float = 0.0
    sync_bn: bool = False
    validate_every: int = 1
    early_stop_epochs: int = 0
    keep_last: int = 2
    workers: int = 2
    checkpoint_minutes: float = 10.0
    seed: int = 0
    loss_limit: float = 1e4

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "validate_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: expected at least 1, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"training.lr: expected a positive number, got {self.lr}")


def train_config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `dataclasses.asdict(config)`; lists (from JSON) become tuples.

    Raises:
        ValueError: a key that this version does not know, by name.
    """
    augment = AugmentConfig(**_known(AugmentConfig, values.get("augment", {})))
    return TrainConfig(**{**_known(TrainConfig, values), "augment": augment})


def _known(kind: type[AugmentConfig] | type[TrainConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown keys {unknown}; expected some of {sorted(known)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
