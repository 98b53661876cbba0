"""A run of load for people: tables for the terminal, plots, one HTML file, and two runs side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.load_stats import Summary

mpl.use("Agg")
TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d8dde4; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; } .warning { color: #8a3b00; }
@media (prefers-color-scheme: dark) {
  body { color: #dfe5ec; background: #14181d; } th, td { border-color: #343c46; } .warning { color: #ffb47a; } img { background: #fff; }
}
"""


def rows_of(summary: Summary) -> list[tuple[str, str]]:
    """What a person reads first, as (name, value)."""
    rows = [
        ("offered, requests/s", f"{summary.offered_per_s:.1f}"),
        ("answered, images/s", f"{summary.answered_per_s:.1f}"),
        *((f"{name}, ms", f"{value:.1f}") for name, value in summary.latency_ms.items()),
        *((f"status {status}", str(count)) for status, count in summary.statuses.items()),
        ("errors", str(summary.errors)),
    ]
    if summary.refusal_ms:
        rows.append(("refusals p99, ms", f"{summary.refusal_ms['p99']:.1f}"))
        rows.append(("refusals with Retry-After", f"{summary.refusals_with_retry_after:.1%}"))
    if summary.bad_pictures:
        rows.append(("bad pictures among them", str(summary.bad_pictures)))
    rows.append(("generator CPU", f"{summary.generator_cpu:.0%}"))
    return rows


def warning_of(summary: Summary) -> str | None:
    """A sentence where the figures say less than they seem to."""
    if not summary.generator_limited:
        return None
    return (
        f"The load generator used {summary.generator_cpu:.0%} of a core and sent {summary.late_sends:.1%} of the requests late: "
        "part of the latency is its own. Give it a core, or send less."
    )


def table_of(summaries: Sequence[Summary]) -> Table:
    """For the terminal: one column a run, and with two runs their ratio."""
    table = Table(title=" | ".join(summary.title for summary in summaries) if len(summaries) == 1 else None)
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.title, justify="right")
    if len(summaries) == 2:
        table.add_column("second / first", justify="right")
    for cells in compared_rows(summaries):
        table.add_row(*cells)
    return table


def compared_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Rows of name, each run's value, and with two runs the ratio of the numbers."""
    columns = [dict(rows_of(summary)) for summary in summaries]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        values = [column.get(name, "-") for column in columns]
        row = [name, *values]
        if len(values) == 2:
            row.append(_ratio(*values))
        rows.append(row)
    return rows


def _ratio(first: str, second: str) -> str:
    try:
        return f"{float(second.rstrip('%')) / float(first.rstrip('%')):.2f}"
    except (ValueError, ZeroDivisionError):
        return "-"


def plot_percentiles(axes: Any, summaries: Sequence[Summary]) -> None:
    """Latency over percentile, the axis stretched towards 100 so that a tail is as wide as a body."""
    furthest = 1.0
    for summary in summaries:
        if not summary.curve:
            continue
        stretched = [100 / (100 - percentile) if percentile < 100 else float(summary.requests) for percentile, _ in summary.curve]
        axes.plot(stretched, [ms for _, ms in summary.curve], label=summary.title, drawstyle="steps-post")
        furthest = max(furthest, *stretched)
    axes.set_xscale("log")
    shown = [tick for tick in TICKS if 100 / (100 - tick) <= furthest * 1.05]
    axes.set_xticks([100 / (100 - tick) for tick in shown], [f"{tick:g} %" for tick in shown])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("percentile of answered requests")
    axes.set_ylabel("latency, ms")
    axes.grid(alpha=0.3)
    if len(summaries) > 1:
        axes.legend(fontsize="small")


def plot_timeline(axes: Any, summary: Summary) -> None:
    """Offered, answered and refused requests by second."""
    seconds = [row["second"] for row in summary.timeline]
    for name, colour in (("offered", "#9aa5b1"), ("answered", "#1f77b4"), ("refused", "#d62728")):
        axes.plot(seconds, [row[name] for row in summary.timeline], label=name, color=colour)
    axes.set_xlabel("second")
    axes.set_ylabel("requests/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw(summaries: Sequence[Summary]) -> Figure:
    """Percentiles of all runs, and under them each run through time."""
    figure, axes = plt.subplots(1 + len(summaries), 1, figsize=(8, 4 + 2.4 * len(summaries)), layout="constrained", squeeze=False)
    plot_percentiles(axes[0, 0], summaries)
    for summary, lower in zip(summaries, axes[1:, 0], strict=True):
        plot_timeline(lower, summary)
        lower.set_title(summary.title, fontsize="small")
    return figure


def write_plot(summaries: Sequence[Summary], path: Path) -> None:
    """The figure as a file; the suffix chooses the type."""
    figure = draw(summaries)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_html(summaries: Sequence[Summary], path: Path) -> None:
    """One file without external parts: table, plots, warnings."""
    buffer = io.BytesIO()
    figure = draw(summaries)
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    picture = base64.b64encode(buffer.getvalue()).decode("ascii")
    heads = "".join(f"<th>{html.escape(summary.title)}</th>" for summary in summaries) + (
        "<th>second / first</th>" if len(summaries) == 2 else ""
    )
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in compared_rows(summaries))
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in map(warning_of, summaries) if text)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Load report</title><style>{STYLE}</style>'
        f"<h1>Load report</h1>{warnings}<table><tr><th></th>{heads}</tr>{body}</table>"
        f'<img alt="Latency by percentile, and requests by second" src="data:image/png;base64,{picture}"></html>\n',
        encoding="utf-8",
    )
