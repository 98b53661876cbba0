"""How the paper's tables are shown: on the terminal, as Markdown, as plain values, and the recall of proposals as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Shown

from model.data.records import DetectionSet
from model.metrics.recall import covered_overlaps
from model.paper_lab import Sets
from model.paper_speed import STAGES, Band, SpeedRow, ratios
from model.paper_tables import Row, Table

RUN_TO_RUN = 0.8
"""Two standard deviations of five runs of the original release (59.9 60.4 59.5 60.1 59.5): a single run within it agrees."""

PUBLISHED_RATIOS = "published times faster, per image with proposals: R-CNN 1x, Fast R-CNN 25x, Faster R-CNN 250x"
PLOTTED_LIMITS = (300, 2000)
PLOTTED_IOU = np.linspace(0.5, 1.0, 51)


class Measured(NamedTuple):
    """A row with its numbers, one a seed; none where the data it needs was not given."""

    row: Row
    values: list[float]


class Page(NamedTuple):
    """A table ready to be written anywhere; the first column is text, the others numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def print(self) -> None:
        shown = Shown(title=self.title)
        for i, name in enumerate(self.columns):
            shown.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            shown.add_row(*row)
        console = Console(width=130)
        console.print(shown)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)

    def markdown(self, command: str) -> str:
        """A page of its own, with the command that made it."""
        lines = [f"# {self.title}", "", f"`{command}`", "", "| " + " | ".join(self.columns) + " |"]
        lines += ["| --- |" + " ---: |" * (len(self.columns) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"


def table_page(table: Table, measured: Sequence[Measured], sets: Sets) -> Page:
    """Published beside ours, with the noise band."""
    scores = table.unit.startswith("mAP")
    rows = []
    for row, values in measured:
        mean, spread = _mean_and_spread(values)
        band = f" ± {RUN_TO_RUN}" if scores else ""
        published = "-" if row.published is None else f"{row.published:.1f}{band}"
        ours = "needs --second-split" if mean is None else f"{mean:.1f}"
        ours += "" if spread is None else f" ± {spread:.1f} ({len(values)})"
        difference = "-" if mean is None or row.published is None else f"{mean - row.published:+.1f}"
        rows.append([row.label, published, ours, difference])
    notes = [f"ours: trained on {sets.train.name} ({len(sets.train)} pictures), tested on {sets.test.name} ({len(sets.test)})"]
    if scores:
        notes.append(f"± {RUN_TO_RUN}: two deviations of five runs of the original release; ± after ours: of its seeds")
    return Page(f"{table.title} ({table.unit})", ["row", "published", "ours", "difference"], rows, notes)


def speed_page(rows: Sequence[SpeedRow], device: str, crops: int | None, pictures: int) -> Page:
    """Stage by stage, and how many times faster than R-CNN."""
    faster = ratios(rows)
    lines = []
    for row in rows:
        cells = [f"{_number(known)} / {row.ours[stage]:.0f}" for stage, known in zip(STAGES, row.published, strict=True)]
        lines.append([row.label, *cells, f"{_number(row.published_accuracy, 1)} / {_number(row.accuracy, 1)}", _times(faster[row.label])])
    notes = [
        f"medians of {pictures} pictures, all systems in turn on each and in the opposite order on every other; behind the ratio its range",
        "Selective Search ran once a picture, its time counts for each system that needs it",
        PUBLISHED_RATIOS,
    ]
    if crops is not None:
        notes.append(f"R-CNN ran {crops} regions of each picture, its time is scaled to all of them")
    title = f"Table 5: milliseconds a picture, published (K40) / ours ({device})"
    return Page(title, ["system", *STAGES, "mAP %", "times faster"], lines, notes)


def _times(band: Band) -> str:
    spread = "" if band.low == band.high else f" ({band.low:.1f} to {band.high:.1f})"
    return f"{band.median:.1f}x{spread}"


def row_values(item: Measured) -> dict[str, Any]:
    mean, spread = _mean_and_spread(item.values)
    return {"label": item.row.label, "published": item.row.published, "ours": item.values, "mean": mean, "sd": spread}


def speed_values(row: SpeedRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "published_ms": dict(zip(STAGES, row.published, strict=True)),
        "ours_ms": row.ours,
        "ours_totals_ms": row.totals,
        "published_mAP": row.published_accuracy,
        "ours_mAP": row.accuracy,
    }


def plot_recall(path: Path, dataset: DetectionSet, sources: Mapping[str, Sequence[NDArray[np.floating]]]) -> None:
    """Recall over the IoU that counts as found, one panel a number of proposals (the paper's figure 4)."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, limit in zip(figure.subplots(1, len(PLOTTED_LIMITS), sharey=True), PLOTTED_LIMITS, strict=True):
        for name, proposals in sources.items():
            pairs = zip(dataset.records, proposals, strict=True)
            got = np.concatenate([covered_overlaps(record.boxes[record.plain], boxes[:limit]) for record, boxes in pairs])
            axes.plot(PLOTTED_IOU, [(got >= iou - 1e-12).mean() for iou in PLOTTED_IOU], label=name)
        axes.set(xlim=(0.5, 1), ylim=(0, 1.02), xlabel="IoU", title=f"{limit} proposals")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.supylabel("recall")
    figure.savefig(path, dpi=110)


def _mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
