"""What the activations of a network are on given pictures: the ranges that int8 maps to 256 steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto

from export.pictures import Picture
from model.data.formats import open_dataset
from model.data.images import ImageError, read_rgb
from service.images import assemble, prepare_pixels
from service.manifest import InputSpec
from service.runtime import INPUTS

PICTURE_TYPES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

Range = tuple[float, float]


class CalibrationError(ValueError):
    """What was given cannot calibrate; a sentence for the user."""


@dataclass(frozen=True)
class Calibration:
    """What the activations were on the pictures that were given.

    Attributes:
        ranges: smallest and largest value of each tensor, by name.
        pictures: how many.
    """

    ranges: Mapping[str, Range]
    pictures: int


def picture_files(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself, by name."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURE_TYPES)


def check_pictures(paths: Sequence[Path]) -> None:
    """Decode each once, for before the minutes of tracing.

    Raises:
        CalibrationError: some cannot be used; names the first.
    """
    faults = []
    for path in paths:
        try:
            read_rgb(path)
        except ImageError as fault:
            faults.append(f"{path}: {fault.kind}: {fault.sentence}")
    if faults:
        raise CalibrationError(f"{len(faults)} of {len(paths)} pictures to calibrate on cannot be used, the first: {faults[0]}")


def calibration_files(
    source: Path, count: int, *, split: str = "train", data_format: str | None = None, class_names: Sequence[str], skip_bad: bool = False
) -> list[Path]:
    """At most `count` pictures, evenly spread over what is there.

    Args:
        source: a folder of pictures, or a data set, of which `split` is taken.
        class_names: of the network.

    Raises:
        DataError: the data set is faulty.
        CalibrationError: the folder does not exist.
    """
    if not source.exists():
        raise CalibrationError(f"--calibrate: there is no {source}; give a folder of pictures or a data set")
    found = picture_files(source) if source.is_dir() else []
    if not found:
        dataset = open_dataset(source, split, data_format=data_format, class_names=tuple(class_names), skip_bad=skip_bad)
        found = [record.path for record in dataset.records]
    if len(found) <= count:
        return found
    return [found[round(index)] for index in np.linspace(0, len(found) - 1, count)]


def read_pictures(paths: Iterable[Path]) -> Iterator[Picture]:
    """One after another, so that only one is held."""
    return (read_rgb(path) for path in paths)


def calibrate(
    model: onnx.ModelProto,
    nodes: Iterable[NodeProto],
    pictures: Iterable[Picture],
    spec: InputSpec,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Run the fp32 graph on pictures and note the range of every tensor that will be quantised.

    Args:
        pictures: RGB uint8 [H, W, 3] of any size; prepared as the service prepares them.
        progress: called with the number of pictures done.

    Raises:
        CalibrationError: no picture, or a range that is not finite.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    names = sorted({name for node in nodes for name in (*activations(node, constants), *node.output)})
    session = _observing_session(model, names)
    lowest, highest = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    count = 0
    for count, picture in enumerate(pictures, start=1):
        feed = dict(zip(INPUTS, assemble([prepare_pixels(picture, spec)]), strict=True))
        values: list[NDArray[np.float32]] = session.run(names, feed)
        lowest = np.minimum(lowest, [value.min() for value in values])
        highest = np.maximum(highest, [value.max() for value in values])
        progress(count)
    if count == 0:
        raise CalibrationError("int8 needs pictures to calibrate on, and none were given; use --calibrate")
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        broken = [name for name, low, high in zip(names, lowest, highest, strict=True) if not np.isfinite(high - low)]
        raise CalibrationError(f"activations are not finite on the calibration pictures: {broken[:5]}; the network is broken")
    return Calibration({name: (float(a), float(b)) for name, a, b in zip(names, lowest, highest, strict=True)}, count)


def activations(node: NodeProto, constants: Mapping[str, onnx.TensorProto]) -> list[str]:
    """Inputs that carry pictures' data: not weights, bounds or sizes."""
    given = node.input if node.op_type == "Add" else node.input[:1]
    return [name for name in given if name and name not in constants]


def _observing_session(model: onnx.ModelProto, names: Sequence[str]) -> ort.InferenceSession:
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    present = {output.name for output in observed.graph.output}
    for name in names:
        if name not in present:
            observed.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(observed.SerializeToString(), options, providers=["CPUExecutionProvider"])
