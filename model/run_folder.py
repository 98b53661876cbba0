"""The folder of a training run: configuration, environment, metrics, TensorBoard, checkpoints, sample pictures and a summary."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from model.data.records import DetectionSet
from model.metrics.plots import plot_training
from model.metrics.predictions import Prediction
from model.metrics.report import Report
from model.visualize import save_samples, worst_pictures

SAMPLES = 4
"""Of the first and of the worst validation pictures."""


class RunFolder:
    """Paths and writers of one run.

    Every line of metrics.jsonl has "step" (batches done) and "kind" ("train" or "val"); wall-clock values stand under "timing", so
    that two runs can be compared without them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.pt"
        self.last = path / "last.pt"
        self.epochs = path / "epochs"
        self.samples = path / "samples"
        self.report = path / "report"
        self.metrics = path / "metrics.jsonl"
        self._board: SummaryWriter | None = None

    def create(self) -> None:
        for folder in (self.path, self.epochs, self.samples):
            folder.mkdir(parents=True, exist_ok=True)

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(values, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / name).read_text())
        return content

    def rewind(self, step: int) -> None:
        """Drops metrics after a step: what a killed run wrote after its last checkpoint will be written again."""
        if self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
            self.metrics.write_text("".join(f"{line}\n" for line in lines))
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, kind: str, step: int, values: dict[str, Any], timing: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and the numbers to TensorBoard."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values, "timing": timing}) + "\n")
        if self._board is None:
            self._board = SummaryWriter(str(self.path / "tensorboard"))
        for name, value in {**values, **timing}.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def keep_epoch(self, epoch: int, keep_last: int) -> None:
        """Keeps last.pt under the epoch's name (a second name for the same bytes) and drops the oldest beyond `keep_last`."""
        name = self.epochs / f"epoch_{epoch:04d}.pt"
        name.unlink(missing_ok=True)
        try:
            os.link(self.last, name)
        except OSError:  # a file system without hard links
            name.write_bytes(self.last.read_bytes())
        for old in sorted(self.epochs.glob("epoch_*.pt"))[:-keep_last]:
            old.unlink()

    def write_best(self, dataset: DetectionSet, predictions: Sequence[Prediction], report: Report) -> None:
        """The best checkpoint's report with plots, and sample pictures: the first few and the worst."""
        report.write(self.report)
        for old in self.samples.glob("*.png"):
            old.unlink()
        chosen = [*range(min(SAMPLES, len(dataset))), *worst_pictures(dataset, predictions, SAMPLES)]
        save_samples(self.samples, dataset, predictions, list(dict.fromkeys(chosen)))

    def write_summary(self, outcome: str, facts: dict[str, Any]) -> None:
        """summary.md: how the run ended, what it was, every validation, and where the rest lies."""
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        page = [f"# {self.path.name}", "", outcome, "", *(f"- {key}: `{value}`" for key, value in facts.items()), ""]
        page += ["| epoch | loss | AP | AP50 | AP75 | VOC AP50 |", "| --- | --- | --- | --- | --- | --- |"]
        for line in lines:
            if line["kind"] == "val":
                loss = sum(value for key, value in line.items() if key.startswith("mean_"))
                cells = " | ".join(f"{line[key]:.4f}" for key in ("AP", "AP50", "AP75", "voc_ap50"))
                page.append(f"| {line['epoch'] + 1} | {loss:.4f} | {cells} |")
        seconds = sum(line["timing"].get("seconds", 0.0) for line in lines)
        page += [
            "",
            f"{seconds / 60:.1f} minutes in all. The best checkpoint's report: [report.md](report/report.md)",
            "",
            "![training](training.png)",
        ]
        (self.path / "summary.md").write_text("\n".join(page) + "\n")
        plot_training(self.path / "training.png", lines)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short


def environment() -> dict[str, Any]:
    """What a run needs to be understood later: versions, hardware, commit, command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
        "command": command_line(),
    }


def command_line() -> str:
    """The command as it can be typed again."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None else f"python {sys.argv[0]}"
    return " ".join([program, *sys.argv[1:]])


def git_commit() -> str:
    """The checkout's commit, with "+changes" where files differ from it; outside a checkout what SOURCE_REVISION says, as in an image."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SOURCE_REVISION", "")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()  # noqa: S603, S607
