"""One image through the service: admission, decoding in the pool, a batch on a device, and the image's detections back.

The event loop only passes things on. Whoever cancels `detect` takes the image out of the pool or the queue.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

from service.errors import DetectorError, InferenceFailed, QueueFull, WouldMissDeadline
from service.images import ImageLimits, Prepared, prepare
from service.inference import ImageDetections
from service.metrics import Metrics
from service.repository import ServedVersion
from service.scheduler import Answer, Priority, Scheduler, Ticket
from service.shadow import Shadow

P = ParamSpec("P")
T = TypeVar("T")

PriorityName = Literal["high", "low"]
PRIORITIES: dict[str, Priority] = {"high": Priority.HIGH, "low": Priority.LOW}
DECODE_WEIGHT = 0.05
"""Weight of the newest picture in the running average of decoding time."""
DECODE_NICENESS = 3
"""Of decoding threads, above the process's own: they always have work under load, and whoever answers, refuses or feeds a device must
not wait for their time slice to end."""

REASON_OF_CODE = {
    "queue_full": "queue_full",
    "deadline": "deadline",
    "deadline_exceeded": "deadline",
    "too_large": "too_large",
    "too_many_pixels": "too_many_pixels",
    "bad_image": "bad_image",
    "unsupported_type": "bad_image",
    "empty_body": "bad_image",
    "malformed_request": "bad_request",
    "bad_option": "bad_request",
    "model_not_found": "bad_request",
    "slow_body": "bad_request",
    "draining": "draining",
    "not_ready": "draining",
    "unauthorised": "unauthorised",
    "forbidden": "unauthorised",
}


@dataclass(frozen=True, slots=True)
class Result:
    """One image's answer in numbers. Times in seconds."""

    served: ServedVersion
    prepared: Prepared
    detections: ImageDetections
    decode_s: float
    queue_s: float
    infer_s: float
    batch_size: int


def _step_back() -> None:
    """Let this thread be scheduled after the others. Elsewhere than on Linux niceness belongs to the process."""
    if sys.platform == "linux":
        own = threading.get_native_id()
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + DECODE_NICENESS)


@dataclass(slots=True)
class _Work:
    """One encoded picture on its way to a lane."""

    data: bytes
    served: ServedVersion
    ticket: Ticket
    priority: Priority
    prepared: Prepared | None = None
    decode_s: float = 0.0


class Pipeline:
    """Joins the decode pool, the scheduler and the bounds on what is in the house."""

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: Metrics,
        limits: ImageLimits,
        *,
        decode_threads: int,
        max_images: int,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.shadow: Shadow | None = None
        """Told of every image that was answered."""
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._decode_threads = decode_threads
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode", initializer=_step_back)
        self._max_images, self._max_bytes = max_images, max_bytes
        self._images, self._nbytes = 0, 0
        self._lock = threading.Lock()
        """Guards the two that follow, which the pool's threads write too."""
        self._decoding = 0
        self._decode_average_s = 0.005

    # Bounds

    @property
    def images_in_house(self) -> int:
        """Images accepted and not yet answered."""
        return self._images

    def check_room(self, served: ServedVersion, deadline: float) -> None:
        """Refuse at once what could not be answered, before its body is read.

        Raises:
            QueueFull, WouldMissDeadline: with the time after which another try makes sense.
        """
        room = self._images < self._max_images and self._nbytes < self._max_bytes
        if room and self._images * served.slowest_image_s < deadline - self._clock():
            return  # in time even if each image of the house ran alone: no need for an estimate
        if not room:
            raise self._full(served)
        wait_s = self._estimate_s(served)
        allowed_s = deadline - self._clock()
        if wait_s > allowed_s:
            raise WouldMissDeadline(
                f"an answer would take about {wait_s * 1e3:.0f} ms and the request allows {allowed_s * 1e3:.0f} ms; "
                "try again later or allow more",
                retry_after_s=wait_s - allowed_s,
            )

    def _full(self, served: ServedVersion) -> QueueFull:
        wait_s = self._estimate_s(served)
        return QueueFull(
            f"as many images as are let in are being answered ({self._images}); one that came now would take about {wait_s:.1f} s, "
            "so ask again after Retry-After",
            retry_after_s=wait_s,
        )

    def _estimate_s(self, served: ServedVersion) -> float:
        """Seconds until an image that comes now would be answered: the pool's backlog, or the devices' and what the pool brings."""
        decode_s = self._decoding * self._decode_average_s / self._decode_threads
        device_s = self._scheduler.estimate_s(served.lanes[0])
        best_s = min(seconds / size for (_, size), seconds in served.loaded.costs.items())
        return max(decode_s, device_s + self._decoding * best_s / len(served.loaded.runtimes))

    @contextmanager
    def hold_bytes(self, nbytes: int) -> Iterator[None]:
        """Count a body while it is in memory.

        Raises:
            QueueFull: the service holds as many bytes as it may.
        """
        if self._nbytes and self._nbytes + nbytes > self._max_bytes:
            raise QueueFull(
                f"the service holds {self._nbytes} bytes of bodies and may hold {self._max_bytes}; try again", retry_after_s=1.0
            )
        self._nbytes += nbytes
        try:
            yield
        finally:
            self._nbytes -= nbytes

    def count_refusal(self, error: DetectorError) -> None:
        """Count an image that gets this error instead of detections; an error that was counted before is not counted again."""
        if error.counted:
            return
        error.counted = True
        reason = REASON_OF_CODE.get(error.code)
        if reason is not None:
            self._metrics.rejected[reason].inc()
        self._metrics.images["failed" if error.status in (500, 504) else "rejected"].inc()

    # Work

    async def detect(self, data: bytes, served: ServedVersion, *, deadline: float, priority: PriorityName = "high") -> Result:
        """Detect on an encoded picture.

        Args:
            data: the picture's bytes.
            served: the version that answers.
            deadline: latest useful moment, on the monotonic clock.

        Raises:
            DetectorError: one of its subclasses, for this image alone.
        """
        with served.lease(), self._counted(), self._admitted(served):
            work = _Work(data, served, self._scheduler.expect(deadline), PRIORITIES[priority])
            with self._lock:
                self._decoding += 1
            job = self._pool.submit(self._decode, work)
            try:
                answer = await work.ticket.future
            except BaseException:
                if job.cancel():
                    self._decoded()
                raise
            assert work.prepared is not None  # there is no answer without it
            return self._finish(answer, work.prepared, served, work.decode_s)

    async def infer(self, prepared: Prepared, served: ServedVersion, *, deadline: float, priority: PriorityName = "high") -> Result:
        """The same for a picture that is already in the input frame. Raises DetectorError."""
        with served.lease(), self._counted(), self._admitted(served):
            future = self._scheduler.submit(
                served.lane(prepared.bucket), prepared, nbytes=prepared.pixels.nbytes, deadline=deadline, priority=PRIORITIES[priority]
            )
            return self._finish(await future, prepared, served, 0.0)

    async def probe(self, prepared: Prepared, served: ServedVersion) -> None:
        """One inference that is counted as no image and yields to all others. Raises DetectorError."""
        lane = served.lane(prepared.bucket)
        answer = await self._scheduler.submit(lane, prepared, nbytes=prepared.pixels.nbytes, priority=Priority.LOW)
        if isinstance(answer.result, InferenceFailed):
            raise answer.result

    async def compute(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something that takes CPU in the decode pool, in the request's context."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: context.run(function, *args, **kwargs))

    def _finish(self, answer: Answer, prepared: Prepared, served: ServedVersion, decode_s: float) -> Result:
        if isinstance(answer.result, InferenceFailed):
            raise answer.result
        if self.shadow is not None:
            self.shadow.offer(served, prepared, answer.result)
        self._metrics.stage_seconds["queue"].observe(answer.queue_s)
        scores = answer.result.scores
        self._metrics.detections_per_image.observe(len(scores))
        if len(scores):
            self._metrics.top_score.observe(float(scores[0]))
        return Result(served, prepared, answer.result, decode_s, answer.queue_s, answer.run_s, answer.batch_size)

    def _decode(self, work: _Work) -> None:
        """On a thread of the pool, which hands the picture to the scheduler itself: a detour by the event loop would cost two wakings."""
        try:
            prepared, work.decode_s = self._prepare(work.data, work.served)
            work.prepared = prepared
            lane = work.served.lane(prepared.bucket)
            self._scheduler.deliver(work.ticket, lane, prepared, nbytes=prepared.pixels.nbytes, priority=work.priority)
        except Exception as error:  # whatever it is, somebody awaits it
            self._scheduler.refuse(work.ticket, error)
        finally:
            self._decoded(work.decode_s or None)

    def _decoded(self, seconds: float | None = None) -> None:
        """One picture fewer is in the pool. Called on its threads and on the event loop."""
        with self._lock:
            self._decoding -= 1
            if seconds is not None:
                self._decode_average_s += DECODE_WEIGHT * (seconds - self._decode_average_s)

    def _prepare(self, data: bytes, served: ServedVersion) -> tuple[Prepared, float]:
        started = time.perf_counter()
        prepared = prepare(data, served.manifest.input, self.limits)
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds["decode"].observe(seconds)
        height, width = prepared.original_hw
        self._metrics.input_megapixels.observe(height * width / 1e6)
        return prepared, seconds

    @contextmanager
    def _admitted(self, served: ServedVersion) -> Iterator[None]:
        if self._images >= self._max_images:
            raise self._full(served)
        self._images += 1
        try:
            yield
        finally:
            self._images -= 1

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the image by its outcome."""
        try:
            yield
        except asyncio.CancelledError:
            self._metrics.images["cancelled"].inc()
            raise
        except DetectorError as error:
            self.count_refusal(error)
            raise
        except Exception:
            self._metrics.images["failed"].inc()
            raise
        else:
            self._metrics.images["ok"].inc()

    async def close(self) -> None:
        """Stop the pool and the shadow; what they hold is dropped."""
        if self.shadow is not None:
            await self.shadow.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
