"""Memory and time of matching and sampling, by number of images: is it linear, and does it fit?

    python -m benchmarks.matching --json benchmarks/results/matching.json
    python -m benchmarks.matching --device cuda --images 1,2,4,8,16

270 000 anchors are those of five levels at 800 x 1344; every image has 50 boxes. Each number of images is measured in a process of its
own, so that none profits from memory that another left behind. On a CPU the peak is the process's high-water mark (Linux), less what it
held before, and the time the process's own CPU seconds, in which a busy machine counts little; on CUDA the allocator's peak and the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.matching import match, sample

ANCHORS, BOXES = 270_000, 50
FRAME_HW = (800, 1344)
LIMIT_MB = 1000.0
"""What 8 images may take."""


class Measured(TypedDict):
    """Of one number of images: the median seconds of a pass, and its peak beyond what the inputs and the process held."""

    images: int
    seconds: float
    peak_mb: float


def draw_boxes(count: int, generator: torch.Generator) -> Tensor:
    """Boxes `[count, 4]` of 8 to 400 px a side, inside the frame."""
    height, width = FRAME_HW
    sides = 8 * torch.exp(torch.rand(count, 2, generator=generator) * 3.9)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat([corner, corner + sides], dim=1)


def workload(images: int, anchors: int, boxes: int, device: str) -> Callable[[], None]:
    """What the RPN does with a batch before its losses, as a function to call again and again."""
    generator = torch.Generator().manual_seed(0)
    candidates = draw_boxes(anchors, generator).to(device)
    gt = torch.stack([draw_boxes(boxes, generator) for _ in range(images)]).to(device)
    valid = torch.ones(images, boxes, dtype=torch.bool, device=device)

    def run() -> None:
        matched = match(candidates, gt, valid, fg_iou_thresh=0.7, bg_iou_thresh=0.3, allow_low_quality=True)
        sample(matched, 256, 0.5)

    return run


def measure(images: int, anchors: int, boxes: int, repeats: int, device: str) -> Measured:
    """Measures in this process, which should have done nothing of the kind before."""
    run, on_cuda = workload(images, anchors, boxes, device), device.startswith("cuda")
    clock = time.perf_counter if on_cuda else time.process_time
    with torch.inference_mode():
        peak = _cuda_peak(run) if on_cuda else _host_peak(run)
        seconds = []
        for _ in range(repeats):
            started = clock()
            run()
            if on_cuda:
                torch.cuda.synchronize()
            seconds.append(clock() - started)
    return Measured(images=images, seconds=statistics.median(seconds), peak_mb=peak / 1e6)


def _cuda_peak(run: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return float(torch.cuda.max_memory_allocated() - before)


def _host_peak(run: Callable[[], None]) -> float:
    workload(1, 1000, 2, "cpu")()  # libraries load their own memory on the first call
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024.0 * int(line.split()[1])


def measure_apart(images: int, options: argparse.Namespace) -> Measured:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.matching", "--one", str(images), "--anchors", str(options.anchors)]
    command += ["--boxes", str(options.boxes), "--repeats", str(options.repeats), "--device", options.device]
    command += ["--threads", str(options.threads)] if options.threads else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: Measured = json.loads(done.stdout)
    return measured


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", default="1,2,4,8", help="numbers of images (default: 1,2,4,8)")
    parser.add_argument("--anchors", type=int, default=ANCHORS)
    parser.add_argument("--boxes", type=int, default=BOXES, help="of each image (default: 50)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options.anchors, options.boxes, options.repeats, options.device)))
        return 0
    rows = [measure_apart(int(count), options) for count in options.images.split(",")]
    _show(rows, options)
    if options.json is not None:
        from model.run_folder import environment  # loads plotting and TensorBoard, which the measured processes need not

        facts = {"anchors": options.anchors, "boxes": options.boxes, "device": options.device, "limit_mb": LIMIT_MB}
        options.json.write_text(json.dumps({**facts, "rows": rows, "environment": environment()}, indent=2) + "\n")
    return 0 if all(row["peak_mb"] < LIMIT_MB for row in rows if row["images"] <= 8) else 1


def _show(rows: Sequence[Measured], options: argparse.Namespace) -> None:
    shown = Table(title=f"Matching and sampling: {options.anchors} anchors, {options.boxes} boxes an image, {options.device}")
    for name in ("images", "ms", "ms an image", "peak MB", "MB an image"):
        shown.add_column(name, justify="right")
    for row in rows:
        count = row["images"]
        ms, peak = 1000 * row["seconds"], row["peak_mb"]
        shown.add_row(str(count), f"{ms:.0f}", f"{ms / count:.0f}", f"{peak:.0f}", f"{peak / count:.0f}")
    Console().print(shown)


if __name__ == "__main__":
    raise SystemExit(main())
