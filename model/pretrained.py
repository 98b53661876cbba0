"""Torchvision's COCO detectors as checkpoints of this project: fetched, or read from a file, and converted key by key.

`python -m model.pretrained resnet50_fpn` writes one. K categories of COCO (80); torchvision's predictors have a row for each of the 90
numbers that COCO gives out, and one for background.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models import detection

from model.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from model.faster_rcnn import FasterRCNN, build_detector
from model.presets import PRESETS
from model.stopping import INTERRUPTED
from model.weights import BOOKKEEPING, WeightsError, fit, load_state

EXAMPLES = """examples:
  python -m model.pretrained resnet50_fpn
  python -m model.pretrained FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1 --out runs/m320.pt
  python -m model.pretrained fasterrcnn_resnet50_fpn_v2 --weights fasterrcnn_resnet50_fpn_v2_coco.pth

The checkpoint goes wherever a trained one does: python -m export, python -m model.evaluate, python -m model.train --init.
Exit status: 0 written, 1 an error, 130 interrupted.
"""
PUBLISHED: dict[str, Any] = {
    "mobilenet_v3_large_320_fpn": detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
    "mobilenet_v3_large_fpn": detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
    "resnet50_fpn": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "resnet50_fpn_v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}
"""Preset -> torchvision's weights for it."""

NORM_EPS = {"resnet50_fpn": 0.0}
"""These weights were trained without an epsilon in the frozen norm, and torchvision sets it to 0 when it loads them."""

NEVER_TRAINED = "N/A"
"""Torchvision's name for the ten numbers that COCO left without a category."""

PREDICTOR = "roi_heads.box_predictor."
SILENCE_S = 30.0
"""A server that sends nothing for this long is given up."""


def load_torchvision(detector: FasterRCNN, state: Mapping[str, Tensor], source: str) -> None:
    """Load the state dict of a torchvision Faster R-CNN, key by key.

    Raises:
        WeightsError: a weight is missing, left over or of another shape, by name.
    """
    renamed = {rename(name, detector): value for name, value in state.items() if not name.endswith(BOOKKEEPING)}
    left_over = sorted(set(renamed) - set(detector.state_dict()))
    if left_over:
        raise WeightsError(f"{source} holds {len(left_over)} weights that {detector.config.architecture} lacks, first {left_over[0]!r}")
    fit(detector, renamed, source)


def rename(name: str, detector: FasterRCNN) -> str:
    """Torchvision's name of a weight -> ours."""
    features = "features." if hasattr(detector.backbone.body, "features") else ""
    rules = [
        (r"^backbone\.body\.", f"backbone.body.{features}"),
        (r"^backbone\.fpn\.inner_blocks\.(\d+)\.", r"backbone.fpn.laterals.\1."),
        (r"^backbone\.fpn\.layer_blocks\.(\d+)\.", r"backbone.fpn.outputs.\1."),
        (r"^rpn\.head\.conv\.(\d+)\.0\.", r"rpn.convs.\1."),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.convs.0.\1"),
        (r"^rpn\.head\.", "rpn."),
        (r"^roi_heads\.box_predictor\.", "head."),
        (r"^roi_heads\.box_head\.(fc\d)\.", r"head.body.\1."),
        (r"^roi_heads\.box_head\.([0-3])\.", r"head.body.convs.\1."),
        (r"^roi_heads\.box_head\.5\.", "head.body.fc."),
    ]
    if detector.config.backbone.norm == "frozen":  # without a norm in the pyramid, torchvision still counts the convolution as number 0
        rules[1:3] = [(pattern + r"(?:0\.)?", ours) for pattern, ours in rules[1:3]]
    for pattern, ours in rules:
        name, found = re.subn(pattern, ours, name)
        if found:
            return name
    return name


class Weights(NamedTuple):
    """A state dict in torchvision's names, and whether it is the one that torchvision publishes."""

    state: Mapping[str, Tensor]
    source: str
    genuine: bool


def preset_of(name: str) -> str:
    """The preset of a network's name, as we, torchvision's builders or its enums spell it.

    Raises:
        WeightsError: torchvision has no COCO weights of this name.
    """
    plain = re.sub(r"(_weights)?(\.coco_v1|\.default)?$", "", name.lower().removeprefix("fasterrcnn_"))
    if plain not in PUBLISHED:
        raise WeightsError(f"torchvision has no COCO weights for {name!r}; expected one of {', '.join(sorted(PUBLISHED))}")
    return plain


def coco_checkpoint(name: str, file: Path | None = None) -> Checkpoint:
    """Torchvision's detector as a checkpoint: our names, the 80 COCO categories.

    Args:
        name: see `preset_of`.
        file: a state dict in torchvision's names; None fetches the published one (or takes it from torch's cache).

    Raises:
        FileNotFoundError: no such file.
        WeightsError: unknown name, weights that cannot be fetched, or that do not fit; a sentence with what to do.
    """
    preset = preset_of(name)
    return convert(preset, fetch(preset) if file is None else read(preset, file))


def fetch(preset: str) -> Weights:
    """The published weights, checked against their hash.

    Raises:
        WeightsError: there is no way to them, or they arrive damaged.
    """
    weights = PUBLISHED[preset]
    try:
        with _impatient():
            return Weights(weights.get_state_dict(progress=True, check_hash=True), str(weights), genuine=True)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another hash than the published one
        reason = getattr(error, "reason", None) or error
        raise WeightsError(
            f"cannot fetch torchvision's {weights} ({type(error).__name__}: {reason}); "
            "fetch that file where there is a network, then give it with --weights FILE"
        ) from error


@contextmanager
def _impatient() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)  # torch's download has no limit of its own
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read(preset: str, file: Path) -> Weights:
    """Weights from a file; torchvision ends a published file's name with the first digits of its hash, by which it is recognised."""
    state = load_state(file, option="--weights")
    published = re.search(r"-([0-9a-f]{8,})\.pth$", PUBLISHED[preset].url)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Weights(state, str(file), genuine=published is not None and digest.startswith(published[1]))


def convert(preset: str, weights: Weights) -> Checkpoint:
    """Weights in torchvision's names -> a checkpoint of the preset.

    Raises:
        WeightsError: they do not fit, by name of the first that does not.
    """
    meta = PUBLISHED[preset].meta
    categories: list[str] = meta["categories"]
    trained = [row for row, category in enumerate(categories) if category != NEVER_TRAINED]
    config = PRESETS[preset](tuple(categories[row] for row in trained[1:])).detector  # row 0 is the background
    if preset in NORM_EPS:
        config = replace(config, backbone=replace(config.backbone, norm_eps=NORM_EPS[preset]))
    detector = build_detector(config)
    load_torchvision(detector, keep_rows(weights.state, trained, len(categories), weights.source), weights.source)
    training: dict[str, Any] = {
        "command": f"python -m model.pretrained {preset}",
        "dataset": f"not known: weights from {Path(weights.source).name}",
    }
    if weights.genuine:
        training["dataset"] = f"COCO train2017, by torchvision: {PUBLISHED[preset]}"
        training["metrics"] = {"published": meta["_metrics"]}
    return Checkpoint(detector.state_dict(), config, training)


def keep_rows(state: Mapping[str, Tensor], rows: Sequence[int], categories: int, source: str) -> dict[str, Tensor]:
    """The state with only these classes in its two predictors, in this order; row 0, the background, stays row 0.

    A class that COCO does not have was never the answer to any box: training only ever pushed its logit down. Without its row, every
    other score is divided by 1 - p, p being the probability that the softmax gave to such classes, which is next to nothing. In exchange
    no detection can come with a class that has no name.

    Args:
        categories: that the predictors of `state` must have.

    Raises:
        WeightsError: they have another number.
    """
    kept = dict(state)
    for layer, values in (("cls_score", 1), ("bbox_pred", 4)):  # values a class
        for part in ("weight", "bias"):
            name = f"{PREDICTOR}{layer}.{part}"
            if name not in state:
                continue  # loading says what is missing
            tensor = state[name]
            if tensor.shape[:1] != (categories * values,):
                raise WeightsError(
                    f"{source}: {name} has shape {tuple(tensor.shape)}, expected {categories * values} rows, "
                    f"{values} for each of COCO's {categories} category numbers"
                )
            kept[name] = tensor.reshape(categories, values, *tensor.shape[1:])[torch.as_tensor(rows)].flatten(0, 1)
    return kept


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.pretrained",
        description="Writes a checkpoint from torchvision's COCO weights of a Faster R-CNN.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=f"{', '.join(sorted(PUBLISHED))}, or torchvision's name of the builder or the weights")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state dict in torchvision's names, instead of fetching one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the checkpoint (default: runs/NAME_coco.pt)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        out = options.out or Path("runs", f"{preset_of(options.name)}_coco.pt")
        checkpoint = coco_checkpoint(options.name, options.weights)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(out, checkpoint)
    except (WeightsError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB); next: python -m export {out} --name coco")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
