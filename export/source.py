"""Where the exported network comes from: a checkpoint on disk, or torchvision's COCO weights by name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.checkpoint import save_checkpoint
from model.pretrained import coco_checkpoint

TORCHVISION = "torchvision:"


@contextmanager
def checkpoint_file(source: str, weights: Path | None = None) -> Iterator[Path]:
    """The checkpoint to export; one converted from torchvision's weights is gone afterwards.

    Args:
        source: path of a checkpoint, or `torchvision:NAME`.
        weights: a state dict in torchvision's names instead of the published one.

    Raises:
        FileNotFoundError, WeightsError: see `coco_checkpoint`.
        ValueError: weights beside a checkpoint, which has its own.
    """
    if not source.startswith(TORCHVISION):
        if weights is not None:
            raise ValueError(f"--weights belongs to {TORCHVISION}NAME; the checkpoint {source} has its own weights")
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="torchvision-") as folder:
        path = Path(folder) / "coco.pt"
        save_checkpoint(path, coco_checkpoint(source.removeprefix(TORCHVISION), weights))
        yield path
