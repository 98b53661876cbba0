"""Trains a detector: `python -m model.train --preset NAME --data PATH --out RUN`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import CheckpointError, load_checkpoint
from model.config import config_from_dict, to_dict
from model.data.formats import READERS, open_dataset
from model.data.records import DataError, DetectionSet
from model.faster_rcnn import FasterRCNN, build_detector
from model.overrides import with_settings
from model.presets import PRESETS, Preset
from model.processes import Processes, start_processes, stop_processes
from model.random_state import seed_everything
from model.run_folder import RunFolder, command_line, environment, git_commit
from model.stopping import INTERRUPTED
from model.trainer import Outcome, Trainer, TrainingError
from model.training import train_config_from_dict

RANDOM_START = (
    "warning: every layer starts from random weights, which takes far more pictures and epochs than a backbone that has learned ImageNet; "
    "give its torchvision state dict by --backbone-weights FILE, or a detector's checkpoint by --init"
)

EXAMPLES = """examples:
  python -m model.train --preset mobilenet_v2_fpn --data VOC_FOLDER --backbone-weights mobilenet_v2.pth --out runs/cells
  python -m model.train --preset mobilenet_v2_fpn --data COCO_FOLDER --train-split train2017 --val-split val2017 --out runs/coco \\
      --set training.batch_size=16 --set training.lr=0.02 --set detector.input.short_side=480
  python -m model.train --out runs/cells --resume
  torchrun --nproc-per-node 4 -m model.train --preset mobilenet_v2_fpn --data VOC_FOLDER --out runs/cells --resume-if-present
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.train", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run: checkpoints, metrics, pictures, summary")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out exactly where it stopped; needs no other option")
    parser.add_argument(
        "--resume-if-present",
        action="store_true",
        help="--resume where --out holds a checkpoint, else start anew: one command for jobs that are restarted (torchrun, Kubernetes)",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="network and recipe to start from")
    parser.add_argument("--data", type=Path, metavar="PATH", help="folder of the data set")
    parser.add_argument("--format", choices=sorted(READERS), help="its format; guessed from the folder if left out")
    parser.add_argument("--train-split", default="train", help='split to train on; several are joined with "+" (default: train)')
    parser.add_argument(
        "--val-split", default="val", help='split to choose the best checkpoint on; "none" validates nothing (default: val)'
    )
    parser.add_argument("--classes", metavar="A,B,...", help="class names in label order (default: those of the training split)")
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out and list them, instead of stopping at them")
    parser.add_argument("--backbone-weights", type=Path, metavar="FILE", help="ImageNet weights of the backbone, a torchvision state dict")
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="start from a detector's weights; layers of another shape start anew"
    )
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="change one value, such as training.lr=0.005"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads of the network (default: all)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and the outcome")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        outcome = train(options)
    except (DataError, TrainingError, CheckpointError, OSError, ValueError) as error:  # OSError: a full disk, too
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    finally:
        stop_processes()
    if outcome.message:
        print(outcome.message)
    return 0 if outcome.finished else INTERRUPTED


def _sentence(error: Exception) -> str:
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} cannot be written or read by this user; give a folder of your own with --out, or change its rights"
    return str(error)


def train(options: argparse.Namespace) -> Outcome:
    """Starts or resumes the run that the options describe.

    Raises:
        DataError, TrainingError, CheckpointError, FileNotFoundError, ValueError: with a sentence for the user.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    processes = start_processes(options.device)
    folder = RunFolder(options.out)
    # the leading process decides: on a network file system the others may see its file later
    resume = options.resume or (options.resume_if_present and processes.gather(folder.last.is_file())[0])
    values = _saved_values(folder) if resume else _new_values(options, folder)
    train_set, val_set = _open(values["data"])
    values = with_settings(values, options.settings) if resume else _with_preset(values, train_set, options.settings)
    trainer = _build_trainer(values, folder, processes, (train_set, val_set), quiet=options.quiet)
    if resume:
        trainer.restore(load_checkpoint(folder.last))
    elif processes.leads:
        folder.create()
        folder.write_json("config.json", values)
        folder.write_json("environment.json", environment())
    if not options.quiet and processes.leads:
        _announce(values, train_set, val_set, trainer)
        if not (resume or values["backbone_weights"] or values["init"]):
            print(RANDOM_START, file=sys.stderr)
    outcome = trainer.run()
    folder.close()
    return outcome


def _new_values(options: argparse.Namespace, folder: RunFolder) -> dict[str, Any]:
    missing = [name for name in ("preset", "data") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"--{' and --'.join(missing)} missing; presets: {', '.join(sorted(PRESETS))}; or --resume to go on with a run")
    if folder.last.exists():
        raise ValueError(f"{folder.path} already holds a run; go on with it by --resume (or --resume-if-present), or give another --out")
    data = {
        "path": str(options.data),
        "format": options.format,
        "train_split": options.train_split,
        "val_split": None if options.val_split == "none" else options.val_split,
        "classes": options.classes.split(",") if options.classes else None,
        "skip_bad": options.skip_bad,
    }
    weights = {"backbone_weights": options.backbone_weights, "init": options.init}
    return {"preset": options.preset, "data": data, **{key: str(value) if value else None for key, value in weights.items()}}


def _saved_values(folder: RunFolder) -> dict[str, Any]:
    if not folder.last.is_file() or not (folder.path / "config.json").is_file():
        raise ValueError(f"{folder.path} holds no run to resume; expected config.json and last.pt")
    return folder.read_json("config.json")


def _open(data: dict[str, Any]) -> tuple[DetectionSet, DetectionSet | None]:
    common = {"data_format": data["format"], "skip_bad": data["skip_bad"]}
    train_set = open_dataset(Path(data["path"]), data["train_split"], class_names=data["classes"], **common)
    if data["val_split"] is None:
        return train_set, None
    return train_set, open_dataset(Path(data["path"]), data["val_split"], class_names=train_set.class_names, **common)


def _with_preset(values: dict[str, Any], train_set: DetectionSet, settings: Sequence[str]) -> dict[str, Any]:
    preset = PRESETS[values["preset"]](train_set.class_names)
    return with_settings({**values, **preset_values(preset)}, settings)


def preset_values(preset: Preset) -> dict[str, Any]:
    """A preset as plain values, which --set changes and config.json stores."""
    return {"detector": to_dict(preset.detector), "training": dataclasses.asdict(preset.training)}


def _build_trainer(
    values: dict[str, Any], folder: RunFolder, processes: Processes, splits: tuple[DetectionSet, DetectionSet | None], *, quiet: bool
) -> Trainer:
    config = train_config_from_dict(values["training"])
    seed_everything(config.seed)
    backbone_weights = Path(values["backbone_weights"]) if values["backbone_weights"] else None
    detector = build_detector(config_from_dict(values["detector"]), backbone_weights)
    if values["init"]:
        _load_matching(detector, Path(values["init"]), print if not quiet and processes.leads else lambda _: None)
    facts = {"dataset": splits[0].name, "command": command_line(), "commit": git_commit(), "preset": values["preset"]}
    return Trainer(detector, splits[0], splits[1], config, folder, processes, facts=facts, quiet=quiet)


def _load_matching(detector: FasterRCNN, path: Path, say: Callable[[str], None]) -> None:
    """Takes over every tensor of the same name and shape, and names the rest."""
    state = detector.state_dict()
    loaded = load_checkpoint(path).detector
    matching = {name: tensor for name, tensor in loaded.items() if name in state and state[name].shape == tensor.shape}
    if not matching:
        raise ValueError(f"{path}: none of its {len(loaded)} tensors fits this detector; use the preset it was trained with")
    detector.load_state_dict(matching, strict=False)
    anew = sorted(set(state) - set(matching))
    say(f"took {len(matching)} tensors from {path}; starting anew: {', '.join(anew) or 'none'}")


def _announce(values: dict[str, Any], train_set: DetectionSet, val_set: DetectionSet | None, trainer: Trainer) -> None:
    parameters = sum(parameter.numel() for parameter in trainer.learner.detector.parameters())
    print(f"{values['preset']}: {parameters / 1e6:.1f} M parameters, {len(train_set.class_names)} classes, on {trainer.processes.device}")
    for part in filter(None, (train_set, val_set)):
        print(f"{part.name}: {len(part)} pictures, {sum(len(record.labels) for record in part.records)} boxes, {len(part.skipped)} skipped")
        for fault in part.skipped:
            print(f"  skipped {fault}")


if __name__ == "__main__":
    raise SystemExit(main())
