"""A comparison for people and for programs: tables on the terminal, a page with pictures, and JSON."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from export.compare_pictures import draw_disagreements
from export.comparison import UNKNOWN_AP, Comparison, Version
from model.evaluation import check_new_folder
from model.metrics.coco import STATS

PAGE, DATA, PICTURES = "index.html", "comparison.json", "pictures"
SPEED_NAMES = {
    "prepare_p50_ms": "decode and resize, median ms",
    "prepare_p95_ms": "decode and resize, 95 % ms",
    "network_p50_ms": "network, median ms",
    "network_p95_ms": "network, 95 % ms",
}
Row = tuple[str, ...]
Section = tuple[str, Row, list[Row]]
"""Title, names of the columns, rows."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #111827; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 2rem }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d1d5db; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #6b7280 } h2 { margin-top: 2.5rem }
figure { margin: 2rem 0 } figure img { max-width: 100%; height: auto } figcaption { color: #4b5563 }
.broken { border-left: .4rem solid #b91c1c; padding: .5rem 1rem; background: #fef2f2 }
.held { border-left: .4rem solid #15803d; padding: .5rem 1rem; background: #f0fdf4 } code { overflow-wrap: anywhere }
"""


def sections(comparison: Comparison) -> list[Section]:
    """The comparison's tables as text."""
    return [_versions(comparison), _precision(comparison), _classes(comparison), _agreement(comparison), _errors(comparison)]


def tables(comparison: Comparison) -> list[Table]:
    """The same for a terminal, for a console that takes brackets in names for text."""
    drawn = []
    for title, columns, rows in sections(comparison):
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        drawn.append(table)
    return drawn


def check_folder(folder: Path) -> None:
    """Raises ValueError where a report would replace something that is none, or where no folder can be made."""
    check_new_folder(folder, "--out")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / DATA).is_file())):
        raise ValueError(f"{folder} holds something that is no comparison; choose another folder with --out")


def write_report(folder: Path, comparison: Comparison, *, pictures: int) -> Path:
    """Write the page, the JSON and the pictures; an earlier comparison in the folder is replaced at the end, or stays whole.

    Returns:
        The page.

    Raises:
        ValueError: the folder holds something else.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f".{DATA}.part", folder / f".{PAGE}.part"
    try:
        names = draw_disagreements(
            folder / PICTURES,
            comparison.dataset,
            (comparison.a.predictions, comparison.b.predictions),
            comparison.pictures,
            titles=(comparison.a.title, comparison.b.title),
            score_threshold=comparison.score_threshold,
            count=pictures,
            mark=f"-{secrets.token_hex(4)}",
        )
        data.write_text(json.dumps(to_dict(comparison), indent=2) + "\n")
        page.write_text(_page(comparison, names))
        data.replace(folder / DATA)
        page.replace(folder / PAGE)
    finally:
        data.unlink(missing_ok=True)
        page.unlink(missing_ok=True)
        _sweep(folder)
    return folder / PAGE


def _sweep(folder: Path) -> None:
    """Remove the pictures that the page does not show: those of the report that was replaced, or of one that was not finished."""
    page = (folder / PAGE).read_text() if (folder / PAGE).is_file() else ""
    for picture in (folder / PICTURES).glob("*.jpg"):
        if f"{PICTURES}/{picture.name}" not in page:
            picture.unlink()
    if not page:
        for made in (folder / PICTURES, folder):
            with suppress(OSError):  # not there, or somebody else put something into it
                made.rmdir()


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return {
        "a": _version_dict(comparison.a),
        "b": _version_dict(comparison.b),
        "dataset": comparison.dataset.name,
        "images": len(comparison.dataset),
        "score_threshold": comparison.score_threshold,
        "bounds_broken": list(comparison.broken),
        "differing_images": comparison.differing,
        "agreement": {one.name: {key: value for key, value in asdict(one).items() if key != "name"} for one in comparison.classes},
        "pictures": [
            {
                "image": record.image_id,
                "disagreement": round(one.disagreement, 6),
                "both": len(one.pairs),
                "missed": len(one.missed),
                "extra": len(one.extra),
                "renamed": len(one.renamed),
            }
            for record, one in zip(comparison.dataset.records, comparison.pictures, strict=True)
        ],
    }


def _version_dict(version: Version) -> dict[str, Any]:
    facts = {"name": version.manifest.name, "version": version.manifest.version, "file": str(version.path), "sha256": version.sha256}
    return {**facts, "bytes": version.file_bytes, "provider": version.provider, "speed": dict(version.speed), **version.report.to_dict()}


def _versions(comparison: Comparison) -> Section:
    def row(name: str, values: Iterable[str]) -> Row:
        return (name, *values)

    both = comparison.versions
    rows = [
        row("version", (f"{v.manifest.name}@{v.manifest.version}" for v in both)),
        row("network", (f"{v.manifest.architecture}, {v.manifest.precision.default}" for v in both)),
        row("input", (f"{v.manifest.input.short_side} to {v.manifest.input.long_side}" for v in both)),
        row("file", (f"{v.file_bytes / 1e6:.1f} MB, sha256 {v.sha256[:12]}" for v in both)),
        row("provider", (v.provider for v in both)),
    ]
    rows += [row(title, (f"{v.speed[key]:.1f}" for v in both)) for key, title in SPEED_NAMES.items()]
    return "versions and speed, one picture at a time", ("", "A", "B"), rows


def _precision(comparison: Comparison) -> Section:
    a, b = comparison.a.report, comparison.b.report
    rows = [_difference(name, _known(a.coco.stats[name]), _known(b.coco.stats[name])) for name in STATS]
    rows.append(_difference("VOC AP50, area", a.voc_ap50, b.voc_ap50))
    return f"average precision on {comparison.dataset.name}, {len(comparison.dataset)} pictures", ("", "A", "B", "B - A"), rows


def _classes(comparison: Comparison) -> Section:
    boxes = {name: str(curve.positives) for name, curve in comparison.a.report.curves.items()}
    rows: list[Row] = []
    for name in comparison.dataset.class_names:
        title, *numbers = _difference(name, *comparison.class_ap(name))
        rows.append((title, boxes[name], *numbers))
    return "average precision by class", ("class", "boxes", "A", "B", "B - A"), rows


def _agreement(comparison: Comparison) -> Section:
    rows: list[Row] = [
        (c.name, str(c.both), str(c.missed), str(c.extra), f"{c.worst_box_px:.2f}", f"{c.worst_score:.4f}", f"{c.mean_iou:.4f}")
        for c in comparison.classes
    ]
    columns = ("class", "both", "only A", "only B", "largest box difference, px", "largest score difference", "mean IoU")
    return f"agreement of detections over score {comparison.score_threshold:g}", columns, rows


def _errors(comparison: Comparison) -> Section:
    a, b = comparison.a.report.errors, comparison.b.report.errors
    rows: list[Row] = [
        (kind, str(a.counts[kind]), str(b.counts[kind]), f"{a.ap_cost[kind]:.4f}", f"{b.ap_cost[kind]:.4f}") for kind in a.counts
    ]
    return "errors, and the AP50 that mending each would gain", ("kind", "A", "B", "A gains", "B gains"), rows


def _known(value: float) -> float | None:
    return None if value == UNKNOWN_AP else value


def _difference(name: str, a: float | None, b: float | None) -> Row:
    shown = [f"{value:.4f}" if value is not None else "-" for value in (a, b)]
    return (name, *shown, f"{b - a:+.4f}" if a is not None and b is not None else "-")


def _page(comparison: Comparison, pictures: dict[int, str]) -> str:
    title = f"{comparison.a.title} against {comparison.b.title}"
    body = [f"<h1>{escape(title)}</h1>", _verdict(comparison)]
    body += [_html_table(*section) for section in sections(comparison)]
    if pictures:
        body.append(f"<h2>Largest disagreements</h2><p>{_legend()}</p>")
    elif not any(one.disagreement for one in comparison.pictures):
        body.append("<p>The versions agree on every picture.</p>")
    for index, name in pictures.items():
        one, record = comparison.pictures[index], comparison.dataset.records[index]
        counts = f"both {len(one.pairs)}, only A {len(one.missed)}, only B {len(one.extra)}, of these another class {len(one.renamed)}"
        caption = f"{escape(record.image_id)}: {counts}; disagreement {one.disagreement:.2f}"
        source = f"{PICTURES}/{escape(name, quote=True)}"
        image = f'<img src="{source}" alt="{caption}: A on the left, B on the right" loading="lazy">'
        body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _verdict(comparison: Comparison) -> str:
    a, b = comparison.a.report.ap, comparison.b.report.ap
    sentence = (
        f"AP goes from {a:.4f} to {b:.4f}. Over score {comparison.score_threshold:g}, the versions see other objects on "
        f"{comparison.differing} of {len(comparison.dataset)} pictures."
    )
    if not comparison.broken:
        return f'<p class="held">{sentence}</p>'
    return f'<p class="broken">{sentence} ' + " ".join(f"{escape(broken)}." for broken in comparison.broken) + "</p>"


def _legend() -> str:
    return (
        "A on the left, B on the right. Thin white: the truth. Yellow frame: only this version finds it over the score. "
        "Disagreement: the scores that would have to change to agree, plus 1 - IoU of what both find."
    )


def _html_table(title: str, columns: Row, rows: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title[:1].upper() + title[1:])}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
