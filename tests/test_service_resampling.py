"""The SIMD resize is Pillow's but for rounding, whatever the sizes, the channels and the part of the picture."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service import resampling
from service.resampling import resize

needs_simd = pytest.mark.skipif(resampling.simd is None, reason="no build of the SIMD resize for this platform")


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


@needs_simd
@pytest.mark.parametrize(
    ("hw", "target_hw", "box"),
    [
        ((480, 640), (384, 512), None),
        ((97, 131), (384, 519), None),  # larger
        ((1500, 2001), (384, 512), (0.0, 0.0, 2000.5, 1499.5)),  # of a draft: the last column is not wholly the picture's
        ((300, 7), (150, 3), None),
        ((2, 100), (1, 31), None),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_simd_differs_by_rounding_only(
    hw: tuple[int, int], target_hw: tuple[int, int], box: resampling.Box | None, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = noise(*hw, channels)
    quick = resize(pixels, target_hw, box)
    monkeypatch.setattr(resampling, "simd", None)
    careful = resize(pixels, target_hw, box)
    assert quick.shape == careful.shape == (*target_hw, channels)
    difference = quick.astype(np.int16) - careful
    assert np.abs(difference).max() <= 2
    assert np.abs(difference).mean() < 0.35
    assert abs(difference.mean()) < 0.1


def test_without_simd_it_is_pillow_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "simd", None)
    pixels = noise(60, 90)
    expected = Image.fromarray(pixels).resize((45, 30), Image.Resampling.BILINEAR, box=(0, 0, 80.5, 60))
    assert np.array_equal(resize(pixels, (30, 45), (0, 0, 80.5, 60)), np.asarray(expected))


def test_the_right_size_is_left_alone() -> None:
    pixels = noise(30, 50)
    assert resize(pixels, (30, 50)) is pixels
    assert resize(pixels, (30, 50), (0, 0, 50, 30)) is pixels


def test_threads_do_not_share_a_resizer() -> None:
    jobs = [noise(200 + number, 300) for number in range(16)] * 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda pixels: resize(pixels, (100, 150)), jobs))
    for pixels, found in zip(jobs, together, strict=True):
        assert np.array_equal(found, resize(pixels, (100, 150)))
