"""Training and eager inference against torchvision's own Faster R-CNN: `python -m benchmarks.training`.

Each side lives in a process of its own and holds the same network (parameters are counted on both sides); they take turns, so that a
busy machine slows both alike. The ratio is of the medians over the same rounds. Pictures are drawn by this project unless --data
names a data set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torchvision
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.training_sides import Task, serve_side
from model.data.synthetic import write_voc
from model.presets import PRESETS

mpl.use("Agg")
from matplotlib import pyplot as plt

SIDES = ("ours", "torchvision")
AIM = 1.5
RESULTS = "training.json"
DRAWN_PICTURES, DRAWN_HW = 48, (480, 640)

EXAMPLES = """examples:
  python -m benchmarks.training
  python -m benchmarks.training --presets mobilenet_v2_fpn resnet50_fpn --data VOC_FOLDER --split train --amp bf16
  python -m benchmarks.training --presets all --short-side 320 --steps 1 --rounds 3 --infer-rounds 3 --resume
  python -m benchmarks.training --presets resnet50_fpn --device cuda --batch-size 16 --amp fp16

Exit status: 0 measured, 1 an error. A missed aim is printed, it is no error.
"""


class SideError(RuntimeError):
    """A side stopped; the message is its own."""


class Side:
    """One side's process."""

    def __init__(self, name: str, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_side, args=(name, task, theirs), name=f"side-{name}")
        self.process.start()
        theirs.close()

    def ready(self) -> int:
        """The number of its network's parameters, once it is built."""
        return int(self._receive()[1])

    def ask(self, what: str, *arguments: Any) -> Any:
        self.connection.send((what, *arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            raise SideError(f"the side {self.name!r} ended without a word (out of memory?)") from None
        if isinstance(answer, tuple) and answer[0] == "failed":
            raise SideError(f"the side {self.name!r} stopped: {answer[1]}")
        return answer

    def stop(self) -> None:
        if self.process.is_alive():
            with contextlib.suppress(OSError):  # it has just ended by itself
                self.connection.send(None)
            self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


@contextmanager
def both_sides(task: Task) -> Iterator[dict[str, Side]]:
    """The two processes, ready; ended on the way out."""
    sides = {name: Side(name, task) for name in SIDES}
    try:
        sizes = {name: side.ready() for name, side in sides.items()}
        if len(set(sizes.values())) > 1:
            raise SideError(f"the sides are not the same network: {sizes} parameters")
        yield sides
    finally:
        for side in sides.values():
            side.stop()


def measure(task: Task, options: argparse.Namespace, tick: Any) -> dict[str, Any]:
    """One preset's row: throughput of training, its data wait and peak memory, and eager inference."""
    trained: dict[str, list[tuple[float, float, float]]] = {name: [] for name in SIDES}
    inferred: dict[str, list[float]] = {name: [] for name in SIDES}
    with both_sides(task) as sides:
        for round_number in range(-1, options.rounds):  # round -1 warms up and does not count
            for name, side in sides.items():
                if options.steps:
                    turn = side.ask("train", options.steps)
                    if round_number >= 0:
                        trained[name].append(turn)
                tick()
        memory = {name: side.ask("memory") for name, side in sides.items()}
        for round_number in range(-1, options.infer_rounds):
            for name, side in sides.items():
                seconds = side.ask("infer", options.infer_batch)
                if round_number >= 0:
                    inferred[name].append(seconds)
                tick()
    row: dict[str, Any] = {"preset": task.preset, **facts(options)}
    if options.steps:
        row["training"] = training_row(trained, memory, options.steps * task.batch_size)
    if options.infer_rounds:
        middle = {name: statistics.median(values) for name, values in inferred.items()}
        row["inference"] = {"batch": options.infer_batch, "seconds": middle, "ratio": middle["torchvision"] / middle["ours"]}
    return row


def training_row(trained: dict[str, list[tuple[float, float, float]]], memory: dict[str, int], images: int) -> dict[str, Any]:
    """Images a second, their ratio, data wait (a share of the time) and peak memory of both sides.

    Args:
        trained: per side and round: seconds, seconds waited for data, last loss.
        images: pictures of a round.
    """
    rates = {name: images / statistics.median(turn[0] for turn in turns) for name, turns in trained.items()}
    waits = {name: sum(turn[1] for turn in turns) / sum(turn[0] for turn in turns) for name, turns in trained.items()}
    return {
        "images_per_s": rates,
        "ratio": rates["ours"] / rates["torchvision"],
        "rounds": {name: [images / turn[0] for turn in turns] for name, turns in trained.items()},
        "data_wait_share": waits,
        "peak_memory_bytes": memory,
        "last_loss": {name: turns[-1][2] for name, turns in trained.items()},
    }


def row_name(row: dict[str, Any]) -> str:
    """The preset, and its short side where that is not its own."""
    return f"{row['preset']} at {row['short_side']} px" if row["short_side"] else str(row["preset"])


def merged(earlier: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row in the place of an earlier one of the same name, or behind them all."""
    rows = list(earlier)
    places = [place for place, other in enumerate(rows) if row_name(other) == row_name(row)]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)
    return rows


def save(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    plot(rows, folder / "training.png")


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Both sides next to each other."""
    drawn = Table(title=title)
    columns = (
        "preset",
        "img/s ours",
        "torchvision",
        "ratio",
        "data wait ours",
        "peak ours",
        "torchvision",
        "eager batch ours",
        "torchvision",
        "ratio",
    )
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        cells = [row_name(row)]
        training, inference = row.get("training"), row.get("inference")
        if training:
            rates, memory = training["images_per_s"], training["peak_memory_bytes"]
            cells += [f"{rates['ours']:.2f}", f"{rates['torchvision']:.2f}", f"{training['ratio']:.2f}x"]
            cells += [f"{training['data_wait_share']['ours']:.1%}", *(f"{memory[name] / 2**20:.0f} MiB" for name in SIDES)]
        else:
            cells += ["-"] * 6
        if inference:
            cells += [*(f"{inference['seconds'][name] * 1e3:.0f} ms" for name in SIDES), f"{inference['ratio']:.2f}x"]
        drawn.add_row(*cells)
    return drawn


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Times torchvision, for training and for eager inference; 1 is torchvision's speed."""
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.55 * len(rows)), layout="constrained")
    for offset, (key, label) in enumerate((("training", "training"), ("inference", "eager inference"))):
        found = [(place, row[key]["ratio"]) for place, row in enumerate(rows) if key in row]
        bars = axes.barh([place + 0.2 - 0.4 * offset for place, _ in found], [ratio for _, ratio in found], height=0.36, label=label)
        axes.bar_label(bars, fmt="%.2fx", fontsize=8, padding=2)
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.axvline(AIM, color="tab:green", linestyle="--", linewidth=1, label=f"aim of training: {AIM}x")
    axes.set_yticks(range(len(rows)), [row_name(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("times torchvision's speed, same network, data, batch, precision and machine")
    axes.margins(x=0.1)
    figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--presets", nargs="+", choices=[*sorted(PRESETS), "all"], default=["mobilenet_v2_fpn"], help="default: mobilenet_v2_fpn"
    )
    parser.add_argument("--data", type=Path, help="folder of a data set (default: pictures drawn for this run)")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures a step (default: 4)")
    parser.add_argument("--short-side", type=int, help="of the resized pictures (default: the preset's)")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision of both sides (default: off)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each side (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each side (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="training steps of a side's turn; 0 leaves training out (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side that count (default: 5)")
    parser.add_argument("--infer-rounds", type=int, default=5, help="batches of eager inference; 0 leaves it out (default: 5)")
    parser.add_argument("--infer-batch", type=int, default=4, help="pictures of such a batch (default: 4)")
    parser.add_argument("--resume", action="store_true", help="leave out what stands in the results already, measured alike")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder for training.json and training.png, written after each preset; rows of other presets and sizes stay in them",
    )
    return parser


def run(options: argparse.Namespace, data: Path, console: Console) -> list[dict[str, Any]]:
    """All presets' rows, each kept as soon as it is there."""
    known = options.out / RESULTS
    kept: list[dict[str, Any]] = json.loads(known.read_text())["rows"] if known.is_file() else []
    measured = [row["preset"] for row in kept if facts(options).items() <= row.items()] if options.resume else []
    presets = list(PRESETS) if "all" in options.presets else options.presets
    presets = [preset for preset in presets if preset not in measured]
    turns = len(presets) * 2 * (options.rounds + options.infer_rounds + 2)
    rows = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=turns)
        for preset in presets:
            progress.update(bar, description=preset)
            task = Task(
                preset=preset,
                data=data,
                split=options.split,
                batch_size=options.batch_size,
                amp=options.amp,
                device=options.device,
                threads=options.threads,
                workers=options.workers,
                short_side=options.short_side,
            )
            rows.append(measure(task, options, lambda: progress.advance(bar)))
            kept = merged(kept, rows[-1])
            save(kept, options.out)
            console.print(f"{verdict(rows[-1])}; kept in {known}")
    return rows


def verdict(row: dict[str, Any]) -> str:
    """The row in one sentence."""
    parts = []
    if "training" in row:
        ratio = row["training"]["ratio"]
        parts.append(f"training {ratio:.2f}x torchvision's (aim {AIM}x: {'met' if ratio >= AIM else 'missed'})")
    if "inference" in row:
        ratio = row["inference"]["ratio"]
        parts.append(f"eager inference {ratio:.2f}x (aim 1x: {'met' if ratio >= 1 else 'missed'})")
    return f"{row_name(row)}: {', '.join(parts)}"


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} CPUs",
        "threads": options.threads,
        "batch_size": options.batch_size,
        "short_side": options.short_side,
        "precision": options.amp,
        "data": options.data.name if options.data else f"{DRAWN_PICTURES} drawn pictures of {DRAWN_HW[1]}x{DRAWN_HW[0]}",
        "steps_a_turn": options.steps,
        "turns": options.rounds,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    console = Console(width=170)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or write_voc(Path(folder), {"train": DRAWN_PICTURES}, DRAWN_HW)
        try:
            rows = run(options, data, console)
        except (SideError, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    machine = facts(options)["machine"]
    console.print(table(rows, f"{machine}, {options.threads} threads, batch {options.batch_size}, {options.amp}; medians of turns"))
    for row in rows:
        console.print(verdict(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
