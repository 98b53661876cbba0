"""The verification report for people: a table on the terminal, Markdown beside the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from export.verify import FREE, CaseResult, Gates, Report

COLUMNS = ("case", "bucket", "batch", "detections", "matched", "missed", "extra", "box px", "score", "top alone", "undecided")


def table(report: Report) -> Table:
    """One row a case, one for all, as rich draws it."""
    drawn = Table(
        title=f"ONNX against {report.reference}",
        caption=_gates_in_words(report.gates),
    )
    for index, name in enumerate(COLUMNS):
        drawn.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in report.rows:
        drawn.add_row(*_cells(row), style="red" if row in report.failed_rows else None)
    drawn.add_section()
    drawn.add_row(*_total(report), style="bold")
    return drawn


def markdown(report: Report, accuracy: Mapping[str, Any] | None = None) -> str:
    """The same table in Markdown, with the verdict.

    Args:
        accuracy: as the manifest's parity keeps it, where AP was measured or should have been.
    """
    lines = [
        f"# Verification against {report.reference}",
        "",
        f"Both sides got the same pixels, through the service's own preprocessing and runtime ({report.provider}). "
        "None of these shapes was traced.",
        f"G{_gates_in_words(report.gates)[1:]}. " + ("All hold." if not report.failures else "Broken: " + "; ".join(report.failures) + "."),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|--:" * (len(COLUMNS) - 1) + "|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in report.rows]
    lines.append("| " + " | ".join(f"**{cell}**" if cell else "" for cell in _total(report)) + " |")
    lines += [
        "",
        "Undecided: detections that rounding alone decides, as eager PyTorch shows that computes in fp64, or rounds otherwise.",
    ]
    if report.without_floor:
        lines += [
            "",
            "No score floor: the file fills its answer in none of the other pictures, so a copy of it without its score floor was compared "
            "as well.",
        ]
    if accuracy is not None:
        lines += ["", "## Accuracy on real pictures", "", accuracy_in_words(accuracy), *_accuracy_table(accuracy)]
    return "\n".join(lines) + "\n"


def accuracy_in_words(accuracy: Mapping[str, Any] | None) -> str:
    """What became of the accuracy gate, in one sentence."""
    if accuracy is None:
        return "AP was not measured at export."
    if not accuracy.get("checked", True):
        return f"Not checked: {accuracy['reason']}"
    ap = accuracy["ap"]
    sentence = f"AP {ap['file']:.4f}, of the network in fp32 {ap['network']:.4f}, on {accuracy['dataset']} ({_counted(accuracy)})"
    if "max_ap_drop" in accuracy:
        sentence += f": drop {100 * accuracy['ap_drop']:.2f} points, allowed {100 * accuracy['max_ap_drop']:g}"
    return sentence + "."


def _counted(accuracy: Mapping[str, Any]) -> str:
    boxes = f", {accuracy['boxes']} boxes" if "boxes" in accuracy else ""  # older files do not say it
    return f"{accuracy['pictures']} pictures{boxes}"


def _accuracy_table(accuracy: Mapping[str, Any]) -> list[str]:
    if not accuracy.get("checked", True):
        return []
    lines = ["", "| | file | network in fp32 | file, exact padding |", "|---|--:|--:|--:|"]
    for name in ("ap", "voc_ap50"):
        values = accuracy[name]
        lines.append(f"| {name} | {values['file']:.4f} | {values['network']:.4f} | {values['exact_padding']:.4f} |")
    return lines


def _gates_in_words(gates: Gates) -> str:
    if gates == FREE:
        return "gates: the contract in every case, and a batch against singles; other distances are shown, AP on real pictures is gated"
    return f"gates: boxes {gates.box_px:g} px, scores {gates.score:g}, no unmatched box above score {gates.unmatched_score:g}"


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
