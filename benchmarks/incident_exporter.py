"""A stand-in for the exporters of a machine with a GPU: the series of dcgm-exporter and cAdvisor with simulated values.

It lets the alert and the panels that read them be seen on a machine that has neither. Every series says so: `Hostname="simulated"`
or `pod="simulated"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

GPU_MEMORY_MIB = 81_559
THROTTLED_WHEN_FULL = 0.3
PERIODS_A_TICK = 10
"""The kernel's scheduler periods of 100 ms in a tick of a second."""


class GpuMachine:
    """What the exporters say. `use` and `tick` may be called at any time."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._used = self._gauge("DCGM_FI_DEV_FB_USED", "MiB in use.")
        self._free = self._gauge("DCGM_FI_DEV_FB_FREE", "MiB that are free.")
        self._power = self._gauge("DCGM_FI_DEV_POWER_USAGE", "Watts.")
        self._temperature = self._gauge("DCGM_FI_DEV_GPU_TEMP", "Degrees Celsius.")
        self._engine = self._gauge("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "Share of the time that an engine works.")
        self._periods = self._counter("container_cpu_cfs_periods", "Scheduler periods.")
        self._throttled = self._counter("container_cpu_cfs_throttled_periods", "Those that the container had to sit out.")
        self.use(0.4)
        self.tick(0.0)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["gpu", "Hostname"], registry=self.registry).labels("0", "simulated")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["container", "pod"], registry=self.registry).labels("detector", "simulated")

    def use(self, memory_share: float) -> None:
        """This share of the GPU's memory is in use from now on."""
        self._used.set(memory_share * GPU_MEMORY_MIB)
        self._free.set((1 - memory_share) * GPU_MEMORY_MIB)

    def tick(self, busy: float) -> None:
        """A second passes in which the device was busy for this share of it."""
        self._engine.set(busy)
        self._power.set(70 + 430 * busy)
        self._temperature.set(35 + 40 * busy)
        self._periods.inc(PERIODS_A_TICK)
        self._throttled.inc(PERIODS_A_TICK * THROTTLED_WHEN_FULL * busy**2)


@contextmanager
def exported(machine: GpuMachine) -> Iterator[int]:
    """Serve its /metrics on this machine. Yields the port."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=machine.registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
