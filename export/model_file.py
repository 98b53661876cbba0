"""What several of export's tools ask of an ONNX file, without torch."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from service.manifest import Manifest, ManifestError, parse_manifest


def read(path: Path) -> tuple[onnx.ModelProto, Manifest]:
    """A file with its manifest.

    Raises:
        ManifestError: it has none, or is no ONNX file.
    """
    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise ManifestError(f"{path} is no ONNX file, or not a whole one") from error
    return model, parse_manifest({entry.key: entry.value for entry in model.metadata_props}, str(path))


def required_inputs(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the inputs that a caller must give."""
    defaults = {initializer.name for initializer in model.graph.initializer}
    return tuple(value.name for value in model.graph.input if value.name not in defaults)


def operator_set(model: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))
