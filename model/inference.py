"""Runs a detector over a data set: the same resize and padding as serving, boxes back in the original frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import InputConfig
from model.data.images import choose_bucket, pad_batch, read_rgb, resized_hw
from model.data.records import DetectionSet, Record
from model.faster_rcnn import FasterRCNN
from model.metrics.predictions import Prediction
from model.roi_heads import Detections

READ_THREADS = 4


@torch.inference_mode()
def predict(
    detector: FasterRCNN,
    dataset: DetectionSet,
    *,
    batch_size: int = 4,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Detections of a data set's pictures, in the order of `indices` (default: all).

    Pictures of one bucket share a batch; the detector is left in evaluation mode.

    Args:
        progress: called with the number of pictures done after each batch.
    """
    wanted = list(range(len(dataset))) if indices is None else list(indices)
    frame = detector.config.input
    device = next(detector.parameters()).device
    detector.eval()
    found: dict[int, Prediction] = {}
    for batch, images, sizes_hw in _batches(dataset, wanted, frame, batch_size):
        detections = detector(images.to(device, non_blocking=True), sizes_hw.to(device, non_blocking=True))
        rows = _to_numpy(detections)
        if not np.isfinite(rows[1]).all():
            raise ValueError(f"the network gives NaN or infinite numbers for pictures such as {dataset.records[batch[0]].path}")
        for i, index in enumerate(batch):
            found[index] = _original_frame(rows, i, dataset.records[index], tuple(sizes_hw[i].tolist()))
        if progress is not None:
            progress(len(found))
    return [found[index] for index in wanted]


def _batches(
    dataset: DetectionSet, wanted: Sequence[int], frame: InputConfig, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    buckets: dict[tuple[int, int], list[int]] = {}
    for index in wanted:
        size_hw = resized_hw(dataset.records[index].size_hw, frame.short_side, frame.long_side)
        buckets.setdefault(choose_bucket(size_hw, frame.buckets), []).append(index)
    jobs = [(bucket, rows[i : i + batch_size]) for bucket, rows in buckets.items() for i in range(0, len(rows), batch_size)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        ahead: deque[tuple[tuple[int, int], list[int], list[Future[NDArray[np.uint8]]]]] = deque()
        for bucket, batch in jobs:
            ahead.append((bucket, batch, [pool.submit(_read, dataset.records[index], frame) for index in batch]))
            if len(ahead) > 2:
                yield _assemble(*ahead.popleft())
        while ahead:
            yield _assemble(*ahead.popleft())


def _read(record: Record, frame: InputConfig) -> NDArray[np.uint8]:
    size_hw = resized_hw(record.size_hw, frame.short_side, frame.long_side)
    return read_rgb(record.path, size_hw=size_hw, expected_hw=record.size_hw)


def _assemble(bucket: tuple[int, int], batch: list[int], reading: list[Future[NDArray[np.uint8]]]) -> tuple[list[int], Tensor, Tensor]:
    images = [future.result() for future in reading]
    return batch, torch.from_numpy(pad_batch(images, bucket)), torch.tensor([image.shape[:2] for image in images])


def _to_numpy(detections: Detections) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    boxes, scores = detections.boxes.float().cpu().numpy(), detections.scores.float().cpu().numpy()
    return boxes, scores, detections.labels.cpu().numpy(), detections.num_detections.cpu().numpy()


def _original_frame(
    rows: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]],
    i: int,
    record: Record,
    size_hw: tuple[int, ...],
) -> Prediction:
    boxes, scores, labels, counts = rows
    count = int(counts[i])
    height, width = record.size_hw
    scale = np.array([width / size_hw[1], height / size_hw[0]] * 2, dtype=np.float32)
    restored = (boxes[i, :count] * scale).clip(0, np.array([width, height, width, height], dtype=np.float32))
    return Prediction(boxes=restored, scores=scores[i, :count], labels=labels[i, :count])
