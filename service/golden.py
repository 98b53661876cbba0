"""Golden images: pictures with known answers that a model file carries, so that a version proves itself before it serves.

N detections found, G expected ones.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.images import ImageLimits, assemble, prepare, to_original_frame
from service.manifest import GoldenImage
from service.runtime import Runtime

GOLDEN_LIMITS = ImageLimits(max_bytes=4 * 1024 * 1024, max_pixels=4_000_000)


class GoldenMismatch(RuntimeError):
    """A version answers its own golden image differently from the export: a wrong file, runtime or device."""


@dataclass(frozen=True, slots=True)
class Found:
    """Detections of one picture, boxes [N, 4] xyxy in the original frame."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def check_golden(runtime: Runtime) -> None:
    """Run every golden image of the manifest.

    Raises:
        GoldenMismatch: says which image and which detection differ, and by how much is allowed.
    """
    for index, golden in enumerate(runtime.manifest.golden):
        difference = compare(golden, _detect(runtime, golden))
        if difference is not None:
            raise GoldenMismatch(
                f"golden image {index}: {difference}; export the checkpoint again, or look at the device and its libraries"
            )


def _detect(runtime: Runtime, golden: GoldenImage) -> Found:
    prepared = prepare(base64.b64decode(golden.image), runtime.manifest.input, GOLDEN_LIMITS)
    detections = runtime.run(*assemble([prepared]))
    count = int(detections.num_detections[0])
    boxes = to_original_frame(detections.boxes[0, :count], prepared)
    return Found(boxes, detections.scores[0, :count], detections.labels[0, :count])


def compare(golden: GoldenImage, found: Found) -> str | None:
    """The first difference as words, or None. Detections whose score lies within the tolerance of `min_score` may be missing or extra."""
    left = set(range(len(found.scores)))
    for expected in golden.detections:
        match = next(
            (
                i
                for i in sorted(left)
                if found.labels[i] == expected.label
                and abs(float(found.scores[i]) - expected.score) <= golden.tolerance.score
                and np.abs(found.boxes[i] - np.array(expected.box)).max() <= golden.tolerance.box_px
            ),
            None,
        )
        if match is not None:
            left.remove(match)
        elif expected.score > golden.min_score + golden.tolerance.score:
            return f"expected label {expected.label} with score {expected.score:.3f} at {_shown(expected.box)}, not found"
    for i in sorted(left):
        if found.scores[i] > golden.min_score + golden.tolerance.score:
            return f"found label {found.labels[i]} with score {found.scores[i]:.3f} at {_shown(found.boxes[i])}, not expected"
    return None


def _shown(box: object) -> str:
    return "[" + ", ".join(f"{side:.1f}" for side in np.asarray(box).tolist()) + "]"
