"""Golden images: drawn, small, answered by the file itself, and clear of every threshold."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from tiny_detector import Exported

from export import pictures
from export.golden import clear_threshold, golden_pictures
from service.images import assemble, prepare_pixels, to_original_frame
from service.runtime import OnnxRuntime


def test_golden_images_reproduce(exported: Exported) -> None:
    runtime = OnnxRuntime(exported.file, provider="cpu")
    for golden in runtime.manifest.golden:
        data = base64.b64decode(golden.image)
        assert len(data) < 100_000
        picture = np.asarray(Image.open(io.BytesIO(data)))
        prepared = prepare_pixels(picture, runtime.manifest.input)
        answer = runtime.run(*assemble([prepared]))
        count = int((answer.scores[0] > golden.min_score).sum())
        assert count == len(golden.detections)
        assert count > 0
        boxes = to_original_frame(answer.boxes[0, :count], prepared)
        np.testing.assert_allclose(boxes, [d.box for d in golden.detections], atol=1e-3)
        np.testing.assert_allclose(answer.scores[0, :count], [d.score for d in golden.detections], atol=1e-5)
        assert answer.labels[0, :count].tolist() == [d.label for d in golden.detections]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], 0.5),
        ([0.99, 0.1], 0.5),  # outside the range that matters
        ([0.45], 0.6),  # gaps .25-.45 and .45-.75
        ([0.9, 0.6, 0.58, 0.3], 0.44),
    ],
)
def test_threshold_lies_in_the_widest_gap(scores: list[float], expected: float) -> None:
    assert clear_threshold(scores) == pytest.approx(expected)


def test_pictures_are_deterministic_and_not_square() -> None:
    for first, second in zip(golden_pictures(), golden_pictures(), strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.shape[0] != first.shape[1]


@pytest.mark.parametrize("hw", [(1, 1), (9, 13), (40, 300)])
def test_drawings_fit_any_size(hw: tuple[int, int]) -> None:
    for picture in (pictures.smear(hw, 1), pictures.street(hw, 1), pictures.noise(hw, 1), pictures.blank(hw, 7), pictures.one_pixel(hw)):
        assert picture.shape == (*hw, 3)
        assert picture.dtype == np.uint8


def test_contents_differ() -> None:
    hw = (60, 80)
    assert pictures.one_pixel(hw).sum() == 3 * 255
    assert np.unique(pictures.blank(hw, 7)).tolist() == [7]
    assert len(np.unique(pictures.noise(hw, 0))) == 256
    assert pictures.smear(hw, 0, cells=60).std() > 5
