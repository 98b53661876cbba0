"""Plots of a report as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from model.metrics.voc import Curve

MAX_CURVES = 12
"""More classes than this are drawn by falling number of objects, the rest left out."""

MAX_CELLS = 25
"""Numbers are written into the cells of a confusion matrix up to this many classes."""


def plot_curves(path: Path, curves: Mapping[str, Curve]) -> None:
    """Precision over recall at IoU .5, one line a class."""
    shown = sorted((item for item in curves.items() if item[1].positives), key=lambda item: -item[1].positives)[:MAX_CURVES]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in shown:
        axes.plot(curve.recall, curve.precision, label=f"{name}: AP50 {curve.ap_area:.3f}, {curve.positives} boxes")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title="Precision over recall at IoU .5")
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def plot_confusion(path: Path, matrix: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Rows are the truth, columns what was detected."""
    names = [*class_names, "background"]
    side = min(3 + 0.45 * len(names), 18)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="detected", ylabel="truth", title="Detections over .5 at IoU .5")
    if len(names) <= MAX_CELLS:
        for (row, column), count in np.ndenumerate(matrix):
            axes.text(
                column, row, str(count), ha="center", va="center", fontsize=8, color="white" if shares[row, column] > 0.5 else "black"
            )
    figure.savefig(path, dpi=110)


def plot_errors(path: Path, ap_cost: Mapping[str, float]) -> None:
    """What AP50 would gain without each kind of error."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(ap_cost), list(ap_cost.values()))
    axes.invert_yaxis()
    axes.set(xlabel="AP50 gained if mended", title="Where AP50 is lost")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)


def plot_training(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Loss and validation AP over the batches, from the lines of metrics.jsonl."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    axes.plot([line["step"] for line in train], [line["loss"] for line in train], alpha=0.5, linewidth=0.8, label="loss")
    axes.set(xlabel="batch", ylabel="loss", yscale="log")
    right = axes.twinx()
    for name in ("AP", "AP50"):
        right.plot(
            [line["step"] for line in val], [line[name] for line in val], marker=".", label=name, color="C1" if name == "AP" else "C2"
        )
    right.set(ylabel="validation", ylim=(0, 1))
    right.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=110)
