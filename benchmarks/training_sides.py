"""The two sides of the training benchmark, each in a process of its own, so that peak memory is its own as well.

A side trains whole steps on the same pictures: read, resize, flip, forward, backward, SGD. Ours is the loader and the
learner that `python -m model.train` uses; torchvision's follows its reference script: a data loader of float pictures and lists, the
model's own transform, the losses read on every step.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.torchvision_twin import check_twin, share_weights, start_calmly, torchvision_twin
from model.config import DetectorConfig
from model.data.formats import open_dataset
from model.data.images import pad_batch, padded_hw, read_rgb, resized_hw
from model.data.loader import training_batches
from model.data.records import DetectionSet
from model.faster_rcnn import build_detector
from model.learner import AMP_TYPES, Learner
from model.presets import PRESETS
from model.processes import start_processes
from model.training import AugmentConfig, TrainConfig

FOREVER = 10**6
"""Epochs: the parent says when to stop."""


@dataclass(frozen=True)
class Task:
    """What both sides do."""

    preset: str
    data: Path
    split: str
    batch_size: int
    amp: str
    device: str
    threads: int
    workers: int
    short_side: int | None = None

    def detector_config(self, class_names: tuple[str, ...]) -> DetectorConfig:
        config = PRESETS[self.preset](class_names).detector
        if self.short_side is None:
            return config
        scale = self.short_side / config.input.short_side
        buckets = tuple((_stride(h * scale), _stride(w * scale)) for h, w in config.input.buckets)
        frame = replace(config.input, short_side=self.short_side, long_side=round(config.input.long_side * scale), buckets=buckets)
        return replace(config, input=frame)

    def train_config(self) -> TrainConfig:
        return TrainConfig(
            epochs=FOREVER,
            batch_size=self.batch_size,
            lr=1e-3,
            clip_norm=0.0,
            amp=self.amp,  # type: ignore[arg-type]  # one of its literals, checked by argparse
            workers=self.workers,
            augment=AugmentConfig(hflip=0.5),
        )

    def open(self) -> DetectionSet:
        return open_dataset(self.data, self.split, skip_bad=True)


def _stride(length: float) -> int:
    return max(32, 32 * round(length / 32))


def serve_side(side: str, task: Task, connection: Connection) -> None:
    """Answers the parent: ("train", steps) -> (seconds, waited, loss), ("infer", pictures) -> seconds, ("memory",) -> bytes."""
    torch.set_num_threads(task.threads)
    try:
        turns = (OurSide if side == "ours" else TorchvisionSide)(task)
        connection.send(("ready", turns.parameters))
        while (message := connection.recv()) is not None:
            connection.send(turns.answer(*message))
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        raise


class _Side(ABC):
    """Shared: timing, memory, and eager inference of one batch."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.dataset = task.open()
        self.config = task.detector_config(self.dataset.class_names)
        self.processes = start_processes(task.device)
        self.device = self.processes.device
        self._batches: Iterator[Any] | None = None

    def answer(self, what: str, *arguments: Any) -> Any:
        if what == "train":
            return self.train(*arguments)
        return peak_memory(self.device) if what == "memory" else self.infer(*arguments)

    def train(self, steps: int) -> tuple[float, float, float]:
        """Seconds of so many steps, the part of it spent waiting for data, and the last loss."""
        if self._batches is None:
            self._batches = self.batches()
        waited = loss = 0.0
        started = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self._batches)
            waited += time.perf_counter() - asked
            loss = self.step(batch)
        return time.perf_counter() - started, waited, loss

    @torch.inference_mode()
    def infer(self, pictures: int) -> float:
        """Seconds of one batch, pictures already in memory in the form that the side takes."""
        frame = self.config.input
        records = self.dataset.records[:pictures]
        sizes = [resized_hw(record.size_hw, frame.short_side, frame.long_side) for record in records]
        ready = self.inputs([read_rgb(record.path, size_hw=size) for record, size in zip(records, sizes, strict=True)])
        started = time.perf_counter()
        self.detect(ready)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def starting_twin(self) -> nn.Module:
        """Torchvision's network with the random weights that both sides begin with."""
        torch.manual_seed(0)
        twin = torchvision_twin(self.config)
        start_calmly(twin, self.config)
        return twin

    parameters: int

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Batches without end, in the form that `step` takes."""

    @abstractmethod
    def step(self, batch: Any) -> float:
        """One optimizer step; returns the loss."""

    @abstractmethod
    def inputs(self, sized: list[NDArray[np.uint8]]) -> Any:
        """Resized pictures in the form that the side takes, on the device."""

    @abstractmethod
    def detect(self, ready: Any) -> object:
        """Detections of what `inputs` gave."""

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        amp = self.task.amp
        return torch.autocast(self.device.type, AMP_TYPES.get(amp, torch.bfloat16), enabled=amp != "off")


class OurSide(_Side):
    """Our loader and learner."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        detector, twin = build_detector(self.config), self.starting_twin()
        check_twin(detector, twin)
        share_weights(twin, detector)
        del twin  # this process's peak memory is our side's own
        self.learner = Learner(detector, task.train_config(), self.processes)
        self.parameters = sum(p.numel() for p in detector.parameters())

    def batches(self) -> Iterator[Any]:
        return training_batches(self.dataset, self.config.input, self.task.train_config(), pin_memory=self.device.type == "cuda")

    def step(self, batch: Any) -> float:
        self.learner.parallel.train()
        return float(self.learner.step(batch, 1e-3)[:4].sum())

    def inputs(self, sized: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        sizes = [(picture.shape[0], picture.shape[1]) for picture in sized]
        return torch.from_numpy(pad_batch(sized, padded_hw(sizes))).to(self.device), torch.tensor(sizes).to(self.device)

    def detect(self, ready: tuple[Tensor, Tensor]) -> object:
        self.learner.detector.eval()
        with self._autocast():
            return self.learner.detector(*ready)


class TorchvisionSide(_Side):
    """Torchvision's model in the manner of its reference script."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.model = self.starting_twin().to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learning, lr=1e-3, momentum=0.9, weight_decay=1e-4)  # as the reference script builds it
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=task.amp == "fp16" and self.device.type == "cuda")

    def batches(self) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            FloatPictures(self.dataset),
            batch_size=self.task.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.task.workers,
            collate_fn=lists_of,
            pin_memory=self.device.type == "cuda",
        )
        while True:
            yield from loader

    def step(self, batch: Any) -> float:
        self.model.train()
        images = [image.to(self.device) for image in batch[0]]
        targets = [{name: value.to(self.device) for name, value in target.items()} for target in batch[1]]
        with self._autocast():
            losses = self.model(images, targets)
            total = sum(losses.values())
        value = float(total)  # the reference script reads the loss on every step, and stops at one that is no number
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def inputs(self, sized: list[NDArray[np.uint8]]) -> list[Tensor]:
        """Resized beforehand as ours are: the transform inside the model then only normalises and pads."""
        return [torch.from_numpy(picture).permute(2, 0, 1).float().div(255).to(self.device) for picture in sized]

    def detect(self, ready: list[Tensor]) -> object:
        self.model.eval()
        with self._autocast():
            return self.model(ready)


class FloatPictures(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Pictures as torchvision's reference takes them: float 0..1 at their own size, mirrored half of the time."""

    def __init__(self, dataset: DetectionSet) -> None:
        self.records = [record for record in dataset.records if len(record.labels)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self.records[index]
        with Image.open(record.path) as opened:
            image = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        boxes = torch.from_numpy(record.boxes).float()
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
            boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([image.shape[-1], 0, image.shape[-1], 0])
        return image.float().div(255), {"boxes": boxes, "labels": torch.from_numpy(record.labels)}


def lists_of(examples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch as torchvision takes it."""
    return [image for image, _ in examples], [target for _, target in examples]


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator, or of this process (its loader's workers not counted)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
