"""Batches: what is in them, in which order, and that neither depends on how they are loaded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import InputConfig
from model.data.formats import open_dataset
from model.data.loader import Batch, BatchPlan, collate, repeat_factors, training_batches
from model.data.records import DataError, DetectionSet, Record
from model.data.synthetic import write_voc
from model.data.transforms import Example
from model.training import AugmentConfig, TrainConfig

FRAME = InputConfig(short_side=64, long_side=96, buckets=((64, 96),))


def record(image_id: int, labels: list[int], size_hw: tuple[int, int] = (40, 60)) -> Record:
    boxes = np.tile([[1.0, 2.0, 20.0, 30.0]], (len(labels), 1))
    flags = np.zeros(len(labels), bool)
    return Record(str(image_id), Path("absent.png"), size_hw, boxes, np.array(labels, np.int64), np.ones(len(labels)), flags, flags)


def dataset_of(records: list[Record]) -> DetectionSet:
    return DetectionSet("made", ("a", "b"), tuple(records))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return open_dataset(write_voc(tmp_path_factory.mktemp("voc"), {"train": 10}), "train")


def test_collate_pads_pictures_and_targets() -> None:
    first = Example(np.full((30, 50, 3), 5, np.uint8), np.array([[1, 2, 3, 4]], np.float32), np.array([2]))
    second = Example(np.full((40, 20, 3), 6, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    batch = collate([first, second], ["x", "y"])
    assert batch.images.shape == (2, 64, 64, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.image_sizes_hw.tolist() == [[30, 50], [40, 20]]
    assert batch.image_sizes_hw.dtype == torch.int64
    assert batch.targets.boxes.tolist() == [[[1, 2, 3, 4]], [[0, 0, 0, 0]]]
    assert batch.targets.labels.tolist() == [[2], [0]]
    empty = collate([second], ["y"])
    assert empty.targets.boxes.shape == (1, 1, 4)


def test_an_epoch_shows_every_picture_and_fills_the_last_batch() -> None:
    plan = BatchPlan.of(dataset_of([record(i, [1]) for i in range(10)]), TrainConfig(batch_size=4))
    batches = plan.batches(0)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    shown = Counter(draw.picture for batch in batches for draw in batch)
    assert set(shown) == set(range(10))
    assert sum(shown.values()) == 12
    assert len({(draw.picture, draw.copy) for batch in batches for draw in batch}) == 12
    assert plan.batches(0) == batches
    assert plan.batches(1) != batches


def test_fewer_pictures_than_a_batch() -> None:
    plan = BatchPlan.of(dataset_of([record(0, [1])]), TrainConfig(batch_size=4))
    assert [[draw.picture for draw in batch] for batch in plan.batches(0)] == [[0, 0, 0, 0]]


def test_batches_hold_one_orientation() -> None:
    sizes = [(60, 40) if i % 3 == 0 else (40, 60) for i in range(30)]
    dataset = dataset_of([record(i, [1], size) for i, size in enumerate(sizes)])
    batches = BatchPlan.of(dataset, TrainConfig(batch_size=4)).batches(3)
    mixed = [batch for batch in batches if len({sizes[draw.picture] for draw in batch}) > 1]
    assert len(mixed) <= 1
    assert len(batches) == 8
    turned = TrainConfig(batch_size=4, augment=AugmentConfig(rot90=1.0, short_sides=(48, 64, 80)))
    batches = BatchPlan.of(dataset, turned).batches(3)
    assert all(len({(draw.sideways, draw.short_side) for draw in batch}) == 1 for batch in batches)
    assert len({draw.short_side for batch in batches for draw in batch}) > 1


def test_rare_classes_are_repeated_by_hand() -> None:
    dataset = dataset_of([record(i, [1]) for i in range(99)] + [record(99, [1, 2])])
    factors = repeat_factors(dataset, 0.04)
    assert factors[0] == 1
    assert factors[99] == pytest.approx(2.0)  # sqrt(.04 / .01)
    plan = BatchPlan.of(dataset, TrainConfig(batch_size=1, repeat_threshold=0.04))
    assert Counter(draw.picture for batch in plan.batches(0) for draw in batch)[99] == 2


def run(scenes: DetectionSet, config: TrainConfig, **options: int) -> list[Batch]:
    return list(training_batches(scenes, FRAME, config, **options))


def same(a: Batch, b: Batch) -> bool:
    tensors = zip((a.images, a.image_sizes_hw, *a.targets), (b.images, b.image_sizes_hw, *b.targets), strict=True)
    return a.image_ids == b.image_ids and all(torch.equal(x, y) for x, y in tensors)


def test_workers_position_and_ranks_change_no_batch(scenes: DetectionSet) -> None:
    augment = AugmentConfig(vflip=0.5, rot90=0.5, scale=(0.7, 1.4), brightness=0.2, hue=0.1, mosaic=0.3, copy_paste=0.5)
    config = TrainConfig(epochs=2, batch_size=4, workers=0, augment=augment)
    state = torch.get_rng_state()
    whole = run(scenes, config)
    assert len(whole) == 6
    parallel = run(scenes, dataclasses.replace(config, workers=2))
    assert all(same(a, b) for a, b in zip(whole, parallel, strict=True))
    assert all(same(a, b) for a, b in zip(whole[4:], run(scenes, config, first_epoch=1, first_batch=1), strict=True))
    halves = [run(scenes, config, rank=rank, world=2) for rank in (0, 1)]
    assert all(a.image_ids + b.image_ids == c.image_ids for a, b, c in zip(*halves, whole, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_epochs_differ_in_augmentation(scenes: DetectionSet) -> None:
    config = TrainConfig(epochs=2, batch_size=10, workers=0, group_by_aspect=False, augment=AugmentConfig(hflip=0, brightness=0.5))
    first, second = run(scenes, config)
    a, b = ({image_id: batch.images[i] for i, image_id in enumerate(batch.image_ids)} for batch in (first, second))
    assert sum(not torch.equal(a[name], b[name]) for name in a) == 10


def test_a_batch_that_processes_cannot_share(scenes: DetectionSet) -> None:
    with pytest.raises(ValueError, match="make it a multiple of 3"):
        run(scenes, TrainConfig(batch_size=4), world=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(workers: int, tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 2})
    Image.new("RGB", (7, 9)).save(root / "JPEGImages" / "train_001.png")
    with pytest.raises(DataError, match=r"^image 'train_001': train_001.png is 7 x 9, annotated as 128 x 96") as error:
        run(open_dataset(root, "train"), TrainConfig(epochs=1, batch_size=2, workers=workers))
    assert "Traceback" not in str(error.value)
