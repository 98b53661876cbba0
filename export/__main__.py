"""Makes a model version that the service can serve out of a training checkpoint, and proves that it answers as the network does."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from export import compare, engines, inspect
from export.accuracy import GateFailed
from export.calibration import PICTURE_TYPES, calibration_files, picture_files
from export.card import CardFacts
from export.console import Parser, error_console, interrupted, interruptible, positive, wide_console
from export.graph import DEFAULT_OPSET, OPSETS, ExportError, GraphOptions
from export.job import Job, export
from export.pictures import Picture
from export.precision import FIRST_OPSET, KINDS
from export.source import checkpoint_file
from export.target import REPOSITORY
from export.version import VersionExistsError
from model.checkpoint import CheckpointError, load_checkpoint
from model.data.formats import READERS, open_dataset
from model.data.images import ImageError, read_rgb
from model.data.records import DataError, DetectionSet
from model.overrides import add_detector_settings
from service.errors import DetectorError
from service.manifest import ManifestError
from service.runtime import RuntimeLoadError

COMMANDS = """commands (each has its own --help):
  python -m export CHECKPOINT --name NAME ...      this one: export, prove, publish
  python -m export inspect FILE                    what is in a version: classes, cost, memory, parity, provenance
  python -m export compare A B DATA                two versions side by side before a roll-out
  python -m export build-engines FILE              TensorRT engines, offline
  python -m export.evaluate FILE_OR_URL --data PATH   AP, errors and speed of a version or of a running service
  python -m export.audit FILE                      where every node runs, and which copies there are"""

EXAMPLES = """examples:
  python -m export runs/cells/best.pt --name blood-cells --repository model_repository
  python -m export runs/cells/best.pt --name blood-cells --repository model_repository --data VOC_FOLDER --split test
  python -m export torchvision:fasterrcnn_mobilenet_v3_large_320_fpn --name coco
  python -m export torchvision:fasterrcnn_resnet50_fpn --name coco --weights fasterrcnn_resnet50_fpn_coco.pth
  python -m export runs/cells/best.pt --name blood-cells --precision fp16 --data VOC_FOLDER
  python -m export runs/cells/best.pt --name blood-cells --precision int8 --calibrate VOC_FOLDER --data VOC_FOLDER
  python -m export inspect model_repository/blood-cells/1/model.onnx
  python -m export compare blood-cells@1 blood-cells@2 VOC_FOLDER --max-drop 0.5
  python -m export.evaluate model_repository/blood-cells/1/model.onnx --data VOC_FOLDER --split test
  python -m export.audit model_repository/blood-cells/1/model.onnx --provider cpu
  python -m export build-engines model_repository/blood-cells/1 --device 0 --max-batch 16

The version folder holds model.onnx (manifest and golden images inside), README.md (model card), parity.md (verification report) and
config.pbtxt (for Triton). It appears in one step after every gate has held; versions are numbered and never overwritten.
Exit status: 0 published, 1 an error, 2 a gate failed, 64 a mistake on the command line, 130 interrupted; in all but the first case
nothing is left behind.
"""
KNOWN = (
    ExportError,
    CheckpointError,
    VersionExistsError,
    DataError,
    ImageError,
    DetectorError,
    ManifestError,
    RuntimeLoadError,
    OSError,
    ValueError,
)
"""What ends with one sentence instead of a traceback."""
CALIBRATION_PICTURES = 64
BELONGS_TO = {
    "split": ("data",),
    "format": ("data", "calibrate"),
    "skip_bad": ("data", "calibrate"),
    "calibrate_split": ("calibrate",),
    "calibrate_pictures": ("calibrate",),
}
"""Options that say how another is read: alone they are a slip, and without --data one that leaves the AP unmeasured."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m export",
        description=f"{__doc__}\n\n{COMMANDS}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="best.pt or last.pt of a training run, or torchvision:NAME for torchvision's COCO weights")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="with torchvision:NAME: its state dict, instead of fetching it")
    parser.add_argument("--name", required=True, help="model's name: lower case letters, digits, '.', '_', '-'")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help=f"model repository (default: {REPOSITORY})")
    parser.add_argument("--version", type=positive, help="version number (default: the next free one)")
    add_detector_settings(parser)
    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--nms",
        choices=("onnx", "dense"),
        default="onnx",
        help="onnx: NonMaxSuppression, fastest on CPUs; dense: matrix form without a host sync, for GPUs (default: onnx)",
    )
    graph.add_argument(
        "--opset", type=int, choices=OPSETS, help=f"ONNX operator set (default: {DEFAULT_OPSET}; bf16: {FIRST_OPSET['bf16']})"
    )
    graph.add_argument(
        "--precision",
        choices=KINDS,
        default="fp32",
        help="fp16: for GPUs; int8: for CPUs with VNNI; bf16: for GPUs, exported on one; what stays in fp32 is in the card (default: fp32)",
    )
    int8 = parser.add_argument_group("int8")
    int8.add_argument("--calibrate", type=Path, metavar="PATH", help="folder of pictures, or data set, to measure activations on")
    int8.add_argument("--calibrate-split", metavar="SPLIT", help="the data set's split to calibrate on (default: train)")
    int8.add_argument(
        "--calibrate-pictures",
        type=positive,
        metavar="N",
        help=f"this many, evenly spread over what is there (default: {CALIBRATION_PICTURES})",
    )
    proof = parser.add_argument_group("proof")
    proof.add_argument(
        "--provider",
        choices=("cpu", "cuda"),
        help="where the file is verified and AP measured; fp16 that GPUs will serve is best verified on one (default: cpu; bf16: cuda)",
    )
    proof.add_argument("--pictures", type=Path, metavar="FOLDER", help="also verify on the pictures in this folder")
    proof.add_argument(
        "--data", type=Path, metavar="PATH", help="data set: AP of the file is held against the network's and goes into the card"
    )
    proof.add_argument(
        "--allow-unmeasured",
        action="store_true",
        help="publish fp16, bf16 or int8 without --data; manifest and card say that it is unproven",
    )
    proof.add_argument("--format", choices=sorted(READERS), help="the data set's format; guessed if left out")
    proof.add_argument("--split", help="the data set's split (default: test)")
    proof.add_argument("--skip-bad", action="store_true", help="leave faulty records of the data set out")
    card = parser.add_argument_group("model card")
    card.add_argument("--description", default="", help="one sentence: what it finds, in what pictures")
    card.add_argument("--licence", default="", help="licence of the weights")
    card.add_argument("--data-licence", default="", help="licence and origin of the training pictures")
    card.add_argument("--training-time", default="", help="hardware and duration of the training")
    card.add_argument("--training-command", default="", help="stands for the command in the checkpoint, if that names private folders")
    card.add_argument("--known-failure", action="append", default=[], metavar="SENTENCE", help="may be given several times")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] == "inspect":
        return inspect.main(given[1:])
    if given and given[0] == "compare":
        return compare.main(given[1:])
    if given and given[0] == "build-engines":
        return engines.main(given[1:])
    parser = build_parser()
    options = parser.parse_args(given)
    stray = stray_option(options)
    if stray is not None:
        parser.error(stray)
    console, errors = wide_console(), error_console()
    try:
        with interruptible(), checkpoint_file(options.checkpoint, options.weights) as options.checkpoint:
            export(_job(options, f"python -m export {shlex.join(given)}"), console)
    except GateFailed as verdict:
        errors.print(f"error: the file does not answer as the network does; nothing was published\n{verdict}")
        return 2
    except KNOWN as error:
        errors.print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return interrupted("nothing was published")
    return 0


def stray_option(options: argparse.Namespace) -> str | None:
    """What is wrong with an option that would have no effect; None where each has one."""
    for name, owners in BELONGS_TO.items():
        if getattr(options, name) and not any(getattr(options, owner) for owner in owners):
            needed = " or ".join(f"--{owner} PATH" for owner in owners)
            return f"--{name.replace('_', '-')} says how {needed} is read, which was not given"
    if options.calibrate and options.precision != "int8":
        return f"--calibrate belongs to --precision int8, not {options.precision}"
    if options.allow_unmeasured and options.data:
        return "--allow-unmeasured stands for --data PATH: give one of the two"
    if options.allow_unmeasured and options.precision == "fp32":
        return "--allow-unmeasured belongs to fp16, bf16 and int8: fp32 is held against the network box by box and needs no data set"
    return None


def _job(options: argparse.Namespace, command: str) -> Job:
    # its class names are needed to read a data set; it is loaded once, and only where it must be before the request was checked
    loaded = load_checkpoint(options.checkpoint, options.settings) if options.data or options.calibrate else None
    names = loaded.config.class_names if loaded else ()
    return Job(
        checkpoint=options.checkpoint,
        loaded=loaded,
        name=options.name,
        repository=options.repository,
        version=options.version,
        settings=options.settings,
        graph=GraphOptions(
            nms=options.nms, opset=options.opset or max(DEFAULT_OPSET, FIRST_OPSET[options.precision]), precision=options.precision
        ),
        facts=CardFacts(
            description=options.description,
            licence=options.licence,
            data_licence=options.data_licence,
            training_time=options.training_time,
            known_failures=tuple(options.known_failure),
        ),
        pictures=_pictures(options.pictures) if options.pictures else (),
        dataset=_dataset(options, names) if options.data else None,
        calibration=_calibration(options, names) if options.calibrate else (),
        verify_on=options.provider,
        allow_unmeasured=options.allow_unmeasured,
        command=command,
        training_command=options.training_command,
    )


def _dataset(options: argparse.Namespace, names: tuple[str, ...]) -> DetectionSet:
    return open_dataset(options.data, options.split or "test", data_format=options.format, class_names=names, skip_bad=options.skip_bad)


def _calibration(options: argparse.Namespace, names: tuple[str, ...]) -> list[Path]:
    return calibration_files(
        options.calibrate,
        options.calibrate_pictures or CALIBRATION_PICTURES,
        split=options.calibrate_split or "train",
        data_format=options.format,
        class_names=names,
        skip_bad=options.skip_bad,
    )


def _pictures(folder: Path) -> list[Picture]:
    paths = picture_files(folder)
    if not paths:
        raise ValueError(f"no pictures ({', '.join(sorted(PICTURE_TYPES))}) in {folder}")
    return [read_rgb(path) for path in paths]


if __name__ == "__main__":
    raise SystemExit(main())
