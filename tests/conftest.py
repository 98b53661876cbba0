"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def detection_data() -> Path:
    """The folder of real images, annotations and weights: DETECTION_DATA, or shared/data beside the checkout."""
    path = Path(os.environ.get("DETECTION_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set DETECTION_DATA to the folder that holds bccd/, coco128/, ...")
    return path
