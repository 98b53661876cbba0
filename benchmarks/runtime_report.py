"""The runtime benchmark for people: tables for the terminal and for Markdown, and one picture of all plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from benchmarks.runtime_contenders import INT8

mpl.use("Agg")
from matplotlib import pyplot as plt

PANEL = (5.2, 3.6)
SWEEPS = {"batch": "images in a batch", "short side": "short side, pixels", "proposals": "proposals an image"}


def speed_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Header first: network, contender, ms a picture, times torchvision eager, aim."""
    lines: list[tuple[str, ...]] = [("network", "contender", "ms a picture", "fastest", "times torchvision", "aim")]
    for row in rows:
        for who, seconds in row["seconds"].items():
            aim = f"{row['aim']:.1f}" if row["aim"] and who == row["judged"] else _int8_words(row) if who == INT8 else ""
            times = (f"{seconds * 1e3:.1f}", f"{row['fastest'][who] * 1e3:.1f}", f"{row['ratio'][who]:.2f}")
            lines.append((row["network"], who, *times, aim))
        lines += [(row["network"], who, "-", "-", "-", f"cannot: {reason}") for who, reason in row["cannot"].items()]
    return lines


def _int8_words(row: dict[str, Any]) -> str:
    aim = f", aim {row['int8_aim']:.1f}" if row["int8_aim"] else ""
    return f"{row['int8_times_fp32']:.2f} times fp32{aim}"


def trained_sentence(trained: dict[str, Any]) -> str:
    """int8 of a trained network: what it gains and what it loses."""
    ms, ap = {kind: f"{1e3 * value:.1f}" for kind, value in trained["seconds"].items()}, trained["ap"]
    return (
        f"A trained network in int8, calibrated on {trained['calibrated_on']} pictures: {ms['int8']} ms a picture, in fp32 {ms['fp32']} "
        f"({trained['times_fp32']:.2f} times as fast); AP {ap['int8']:.4f}, in fp32 {ap['fp32']:.4f}, on {trained['pictures']} pictures."
    )


def part_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Header first: where the time of our graph goes, and how near the machine's limits that is."""
    lines: list[tuple[str, ...]] = [("network", "part", "nodes", "ms", "share", "GMAC", "MB", "of the roofline")]
    for row in rows:
        for part in row["parts"]:
            numbers = (f"{part['seconds'] * 1e3:.2f}", f"{part['share']:.1%}", f"{part['gmac']:.2f}", f"{part['megabytes']:.0f}")
            lines.append((row["network"], part["part"], str(part["nodes"]), *numbers, f"{part['roofline']:.0%}"))
        lines.append((row["network"], "post-processing", "", "", f"{row['post_processing']:.1%}", "", "", ""))
    return lines


def table(title: str, lines: Sequence[Sequence[str]]) -> Table:
    """For the terminal."""
    drawn = Table(title=title)
    for index, column in enumerate(lines[0]):
        drawn.add_column(column, justify="left" if index < 2 else "right")
    for line in lines[1:]:
        drawn.add_row(*line)
    return drawn


def markdown(result: dict[str, Any]) -> str:
    """Everything that the JSON holds, for reading."""
    facts = ", ".join(
        f"{name} {result[name]}" for name in ("machine", "device", "threads", "rounds", "torch", "torchvision", "onnxruntime")
    )
    sections = [f"# Runtime\n\n{facts}. Weights: {result['weights']}. {result['note']}"]
    sections.append("## One picture at a time\n\n" + _markdown_table(speed_rows(result["rows"])))
    words = [f"{row['network']}: {', '.join(map(str, row['proposals']))} proposals" for row in result["rows"]]
    sections.append("In the pictures, one after the other: " + "; ".join(words) + ".")
    if "trained" in result:
        sections.append("## int8 of a trained network\n\n" + trained_sentence(result["trained"]))
    sections.append("## Where the time goes\n\n" + f"Peaks: {result['peak']}.\n\n" + _markdown_table(part_rows(result["rows"])))
    for name, points in result.get("sweeps", {}).items():
        lines = [(SWEEPS[name], "ours, ms an image", "torchvision eager, ms an image")]
        lines += [(str(p["x"]), f"{p['ours']:.1f}", f"{p['torchvision']:.1f}" if "torchvision" in p else "-") for p in points]
        sections.append(f"## {result['sweep_network']}: {SWEEPS[name]}\n\n" + _markdown_table(lines))
    if "nms_depth" in result:
        sections.append(_depth_section(result["nms_depth"]))
    if result["left_out"]:
        sections.append(f"Not measured, for want of time: {', '.join(result['left_out'])}.")
    return "\n\n".join(sections) + "\n"


def _depth_section(depth: dict[str, Any]) -> str:
    rounds = sorted({int(value) for name in ("proposals", "detections") for value in depth[name]})
    lines = [("rounds", "scenes of proposals", "scenes of detections")]
    lines += [(str(r), str(depth["proposals"].get(str(r), 0)), str(depth["detections"].get(str(r), 0))) for r in rounds]
    words = (
        f"Rounds until the matrix form of NMS changes nothing, that last look included, on {depth['pictures']} pictures of a trained "
        f"network; a scene is one level or one picture. {depth['unequal']} scenes differ from greedy NMS."
    )
    return f"## Depth of NMS\n\n{words}\n\n{_markdown_table(lines)}"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in (head, rule, *body))


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed, parts, sweeps and the depth of NMS in one picture."""
    panels = [("speed", None), ("parts", None), *result.get("sweeps", {}).items()]
    if "nms_depth" in result:
        panels.append(("depth", result["nms_depth"]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained", squeeze=False)
    for axes, (name, content) in zip(grid.flat, panels, strict=False):
        if name == "speed":
            _bars(axes, result["rows"])
        elif name == "parts":
            _shares(axes, result["rows"])
        elif name == "depth":
            _histogram(axes, content)
        else:
            _curve(axes, name, content, result["sweep_network"])
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(who for row in rows for who in row["seconds"]))
    width = 0.8 / len(names)
    for index, who in enumerate(names):
        places = np.arange(len(rows)) + (index - (len(names) - 1) / 2) * width
        bars = axes.bar(places, [row["seconds"].get(who, np.nan) * 1e3 for row in rows], width=width * 0.9, label=who)
        axes.bar_label(bars, fmt="%.0f", fontsize=6)
    axes.set_xticks(range(len(rows)), [row["network"].replace("_", "\n", 1) for row in rows], fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("ms a picture, batch 1")
    _legend_above(axes, columns=2)


def _shares(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    left = np.zeros(len(rows))
    for index, part in enumerate(rows[0]["parts"]):
        shares = np.array([row["parts"][index]["share"] * 100 for row in rows])
        axes.barh(range(len(rows)), shares, left=left, label=part["part"])
        left += shares
    axes.set_yticks(range(len(rows)), [row["network"] for row in rows], fontsize=7)
    axes.set_xlabel("share of our graph's time, %")
    _legend_above(axes, columns=4)


def _legend_above(axes: Axes, columns: int) -> None:
    """Bars fill the whole panel, so no place within it is free."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, fontsize=6, frameon=False)


def _curve(axes: Axes, name: str, points: Sequence[dict[str, float]], network: str) -> None:
    for who, mark in (("ours", "o-"), ("torchvision", "s--")):
        known = [(p["x"], p[who]) for p in points if who in p]
        if known:
            axes.plot(*zip(*known, strict=True), mark, label=who)
    axes.set_xlabel(SWEEPS[name])
    axes.set_ylabel("ms an image")
    axes.set_ylim(bottom=0)
    axes.set_title(network, fontsize=8)
    axes.legend(fontsize=7)


def _histogram(axes: Axes, depth: dict[str, Any]) -> None:
    for offset, name in ((-0.2, "proposals"), (0.2, "detections")):
        rounds = [int(value) for value in depth[name]]
        axes.bar([r + offset for r in rounds], list(depth[name].values()), width=0.4, label=name)
    axes.set_xlabel("rounds of the matrix form of NMS")
    axes.set_ylabel("scenes")
    axes.legend(fontsize=7)
