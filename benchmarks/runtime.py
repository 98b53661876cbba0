"""The exported graph against torchvision's network with the same weights, on the same pictures, side by side in one run.

Contenders: torchvision eager, torch.compile and its own ONNX export where they work; ours eager, on ONNX Runtime, and as the service runs
it; in int8 as well on a CPU, with CUDA graphs and on TensorRT as well on a GPU; further files of ours with --file. Everybody takes each
round in turn, one picture at a time; the ratio is of medians. Nobody rounds fp32 to TF32; --fp16 puts both sides in half precision.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torchvision
from rich.console import Console

from benchmarks import runtime_contenders as contenders
from benchmarks import runtime_report as report
from benchmarks import runtime_sweeps as sweeps
from benchmarks.runtime_contenders import COMPILED, EAGER, GRAPHS, INT8, OURS, OURS_EAGER, TENSORRT, THEIR_ONNX, Device
from benchmarks.runtime_int8 import quantised, trained_in_int8
from benchmarks.runtime_networks import NETWORKS, Pair, Sample, build_pair, filled_slots, full_bucket, read_pictures, samples_of
from benchmarks.runtime_parts import Peak, cpu_peak, gpu_peak, parts_of, post_processing_share
from export.console import wide_console
from export.pictures import Picture, smear, street
from export.profiling import profile
from model.checkpoint import Checkpoint, save_checkpoint

AIMS = {"mobilenet_v3_large_320_fpn": 3.0, "mobilenet_v3_large_fpn": 2.0, "resnet50_fpn": 1.3}
"""Times torchvision eager on a CPU."""
GPU_AIM = 2.0
INT8_AIMS = {"resnet50_fpn": 2.0}
"""Times its own fp32 on a CPU with VNNI."""
CALIBRATION_SEEDS = (100, 101, 102)
"""Drawn pictures that nobody is timed on."""
QUICK_BUCKET = (64, 96)
PARTS = {"eager": OURS_EAGER, "compile": COMPILED, "onnx": THEIR_ONNX, "int8": INT8, "graphs": GRAPHS, "tensorrt": TENSORRT}
EXAMPLES = """examples:
  python -m benchmarks.runtime                                        three networks on the CPU, sweeps
  python -m benchmarks.runtime --networks resnet50_fpn --pictures COCO/val2017 --limit 8 --weights fasterrcnn_resnet50_fpn_coco.pth
  python -m benchmarks.runtime --checkpoint runs/cells/best.pt --data BCCD --split test     adds int8's AP and the depth of NMS
  python -m benchmarks.runtime --networks resnet50_fpn --checkpoint-out /tmp/r50.pt         then export it in another precision, and:
  python -m benchmarks.runtime --networks resnet50_fpn --file int8=model_repository/r50/1/model.onnx
  python -m benchmarks.runtime --provider cuda --fp16 --networks resnet50_fpn

Writes runtime.json, runtime.md and runtime.png, anew after every part: what was measured before an interruption is kept.
"""


def measure(pair: Pair, device: Device, options: argparse.Namespace, peak: Peak, say: Callable[[str], None]) -> dict[str, Any]:
    """One network: everybody's times, and where those of our graph go."""
    samples = _samples(pair, options)
    without = frozenset(PARTS[name] for name in options.without if name in PARTS)
    to_int8 = partial(quantised, config=pair.ours.config, pictures=_calibration_pictures()) if device.provider == "cpu" else None
    with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
        runs, cannot, graph = contenders.gather(
            pair, device, samples[0], folder=Path(folder), files=dict(options.file), without=without, to_int8=to_int8, progress=say
        )
        if EAGER not in runs or OURS not in runs:
            raise RuntimeError(f"{pair.name}: nothing to compare: {cannot.get(EAGER) or cannot.get(OURS)}")
        seconds = sweeps.in_turns(runs, samples, options.rounds, say)
    middle = {who: float(np.median(values)) for who, values in seconds.items()}
    parts = _parts(graph, samples, device, peak)
    return {
        "network": pair.name,
        "proposals": filled_slots(pair, samples),
        "buckets": [list(sample.images.shape[1:3]) for sample in samples],
        "seconds": middle,
        "fastest": {who: min(values) for who, values in seconds.items()},
        "rounds": seconds,
        "ratio": {who: middle[EAGER] / value for who, value in middle.items()},
        "judged": OURS,
        "aim": AIMS.get(pair.name) if device.provider == "cpu" else GPU_AIM,
        "int8_times_fp32": middle[OURS] / middle[INT8] if INT8 in middle else None,
        "int8_aim": INT8_AIMS.get(pair.name),
        "cannot": cannot,
        "parts": [asdict(part) for part in parts],
        "post_processing": post_processing_share(parts),
    }


def _calibration_pictures() -> list[Picture]:
    return [draw((480, 640), seed=seed) for draw, seed in zip((street, smear, street), CALIBRATION_SEEDS, strict=True)]


def _samples(pair: Pair, options: argparse.Namespace) -> list[Sample]:
    if options.quick:
        pair.theirs.transform.min_size, pair.theirs.transform.max_size = (min(QUICK_BUCKET),), max(QUICK_BUCKET)  # type: ignore[union-attr]
        return [full_bucket(QUICK_BUCKET)]
    return samples_of(pair.ours.config, read_pictures(options.pictures, options.limit))


def _parts(graph: onnx.ModelProto, samples: Sequence[Sample], device: Device, peak: Peak) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="runtime-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(graph, str(path))
        height, width = samples[0].images.shape[1:3]
        ran = profile(path, (height, width), provider=device.provider, runs=3, threads=device.threads)
    return parts_of(graph, ran, peak)


def _named_file(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return f"ours, {name}", Path(path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runtime", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS[:3]), help="which (default: the first three)")
    parser.add_argument("--weights", type=Path, help="torchvision state dict, for a single network (default: random weights that behave)")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="pictures to answer (default: drawn ones)")
    parser.add_argument("--limit", type=int, default=3, help="pictures of a round (default: 3)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every contender (default: all)")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="where everybody runs (default: cpu)")
    parser.add_argument("--fp16", action="store_true", help="half precision, torch's sides and ours (with --provider cuda)")
    parser.add_argument("--file", type=_named_file, action="append", default=[], metavar="NAME=FILE", help="another export of ours")
    parser.add_argument("--without", nargs="+", choices=(*PARTS, "sweeps"), default=[], help="leave out")
    parser.add_argument("--sweep-network", choices=NETWORKS, default=NETWORKS[1], help=f"for the sweeps (default: {NETWORKS[1]})")
    parser.add_argument(
        "--checkpoint", type=Path, help="trained detector of ours, for int8 with its AP, and the depth of NMS; needs --data"
    )
    parser.add_argument("--data", type=Path, help="its data set")
    parser.add_argument("--split", default="test", help="split of the data set (default: test)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further part after so long (default: all parts)")
    parser.add_argument("--checkpoint-out", type=Path, metavar="FILE", help="only write the (first) network's weights as our checkpoint")
    parser.add_argument("--quick", action="store_true", help="tiny pictures and sweeps: shows that everything works, measures nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results (default: benchmarks/results)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.weights and len(options.networks) > 1:
        parser.error("--weights belongs to one network: name it with --networks")
    if bool(options.checkpoint) != bool(options.data):
        parser.error("--checkpoint and --data belong together")
    console = wide_console()
    if options.checkpoint_out:
        return _write_checkpoint(options, console)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # the service does not either
    device = Device(options.provider, options.fp16, options.threads)
    peak = cpu_peak(options.threads) if device.provider == "cpu" else gpu_peak(torch.cuda.get_device_name())
    if peak is None:
        parser.error(f"the peaks of {torch.cuda.get_device_name()} are not known; add them to GPU_PEAKS")
    result = _facts(options, device, peak)
    try:
        with console.status("") as status:
            _run_parts(result, options, device, peak, _teller(console, status.update))
    except KeyboardInterrupt:
        result["note"] += " Interrupted: the parts after the last one shown were not measured."
        _keep(result, options.out)
        console.print(f"interrupted; what was measured is in {options.out}", highlight=False)
        return 130
    _show(result, options.out, console)
    return 0


def _run_parts(result: dict[str, Any], options: argparse.Namespace, device: Device, peak: Peak, say: Callable[[str], None]) -> None:
    """Every part of the benchmark in turn, the most wanted first; the result is written after each."""
    started = time.monotonic()
    for name, part in _parts_to_run(result, options, device, peak, say).items():
        passed = (time.monotonic() - started) / 60
        if result["rows"] and passed > options.minutes:
            result["left_out"].append(name)
            _keep(result, options.out)
            continue
        say(f"{passed:.1f} minutes passed; next: {name}")
        result |= part()
        result["minutes"][name] = round((time.monotonic() - started) / 60 - passed, 2)
        _keep(result, options.out)


def _parts_to_run(
    result: dict[str, Any], options: argparse.Namespace, device: Device, peak: Peak, say: Callable[[str], None]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what measures it and gives the entries of the result that it changes."""

    def network(name: str) -> dict[str, Any]:
        return {"rows": [*result["rows"], measure(build_pair(name, options.weights), device, options, peak, say)]}

    rounds = max(1, options.rounds // 2)
    parts: dict[str, Callable[[], dict[str, Any]]] = {name: partial(network, name) for name in options.networks}
    if options.checkpoint:
        given = (options.checkpoint, options.data, options.split)
        limit = 3 if options.quick else 10_000
        if device.provider == "cpu" and "int8" not in options.without:
            parts["trained network in int8"] = lambda: {"trained": trained_in_int8(*given, device, options.rounds, limit, say)}
        parts["depth of NMS"] = lambda: {"nms_depth": sweeps.nms_depth(*given, limit, say)}
    if "sweeps" not in options.without:
        plan, swept = (sweeps.QUICK if options.quick else sweeps.Plan()), options.sweep_network
        parts["sweeps"] = lambda: {"sweep_network": swept, "sweeps": sweeps.sweep(swept, None, device, plan, rounds, say)}
    return parts


def _teller(console: Console, update: Callable[[str], None]) -> Callable[[str], None]:
    """Progress: one changing line on a terminal, a line each in a log."""
    return update if console.is_terminal else lambda sentence: console.print(sentence, style="dim", highlight=False)


def _facts(options: argparse.Namespace, device: Device, peak: Peak) -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.provider == "cuda" else "CPU",
        "threads": options.threads,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "onnxruntime": ort.__version__,
        "weights": options.weights.name if options.weights else "random, scaled to find many things",
        "peak": f"{peak.macs_per_s / 1e9:.0f} GMAC/s, {peak.bytes_per_s / 1e9:.0f} GB/s ({peak.source})",
        "rows": [],
        "minutes": {},
        "allowed_minutes": options.minutes if options.minutes < float("inf") else None,
        "left_out": [],
        "note": "A quick run on tiny pictures: no figure means anything." if options.quick else "Medians of rounds in turns.",
    }


def _write_checkpoint(options: argparse.Namespace, console: Console) -> int:
    pair = build_pair(options.networks[0], options.weights)
    training = {"dataset": "none", "command": "python -m benchmarks.runtime", "metrics": {}}
    save_checkpoint(options.checkpoint_out, Checkpoint(detector=pair.ours.state_dict(), config=pair.ours.config, training=training))
    console.print(f"wrote {options.checkpoint_out}", highlight=False)
    return 0


def _keep(result: dict[str, Any], folder: Path) -> None:
    if not result["rows"]:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runtime.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "runtime.md").write_text(report.markdown(result))
    report.plot(result, folder / "runtime.png")


def _show(result: dict[str, Any], folder: Path, console: Console) -> None:
    console.print(report.table("one picture at a time", report.speed_rows(result["rows"])))
    console.print(report.table(f"where the time of our graph goes; peaks: {result['peak']}", report.part_rows(result["rows"])))
    if "trained" in result:
        console.print(report.trained_sentence(result["trained"]), highlight=False)
    if result["left_out"]:
        console.print(f"not measured within {result['allowed_minutes']:g} minutes: {', '.join(result['left_out'])}", highlight=False)
    console.print(f"wrote runtime.json, runtime.md and runtime.png in {folder}", highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
