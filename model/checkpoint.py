"""Checkpoints: a plain dict of tensors and plain values, written atomically, read with `weights_only=True`.

Keys: "format", "detector" (state dict; the moving average where one is kept), "config" (of the detector), "training" (data set, command,
commit, epoch, metrics) and, where training can go on from the file, "resume".
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import DetectorConfig, config_from_dict, to_dict
from model.faster_rcnn import FasterRCNN, build_detector
from model.overrides import with_detector_settings
from model.tensor_file import read_tensor_file

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds. `resume` is None in files for inference only."""

    detector: dict[str, Tensor]
    config: DetectorConfig
    training: dict[str, Any]
    resume: dict[str, Any] | None = None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint so that at any moment either the old file or the new one is whole.

    Raises:
        CheckpointError: the disk is full or not writable; a previous file of this name is untouched.
    """
    content = {
        "format": FORMAT,
        "detector": checkpoint.detector,
        "config": to_dict(checkpoint.config),
        "training": checkpoint.training,
    }
    if checkpoint.resume is not None:
        content["resume"] = checkpoint.resume
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        kept = "the previous file is untouched; free some space, then go on with --resume"
        advice = kept if path.exists() else "nothing was left behind; free some space, then start again"
        free = shutil.disk_usage(path.parent).free
        raise CheckpointError(f"cannot write {path} ({free / 2**20:.0f} MiB are free there): {error}; {advice}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, settings: Sequence[str] = ()) -> Checkpoint:
    """Reads a checkpoint onto the CPU. No code from the file is run.

    Args:
        settings: KEY=VALUE changes of its configuration, see `model.overrides`.

    Raises:
        CheckpointError: no such file, not a checkpoint of this project, or of another version.
        ValueError: a setting with an unknown key or a value that the configuration does not take.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; a training run writes best.pt and last.pt into its folder")
    content = read_tensor_file(path, lambda reason: CheckpointError(f"{path} is not a whole checkpoint: {reason}"))
    if not isinstance(content, dict) or not {"format", "detector", "config", "training"} <= content.keys():
        raise CheckpointError(f"{path} holds no detector of this project; expected the keys format, detector, config, training")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this version reads format {FORMAT}")
    config = with_detector_settings(config_from_dict(content["config"]), settings)
    return Checkpoint(content["detector"], config, content["training"], content.get("resume"))


def load_detector(path: Path, settings: Sequence[str] = ()) -> FasterRCNN:
    """The detector of a checkpoint, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    return restore_detector(load_checkpoint(path, settings), str(path))


def restore_detector(checkpoint: Checkpoint, source: str) -> FasterRCNN:
    """The same for a checkpoint that was read already; `source` names it in errors.

    Raises:
        CheckpointError: its weights belong to another network.
    """
    detector = build_detector(checkpoint.config)
    try:
        detector.load_state_dict(checkpoint.detector)
    except RuntimeError as error:
        raise CheckpointError(
            f"{source} does not fit this version's network, which names or shapes its layers differently: {error}"
        ) from error
    return detector.eval()
