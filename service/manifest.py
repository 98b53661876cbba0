"""The manifest: everything the service must know about a model file, as JSON inside that file's own metadata.

Schema version 1. Unknown keys are refused, so a file made by a newer exporter is never half understood.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

METADATA_KEY = "manifest"
SCHEMA_VERSION: Final = 1
REPAIR = "export the checkpoint again with `python -m export CHECKPOINT`"

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""Of a model's name: lower case letters, digits, '.', '_' and '-', a letter or digit first, at most 63."""

PositiveInt = Annotated[int, Field(gt=0)]
Bucket = tuple[int, int]
"""(height, width) of a padded input, both multiples of the stride."""


class ManifestError(ValueError):
    """The file carries no manifest, or one that this service does not understand."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputSpec(_Strict):
    """How an image becomes the graph's input: resized with its aspect kept, then padded to a bucket."""

    short_side: PositiveInt
    long_side: PositiveInt
    stride: PositiveInt = 32
    interpolation: Literal["bilinear-antialias"] = "bilinear-antialias"
    buckets: Annotated[list[Bucket], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_buckets(self) -> Self:
        if self.long_side < self.short_side:
            raise ValueError(f"long_side {self.long_side} is below short_side {self.short_side}")
        for height, width in self.buckets:
            if height <= 0 or width <= 0 or height % self.stride or width % self.stride:
                raise ValueError(f"bucket {height}x{width} is not a positive multiple of the stride {self.stride}")
        return self


class Precision(_Strict):
    """Default element type of the graph, and the parts that were kept in fp32."""

    default: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    islands: list[str] = []


class Training(_Strict):
    """Where the weights come from."""

    dataset: str
    commit: str
    command: str
    metrics: dict[str, float | str | None] = {}


class GoldenDetection(_Strict):
    """One expected detection, in pixels of the golden image."""

    box: tuple[float, float, float, float]
    label: PositiveInt
    score: float


class Tolerance(_Strict):
    """How far an answer may lie from the golden one."""

    box_px: float
    score: float


class GoldenImage(_Strict):
    """An image with its answer, checked before a version is served."""

    image: str
    """PNG, base64."""
    detections: list[GoldenDetection]
    """Every detection with a score above `min_score`, best first."""
    min_score: float
    tolerance: Tolerance


class Manifest(_Strict):
    """What one `model.onnx` says of itself."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]
    class_names: Annotated[list[str], Field(min_length=1)]
    """Without background: label k of the graph is class_names[k - 1]."""
    input: InputSpec
    score_floor: Annotated[float, Field(ge=0, lt=1)]
    """The graph answers with every detection above this score."""
    detections_per_image: PositiveInt
    architecture: str
    precision: Precision = Precision()
    opset: PositiveInt
    nms: Literal["onnx", "dense"]
    training: Training
    parity: dict[str, Any]
    """Summary of the verification report that the export passed."""
    created: datetime
    golden: list[GoldenImage] = []

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names holds a name twice")
        return self


def dump_manifest(manifest: Manifest) -> str:
    """The JSON that belongs under METADATA_KEY."""
    return manifest.model_dump_json()


def parse_manifest(metadata: dict[str, str], source: str) -> Manifest:
    """Read the manifest out of an ONNX file's metadata.

    Args:
        metadata: the file's custom metadata, name to value.
        source: the file, for the message.

    Raises:
        ManifestError: a sentence that says what is wrong and how to export a valid file.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise ManifestError(f"{source}: no {METADATA_KEY!r} in the file's metadata, so it was not made by this project; {REPAIR}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(
            f"{source}: manifest field {where!r}: {first['msg']} (schema version {SCHEMA_VERSION} expected); {REPAIR}"
        ) from error
