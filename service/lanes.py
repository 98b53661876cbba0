"""What waits and what runs: entries in lanes in groups, batches, and a snapshot of them all. The rules are in `batch_queue.py`.

Every time is in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from service.batch_costs import BatchCosts

LaneKey = Hashable
Phase = Literal["queued", "running", "done"]


class Priority(IntEnum):
    """HIGH goes first; LOW is overtaken by what arrives within the handicap after it, and by nothing later."""

    HIGH = 0
    LOW = 1


@dataclass(slots=True, eq=False)
class Entry:
    """One image from admission to its answer. `owner` belongs to the caller and is never looked at here."""

    lane: Lane
    item: Any
    nbytes: int
    deadline: float | None
    priority: Priority
    arrived: float
    rank: float
    """Order inside the group: the arrival, later by the handicap for LOW."""
    phase: Phase = "queued"
    owner: Any = None

    def is_late(self, now: float) -> bool:
        return self.deadline is not None and now > self.deadline


@dataclass(slots=True, eq=False)
class Group:
    """Lanes that share one claim on the devices and on the queue."""

    key: Hashable
    lanes: list[Lane] = field(default_factory=list)
    images: int = 0
    nbytes: int = 0
    used_s: float = 0.0
    """Virtual time (start-time fair queueing): device seconds, lifted on wake-up so that idleness earns no credit."""


@dataclass(slots=True, eq=False)
class Lane:
    """Images that may share a batch, in order of arrival per priority."""

    key: LaneKey
    group: Group
    costs: BatchCosts
    run: Any
    assemble: Any = None
    known_good: Any = None
    """An item that works as long as the device does."""
    waiting: tuple[OrderedDict[Entry, None], OrderedDict[Entry, None]] = field(default_factory=lambda: (OrderedDict(), OrderedDict()))
    running: int = 0
    closed: bool = False

    @property
    def depth(self) -> int:
        return len(self.waiting[0]) + len(self.waiting[1])

    def head(self) -> Entry | None:
        """The entry with the lowest rank."""
        heads = [next(iter(entries)) for entries in self.waiting if entries]
        return min(heads, key=lambda entry: entry.rank, default=None)


@dataclass(slots=True, eq=False)
class Batch:
    """What a device takes at once. `late` passed their deadline while waiting; they are to be told, not run."""

    lane: Lane
    device: int
    entries: list[Entry]
    late: list[Entry]
    started: float
    expected_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The queue at one moment. Ages are seconds, 0 where there is nothing."""

    waiting_images: int
    waiting_bytes: int
    oldest_age_s: float
    running_images: int
    longest_run_s: float
    """How long the oldest running batch has been on its device: a watchdog's number."""
    depths: Mapping[LaneKey, int]
