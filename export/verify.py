"""The proof that an exported file answers as the network it came from: run by every export, recorded in the file's own manifest.

B pictures of a batch, H and W the bucket, D detections of a picture. Boxes in pixels of the input frame.
Both sides get the same pixels, through the service's own preprocessing and the service's own runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export import pictures
from export.agreement import Tally, answer_of, compare
from export.pictures import Picture
from export.stability import judge, rivals_of
from model.faster_rcnn import FasterRCNN
from service.images import Prepared, assemble, prepare_pixels
from service.manifest import Bucket, InputSpec, Manifest
from service.runtime import Detections, Runtime

FULL_ANSWER = 100
"""Detections in one picture that the proof must have seen; D of a network that never gives as many."""
BATCH_SIZES = (1, 2, 3, 7)  # the graph is traced with another batch size than most of these, on a shape that is no bucket


@dataclass(frozen=True)
class Gates:
    """Largest differences to eager PyTorch in fp32 that an export may show; what is None is reported and not gated.

    Attributes:
        box_px, score: over detections that both sides give.
        unmatched_score: a detection of one side alone must lie below; the graph's own floor is 0.05.
        undecided_share: of detections that rounding alone decides, and that are therefore not compared.
        matched_share: of the reference's detections that must have a partner.
        full_share: of a full answer that must agree in some picture: what shows nothing proves nothing.
    """

    box_px: float | None = 1e-3
    score: float | None = 1e-4
    unmatched_score: float | None = 0.06
    undecided_share: float | None = 0.02
    matched_share: float | None = None
    full_share: float = 0.9


FREE = Gates(None, None, None, None, full_share=0.5)
"""Of a reduced precision: every answer must keep the contract, its distance is reported, and AP on real pictures decides."""
BATCH_ALONE = Gates(2.0, 0.05, None, None, matched_share=0.95)
"""Of a reduced precision against itself, in a batch and alone: a device may round otherwise there, so a few close calls may flip."""


@dataclass(frozen=True)
class Case:
    """One batch to compare on."""

    name: str
    batch: tuple[Prepared, ...]


@dataclass(frozen=True)
class CaseResult:
    """One row of the report."""

    name: str
    bucket: Bucket
    batch_size: int
    detections: int
    tally: Tally
    problems: tuple[str, ...] = ()
    gates: Gates | None = None
    """Where the row has gates of its own."""


@dataclass(frozen=True)
class Report:
    """All rows, with the gates they were held against."""

    gates: Gates
    rows: tuple[CaseResult, ...]
    reference: str = field(default_factory=lambda: f"PyTorch {torch.__version__}, eager, greedy NMS")
    provider: str = "cpu"
    """Where the file ran."""
    full_answer: int = FULL_ANSWER
    """Detections of a full answer of this network."""
    without_floor: bool = False
    """Whether the fullest picture was seen through a copy of the file that has no score floor."""

    @property
    def total(self) -> Tally:
        """The rows added up."""
        return sum((row.tally for row in self.rows), Tally())

    @property
    def failures(self) -> list[str]:
        """One sentence for every broken gate; empty if the export may be published."""
        return self.differences if self.is_seen else [*self.differences, self._unseen()]

    @property
    def differences(self) -> list[str]:
        """The same of what was seen."""
        sentences = [sentence for row in self.rows for sentence in _broken(row, self.gates)]
        own = [row for row in self.rows if row.gates is None]
        detections, undecided = sum(row.detections for row in own), sum(row.tally.undecided for row in own)
        share = self.gates.undecided_share
        if share is not None and undecided > share * detections:
            sentences.append(f"rounding decides {undecided} of {detections} detections, allowed {share:.0%}")
        return sentences

    @property
    def fullest(self) -> int:
        """Detections on which both sides agree in the picture with most of them."""
        return max((row.tally.matched - row.tally.undecided for row in self.rows if row.batch_size == 1), default=0)

    @property
    def is_seen(self) -> bool:
        """Whether some picture shows as many detections as the proof needs."""
        return self.fullest >= self.gates.full_share * self.full_answer

    @property
    def is_full(self) -> bool:
        """Whether some picture shows a full answer, most of which agrees."""
        return self.is_seen and any(row.detections >= self.full_answer for row in self.rows if row.batch_size == 1)

    def _unseen(self) -> str:
        floor = ", even without the score floor" if self.without_floor else ""
        return (
            f"too little was seen: at most {self.fullest} detections in one picture on which both sides agree{floor}, and the proof needs "
            f"{math.ceil(self.gates.full_share * self.full_answer)}; train the network, or verify on pictures that it finds objects in: "
            "--pictures FOLDER"
        )

    @property
    def failed_rows(self) -> list[CaseResult]:
        """The rows that broke a gate."""
        return [row for row in self.rows if _is_broken(row, self.gates)]

    def summary(self) -> dict[str, Any]:
        """What the manifest keeps."""
        total = self.total
        return {
            "passed": not self.failures,
            "reference": self.reference,
            "provider": self.provider,
            "cases": len(self.rows),
            "pictures": sum(row.batch_size for row in self.rows),
            "detections": sum(row.detections for row in self.rows),
            "matched": total.matched,
            "missed": total.missed,
            "extra": total.extra,
            "top_unmatched_score": total.top_unmatched,
            "ties_at_cut": total.at_cut,
            "undecided": total.undecided,
            "fullest_picture": self.fullest,
            "without_floor": self.without_floor,
            "max_box_px": total.worst_box_px,
            "max_score": total.worst_score,
            "gates": asdict(self.gates),
        }


def verify(
    detector: FasterRCNN,
    runtime: Runtime,
    *,
    gates: Gates | None = None,
    extra_pictures: Sequence[Picture] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Compare the file behind `runtime` with the network, case by case.

    Args:
        detector: in eval mode, on the CPU, with greedy NMS.
        extra_pictures: RGB uint8 [H, W, 3] of any size, compared as well, one by one.
        progress: told the name of every case as it starts.
    """
    gates = gates or Gates()
    manifest = runtime.manifest
    rows: list[CaseResult] = []
    convicted = False  # one difference that rounding does not explain is enough: no more shaking after it
    for case in cases(manifest.input, extra_pictures):
        progress(f"{case.name}, batch of {len(case.batch)}")
        rows.append(against_eager(detector, runtime, case, gates, shake=not convicted))
        convicted = convicted or _is_broken(rows[-1], gates)
    mixed = mixed_batch(manifest.input, max(BATCH_SIZES))
    progress("padding content")
    rows.append(_padding_content(runtime, mixed))
    progress("batch against singles")
    rows.append(batch_against_singles(runtime, mixed, gates))
    return Report(gates, tuple(rows), provider=runtime.provider, full_answer=min(FULL_ANSWER, manifest.detections_per_image))


def cases(spec: InputSpec, extra_pictures: Sequence[Picture] = ()) -> Iterator[Case]:
    """Batches 1, 2, 3, 7 of mixed pictures; awkward pictures; every bucket, one after another; given pictures."""
    for size in BATCH_SIZES:
        yield Case("mixed pictures", mixed_batch(spec, size))
    hw = usual_hw(spec)
    awkward = {
        "black": pictures.blank(hw, 0),
        "white": pictures.blank(hw, 255),
        "noise": pictures.noise(hw, seed=5),
        "one-pixel object": pictures.one_pixel(hw),
        "many objects": pictures.smear(hw, seed=6, cells=160),
        "many blocks": pictures.street(hw, seed=7, blocks=90),
        "tiny picture": pictures.smear((9, 13), seed=8, cells=3),
    }
    for name, picture in awkward.items():
        yield Case(name, (prepare_pixels(picture, spec),))
    yield Case("one-pixel picture", (in_bucket(pictures.blank((1, 1), 128), spec.buckets[-1]),))
    yield Case("no picture at all", (in_bucket(pictures.blank((0, 0), 0), spec.buckets[-1]),))  # certain to give zero detections
    for index, bucket in enumerate([*spec.buckets, spec.buckets[0]]):  # and back to the first: no state may linger
        odd = (bucket[0] - 1 - 2 * (index % 3), bucket[1] - 3 - 2 * (index % 5))
        yield Case("odd size in bucket", (in_bucket(pictures.smear(odd, seed=20 + index), bucket),))
        yield Case("full bucket", (in_bucket(pictures.street(bucket, seed=40 + index), bucket),))
    for index, picture in enumerate(extra_pictures, start=1):
        yield Case(f"given picture {index}", (prepare_pixels(picture, spec),))


def usual_hw(spec: InputSpec) -> tuple[int, int]:
    """Of the drawn pictures: landscape, as large as the input takes it."""
    return spec.short_side, min(spec.long_side, spec.short_side * 4 // 3)


def mixed_batch(spec: InputSpec, size: int) -> tuple[Prepared, ...]:
    """Pictures of different sizes and contents that share the first bucket."""
    bucket = spec.buckets[0]
    draw = (pictures.smear, pictures.street, pictures.noise)
    sizes = [(max(1, bucket[0] - 7 * i), max(1, bucket[1] - 11 * ((i * 3) % 7))) for i in range(size)]
    return tuple(in_bucket(draw[i % 3](hw, i), bucket) for i, hw in enumerate(sizes))


def in_bucket(picture: Picture, bucket: Bucket) -> Prepared:
    """A picture that is already in the input frame."""
    return Prepared(picture, bucket, (picture.shape[0], picture.shape[1]))


def eager(detector: FasterRCNN, images: pictures.Picture, sizes_hw: NDArray[np.int64]) -> Detections:
    """The network's own answer as numpy arrays."""
    with torch.inference_mode():
        answer = detector(torch.from_numpy(images), torch.from_numpy(sizes_hw))
    return Detections(*(part.numpy() for part in answer))


def one_by_one(answer: Callable[[Picture, NDArray[np.int64]], Detections], images: Picture, sizes_hw: NDArray[np.int64]) -> Detections:
    """The batch's answer, asked for a picture at a time."""
    singles = [answer(images[i : i + 1], sizes_hw[i : i + 1]) for i in range(len(images))]
    return Detections(*(np.concatenate(parts) for parts in zip(*singles, strict=True)))


def contract_problems(detections: Detections, sizes_hw: NDArray[np.int64], manifest: Manifest) -> list[str]:
    """What in an answer breaks the graph contract, one sentence each."""
    problems = []
    count, limit = detections.num_detections, manifest.detections_per_image
    size = len(sizes_hw)
    shapes = {"boxes": (size, limit, 4), "scores": (size, limit), "labels": (size, limit), "num_detections": (size,)}
    for name, shape in shapes.items():
        if getattr(detections, name).shape != shape:
            problems.append(f"{name} has shape {getattr(detections, name).shape}, expected {shape}")
    if problems:
        return problems
    used = np.arange(limit)[None, :] < count[:, None]  # [B, D]
    boxes, scores, labels = detections.boxes, detections.scores, detections.labels
    height, width = sizes_hw[:, :1], sizes_hw[:, 1:]
    inside = (boxes[..., 0] >= 0) & (boxes[..., 1] >= 0) & (boxes[..., 2] <= width) & (boxes[..., 3] <= height)
    upright = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    rules = {
        "a value is not finite": np.isfinite(boxes).all() and np.isfinite(scores).all(),
        "num_detections lies outside 0..D": bool(((count >= 0) & (count <= limit)).all()),
        "a box is empty or leaves its picture": bool((inside & upright)[used].all()),
        "scores do not descend": bool((np.diff(scores, axis=1) <= 0).all()),
        "a score is not above the floor": bool((scores[used] > manifest.score_floor).all()),
        "rows beyond the count are not zero": not (scores[~used].any() or labels[~used].any() or boxes[~used].any()),
        "a label lies outside 1..K": bool(((labels[used] >= 1) & (labels[used] <= len(manifest.class_names))).all()),
    }
    return [sentence for sentence, holds in rules.items() if not holds]


def against_eager(detector: FasterRCNN, runtime: Runtime, case: Case, gates: Gates, *, shake: bool) -> CaseResult:
    """One row; with `shake`, rivals of the network judge what breaks a gate."""
    images, sizes_hw = assemble(case.batch)
    reference = eager(detector, images, sizes_hw)
    row = _row(case.name, images, sizes_hw, reference, runtime)
    if row.problems or not shake or not _is_broken(row, gates):
        return row
    # rivals are asked only where a difference shows: it costs some more passes through the network
    answer = runtime.run(images, sizes_hw)
    # and a picture at a time: seven of 800 x 1088 in fp64 would take VGG-16 some ten gigabytes
    rivals = [one_by_one(partial(eager, rival), images, sizes_hw) for rival in rivals_of(detector)]
    limit = runtime.manifest.detections_per_image
    judged = [
        judge(
            answer_of(reference, i),
            answer_of(answer, i),
            [answer_of(rival, i) for rival in rivals],
            limit=limit,
            box_px=math.inf if gates.box_px is None else gates.box_px,
            score=math.inf if gates.score is None else gates.score,
        )
        for i in range(len(images))
    ]
    return replace(row, tally=Tally.of(judged))


def _padding_content(runtime: Runtime, batch: Sequence[Prepared]) -> CaseResult:
    images, sizes_hw = assemble(batch)
    noisy = pictures.noise((images.shape[0] * images.shape[1], images.shape[2]), seed=9).reshape(images.shape)
    for index, (height, width) in enumerate(sizes_hw):
        noisy[index, :height, :width] = images[index, :height, :width]
    row = _row("noise in the padding, against zeros", noisy, sizes_hw, runtime.run(images, sizes_hw), runtime)
    return replace(row, gates=Gates())  # the file against itself on one shape: no precision excuses a difference


def batch_against_singles(runtime: Runtime, batch: Sequence[Prepared], gates: Gates) -> CaseResult:
    """One row: the file against itself, in a batch and a picture at a time."""
    images, sizes_hw = assemble(batch)
    row = _row("batch against singles", images, sizes_hw, one_by_one(runtime.run, images, sizes_hw), runtime)
    return replace(row, gates=BATCH_ALONE) if gates == FREE else row


def _row(name: str, images: Picture, sizes_hw: NDArray[np.int64], reference: Detections, runtime: Runtime) -> CaseResult:
    answer = runtime.run(images, sizes_hw)
    problems = contract_problems(answer, sizes_hw, runtime.manifest)
    tally = Tally()
    if not problems:
        limit = runtime.manifest.detections_per_image
        tally = Tally.of(compare(answer_of(reference, i), answer_of(answer, i), limit=limit) for i in range(len(images)))
    return CaseResult(name, images.shape[1:3], len(images), int(answer.num_detections.sum()), tally, tuple(problems))


def _is_broken(row: CaseResult, gates: Gates) -> bool:
    return any(True for _ in _broken(row, gates))


def _broken(row: CaseResult, gates_of_all: Gates) -> Iterator[str]:
    gates = row.gates or gates_of_all
    where = f"{row.name} ({row.bucket[0]}x{row.bucket[1]}, batch {row.batch_size})"
    for problem in row.problems:
        yield f"{where}: {problem}"
    tally = row.tally
    if gates.box_px is not None and tally.worst_box_px > gates.box_px:
        yield f"{where}: a box moved by {tally.worst_box_px:.2g} px, allowed {gates.box_px:g}"
    if gates.score is not None and tally.worst_score > gates.score:
        yield f"{where}: a score moved by {tally.worst_score:.2g}, allowed {gates.score:g}"
    paired = tally.matched + tally.missed
    if gates.matched_share is not None and tally.matched < gates.matched_share * paired:
        yield f"{where}: {tally.missed} of {paired} detections have no partner, allowed {1 - gates.matched_share:.0%}"
    if gates.unmatched_score is not None and tally.top_unmatched > gates.unmatched_score:
        yield f"{where}: a box with score {tally.top_unmatched:.3f} has no partner, allowed up to {gates.unmatched_score:g}"
