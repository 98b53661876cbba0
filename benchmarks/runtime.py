"""The exported graph against torchvision's eager network with the same weights: `python -m benchmarks.runtime`.

All contenders run in turns within one process, so that a busy machine slows them alike; the ratio is of medians of the same rounds.
Weights are random unless --weights gives a torchvision state dict: with random ones every proposal slot is filled, the worst case.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import onnxruntime as ort
import torch
import torchvision
from rich.console import Console
from rich.table import Table

from export import pictures
from export.graph import GraphOptions, build_graph, inference_copy
from model.faster_rcnn import FasterRCNN, build_detector
from model.presets import PRESETS
from model.pretrained import load_torchvision
from model.weights import load_state
from service.manifest import Bucket

mpl.use("Agg")
from matplotlib import pyplot as plt

NETWORKS = ("mobilenet_v3_large_320_fpn", "mobilenet_v3_large_fpn", "resnet50_fpn", "resnet50_fpn_v2")
COCO_CLASSES = 90
AIMS = {"mobilenet_v3_large_320_fpn": 3.0, "mobilenet_v3_large_fpn": 2.0, "resnet50_fpn": 1.3}

Contender = Callable[[], object]


def pair(name: str, weights: Path | None) -> tuple[torch.nn.Module, FasterRCNN]:
    """Torchvision's network and ours with one set of weights."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models.detection, f"fasterrcnn_{name}")(weights=None, weights_backbone=None).eval()
    if weights is not None:
        theirs.load_state_dict(load_state(weights))
    preset = PRESETS[name](tuple(f"class {k}" for k in range(1, COCO_CLASSES + 1)))
    ours = build_detector(preset.detector).eval()
    load_torchvision(ours, theirs.state_dict(), "torchvision's network")
    return theirs, ours


def contenders(name: str, weights: Path | None, bucket: Bucket, threads: int) -> dict[str, Contender]:
    """Functions that each answer one picture of the bucket's size."""
    theirs, ours = pair(name, weights)
    picture = pictures.street(bucket, seed=1)
    images, sizes_hw = picture[None], np.array([bucket], dtype=np.int64)
    as_float = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    batch = (torch.from_numpy(images), torch.from_numpy(sizes_hw))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    graph = build_graph(ours, GraphOptions()).SerializeToString()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    folded = inference_copy(ours, "onnx")

    @torch.inference_mode()
    def eager_theirs() -> object:
        return theirs([as_float])

    @torch.inference_mode()
    def eager_ours() -> object:
        return folded(*batch)

    def exported() -> object:
        return session.run(None, {"images": images, "image_sizes_hw": sizes_hw})

    return {"torchvision eager": eager_theirs, "ours, eager": eager_ours, "ours, ONNX Runtime": exported}


def in_turns(runs: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; one round first to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, call in runs.items():
            started = time.perf_counter()
            call()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One network's row."""
    bucket = PRESETS[name](("object",)).detector.input.buckets[-2]
    seconds = in_turns(contenders(name, options.weights, bucket, options.threads), options.rounds)
    middle = {who: float(np.median(values)) for who, values in seconds.items()}
    base = middle["torchvision eager"]
    return {
        "network": name,
        "bucket": list(bucket),
        "seconds": middle,
        "fastest": {who: min(values) for who, values in seconds.items()},
        "ratio": {who: base / value for who, value in middle.items()},
        "aim": AIMS.get(name),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Milliseconds and ratios."""
    drawn = Table(title="one picture on the CPU, median of rounds in turns")
    for column in ("network", "bucket", "torchvision eager ms", "ours, eager ms", "ours, ONNX Runtime ms", "times torchvision", "aim"):
        drawn.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        times = [f"{row['seconds'][who] * 1e3:.0f}" for who in ("torchvision eager", "ours, eager", "ours, ONNX Runtime")]
        aim = f"{row['aim']:.1f}" if row["aim"] else "-"
        drawn.add_row(row["network"], "x".join(map(str, row["bucket"])), *times, f"{row['ratio']['ours, ONNX Runtime']:.2f}", aim)
    return drawn


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of milliseconds, one group a network."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    names = list(rows[0]["seconds"])
    for index, who in enumerate(names):
        places = np.arange(len(rows)) + (index - 1) * 0.27
        bars = axes.bar(places, [row["seconds"][who] * 1e3 for row in rows], width=0.25, label=who)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(rows)), [row["network"] for row in rows])
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds a picture, batch 1")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS[:3]), help="which (default: the first three)")
    parser.add_argument("--weights", type=Path, help="torchvision state dict, for a single network")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count (default: 10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every contender (default: all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for runtime.json and runtime.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    rows = []
    for name in options.networks:
        console.print(f"measuring {name}")
        rows.append(measure(name, options))
    console.print(table(rows))
    facts = {"machine": platform.processor() or platform.machine(), "threads": options.threads, "rounds": options.rounds}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "onnxruntime": ort.__version__}
    options.out.mkdir(parents=True, exist_ok=True)
    weights = str(options.weights.name) if options.weights else "random"
    (options.out / "runtime.json").write_text(json.dumps({**facts, **versions, "weights": weights, "rows": rows}, indent=2) + "\n")
    plot(rows, options.out / "runtime.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
