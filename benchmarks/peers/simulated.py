"""What every server of the comparison shares: the decoding, a device of 4 ms a batch and 1.5 ms an image, and the answer.

The device takes time and no CPU, as a GPU does. A file lock makes it one device for all processes of a server. It takes any mix of
pictures in one batch, which a model does only if it has one input shape: so SPEC has one bucket, and every server batches alike.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from service.decoding import ImageLimits
from service.images import Prepared, prepare, to_original_frame
from service.manifest import InputSpec

SECONDS_A_BATCH = 0.004
SECONDS_AN_IMAGE = 0.0015
MAX_BATCH_SIZE = 16
DECODE_THREADS = 2
SPEC = InputSpec(short_side=384, long_side=640, buckets=[(640, 640)])
FIVE_BUCKETS = [(384, 384), (384, 512), (512, 384), (384, 640), (640, 384)]
"""What a real model would rather have: less padding, but a batch holds pictures of one shape."""
LIMITS = ImageLimits(max_bytes=32 << 20, max_pixels=50_000_000)
BOXES = np.array([[10, 20, 110, 90], [40, 30, 200, 180], [100, 50, 180, 220], [5, 5, 60, 70], [120, 90, 300, 260]], dtype=np.float32)
SCORES = (0.98, 0.93, 0.87, 0.74, 0.61)
LABELS = (1, 2, 1, 3, 2)
CLASS_NAMES = ("red", "green", "blue")
LOCK_VARIABLE = "SIMULATED_DEVICE_LOCK"


class SimulatedDevice:
    """Sleeps as long as a device would compute, one batch at a time, whoever asks."""

    def __init__(self) -> None:
        path = os.environ.get(LOCK_VARIABLE) or tempfile.mkstemp(prefix="simulated-device-")[1]
        self._file = Path(path).open("a")  # noqa: SIM115  # held as long as the device
        self._lock = threading.Lock()  # a file lock does not tell threads apart

    def run(self, images: int) -> None:
        """One batch of so many images."""
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                time.sleep(SECONDS_A_BATCH + SECONDS_AN_IMAGE * images)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the lock's file."""
        self._file.close()


def decode(body: bytes) -> Prepared:
    """The service's own decoding."""
    return prepare(body, SPEC, LIMITS)


def answer(prepared: Prepared) -> dict[str, Any]:
    """What a client gets: the same five boxes in the frame of its picture."""
    height, width = prepared.original_hw
    detections = [
        {"box": [round(float(value), 2) for value in box], "class": CLASS_NAMES[label - 1], "class_id": label, "score": score}
        for box, score, label in zip(to_original_frame(BOXES, prepared), SCORES, LABELS, strict=True)
    ]
    return {"model": {"name": "simulated", "version": "1"}, "image": {"width": width, "height": height}, "detections": detections}


def answer_bytes(prepared: Prepared) -> bytes:
    """The same as JSON."""
    return orjson.dumps(answer(prepared))


def port_argument() -> int:
    """The port from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    return int(parser.parse_known_args()[0].port)
