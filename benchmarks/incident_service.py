"""The real service on a device that dies when a file says so: `python -m benchmarks.incident_service FILE IMAGE_MS`.

Everything is the service's own, the runtime and the model too; only the moment at which the device hangs or is lost is chosen from
outside: FILE holds `hang` (an inference never ends), `lost` (it raises, for good), `lost NUMBER` (only that device does), `memory` (now
and then there is none left for a batch) or anything else (it works).
IMAGE_MS is added to each image, so that a small model stands for a larger one: then the device is full before the CPU is.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service import app, loading, logs
from service.device_errors import DeviceLost, DeviceOutOfMemory
from service.manifest import Manifest
from service.runtime import Detections, Runtime
from service.server import make_server, serve
from service.settings import load_settings

PERIOD_S = 0.1
RUNS_UNTIL_FULL = 5
"""With a full memory every so manieth inference finds no room."""


class MortalRuntime:
    """A runtime that asks a file whether its device lives."""

    def __init__(self, inner: Runtime, state: Path, image_s: float, device: int = 0) -> None:
        self._inner = inner
        self._device = device
        self._image_s = image_s
        self._state = state
        self._runs = 0
        self.provider = inner.provider

    @property
    def manifest(self) -> Manifest:
        """The inner one's."""
        return self._inner.manifest

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
        """The inner one's answer, if the device lives."""
        while self._word() == "hang":
            time.sleep(PERIOD_S)
        if self._word() in ("lost", f"lost {self._device}"):
            raise DeviceLost("the device fell off the bus (simulated)")
        self._runs += 1
        if self._word() == "memory" and self._runs % RUNS_UNTIL_FULL == 0:
            raise DeviceOutOfMemory("no memory is left on the device (simulated)")
        time.sleep(self._image_s * len(images))
        return self._inner.run(images, image_sizes_hw)

    def _word(self) -> str:
        return self._state.read_text().strip() if self._state.exists() else ""

    def close(self) -> None:
        """Free the inner one."""
        self._inner.close()


def main() -> int:
    """Serve until told to stop; the exit code is the service's."""
    state, image_s = Path(sys.argv[1]), float(sys.argv[2]) / 1e3
    usual = loading.open_onnx

    def open_mortal(**options: object) -> loading.OpenRuntime:
        open_runtime = usual(**options)
        return lambda path, device, largest_batch: MortalRuntime(open_runtime(path, device, largest_batch), state, image_s, device)

    app.open_onnx = open_mortal
    settings = load_settings()
    logs.configure_logs(settings.log_level, settings.log_format)
    server = make_server(app.create_app(settings), settings)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve(server))
    return server.exit_code


if __name__ == "__main__":
    sys.exit(main())
