"""A stage of paper-style training on its way: kept when it is interrupted and now and then, gone on with to the bit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from model.faster_rcnn import FasterRCNN
from model.random_state import rng_state, set_rng_state

SAVE_EVERY_SECONDS = 600.0


class StageInterrupted(Exception):  # a request, not an error
    """Ctrl-C or SIGTERM during a stage whose state was saved."""

    def __init__(self, done: int, steps: int, path: Path) -> None:
        super().__init__(f"interrupted after {done} of {steps} steps; saved {path}")


@dataclass
class StageFile:
    """Where a running stage is kept.

    Attributes:
        made_by: what the stage must have been started with for its file to be gone on with.
        every_seconds: between two saves without an interruption.
    """

    path: Path
    made_by: dict[str, Any]
    every_seconds: float = SAVE_EVERY_SECONDS
    _saved_at: float = field(default_factory=time.monotonic)

    def restore(self, detector: FasterRCNN, optimizer: torch.optim.Optimizer) -> list[float]:
        """Brings everything to where the file left off; the losses so far, none where there is no file.

        Raises:
            CheckpointError: the file is broken, or of a stage that was started with other options.
        """
        if not self.path.is_file():
            return []
        checkpoint = load_checkpoint(self.path)
        if checkpoint.training.get("made_by") != self.made_by or checkpoint.resume is None:
            raise CheckpointError(f"{self.path} was made with other options; give the same to go on, or delete it to start the step anew")
        detector.load_state_dict(checkpoint.detector)
        optimizer.load_state_dict(checkpoint.resume["optimizer"])
        set_rng_state(checkpoint.resume["rng"])
        return [float(loss) for loss in checkpoint.resume["losses"]]

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.every_seconds

    def save(self, detector: FasterRCNN, optimizer: torch.optim.Optimizer, losses: Sequence[float]) -> None:
        """Writes the file anew.

        Raises:
            CheckpointError: the disk is full; the file before is untouched.
        """
        resume = {"optimizer": optimizer.state_dict(), "rng": rng_state(), "losses": list(losses)}
        save_checkpoint(self.path, Checkpoint(detector.state_dict(), detector.config, {"made_by": self.made_by}, resume))
        self._saved_at = time.monotonic()
