"""Background looks at the process itself: a late event loop, a hung device, and an inference on request to see that the device answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from service.device_errors import DeviceOutOfMemory
from service.health import EXIT_HUNG, Health
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.repository import Repository, grey_picture
from service.scheduler import LaneKey, Observer, Phase, Scheduler

LAG_PERIOD_S = 0.1
WATCHDOG_PERIODS = 10
"""Looks at the devices within one watchdog limit."""

logger = logging.getLogger(__name__)


class ServiceObserver(Observer):
    """Counts what the scheduler tells, and tells health that a device answered."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._metrics = metrics
        self._health = health

    def batch_ran(self, lane: LaneKey, size: int, seconds: float) -> None:
        self._metrics.batch_size.observe(size)
        self._health.saw_inference()

    def batch_failed(self, lane: LaneKey, size: int, error: Exception) -> None:
        self._metrics.device_errors["out_of_memory" if isinstance(error, DeviceOutOfMemory) else "other"].inc()

    def out_of_memory(self, lane: LaneKey, size: int, limit: int) -> None:
        logger.warning("%d pictures did not fit into the device's memory; batches of lane %r hold at most %d for now", size, lane, limit)

    def cancelled(self, phase: Phase) -> None:
        if phase in self._metrics.cancelled:
            self._metrics.cancelled[phase].inc()


def watch_queue(scheduler: Scheduler, metrics: Metrics) -> None:
    """Let the queue's gauges read the queue when they are scraped."""
    metrics.queue_depth.set_function(lambda: float(scheduler.snapshot().waiting_images))
    metrics.queue_oldest_age.set_function(lambda: scheduler.snapshot().oldest_age_s)


async def measure_loop_lag(metrics: Metrics) -> None:
    """Sleep shortly, for ever, and observe how late the loop wakes."""
    while True:
        asked = time.perf_counter()
        await asyncio.sleep(LAG_PERIOD_S)
        metrics.event_loop_lag.observe(max(0.0, time.perf_counter() - asked - LAG_PERIOD_S))


async def watch_devices(scheduler: Scheduler, health: Health, limit_s: float) -> None:
    """Fail the service when an inference takes longer than the limit: a hung device cannot be interrupted, only left."""
    while health.failure is None:
        await asyncio.sleep(limit_s / WATCHDOG_PERIODS)
        longest_s = scheduler.snapshot().longest_run_s
        if longest_s > limit_s:
            health.fail(f"an inference has been running for {longest_s:.1f} s; DETECTOR_WATCHDOG_SECONDS allows {limit_s:g}", EXIT_HUNG)


def make_canary(repository: Repository, pipeline: Pipeline) -> Callable[[], Awaitable[None]]:
    """One inference on a grey picture with the default model, through the queue like any request, but counted as none."""

    async def run_canary() -> None:
        if not repository.served:
            return  # nothing to try; readiness says so by itself
        served = repository.served[0]
        prepared = grey_picture(served.manifest.input.buckets[0])
        with served.lease():
            await pipeline.probe(prepared, served)

    return run_canary
