"""Which augmentation pays: the same short training with one thing changed at a time, scored on the validation split.

    python -m benchmarks.augmentation VOC_FOLDER --backbone-weights mobilenet_v2.pth --epochs 6 --short-side 192 --work runs/augmentation

Each training is `python -m model.train`, kept in --work and gone on with where it stopped. Only differences larger than the spread over
seeds mean something, and a short training favours weak augmentation: strong ones pay late.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model.presets import PRESETS
from model.run_folder import command_line, environment

VARIANTS: dict[str, tuple[str, ...]] = {
    "as the preset has it": (),
    "mirroring alone": ("scale=[1,1]", "brightness=0", "contrast=0", "saturation=0", "hue=0"),
    "and mosaic": ("mosaic=0.5",),
    "and copy-paste": ("copy_paste=0.5",),
    "large-scale jitter": ("scale=[0.1,2.0]",),
    "and turns": ("vflip=0.5", "rot90=0.5"),
}
"""Name -> settings below training.augment."""

SCORES = ("AP", "AP50", "AP75")


def settings_of(variant: str, seed: int, options: argparse.Namespace) -> list[str]:
    """KEY=VALUE settings of one training; the long side keeps its proportion to the short one."""
    frame = PRESETS[options.preset](("any",)).detector.input
    long = round(frame.long_side * options.short_side / frame.short_side)
    return [
        f"detector.input.short_side={options.short_side}",
        f"detector.input.long_side={long}",
        "detector.input.buckets=[]",
        f"training.epochs={options.epochs}",
        f"training.validate_every={options.epochs}",
        f"training.seed={seed}",
        *(f"training.augment.{setting}" for setting in VARIANTS[variant]),
        *options.settings,
    ]


def train(variant: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Trains, or reads what was trained before; the scores of the last epoch."""
    out = options.work / f"{''.join(c if c.isalnum() else '_' for c in variant)}_seed{seed}"
    command = [sys.executable, "-m", "model.train", "--preset", options.preset, "--data", str(options.data), "--out", str(out)]
    command += ["--train-split", options.train_split, "--val-split", options.val_split, "--resume-if-present", "--quiet", "--skip-bad"]
    command += ["--backbone-weights", str(options.backbone_weights)] if options.backbone_weights else []
    command += ["--threads", str(options.threads)] if options.threads else []
    for setting in settings_of(variant, seed, options):
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "val"][-1]
    return {name: last[name] for name in SCORES}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.augmentation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mobilenet_v2_fpn")
    parser.add_argument("--backbone-weights", type=Path, metavar="FILE")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--val-split", default="val")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of: {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--short-side", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as in model.train, for all")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("runs/augmentation"), help="folder of the trainings")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    chosen = options.variants.split(",")
    unknown = sorted(set(chosen) - set(VARIANTS))
    if unknown:
        print(f"error: --variants: no {', '.join(unknown)}; known: {', '.join(VARIANTS)}", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    for variant in chosen:
        started = time.monotonic()
        scores = [train(variant, seed, options) for seed in range(options.seeds)]
        means = {name: statistics.mean(score[name] for score in scores) for name in SCORES}
        spread = statistics.stdev(score["AP"] for score in scores) if len(scores) > 1 else None
        rows.append({"variant": variant, "settings": VARIANTS[variant], "seeds": scores, **means, "AP_sd": spread})
        print(f"{variant}: AP {means['AP']:.3f} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        _write(rows, options)
    _show(rows, options)
    return 0


def _write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """After every variant, so that an interruption loses none."""
    facts = {"preset": options.preset, "epochs": options.epochs, "short_side": options.short_side, "data": options.data.name}
    if options.json is not None:
        options.json.write_text(json.dumps({**facts, "rows": rows, "environment": environment()}, indent=2) + "\n")
    if options.markdown is not None:
        lines = ["# Augmentation, one thing changed at a time", "", f"`{command_line()}`", ""]
        lines += [f"{options.data.name}/{options.val_split}, {options.epochs} epochs at short side {options.short_side}.", ""]
        lines += ["| training | AP | AP50 | AP75 | deviation of AP over seeds |", "| --- | ---: | ---: | ---: | ---: |"]
        lines += [f"| {row['variant']} | " + " | ".join(_cells(row)) + " |" for row in rows]
        if missing := set(options.variants.split(",")) - {row["variant"] for row in rows}:
            lines += ["", f"Not trained to the end: {', '.join(sorted(missing))}."]
        options.markdown.write_text("\n".join(lines) + "\n")


def _cells(row: dict[str, Any]) -> list[str]:
    return [*(f"{row[name]:.3f}" for name in SCORES), "-" if row["AP_sd"] is None else f"{row['AP_sd']:.3f}"]


def _show(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    shown = Table(title=f"{options.epochs} epochs at short side {options.short_side}, {options.seeds} seeds")
    for name in ("training", *SCORES, "deviation"):
        shown.add_column(name, justify="left" if name == "training" else "right")
    for row in rows:
        shown.add_row(row["variant"], *_cells(row))
    Console().print(shown)


if __name__ == "__main__":
    raise SystemExit(main())
