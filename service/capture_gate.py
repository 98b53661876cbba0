"""While one thread records a CUDA graph, no other thread of the process may call CUDA.

ONNX Runtime records in CUDA's global mode: an allocation or a copy on any other thread, whatever its device, then fails, and so does the
recording. Recordings are few, each at the first run of a shape; everything else passes the gate side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CaptureGate:
    """Either one thread that records, or any number of others. Who wants to record goes before those that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._others = 0
        self._recording = False
        self._own = threading.local()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """For whatever else calls CUDA. Within a pass of the same thread it does nothing."""
        if getattr(self._own, "passed", False):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._recording)
            self._others += 1
        self._own.passed = True
        try:
            yield
        finally:
            self._own.passed = False
            with self._changed:
                self._others -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a run that records: waits until everybody else is out.

        Raises:
            RuntimeError: this thread is within a pass already, so it would wait for itself.
        """
        if getattr(self._own, "passed", False):
            raise RuntimeError("a recording begins outside of any pass through the gate, this thread is within one; leave that first")
        with self._changed:
            self._changed.wait_for(lambda: not self._recording)
            self._recording = True
            self._changed.wait_for(lambda: self._others == 0)
        self._own.passed = True
        try:
            yield
        finally:
            self._own.passed = False
            with self._changed:
                self._recording = False
                self._changed.notify_all()


CAPTURES = CaptureGate()
"""The process's one gate, as CUDA's rule is the process's."""
