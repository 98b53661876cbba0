"""What a comparison of two versions holds, and the bounds that a pipeline may set on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.compare_agreement import ClassAgreement, PictureAgreement
from model.data.records import DetectionSet
from model.metrics.predictions import Prediction
from model.metrics.report import Report
from service.manifest import Manifest

UNKNOWN_AP = -1.0
"""What COCO's evaluation gives where there is no ground truth."""
POINTS = 100.0
"""Average precision is spoken of in hundredths."""


@dataclass(frozen=True)
class Version:
    """One of the two versions, with its answers.

    Attributes:
        label: "A" or "B".
        predictions: one a record, labels among the classes of both versions.
        speed: milliseconds of a picture: prepare and network, p50 and p95.
    """

    label: str
    path: Path
    manifest: Manifest
    provider: str
    sha256: str
    file_bytes: int
    predictions: Sequence[Prediction]
    report: Report
    speed: Mapping[str, float]

    @property
    def title(self) -> str:
        """`A: name@version`."""
        return f"{self.label}: {self.manifest.name}@{self.manifest.version}"


@dataclass(frozen=True)
class Comparison:
    """Two versions on one data set.

    Attributes:
        pictures: agreement on each record, over the score threshold.
        classes: the same by class, then one row for all.
        broken: a sentence for each bound that does not hold.
    """

    a: Version
    b: Version
    dataset: DetectionSet
    score_threshold: float
    pictures: tuple[PictureAgreement, ...]
    classes: tuple[ClassAgreement, ...]
    broken: tuple[str, ...] = ()

    @property
    def versions(self) -> tuple[Version, Version]:
        return self.a, self.b

    @property
    def differing(self) -> int:
        """Pictures on which a client sees another set of objects."""
        return sum(one.differs for one in self.pictures)

    def class_ap(self, name: str) -> tuple[float | None, float | None]:
        """A's and B's AP of a class; None where there is no ground truth, or where the version does not know the class."""
        return tuple(  # type: ignore[return-value]
            version.report.coco.per_class[name]["AP"]
            if name in version.manifest.class_names and version.report.coco.per_class[name]["AP"] != UNKNOWN_AP
            else None
            for version in self.versions
        )


@dataclass(frozen=True)
class Bounds:
    """How much AP may fall from A to B, in points (hundredths): over all classes, and of any one that A knows. None: no bound."""

    drop: float | None = None
    class_drop: float | None = None

    def broken(self, comparison: Comparison) -> tuple[str, ...]:
        """A sentence for each bound that does not hold.

        Raises:
            ValueError: a bound is set and the data set has no box, so that nothing can be said.
        """
        a, b = comparison.a.report.ap, comparison.b.report.ap
        if UNKNOWN_AP in (a, b) and (self.drop is not None or self.class_drop is not None):
            raise ValueError(f"{comparison.dataset.name} has no box that counts, so AP cannot be held against a bound")
        found = []
        if self.drop is not None and (a - b) * POINTS > self.drop:
            found.append(f"AP falls by {(a - b) * POINTS:.2f} points, from {a:.4f} to {b:.4f}; {self.drop:g} are allowed")
        for name in comparison.dataset.class_names if self.class_drop is not None else ():
            before, after = comparison.class_ap(name)
            if before is not None and self.class_drop is not None and (before - (after or 0.0)) * POINTS > self.class_drop:
                reached = "B does not know it" if after is None else f"to {after:.4f}"
                found.append(
                    f"AP of {name} falls by {(before - (after or 0.0)) * POINTS:.2f} points, from {before:.4f} {reached}; "
                    f"{self.class_drop:g} are allowed"
                )
        return tuple(found)
