"""This project's service with its default settings, around the simulated device."""

from __future__ import annotations

import asyncio
import cProfile
import os
import sys
import time
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.simulated import BOXES, CLASS_NAMES, LABELS, SCORES, SPEC, SimulatedDevice, port_argument
from service.app import create_app
from service.logs import configure_logs
from service.manifest import InputSpec, Manifest, Training
from service.runtime import Detections
from service.server import make_server, serve
from service.settings import load_settings

DETECTIONS_PER_IMAGE = 100
PROFILE_VARIABLE = "SERVING_PROFILE"
"""Names a file: the event loop's thread is profiled into it."""


class SimulatedRuntime:
    """A runtime that finds the same boxes in every image, after the time of the simulated device."""

    provider = "simulated"

    def __init__(self, spec: InputSpec = SPEC) -> None:
        self._device = SimulatedDevice()
        self._manifest = Manifest(
            name="simulated",
            version="1",
            class_names=list(CLASS_NAMES),
            input=spec,
            score_floor=0.05,
            detections_per_image=DETECTIONS_PER_IMAGE,
            architecture="none",
            opset=18,
            nms="dense",
            training=Training(dataset="none", commit="none", command="none"),
            parity={},
            created=datetime(2025, 1, 1, tzinfo=UTC),
        )

    @property
    def manifest(self) -> Manifest:
        """Of a model that does not exist."""
        return self._manifest

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
        """The same detections for each of [B, H, W, 3]."""
        count, found = len(images), len(BOXES)
        self._device.run(count)
        boxes = np.zeros((count, DETECTIONS_PER_IMAGE, 4), np.float32)
        scores = np.zeros((count, DETECTIONS_PER_IMAGE), np.float32)
        labels = np.zeros((count, DETECTIONS_PER_IMAGE), np.int64)
        boxes[:, :found], scores[:, :found], labels[:, :found] = BOXES, SCORES, LABELS
        return Detections(boxes, scores, labels, np.full(count, found, np.int64))

    def close(self) -> None:
        """Let go of the device."""
        self._device.close()


def main(spec: InputSpec = SPEC) -> int:
    """Serve until told to stop."""
    settings = load_settings(host="127.0.0.1", port=port_argument(), log_level="warning", drain_seconds=0.0)
    configure_logs(settings.log_level, settings.log_format)
    server = make_server(create_app(settings, runtime=SimulatedRuntime(spec)), settings)
    profile = cProfile.Profile(time.thread_time) if PROFILE_VARIABLE in os.environ else None
    if profile is not None:
        profile.enable()
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve(server))
    if profile is not None:
        profile.disable()
        profile.dump_stats(os.environ[PROFILE_VARIABLE])
    return server.exit_code


if __name__ == "__main__":
    sys.exit(main())
