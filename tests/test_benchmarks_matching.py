"""Matching at its full size: 8 images with 270 000 anchors and 50 boxes each, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.matching import ANCHORS, BOXES, FRAME_HW, LIMIT_MB, draw_boxes, main


def test_the_workload_is_the_stated_one() -> None:
    import torch

    assert (ANCHORS, BOXES, LIMIT_MB) == (270_000, 50, 1000.0)
    boxes = draw_boxes(500, torch.Generator().manual_seed(1))
    assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= FRAME_HW[1]
    assert boxes[:, 3].max() <= FRAME_HW[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_eight_images_fit_in_a_gigabyte_and_memory_is_linear(tmp_path: Path) -> None:
    assert main(["--images", "2,8", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "matching.json")]) == 0
    two, eight = json.loads((tmp_path / "matching.json").read_text())["rows"]
    assert 10 < two["peak_mb"] < eight["peak_mb"] < 1000
    assert eight["peak_mb"] < 6 * two["peak_mb"]  # four times the images
