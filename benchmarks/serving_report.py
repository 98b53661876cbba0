"""The comparison of servers for people: a table, the targets with what came of them, and a plot. The least disturbed round counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")
OURS = "ours"
OURS_BUCKETS = "ours_buckets"
COLOURS = {
    "ours": "#d62728",
    "ours_buckets": "#ff9896",
    "fastapi": "#7f7f7f",
    "mosec": "#1f77b4",
    "litserve": "#2ca02c",
    "bentoml": "#9467bd",
    "ray": "#ff7f0e",
}
REFUSAL_MS = 20.0
HEADER = (
    "| server | one client p50, ms | p99 | 32 clients, images/s | p50, ms | p99 "
    "| CPU a request, ms | of it beyond decoding | other work, CPUs "
    "| open loop at 80 %: p50, ms | p99 | p99.9 | at 200 %: answered of capacity | refused p99, ms |\n|---|" + "---|" * 13
)


def write_report(report: dict[str, Any], folder: Path) -> str:
    """Write serving.md and serving.png. Returns the text."""
    text = "\n".join([*_lead(report), HEADER, *(_row(report, name) for name in server_names(report)), "", *_targets(report), ""])
    (folder / "serving.md").write_text(text, encoding="utf-8")
    _plot(report, folder / "serving.png")
    return text


def server_names(report: dict[str, Any]) -> list[str]:
    """Servers in the order in which they were first measured."""
    return list(dict.fromkeys(row["server"] for row in report["measured"]))


def least_disturbed(report: dict[str, Any], name: str, part: str) -> dict[str, Any]:
    """A server's run (or `decoders`, `device`) in the round in which other work took the fewest CPUs; empty where there is none."""
    rows = [row for row in report["measured"] if row["server"] == name]
    parts = [row[part] if part in ("decoders", "device") else row["runs"][part] for row in rows]
    return min(parts, key=lambda found: float(found["foreign_cpus"]), default={})


def value(report: dict[str, Any], name: str, part: str, *path: str) -> float:
    """One figure of that run, NaN where it has none."""
    node: Any = least_disturbed(report, name, part)
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return float("nan") if node is None else float(node)


def _lead(report: dict[str, Any]) -> list[str]:
    setup = report["setup"]
    versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items() if version)
    lines = [
        "# Serving, side by side",
        "",
        f"{setup['date']}, {setup['cpus']} CPUs shared with the load generator and with other work "
        f"(load average {setup['load_average']:.1f} at the end), Python {setup['python']}, {versions}. "
        f"JPEGs of {', '.join(setup['sizes_wh'])}, {setup['mean_kilobytes']:.0f} KB on average. "
        f"Device {setup['device']}, of any shapes ({OURS_BUCKETS}: all of one shape, of five). Decoding inside, the same for all. "
        f"Of {setup['rounds']} rounds each run in its least disturbed one. "
        "Latency of the open loop from when a request was due.",
        "",
    ]
    lines += [f"Left out: {name}: {reason}" for name, reason in report["missing"].items()]
    return lines


def _row(report: dict[str, Any], name: str) -> str:
    def of(part: str, *path: str) -> float:
        return value(report, name, part, *path)

    capacity = of("many", "answered_per_s")
    cells = [
        f"{of('one', 'latency_ms', 'p50'):.1f}",
        f"{of('one', 'latency_ms', 'p99'):.1f}",
        f"{capacity:.0f}",
        f"{of('many', 'latency_ms', 'p50'):.0f}",
        f"{of('many', 'latency_ms', 'p99'):.0f}",
        f"{of('many', 'cpu_ms_a_request'):.2f}",
        f"{of('many', 'cpu_ms_a_request') - of('decoders', 'cpu_ms'):.2f}",
        f"{of('many', 'foreign_cpus'):.2f}",
        *(f"{of('steady', 'latency_ms', p):.0f}" for p in ("p50", "p99", "p99.9")),
        f"{of('overload', 'answered_per_s') / capacity:.2f}",
        f"{of('overload', 'refusal_ms', 'p99'):.0f}",
    ]
    return f"| {name} | " + " | ".join(cell.replace("nan", "-") for cell in cells) + " |"


def targets(report: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """(what, value, wanted, reached) for our service; only what the report has figures for."""
    peers = [name for name in server_names(report) if name not in (OURS, OURS_BUCKETS)]
    many = {name: value(report, name, "many", "answered_per_s") for name in server_names(report)}
    if OURS not in many:
        return []

    def ours(part: str, *path: str) -> float:
        return value(report, OURS, part, *path)

    limit = min(ours("device", "per_s"), ours("decoders", "per_s"))
    rows = []
    if peers:
        best = max(many[name] for name in peers)
        rows.append(("32 clients, images/s, ours over the best peer", many[OURS] / best, ">= 1.3", many[OURS] >= 1.3 * best))
    rows.append(("32 clients, of the lower limit of device and decoders", many[OURS] / limit, ">= 0.85", many[OURS] >= 0.85 * limit))
    if "fastapi" in peers:
        ratio = ours("one", "latency_ms", "p50") / value(report, "fastapi", "one", "latency_ms", "p50")
        rows.append(("one client, p50, ours over plain FastAPI", ratio, "<= 1", ratio <= 1))
    tail = ours("steady", "latency_ms", "p99.9") / ours("steady", "latency_ms", "p50")
    rows.append(("open loop at 80 %, p99.9 over p50", tail, "<= 3", tail <= 3))
    goodput = ours("overload", "answered_per_s") / many[OURS]
    rows.append(("at 200 %, answered of capacity", goodput, ">= 0.9", goodput >= 0.9))
    refusal = ours("overload", "refusal_ms", "max")
    rows.append(("at 200 %, slowest refusal, ms", refusal, f"<= {REFUSAL_MS:g}", refusal <= REFUSAL_MS))
    told = ours("overload", "refusals_with_retry_after")
    rows.append(("at 200 %, refusals with Retry-After", told, "= 1", told == 1))
    return rows


def _targets(report: dict[str, Any]) -> list[str]:
    lines = ["| target | measured | wanted | |", "|---|---|---|---|"]
    return lines + [
        f"| {what} | {measured:.2f} | {wanted} | {'reached' if good else 'missed'} |" for what, measured, wanted, good in targets(report)
    ]


def _plot(report: dict[str, Any], path: Path) -> None:
    names = server_names(report)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rates = [value(report, name, "many", "answered_per_s") for name in names]
    left.bar(names, rates, color=[COLOURS.get(name, "#444444") for name in names])
    if OURS in names:
        limit = min(value(report, OURS, "device", "per_s"), value(report, OURS, "decoders", "per_s"))
        left.axhline(limit, color="black", linewidth=0.8, linestyle="--", label="lower limit of device and decoders alone")
        left.legend(fontsize="small")
    left.set_ylabel("images/s, 32 clients")
    for name in names:
        last = least_disturbed(report, name, "steady")
        curve = [(100 / (100 - percentile), ms) for percentile, ms in last["curve"] if percentile < 100]
        if curve:
            right.plot(*zip(*curve, strict=True), color=COLOURS.get(name), label=f"{name}, {last['offered_per_s']:.0f}/s")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xticks([1, 2, 10, 100, 1000], ["0 %", "50 %", "90 %", "99 %", "99.9 %"])
    right.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    right.set_xlabel("percentile, open loop at 80 % of each server's own capacity")
    right.set_ylabel("latency, ms")
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
