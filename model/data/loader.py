"""From records to batches, in an order that depends on nothing but (seed, epoch).

B images of a batch, G boxes of the fullest picture (at least 1). A batch is what the graph takes: uint8 images padded right and bottom.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.config import InputConfig
from model.data.copy_paste import pasted_example
from model.data.images import ImageError, pad_batch, padded_hw
from model.data.mosaic import mosaic_example
from model.data.records import DataError, DetectionSet
from model.data.transforms import SIDEWAYS_TURNS, Example, augmented_example
from model.faster_rcnn import Targets
from model.training import AugmentConfig, TrainConfig


class Draw(NamedTuple):
    """One picture of one epoch.

    `copy` tells repetitions in the same epoch apart. A whole batch shares `short_side` (0: the detector's own) and `sideways`, whether
    its pictures are turned by a quarter: mixed shapes would be padded to the largest.
    """

    epoch: int
    picture: int
    copy: int
    short_side: int
    sideways: bool


class Batch(NamedTuple):
    """images uint8 [B, H, W, 3]; image_sizes_hw int64 [B, 2]; targets [B, G]; the pictures' ids, to name a culprit."""

    images: Tensor
    image_sizes_hw: Tensor
    targets: Targets
    image_ids: tuple[str, ...]


def collate(examples: list[Example], image_ids: list[str]) -> Batch:
    """Pads pictures to common multiples of the stride and targets to the fullest picture."""
    sizes = [(example.image.shape[0], example.image.shape[1]) for example in examples]
    most = max(1, *(len(example.labels) for example in examples))
    boxes = np.zeros((len(examples), most, 4), dtype=np.float32)
    labels = np.zeros((len(examples), most), dtype=np.int64)
    for i, example in enumerate(examples):
        boxes[i, : len(example.labels)] = example.boxes
        labels[i, : len(example.labels)] = example.labels
    images = torch.from_numpy(pad_batch([example.image for example in examples], padded_hw(sizes)))
    return Batch(images, torch.tensor(sizes), Targets(torch.from_numpy(boxes), torch.from_numpy(labels)), tuple(image_ids))


Loaded = tuple[Example, str] | DataError
"""A picture with its id, or why it cannot be used. Workers send errors as values: raised there, they would arrive as tracebacks."""


class TrainingPictures(Dataset[Loaded]):
    """Map from a draw to a picture; runs in the loader's workers."""

    def __init__(self, dataset: DetectionSet, config: AugmentConfig, frame: InputConfig, seed: int) -> None:
        self.dataset = dataset
        self.config = config
        self.frame = frame
        self.seed = seed

    def __getitem__(self, draw: Draw) -> Loaded:
        record = self.dataset.records[draw.picture]
        rng = np.random.default_rng([self.seed, draw.epoch, draw.picture, draw.copy])
        short = draw.short_side or self.frame.short_side
        long = self.frame.long_side * short / self.frame.short_side
        try:
            if self.config.mosaic and rng.random() < self.config.mosaic:
                return mosaic_example(self.dataset, draw.picture, self.config, (short, long), rng), record.image_id
            if self.config.copy_paste and rng.random() < self.config.copy_paste:
                return pasted_example(self.dataset, draw.picture, self.config, (short, long), rng, sideways=draw.sideways), record.image_id
            return augmented_example(record, self.config, short, long, rng, sideways=draw.sideways), record.image_id
        except ImageError as error:
            return DataError(
                f"image '{record.image_id}': {error.sentence}; repair it, or leave faulty records out with --skip-bad "
                "(`python -m model.data check` lists them)"
            )


def _collate_loaded(loaded: list[Loaded]) -> Batch | DataError:
    examples, image_ids = [], []
    for item in loaded:
        if isinstance(item, DataError):
            return item
        examples.append(item[0])
        image_ids.append(item[1])
    return collate(examples, image_ids)


@dataclass(frozen=True)
class BatchPlan:
    """Which pictures make which batch.

    Attributes:
        portrait: bool [N], taller than wide; batches hold one orientation where `group_by_aspect`.
        repeats: float64 [N], how often a picture is drawn in an epoch, on average.
    """

    portrait: NDArray[np.bool_]
    repeats: NDArray[np.float64]
    config: TrainConfig

    @classmethod
    def of(cls, dataset: DetectionSet, config: TrainConfig) -> BatchPlan:
        portrait = np.array([record.size_hw[0] > record.size_hw[1] for record in dataset.records])
        return cls(portrait, repeat_factors(dataset, config.repeat_threshold), config)

    def batches(self, epoch: int) -> list[list[Draw]]:
        """All batches of an epoch, each of exactly `batch_size`; the last is filled up from the epoch's start."""
        rng = np.random.default_rng([self.config.seed, epoch])
        whole = np.floor(self.repeats).astype(np.int64)
        counts = whole + (rng.random(len(whole)) < self.repeats - whole)
        order = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        groups = self._groups(order, rng)
        augment = self.config.augment
        sides = rng.choice(augment.short_sides or (0,), size=len(groups))
        sideways = rng.random(len(groups)) < SIDEWAYS_TURNS * augment.rot90
        seen: dict[int, int] = {}
        return [
            [self._draw(epoch, int(i), int(side), bool(turned), seen) for i in group]
            for group, side, turned in zip(groups, sides, sideways, strict=True)
        ]

    def _groups(self, order: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
        size = self.config.batch_size
        lanes = [order[self.portrait[order]], order[~self.portrait[order]]] if self.config.group_by_aspect else [order]
        full = [lane[i : i + size] for lane in lanes for i in range(0, len(lane) - size + 1, size)]
        rest = np.concatenate([lane[len(lane) // size * size :] for lane in lanes])
        needed = math.ceil(len(rest) / size) * size
        rest = np.concatenate([rest, np.resize(order, needed - len(rest))])
        full += [rest[i : i + size] for i in range(0, needed, size)]
        return [full[i] for i in rng.permutation(len(full))]

    def _draw(self, epoch: int, index: int, short_side: int, sideways: bool, seen: dict[int, int]) -> Draw:
        copy = seen[index] = seen.get(index, -1) + 1
        return Draw(epoch, index, copy, short_side, sideways)


def repeat_factors(dataset: DetectionSet, threshold: float) -> NDArray[np.float64]:
    """Repeat-factor sampling (LVIS, Gupta et al. 2019): max over a picture's classes of max(1, sqrt(threshold / frequency))."""
    if threshold <= 0:
        return np.ones(len(dataset))
    present = np.zeros((len(dataset), len(dataset.class_names) + 1), dtype=bool)
    for row, record in zip(present, dataset.records, strict=True):
        row[record.labels[record.plain]] = True
    per_class = np.maximum(1.0, np.sqrt(threshold / np.maximum(present.mean(axis=0), 1e-12)))
    largest: NDArray[np.float64] = (present * per_class).max(axis=1)
    return np.maximum(largest, 1.0)


class _Schedule:
    """The batch sampler of a whole run: this process's part of every batch, from a given position on."""

    def __init__(self, plan: BatchPlan, epochs: range, start: int, rank: int, world: int) -> None:
        self.plan, self.epochs, self.start, self.rank, self.world = plan, epochs, start, rank, world

    def __iter__(self) -> Iterator[list[Draw]]:
        for epoch in self.epochs:
            batches = self.plan.batches(epoch)
            part = self.plan.config.batch_size // self.world
            for batch in batches[self.start if epoch == self.epochs.start else 0 :]:
                yield batch[self.rank * part : (self.rank + 1) * part]


def training_batches(
    dataset: DetectionSet,
    frame: InputConfig,
    config: TrainConfig,
    *,
    first_epoch: int = 0,
    first_batch: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of all epochs from a position on, without a pause between epochs. Takes nothing from torch's global generator.

    Raises:
        ValueError: the batch cannot be divided among the processes.
        DataError: on the way, a picture that cannot be used.
    """
    if config.batch_size % world:
        raise ValueError(f"training.batch_size {config.batch_size} is for all processes together; make it a multiple of {world}")
    schedule = _Schedule(BatchPlan.of(dataset, config), range(first_epoch, config.epochs), first_batch, rank, world)
    loader: DataLoader[Loaded] = DataLoader(
        TrainingPictures(dataset, config.augment, frame, config.seed),
        batch_sampler=schedule,
        num_workers=config.workers,
        collate_fn=_collate_loaded,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if config.workers else None,
        generator=torch.Generator(),  # the loader draws a base seed; not from the generator that the network samples with
        prefetch_factor=4 if config.workers else None,
    )
    return _raise_errors(iter(loader))


def _raise_errors(loaded: Iterator[Batch | DataError]) -> Iterator[Batch]:
    for batch in loaded:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    os.setpgid(0, 0)  # Ctrl-C goes to a whole group; in their own, workers live until the training process has saved
