"""One batch on one device: call it, and when it fails find out which image is to blame. Runs on the device's thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from service.batch_queue import Batch, BatchQueue, Entry, LaneKey, Phase
from service.device_errors import DeviceLost, DeviceOutOfMemory
from service.errors import InferenceFailed
from service.refusals import too_late

log = logging.getLogger(__name__)

Run = Callable[[int, Any], Sequence[Any]]
"""(device index, items of one lane, or what was assembled of them) -> one result an item, in order. Called on the device's own thread.

It may raise DeviceOutOfMemory or DeviceLost; any other exception is taken for a bad item, which is then searched for.
"""
Assemble = Callable[[int, Sequence[Any]], Any]
"""(device index, items of one lane) -> what the lane's run callable takes in their place, on the same thread. It may raise as Run may."""
FAILURES_BEFORE_DOUBT = 5
"""So many images that failed alone on one device, with no good run between, and it is asked whether the device is to blame."""
Outcome = tuple[Entry, Any]
"""An entry with its Answer or the error to raise."""


class Answer(NamedTuple):
    """One item's result and what it cost."""

    result: Any
    queue_s: float
    """From submit to the start of its batch."""
    run_s: float
    """Of the batch it shared, repeated runs after a neighbour's failure included."""
    batch_size: int


class Observer:
    """Told what happens, for metrics: override what you count. Called on device threads, `cancelled` on the event loop; keep it short."""

    def batch_formed(self, lane: LaneKey, size: int, queue_s: Sequence[float]) -> None:
        """A device took `size` images, which had waited `queue_s` seconds each."""

    def batch_ran(self, lane: LaneKey, size: int, seconds: float) -> None:
        """One call of the lane's run callable came back with results."""

    def batch_failed(self, lane: LaneKey, size: int, error: Exception) -> None:
        """One call of the lane's run callable raised; a batch of several is split and run again."""

    def out_of_memory(self, lane: LaneKey, size: int, limit: int) -> None:
        """`size` images, more than one, did not fit into the device's memory; the lane's batches hold at most `limit` for now."""

    def cancelled(self, phase: Phase) -> None:
        """A client gave up while its image was `queued` or `running`."""


class BatchRunner:
    """Runs batches and posts their outcomes; shared by all device threads."""

    def __init__(
        self,
        queue: BatchQueue,
        lock: threading.Lock,
        observer: Observer,
        clock: Callable[[], float],
        post: Callable[[list[Outcome]], None],
    ) -> None:
        """Take the scheduler's queue with the lock that guards it, and `post`, which hands outcomes to the event loop."""
        self._queue = queue
        self._lock = lock
        self._observer = observer
        self._clock = clock
        self._post = post
        self._held: dict[int, list[Outcome]] = {}
        self._failures: dict[int, int] = {}
        """Device -> images that failed alone since its last good run."""

    def answer(self, device: int) -> None:
        """Post what the device's last batch gave. Called by the device's thread when it has new work or none."""
        outcomes = self._held.pop(device, None)
        if outcomes is not None:
            self._post(outcomes)

    def run(self, batch: Batch) -> None:
        """Run a batch; if it fails its halves, and if one of those fails its images one by one: only the guilty one gets the error.

        The outcomes of the last run are held until `answer`. To write answers keeps the event loop, and with it Python's lock, for
        milliseconds on end; whoever assembles the next batch then waits for the lock at every copy while the device idles. So the next
        batch is assembled first.
        """
        self._tell(
            self._observer.batch_formed, batch.lane.key, len(batch.entries), [batch.started - entry.arrived for entry in batch.entries]
        )
        pieces = [(batch.entries, 0)]
        while pieces:
            piece, splits = pieces.pop()
            entries = [entry for entry in piece if entry.phase != "done"]  # a client may have left meanwhile
            outcomes = self._attempt(batch, entries) if entries else []
            if outcomes is None:
                pieces.extend((part, splits + 1) for part in reversed(_split(entries, whole=splits == 0)))
                continue
            if not pieces:
                with self._lock:
                    self._queue.finish(batch, now=self._clock())
                self.answer(batch.device)  # everybody of this batch may have left before it was assembled
                self._held[batch.device] = outcomes
            else:
                self._post(outcomes)

    def _attempt(self, batch: Batch, entries: list[Entry]) -> list[Outcome] | None:
        """One call of the device: an outcome for each entry, or None if the entries are to be split and tried again."""
        lane, size = batch.lane, len(entries)
        begun = self._clock()
        try:
            results = lane.run(batch.device, self._assemble(batch, entries))
            if len(results) != size:
                raise RuntimeError(f"the runtime gave {len(results)} results for {size} images")
        except DeviceLost:
            raise
        except Exception as error:
            return self._failed(batch, entries, error)
        ended = self._clock()
        self._failures[batch.device] = 0
        with self._lock:
            lane.costs.observe(size, ended - begun)
        self._tell(self._observer.batch_ran, lane.key, size, ended - begun)
        run_s = ended - batch.started
        return [
            (entry, too_late("while it ran") if entry.is_late(ended) else Answer(result, batch.started - entry.arrived, run_s, size))
            for entry, result in zip(entries, results, strict=True)
        ]

    def _assemble(self, batch: Batch, entries: list[Entry]) -> Any:
        items = [entry.item for entry in entries]
        try:
            return items if batch.lane.assemble is None else batch.lane.assemble(batch.device, items)
        finally:
            self.answer(batch.device)

    def _failed(self, batch: Batch, entries: list[Entry], error: Exception) -> list[Outcome] | None:
        lane, size = batch.lane, len(entries)
        if isinstance(error, DeviceOutOfMemory) and size > 1:
            with self._lock:
                lane.costs.lower_limit(size // 2)
            self._tell(self._observer.out_of_memory, lane.key, size, lane.costs.limit)
        self._tell(self._observer.batch_failed, lane.key, size, error)
        if size > 1:
            return None
        log.warning("an image of lane %r failed alone", lane.key, exc_info=error)
        self._doubt(batch, error)
        return [(entries[0], _blame(error))]

    def _doubt(self, batch: Batch, error: Exception) -> None:
        """After many failures in a row run an item that is known to work: if that fails too, it is the device, whatever its words were.

        Raises:
            DeviceLost: nothing runs here any more.
        """
        lane, device = batch.lane, batch.device
        self._failures[device] = failures = self._failures.get(device, 0) + 1
        if failures < FAILURES_BEFORE_DOUBT or lane.known_good is None:
            return
        items = [lane.known_good]
        try:
            lane.run(device, items if lane.assemble is None else lane.assemble(device, items))
        except Exception as canary_error:
            raise DeviceLost(f"{failures} images in a row failed, and then one that is known to work: {canary_error}") from error
        self._failures[device] = 0

    def _tell(self, event: Callable[..., None], *args: Any) -> None:
        """Metrics must not be able to stop a device."""
        try:
            event(*args)
        except Exception:
            log.exception("the observer failed on %s", event.__name__)


def _split(entries: list[Entry], *, whole: bool) -> list[list[Entry]]:
    """Halves of a whole batch; singles of a half."""
    if not whole:
        return [[entry] for entry in entries]
    middle = (len(entries) + 1) // 2
    return [entries[:middle], entries[middle:]]


def _blame(error: Exception) -> InferenceFailed:
    if isinstance(error, InferenceFailed):
        return error
    failure = InferenceFailed("the device failed on this image alone; other images are served, try this one in another encoding")
    failure.__cause__ = error
    return failure
