"""BentoML: one service with its adaptive batching; a batch is decoded in threads and then run."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bentoml

from benchmarks.peers.simulated import DECODE_THREADS, MAX_BATCH_SIZE, SimulatedDevice, answer, decode, port_argument

MAX_LATENCY_MS = 10_000  # it refuses with 503 what it believes would take longer


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Detector:
    """A batch arrives as files out of a form: raw bodies it takes only without batching."""

    def __init__(self) -> None:
        self.device = SimulatedDevice()
        self.pool = ThreadPoolExecutor(DECODE_THREADS)

    @bentoml.api(route="/v1/detect", batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=MAX_LATENCY_MS)
    def detect(self, images: list[Path]) -> list[dict[str, Any]]:
        prepared = list(self.pool.map(lambda path: decode(path.read_bytes()), images))
        self.device.run(len(prepared))
        return [answer(one) for one in prepared]


if __name__ == "__main__":
    command = ["bentoml", "serve", "benchmarks.peers.bentoml:Detector", "--host", "127.0.0.1", "--port", str(port_argument())]
    os.execv(sys.executable, [sys.executable, "-m", *command])  # noqa: S606  # its own command, as its documentation starts services
