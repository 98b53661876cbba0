"""The verification report for people: a table on the terminal, Markdown beside the file."""

from __future__ import annotations

from rich.table import Table

from export.verify import CaseResult, Report

COLUMNS = ("case", "bucket", "batch", "detections", "matched", "missed", "extra", "box px", "score", "top alone", "undecided")


def table(report: Report) -> Table:
    """One row a case, one for all, as rich draws it."""
    gates = report.gates
    drawn = Table(
        title=f"ONNX against {report.reference}",
        caption=f"gates: {gates.box_px:g} px, {gates.score:g} score, no unmatched box above {gates.unmatched_score:g}",
    )
    for index, name in enumerate(COLUMNS):
        drawn.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in report.rows:
        drawn.add_row(*_cells(row), style="red" if row in report.failed_rows else None)
    drawn.add_section()
    drawn.add_row(*_total(report), style="bold")
    return drawn


def markdown(report: Report) -> str:
    """The same table in Markdown, with the verdict."""
    gates = report.gates
    lines = [
        f"# Verification against {report.reference}",
        "",
        "Both sides got the same pixels, through the service's own preprocessing and runtime. None of these shapes was traced.",
        f"Gates: boxes {gates.box_px:g} px, scores {gates.score:g}, no unmatched box above score {gates.unmatched_score:g}. "
        + ("All hold." if not report.failures else "Broken: " + "; ".join(report.failures) + "."),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|--:" * (len(COLUMNS) - 1) + "|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in report.rows]
    lines.append("| " + " | ".join(f"**{cell}**" if cell else "" for cell in _total(report)) + " |")
    lines += [
        "",
        "Undecided: detections that rounding alone decides, shown by eager PyTorch with its weights changed in their last digits.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: CaseResult) -> list[str]:
    tally = row.tally
    return [
        row.name,
        f"{row.bucket[0]}x{row.bucket[1]}",
        str(row.batch_size),
        str(row.detections),
        str(tally.matched),
        str(tally.missed),
        str(tally.extra),
        f"{tally.worst_box_px:.1e}",
        f"{tally.worst_score:.1e}",
        f"{tally.top_unmatched:.3f}" if tally.missed or tally.extra else "-",
        str(tally.undecided or "-"),
    ]


def _total(report: Report) -> list[str]:
    count, pictures = sum(row.detections for row in report.rows), sum(row.batch_size for row in report.rows)
    return ["all", "", *_cells(CaseResult("all", (0, 0), pictures, count, report.total))[2:]]
