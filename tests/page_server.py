"""For browser tests: a real server on a free port, the whole application over a runtime whose answers are known, and pictures for it."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from service_fakes import WAIT_S, FakeRuntime, make_manifest, make_settings

from service.app import create_app
from service.loading import from_runtime
from service.runtime import Detections

if TYPE_CHECKING:
    from playwright.sync_api import Page

OpenPage = Callable[..., "Page"]

CLASS_NAMES = ["RBC", "WBC", "Platelets"]
Known = tuple[float, float, float, float, str, float]
KNOWN: list[Known] = [  # x1, y1, x2, y2 as shares of the picture, class, score; the third lies inside the second
    (0.10, 0.10, 0.30, 0.40, "WBC", 0.97),
    (0.50, 0.20, 0.70, 0.50, "RBC", 0.90),
    (0.55, 0.25, 0.62, 0.38, "Platelets", 0.83),
    (0.15, 0.55, 0.35, 0.85, "RBC", 0.72),
    (0.60, 0.60, 0.85, 0.90, "RBC", 0.61),
    (0.40, 0.42, 0.47, 0.55, "Platelets", 0.45),
    (0.80, 0.10, 0.95, 0.30, "RBC", 0.20),
]
DETECTIONS_PER_IMAGE = 10


def png(width: int = 90, height: int = 60) -> bytes:
    """A picture with a red upper left quarter."""
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[: height // 2, : width // 2] = [220, 20, 20]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def show(page: Page, picture: bytes, name: str = "slide.png", mime: str = "image/png") -> None:
    """Choose a picture by the file field and wait for its answer."""
    page.locator("#file").set_input_files({"name": name, "mimeType": mime, "buffer": picture})
    page.locator("#progress").wait_for(state="hidden")


class KnownRuntime(FakeRuntime):
    """Answers every picture with KNOWN, or with what is given."""

    def __init__(self, *, name: str = "blood-cells", version: str = "1", known: Sequence[Known] = KNOWN) -> None:
        super().__init__(make_manifest(name=name, version=version, class_names=CLASS_NAMES, detections_per_image=DETECTIONS_PER_IMAGE))
        self._known = known
        self.provider = "cpu"

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
        super().run(images, image_sizes_hw)  # the gate and the counting
        count, known = len(images), len(self._known)
        boxes = np.zeros((count, DETECTIONS_PER_IMAGE, 4), np.float32)
        scores, labels = np.zeros((count, DETECTIONS_PER_IMAGE), np.float32), np.zeros((count, DETECTIONS_PER_IMAGE), np.int64)
        for at, (height, width) in enumerate(image_sizes_hw):
            boxes[at, :known] = np.array([row[:4] for row in self._known]) * [width, height, width, height]
            scores[at, :known] = [row[5] for row in self._known]
            labels[at, :known] = [CLASS_NAMES.index(row[4]) + 1 for row in self._known]
        return Detections(boxes, scores, labels, np.full(count, known, np.int64))


class PageServer:
    """The application with a KnownRuntime on 127.0.0.1, in a thread of its own; it can be stopped and started again on its port."""

    def __init__(self, **settings: Any) -> None:
        self.runtime = KnownRuntime()
        self._settings = make_settings(**settings)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._thread: threading.Thread | None = None
        self.start()

    def start(self) -> None:
        """Serve; returns when the service is ready."""
        if self._socket.fileno() == -1:
            self._socket = socket.create_server(("127.0.0.1", self.port))
        self.app = create_app(self._settings, runtime=self.runtime)
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", lifespan="on", timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + WAIT_S
        while not self._is_ready():
            assert time.monotonic() < deadline, f"not ready within {WAIT_S} s"
            time.sleep(0.02)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])

    def adopt(self, runtime: KnownRuntime) -> None:
        """Take another model or version into service, as the repository does."""
        loaded = from_runtime(runtime, max_batch_size=2)

        async def enter() -> None:
            self.app.state.parts.repository.adopt(loaded, pinned=True)

        asyncio.run_coroutine_threadsafe(enter(), self._loop).result(WAIT_S)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}readyz", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def occupy(self, picture: bytes) -> threading.Thread:
        """Let a picture hold the device until `runtime.gate` is set. Gives the thread that waits for its answer."""
        while self.runtime.entered.acquire(blocking=False):  # runs of the warm-up
            pass
        self.runtime.gate.clear()
        asking = threading.Thread(target=self.detect, args=(picture,))
        asking.start()
        assert self.runtime.entered.acquire(timeout=WAIT_S)
        return asking

    def stop(self) -> None:
        """Stop serving and free the port."""
        assert self._thread is not None
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        self._socket.close()

    def detect(self, picture: bytes, **query: str) -> httpx.Response:
        """POST /v1/detect from beside the browser."""
        return httpx.post(f"{self.url}v1/detect", params=query, content=picture, headers={"content-type": "image/png"}, timeout=20)
