"""Augmentation: boxes stay on what they name, whatever is drawn; draws depend on the generator alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.data.mosaic import mosaic_example
from model.data.records import DetectionSet, Record
from model.data.transforms import (
    Example,
    Geometry,
    augmented_example,
    draw_geometry,
    jitter_colour,
    mirror_boxes,
    plain_example,
    turn_boxes,
    window_boxes,
)
from model.training import AugmentConfig

STILL = AugmentConfig(hflip=0.0)


def make_record(path: Path, boxes: list[list[float]], size_hw: tuple[int, int] = (60, 90)) -> Record:
    """A black picture whose k-th box is filled in colour channel k, with label k + 1."""
    pixels = np.zeros((*size_hw, 3), np.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[int(y1) : int(y2), int(x1) : int(x2), k] = 255
    Image.fromarray(pixels).save(path)
    array = np.array(boxes, np.float64).reshape(-1, 4)
    flags = np.zeros(len(boxes), bool)
    return Record(path.stem, path, size_hw, array, np.arange(1, len(boxes) + 1), np.prod(array[:, 2:] - array[:, :2], axis=1), flags, flags)


def painted_box(image: NDArray[np.uint8], label: int) -> list[float]:
    """Where a box is, from the pixels: the oracle for boxes."""
    mask = image[..., label - 1] > 127
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def check_boxes(example: Example, tolerance: float) -> int:
    height, width = example.image.shape[:2]
    for box, label in zip(example.boxes, example.labels, strict=True):
        assert (box >= 0).all()
        assert (box <= [width, height, width, height]).all()
        np.testing.assert_allclose(box, painted_box(example.image, int(label)), atol=tolerance)
    return len(example.labels)


def test_mirrors_and_turns_by_hand() -> None:
    boxes = np.array([[10.0, 20.0, 30.0, 50.0]])
    np.testing.assert_array_equal(mirror_boxes(boxes, 90, axis=0), [[60, 20, 80, 50]])
    np.testing.assert_array_equal(mirror_boxes(boxes, 60, axis=1), [[10, 10, 30, 40]])
    np.testing.assert_array_equal(turn_boxes(boxes, 90), [[20, 60, 50, 80]])


def test_crop_cuts_moves_scales_and_drops_by_hand() -> None:
    boxes = np.array([[10.0, 10, 30, 30], [0, 0, 11, 11], [26, 26, 60, 60], [40, 40, 50, 50]])
    geometry = Geometry(window=(10, 10, 30, 30), size_hw=(40, 60))
    moved, kept = window_boxes(boxes, geometry, min_visible=0.01)
    assert kept.tolist() == [0, 2]  # the second keeps 1 of 121 px, the last none; the third 16 of 1156
    np.testing.assert_allclose(moved, [[0, 0, 60, 40], [48, 32, 60, 40]])
    _, kept = window_boxes(boxes, geometry, min_visible=0.3)
    assert kept.tolist() == [0]


def test_plain_example_is_the_resize_rule(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a.png", [[9, 6, 45, 36]])
    example = plain_example(record, 40, 200)
    assert example.image.shape == (40, 60, 3)
    np.testing.assert_allclose(example.boxes, [[6, 4, 30, 24]], rtol=1e-6)
    assert example.boxes.dtype == np.float32


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(hflip=1.0),
        AugmentConfig(hflip=0.0, vflip=1.0),
        AugmentConfig(hflip=0.5, vflip=0.5, rot90=1.0),
        AugmentConfig(scale=(0.5, 0.7)),
        AugmentConfig(scale=(1.3, 2.0)),
        AugmentConfig(scale=(1.3, 2.0), crop_to_input=False),
        AugmentConfig(crop=1.0, crop_min=0.5),
        AugmentConfig(hflip=0.5, vflip=0.5, rot90=0.5, crop=0.7, scale=(0.5, 2.0), min_visible=0.1),
    ],
)
def test_boxes_follow_the_pixels(config: AugmentConfig, tmp_path: Path) -> None:
    record = make_record(tmp_path / "a.png", [[6, 9, 36, 30], [50, 12, 80, 55], [10, 40, 40, 58]])
    rng = np.random.default_rng(0)
    examples = [augmented_example(record, config, 120, 180, rng, sideways=i % 2 > 0 and config.rot90 > 0) for i in range(24)]
    seen = sum(check_boxes(example, tolerance=1.01) for example in examples)
    assert seen > 15


def test_turns_are_equally_likely() -> None:
    config = dataclasses.replace(STILL, rot90=0.6)
    rng = np.random.default_rng(0)
    turns = [draw_geometry((60, 90), config, 60, 90, rng, sideways=bool(rng.random() < 0.4)).quarter_turns for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(turns) / 4000, [0.4, 0.2, 0.2, 0.2], atol=0.03)


def test_a_grown_picture_is_cut_back_to_the_input_frame() -> None:
    config = dataclasses.replace(STILL, scale=(2.0, 2.0))
    geometry = draw_geometry((60, 90), config, 60, 90, np.random.default_rng(1))
    assert geometry.size_hw == (60, 90)
    x1, y1, x2, y2 = geometry.window
    assert (x2 - x1, y2 - y1) == pytest.approx((45, 30))
    assert min(x1, y1) >= 0
    assert x2 <= 90
    assert y2 <= 60


def test_difficult_boxes_and_crowds_are_no_targets(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a.png", [[6, 9, 36, 30], [50, 12, 80, 55], [10, 40, 40, 58]])
    record = dataclasses.replace(record, difficult=np.array([True, False, False]), crowd=np.array([False, True, False]))
    assert plain_example(record, 60, 90).labels.tolist() == [3]


def test_a_picture_without_boxes(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a.png", [])
    example = augmented_example(record, AugmentConfig(crop=1.0, rot90=1.0, vflip=1.0), 60, 90, np.random.default_rng(0))
    assert example.boxes.shape == (0, 4)
    assert example.labels.shape == (0,)


def test_colour_by_hand() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    image[0, 0] = [200, 100, 0]

    class Fixed(np.random.Generator):
        def uniform(self, low: float, high: float, size: int) -> NDArray[np.float64]:  # type: ignore[override]
            return np.full(size, high)

    rng = Fixed(np.random.PCG64(0))
    bright = jitter_colour(image, dataclasses.replace(STILL, brightness=0.5), rng)
    assert bright[1, 1].tolist() == [150, 150, 150]
    assert bright[0, 0].tolist() == [255, 150, 0]
    vivid = jitter_colour(image, dataclasses.replace(STILL, saturation=0.5), rng)
    luma = 0.299 * 200 + 0.587 * 100
    assert vivid[0, 0].tolist() == [round(luma + 1.5 * (200 - luma)), round(luma + 1.5 * (100 - luma)), 0]
    assert vivid[1, 1].tolist() == [100, 100, 100]
    turned = jitter_colour(image, dataclasses.replace(STILL, hue=1 / 3), rng)
    assert turned[1, 1].tolist() == [100, 100, 100]
    np.testing.assert_allclose(turned[0, 0], [0, 200, 100], atol=4)  # a third of the circle: red, green, blue rotate
    np.testing.assert_array_equal(image[0, 0], [200, 100, 0])


def test_same_generator_state_same_picture(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a.png", [[6, 9, 36, 30]])
    config = AugmentConfig(vflip=0.5, rot90=0.5, scale=(0.7, 1.4), crop=0.5, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
    first, second, other = (augmented_example(record, config, 60, 90, np.random.default_rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes, second.boxes)
    assert first.image.shape != other.image.shape or (first.image != other.image).any()


def test_mosaic_holds_four_pictures_with_their_boxes(tmp_path: Path) -> None:
    boxes = [[6.0, 9, 36, 30], [50, 12, 80, 55], [10, 40, 40, 58]]
    record = make_record(tmp_path / "a.png", boxes)
    dataset = DetectionSet("a", ("a", "b", "c"), (record,) * 4)
    total = 0
    for seed in range(10):
        config = AugmentConfig(hflip=0.5, scale=(0.5, 1.0), min_visible=0.9)
        example = mosaic_example(dataset, 0, config, (120, 180), np.random.default_rng(seed))
        assert example.image.shape == (120, 180, 3)
        for (x1, y1, x2, y2), label in zip(example.boxes, example.labels, strict=True):
            inner = example.image[int(y1) + 3 : int(y2) - 3, int(x1) + 3 : int(x2) - 3, label - 1]
            assert (inner > 250).all()
            total += 1
    assert total > 20
