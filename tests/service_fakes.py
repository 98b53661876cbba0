"""What the service's tests share: a simulated device with a gate, pictures whose answer is known, an app in its lifespan, a real server."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import httpx
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.manifest import InputSpec, Manifest, Training
from service.runtime import CostTable, Detections
from service.settings import Settings

CLASS_NAMES = ["red", "green", "blue"]
INPUT = InputSpec(short_side=96, long_side=160, buckets=[(96, 160), (160, 96), (128, 128)])
WAIT_S = 20.0
"""Longest any test waits for an event that must come."""


def make_manifest(**changes: Any) -> Manifest:
    """A valid manifest for three classes."""
    fields: dict[str, Any] = {
        "name": "blobs",
        "version": "1",
        "class_names": CLASS_NAMES,
        "input": INPUT,
        "score_floor": 0.05,
        "detections_per_image": 4,
        "architecture": "test",
        "opset": 18,
        "nms": "onnx",
        "training": Training(dataset="none", commit="none", command="none"),
        "parity": {},
        "created": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Manifest(**{**fields, **changes})


class FakeRuntime:
    """Finds one box an image: the right half, with the class of its strongest colour and a score that tells its brightness.

    Like the graph it looks only at what lies inside image_sizes_hw, so its answer shows whether pixels and sizes arrived.
    `gate` holds every run while it is cleared; `entered` counts runs that began.
    """

    def __init__(self, manifest: Manifest | None = None, *, seconds: float = 0.0, seconds_per_image: float = 0.0) -> None:
        self._manifest = manifest or make_manifest()
        self.provider = "fake"
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batch_sizes: list[int] = []
        self.closed = False
        self.before_run: Callable[[NDArray[np.uint8]], None] = lambda images: None
        self.spoil: Callable[[Detections, NDArray[np.uint8]], Detections] = lambda detections, images: detections
        self._seconds, self._seconds_per_image = seconds, seconds_per_image

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
        self.entered.release()
        self.before_run(images)
        assert self.gate.wait(WAIT_S), "the test never opened the gate"
        self.batch_sizes.append(len(images))
        time.sleep(self._seconds + self._seconds_per_image * len(images))
        return self.spoil(detect_colours(images, image_sizes_hw), images)

    def nominal_seconds(self, batch_size: int) -> float:
        return max(0.001, self._seconds + self._seconds_per_image * batch_size)

    def close(self) -> None:
        self.closed = True


def detect_colours(images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> Detections:
    """The fake's answer: two rows of D = 4, the second with a low score."""
    count = len(images)
    boxes, scores, labels = np.zeros((count, 4, 4), np.float32), np.zeros((count, 4), np.float32), np.zeros((count, 4), np.int64)
    for i, (height, width) in enumerate(image_sizes_hw.tolist()):
        colour = images[i, :height, :width].reshape(-1, 3).mean(axis=0)
        boxes[i, 0] = (width / 2, 0, width, height)
        boxes[i, 1] = (0, 0, width / 4, height / 4)
        scores[i, :2] = (0.6 + 0.3 * colour.max() / 255, 0.2)
        labels[i, :2] = (int(colour.argmax()) + 1, 1)
    return Detections(boxes, scores, labels, np.full(count, 2, np.int64))


def picture(width: int = 90, height: int = 60, colour: tuple[int, int, int] = (220, 30, 30), kind: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


def make_settings(**changes: Any) -> Settings:
    """Settings for tests: two decoders, no canary."""
    return Settings(**{"decode_threads": 2, "canary_seconds": 0, "max_batch_size": 8, "drain_seconds": 0, **changes})


@asynccontextmanager
async def running(app: FastAPI, *, ready: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """The app within its lifespan, with a client that talks to it in memory."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://detector") as client:
            if ready:
                await until_ready(app)
            yield client


async def until_ready(app: FastAPI) -> None:
    """Wait for the models; a failure to load them is raised."""
    health = app.state.parts.health
    async with asyncio.timeout(WAIT_S):
        while (reason := health.reason_not_ready()) is not None:
            if health.failure is not None:
                raise AssertionError(f"the app failed: {reason}")
            await asyncio.sleep(0.005)


@asynccontextmanager
async def fake_service(
    runtime: FakeRuntime | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI, FakeRuntime]]:
    """A ready service on a fake runtime: client, app, runtime.

    The costs of its batches are the nominal ones, not measured, so that a busy test machine does not decide which batches pay.
    """
    runtime = runtime or FakeRuntime()
    app = create_app(make_settings(**settings), runtime=runtime)
    with mock.patch("service.loading.warm_up", nominal_costs):
        async with running(app) as client:
            yield client, app, runtime


def nominal_costs(runtime: FakeRuntime, max_batch_size: int) -> CostTable:
    """What warm_up would measure on an idle machine."""
    sizes = [2**n for n in range(max_batch_size.bit_length())]
    return {(bucket, size): runtime.nominal_seconds(size) for bucket in runtime.manifest.input.buckets for size in sizes}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def run(coroutine: Any) -> Any:
    """Run an async test."""
    return asyncio.run(coroutine)


def sample(app: FastAPI, name: str, **labels: str) -> float:
    """One value out of the app's metrics; 0 where it has none yet."""
    value = app.state.parts.metrics.registry.get_sample_value(name, labels)
    return value if value is not None else 0.0
