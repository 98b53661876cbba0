"""One optimizer step: forward, losses, backward, clipping, moving average. The loop around it is the trainer's."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.data.loader import Batch
from model.faster_rcnn import FasterRCNN, Targets
from model.freed_memory import keep_freed_memory
from model.optimization import MovingAverage, build_optimizer, set_learning_rate
from model.processes import Processes
from model.training import TrainConfig

LOSSES = ("rpn_cls", "rpn_reg", "roi_cls", "roi_reg")
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """A detector with everything that changes it."""

    def __init__(self, detector: FasterRCNN, config: TrainConfig, processes: Processes) -> None:
        if config.sync_bn and processes.world > 1:
            if processes.device.type != "cuda":
                raise ValueError("training.sync_bn needs CUDA devices; leave it off on CPUs (--set training.sync_bn=false)")
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)  # type: ignore[no-untyped-call]
        if processes.device.type == "cpu":
            keep_freed_memory()
        self.detector = detector.to(processes.device)
        self.config, self.processes = config, processes
        self.average = MovingAverage(self.detector, config.ema_decay) if config.ema_decay else None
        self.parallel: nn.Module = DistributedDataParallel(self.detector) if processes.world > 1 else self.detector
        self.optimizer = build_optimizer(self.detector, config)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.amp == "fp16" and processes.device.type == "cuda")
        self.optimizer_steps = 0

    @property
    def best_weights(self) -> FasterRCNN:
        """What is validated and exported: the moving average, where there is one."""
        return self.average.detector if self.average is not None else self.detector

    def step(self, batch: Batch, rate: float, *, last_of_step: bool = True) -> Tensor:
        """Gradients of one batch, and the optimizer's step behind the last one of `accumulate`.

        Returns:
            `[5]` on the device: the four losses in the order of LOSSES and the gradient's norm before clipping (0 where there is none),
            the mean over all processes.
        """
        device, config = self.processes.device, self.config
        set_learning_rate(self.optimizer, rate)
        targets = Targets(batch.targets.boxes.to(device, non_blocking=True), batch.targets.labels.to(device, non_blocking=True))
        images, sizes_hw = batch.images.to(device, non_blocking=True), batch.image_sizes_hw.to(device, non_blocking=True)
        amp = torch.autocast(device.type, AMP_TYPES.get(config.amp, torch.bfloat16), enabled=config.amp != "off")
        with self._without_sync(last_of_step):
            with amp:
                losses = self.parallel(images, sizes_hw, targets)
                total = sum(losses[name] for name in LOSSES)
            self.scaler.scale(total / config.accumulate).backward()
        norm = self._update() if last_of_step else torch.zeros((), device=device)
        numbers = torch.stack([*(losses[name].detach().float() for name in LOSSES), norm.detach().float()])
        return self.processes.mean(numbers)

    def _without_sync(self, last_of_step: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.parallel, DistributedDataParallel) and not last_of_step:
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _update(self) -> Tensor:
        norm = torch.zeros((), device=self.processes.device)
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_steps += 1
        if self.average is not None:
            self.average.update(self.detector)
        return norm

    # -- checkpoints ----------------------------------------------------------------------------------------------------------

    def resume_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside `best_weights` to go on to the bit."""
        return {
            "detector": self.detector.state_dict() if self.average is not None else None,
            "average_steps": self.average.steps if self.average is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, best_weights: dict[str, Tensor], state: dict[str, Any], optimizer_steps: int) -> None:
        """The inverse of `resume_state`."""
        self.detector.load_state_dict(state["detector"] or best_weights)
        if self.average is not None:
            self.average.detector.load_state_dict(best_weights)
            self.average.steps = state["average_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.optimizer_steps = optimizer_steps
