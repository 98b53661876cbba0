"""The training loop: step, log, validate, save, and go on exactly where it stopped.

B images of this process's part of a batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.advice import explosion_advice, memory_advice, worker_advice
from model.checkpoint import Checkpoint, save_checkpoint
from model.data.loader import Batch, BatchPlan, training_batches
from model.data.records import DetectionSet
from model.faster_rcnn import FasterRCNN
from model.inference import predict
from model.learner import LOSSES, Learner
from model.metrics.report import Report, evaluate_detections
from model.optimization import learning_rate
from model.processes import Processes
from model.progress import TrainingProgress
from model.random_state import rng_state, seed_everything, set_rng_state
from model.run_folder import RunFolder
from model.stopping import Interruption
from model.training import TrainConfig

AGREE_EVERY = 20
"""With several processes, batches between two agreements on stopping and saving; each costs a round trip."""

STOP, SAVE = 2, 1


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the pictures or the setting and what to try."""


class Outcome(NamedTuple):
    """How a run ended: best validation AP and its epoch (from 0), and the sentence for the person who waited (from the leading process)."""

    best_ap: float
    best_epoch: int
    finished: bool
    message: str


@dataclass
class Position:
    """Where a run stands; all of it is in a checkpoint."""

    epoch: int = 0
    batch: int = 0
    batches_done: int = 0
    best_ap: float = -1.0
    best_epoch: int = -1
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSSES, 0.0))


class _Step(NamedTuple):
    """A step whose numbers have not been read from the device yet."""

    batch_number: int
    image_ids: tuple[str, ...]
    numbers: Tensor  # the four losses and the gradient's norm
    rate: float


class Trainer:
    """Trains a detector on one split and validates it on another."""

    def __init__(
        self,
        detector: FasterRCNN,
        train: DetectionSet,
        val: DetectionSet | None,
        config: TrainConfig,
        folder: RunFolder,
        processes: Processes,
        *,
        facts: dict[str, Any],
        quiet: bool = False,
    ) -> None:
        self.train_set, self.val_set, self.config, self.folder, self.processes = train, val, config, folder, processes
        self.facts = facts
        try:
            self.learner = Learner(detector, config, processes)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.plan = BatchPlan.of(train, config)
        self.position = Position()
        self.report: Report | None = None
        self._pending: deque[_Step] = deque()
        self._saved_at = time.monotonic()
        self._waited = self._worked = 0.0
        lengths = sum(len(self.plan.batches(epoch)) for epoch in range(config.epochs))
        self.progress = TrainingProgress(lengths, quiet=quiet or not processes.leads)

    # -- the run --------------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Trains to the end, or until it is interrupted; the state is saved either way.

        Raises:
            TrainingError: a loss that is no number or has exploded, or memory that does not suffice.
        """
        if self.position.batches_done == 0:
            seed_everything(self.config.seed + self.processes.rank)
        if self.processes.leads:
            self.folder.rewind(self.position.batches_done)
        start = self.position
        batches = training_batches(
            self.train_set,
            self.learner.detector.config.input,
            self.config,
            first_epoch=start.epoch,
            first_batch=start.batch,
            rank=self.processes.rank,
            world=self.processes.world,
            pin_memory=self.processes.device.type == "cuda",
        )
        with Interruption() as interruption, self.progress:
            while self.position.epoch < self.config.epochs:
                if not self._epoch(batches, interruption):
                    self._save_last()
                    return self._outcome(finished=False)
                if self._tired():
                    self.progress.say(f"stopped early: no better AP for {self.config.early_stop_epochs} epochs")
                    break
        outcome = self._outcome(finished=True)
        if self.processes.leads:
            self.folder.write_summary(outcome.message, self.facts)
        return outcome

    def _epoch(self, batches: Iterator[Batch], interruption: Interruption) -> bool:
        """One epoch from the current position; False if it was interrupted."""
        position = self.position
        length = len(self.plan.batches(position.epoch))
        self.learner.parallel.train()
        while position.batch < length:
            started = time.perf_counter()
            batch = self._next(batches)
            waited = time.perf_counter() - started
            last_of_step = (position.batch + 1) % self.config.accumulate == 0 or position.batch + 1 == length
            with self._explained(batch):
                self._step(batch, position.epoch + position.batch / length, last_of_step=last_of_step)
            position.batch += 1
            position.batches_done += 1
            self._read_pending(keep=1 if self.processes.device.type == "cuda" else 0, waited=waited, started=started)
            if last_of_step and self._interrupted(interruption):
                self._read_pending(keep=0)
                return False
        self._read_pending(keep=0)
        self._finish_epoch(length)
        return True

    def _finish_epoch(self, length: int) -> None:
        position = self.position
        epoch = position.epoch
        means = {name: total / length for name, total in position.sums.items()}
        validated = self.val_set is not None and ((epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.config.epochs)
        better = self._validate(means) if validated else False
        if self.val_set is None:
            position.best_epoch, better = epoch, True
        position.epoch, position.batch, position.sums = epoch + 1, 0, dict.fromkeys(LOSSES, 0.0)
        self._save_last()
        if self.processes.leads:
            self.folder.keep_epoch(epoch + 1, self.config.keep_last)
            if better:
                save_checkpoint(self.folder.best, self._checkpoint(resume=None))
        self.learner.parallel.train()

    def _tired(self) -> bool:
        patience = self.config.early_stop_epochs
        return patience > 0 and self.position.best_epoch >= 0 and self.position.epoch - 1 - self.position.best_epoch >= patience

    def _outcome(self, *, finished: bool) -> Outcome:
        position = self.position
        if finished:
            message = f"done: best validation AP {position.best_ap:.4f} in epoch {position.best_epoch + 1}, {self.folder.best}"
        else:
            message = (
                f"interrupted in epoch {position.epoch + 1} after batch {position.batch}; saved {self.folder.last}. "
                f"Go on with: python -m model.train --out {self.folder.path} --resume"
            )
        return Outcome(position.best_ap, position.best_epoch, finished, message if self.processes.leads else "")

    def _next(self, batches: Iterator[Batch]) -> Batch:
        try:
            return next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(worker_advice(self.config, str(error))) from error

    # -- one step -------------------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch, progress: float, *, last_of_step: bool) -> None:
        rate = learning_rate(self.learner.optimizer_steps, progress, self.config)
        numbers = self.learner.step(batch, rate, last_of_step=last_of_step)
        self._pending.append(_Step(self.position.batches_done + 1, batch.image_ids, numbers, rate))

    def _read_pending(self, *, keep: int, waited: float = 0.0, started: float | None = None) -> None:
        """Reads finished steps from the device. One step may stay behind, so that a GPU never waits for this."""
        while len(self._pending) > keep:
            step = self._pending.popleft()
            *losses, norm = step.numbers.tolist()
            self._check(step, losses, norm)
            for name, value in zip(LOSSES, losses, strict=True):
                self.position.sums[name] += value
            seconds = time.perf_counter() - started if started is not None else 0.0
            self._log_step(step, losses, norm, waited, seconds)

    def _log_step(self, step: _Step, losses: list[float], norm: float, waited: float, seconds: float) -> None:
        self._waited, self._worked = 0.95 * self._waited + waited, 0.95 * self._worked + seconds
        share = self._waited / self._worked if self._worked else 0.0
        if not self.processes.leads:
            return
        total = sum(losses)
        values = {"epoch": self.position.epoch, "loss": total, **dict(zip(LOSSES, losses, strict=True)), "grad_norm": norm, "lr": step.rate}
        rate = self.config.batch_size / seconds if seconds else 0.0
        self.folder.log("train", step.batch_number, values, {"seconds": seconds, "data_wait_share": share, "images_per_s": rate})
        self.progress.update(step.batch_number, self.position.epoch, total, rate, share)

    def _check(self, step: _Step, losses: list[float], norm: float) -> None:
        total = sum(losses)
        fine_norm = np.isfinite(norm) or self.config.amp == "fp16"  # loss scaling meets an infinite gradient now and then
        if np.isfinite(total) and total <= self.config.loss_limit and fine_norm:
            return
        numbers = {**dict(zip(LOSSES, losses, strict=True)), "gradient norm": norm}
        raise TrainingError(explosion_advice(step.batch_number, total, numbers, step.image_ids, self.config, self.folder.last))

    @contextlib.contextmanager
    def _explained(self, batch: Batch) -> Iterator[None]:
        """Turns running out of memory into advice."""
        try:
            yield
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise TrainingError(memory_advice(tuple(batch.images.shape), self.config, str(error))) from error

    # -- validation -----------------------------------------------------------------------------------------------------------

    def _validate(self, means: dict[str, float]) -> bool:
        """Validates the moving average (or the weights); True if it is the best so far. All processes share the work."""
        assert self.val_set is not None
        started = time.perf_counter()
        mine = list(range(self.processes.rank, len(self.val_set), self.processes.world))
        parts = self.processes.gather(dict(zip(mine, predict(self.learner.best_weights, self.val_set, indices=mine), strict=True)))
        predictions = {index: prediction for part in parts for index, prediction in part.items()}
        ordered = [predictions[index] for index in range(len(self.val_set))]
        self.report = evaluate_detections(self.val_set, ordered)
        position, stats = self.position, self.report.coco.stats
        better = stats["AP"] > position.best_ap
        if better:
            position.best_ap, position.best_epoch = stats["AP"], position.epoch
        if self.processes.leads:
            values = {"epoch": position.epoch, **stats, "voc_ap50": self.report.voc_ap50, **{f"mean_{k}": v for k, v in means.items()}}
            if better:
                self.folder.write_best(self.val_set, ordered, self.report)
            self.folder.log("val", position.batches_done, values, {"seconds": time.perf_counter() - started})
            self.progress.say(
                f"epoch {position.epoch + 1}/{self.config.epochs}  loss {sum(means.values()):.4f}  AP {stats['AP']:.4f}  "
                f"AP50 {stats['AP50']:.4f}  VOC AP50 {self.report.voc_ap50:.4f}{'  best' if better else ''}"
            )
        return better

    # -- checkpoints ----------------------------------------------------------------------------------------------------------

    def _interrupted(self, interruption: Interruption) -> bool:
        """Whether to stop now; saves on the way if it is time to."""
        if self.processes.world > 1 and self.position.batches_done % AGREE_EVERY:
            return False
        due = time.monotonic() - self._saved_at > 60 * self.config.checkpoint_minutes
        code = self.processes.agree(STOP if interruption.asked else SAVE if due else 0)
        if code == SAVE:
            self._read_pending(keep=0)
            self._save_last()
        return code == STOP

    def _save_last(self) -> None:
        rng = self.processes.gather(rng_state())
        if self.processes.leads:
            save_checkpoint(self.folder.last, self._checkpoint(resume=self._resume_state(rng)))
        self._saved_at = time.monotonic()

    def _checkpoint(self, resume: dict[str, Any] | None) -> Checkpoint:
        source = self.learner.best_weights
        metrics = self.report.to_dict() if self.report is not None else {}
        training = {**self.facts, "epoch": self.position.epoch, "metrics": metrics}
        return Checkpoint(source.state_dict(), source.config, training, resume)

    def _resume_state(self, rng: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "train_config": dataclasses.asdict(self.config),
            "position": {**dataclasses.asdict(self.position), "optimizer_steps": self.learner.optimizer_steps},
            **self.learner.resume_state(),
            "rng": rng,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint with a "resume" part, to the bit on the same kind of device and number of processes.

        Raises:
            TrainingError: the checkpoint is for inference only, or was made by another number of processes.
        """
        resume = checkpoint.resume
        if resume is None:
            raise TrainingError(f"{self.folder.last} is for inference only and cannot be resumed")
        if len(resume["rng"]) != self.processes.world:
            raise TrainingError(f"the run was made by {len(resume['rng'])} processes, this is {self.processes.world}; start as many")
        position = dict(resume["position"])
        self.learner.restore(checkpoint.detector, resume, position.pop("optimizer_steps"))
        self.position = Position(**position)
        set_rng_state(resume["rng"][self.processes.rank])
