"""What to tell a person whose training cannot go on: what happened, to which pictures, and which setting to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from model.training import TrainConfig


def explosion_advice(
    batch_number: int, loss: float, numbers: Mapping[str, float], image_ids: Sequence[str], config: TrainConfig, last: Path
) -> str:
    """A loss that is no number, or above the limit.

    Args:
        numbers: the single losses and the gradient's norm by name.
        last: where the last checkpoint would be.
    """
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    saved = f"the last good state is in {last}" if last.exists() else "no checkpoint was written yet"
    return (
        f"the loss is {loss:.4g} at batch {batch_number} ({shown}); its pictures: {', '.join(image_ids)}; {saved}. "
        f"Try a lower rate (--set training.lr={config.lr / 3:.2g}), a longer warm-up (--set training.warmup_iterations="
        f"{max(100, 2 * config.warmup_iterations)}), bf16 instead of fp16, and look at the data with `python -m model.data check`"
    )


def memory_advice(batch_shape: Sequence[int], config: TrainConfig, original: str) -> str:
    """Out of memory with a batch of shape [B, H, W, 3] in this process."""
    pictures, height, width = batch_shape[:3]
    return (
        f"out of memory with {pictures} pictures of {width} x {height} a process. Lower training.batch_size (now {config.batch_size}) and "
        f"raise training.accumulate (now {config.accumulate}) to keep their product, or lower detector.input.short_side, or on a GPU set "
        f"training.amp=bf16 (now {config.amp}). Original message: {original.splitlines()[0]}"
    )


def worker_advice(config: TrainConfig, original: str) -> str:
    """A loader process that died."""
    return (
        f"a loader process died ({original.splitlines()[0]}). Too little memory or shared memory is the usual reason: lower "
        f"training.workers (now {config.workers}; 0 loads in this process), or give a container more with --shm-size"
    )
