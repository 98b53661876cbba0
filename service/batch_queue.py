"""Which images wait, which run next and who is refused: the scheduler's state machine, without threads, clock or I/O.

A lane holds images that may share a batch (one model version, one bucket). A group holds the lanes between which order is
kept and is the unit of fairness: groups with work waiting get equal device time, whatever is offered to each. Inside a group
the oldest image picks the lane and the measured costs pick the batch.
Every time is in seconds of one monotonic clock that the caller reads and passes as `now`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from service.batch_costs import BatchCosts
from service.errors import NotReady, QueueFull, WouldMissDeadline
from service.lanes import Batch, Entry, Group, Lane, LaneKey, Phase, Priority, Snapshot

__all__ = ["Batch", "BatchQueue", "Entry", "Group", "Lane", "LaneKey", "Phase", "Priority", "Snapshot"]


class BatchQueue:
    """Bounded lanes and the rule that picks the next batch. Not thread-safe: the caller holds a lock around each call."""

    def __init__(self, *, devices: int, max_images: int, max_bytes: int, low_priority_handicap_s: float) -> None:
        for name, value in (("devices", devices), ("max_images", max_images), ("max_bytes", max_bytes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        self.devices = devices
        """How many are left."""
        self._max_images = max_images
        self._max_bytes = max_bytes
        self._handicap_s = low_priority_handicap_s
        self._lanes: dict[LaneKey, Lane] = {}
        self._groups: dict[Hashable, Group] = {}
        self._running: dict[int, Batch] = {}
        self._images = 0
        self._nbytes = 0
        self._virtual_now = 0.0

    # Lanes

    def add_lane(self, key: LaneKey, group: Hashable, costs: BatchCosts, run: Any, assemble: Any = None, known_good: Any = None) -> None:
        """Open a lane. Raises ValueError for a key that is in use."""
        if key in self._lanes:
            raise ValueError(f"lane {key!r} exists; remove it first or give the new version its own key")
        owner = self._groups.setdefault(group, Group(group))
        lane = Lane(key, owner, costs, run, assemble, known_good)
        owner.lanes.append(lane)
        self._lanes[key] = lane

    def close_lane(self, key: LaneKey) -> None:
        """Accept nothing more into the lane; what waits there is still served."""
        self._lanes[key].closed = True

    def remove_lane(self, key: LaneKey) -> None:
        """Forget an idle lane, and its group with its last lane."""
        assert self.lane_idle(key)
        lane = self._lanes.pop(key)
        lane.group.lanes.remove(lane)
        if not lane.group.lanes:
            del self._groups[lane.group.key]

    def lane_idle(self, key: LaneKey) -> bool:
        """Whether nothing of the lane waits or runs."""
        lane = self._lanes[key]
        return lane.depth == 0 and lane.running == 0

    def idle(self) -> bool:
        """Whether nothing waits or runs at all."""
        return self._images == 0 and not self._running

    # Entry

    def admit(self, key: LaneKey, item: Any, *, nbytes: int, deadline: float | None, priority: Priority, now: float) -> Entry:
        """Let one image wait.

        Args:
            key: its lane.
            item: what the lane's run callable gets.
            nbytes: memory it holds while it waits.
            deadline: latest moment for its answer, or None.
            priority: HIGH or LOW.
            now: the moment of its arrival.

        Raises:
            NotReady: no such lane, or one that is closing.
            QueueFull: the bounds on images or bytes, or the room kept for other groups, leave no place.
            WouldMissDeadline: what is ahead takes longer than the deadline allows.
        """
        lane = self._lanes.get(key)
        if lane is None or lane.closed:
            raise NotReady("the model version asked for is no longer loaded; ask again for the current one", retry_after_s=1.0)
        self._check_room(lane.group, nbytes)
        if deadline is not None:
            self._check_deadline(lane, priority, deadline - now, now)
        rank = now + (self._handicap_s if priority is Priority.LOW else 0.0)
        entry = Entry(lane, item, nbytes, deadline, priority, now, rank)
        if lane.group.images == 0:
            lane.group.used_s = max(lane.group.used_s, self._virtual_now)
        lane.waiting[priority][entry] = None
        self._count(lane.group, 1, nbytes)
        return entry

    def _check_room(self, group: Group, nbytes: int) -> None:
        images_fit = _has_room(1, group.images, self._images, self._max_images, [g.images for g in self._groups.values() if g is not group])
        bytes_fit = _has_room(
            nbytes, group.nbytes, self._nbytes, self._max_bytes, [g.nbytes for g in self._groups.values() if g is not group]
        )
        if images_fit and bytes_fit:
            return
        retry_after_s = self.backlog_s()
        held = f"{self._images} of {self._max_images} images" if not images_fit else f"{self._nbytes} of {self._max_bytes} bytes"
        raise QueueFull(f"the queue holds {held}, which takes {retry_after_s:.2f} s; try again after that", retry_after_s=retry_after_s)

    def _check_deadline(self, lane: Lane, priority: Priority, allowed_s: float, now: float) -> None:
        # A free device takes the image at once, so the estimate may be wrong and is not asked: this one run corrects it.
        if self._images == 0 and len(self._running) < self.devices:
            return
        finish_s = self.estimate_s(lane.key, priority, now)
        if finish_s > allowed_s:
            allows_s = max(allowed_s, 0.0)
            detail = f"an answer would take about {finish_s * 1e3:.0f} ms and the request allows {allows_s * 1e3:.0f} ms"
            raise WouldMissDeadline(f"{detail}; try again later or allow more", retry_after_s=finish_s - allows_s)

    def estimate_s(self, key: LaneKey, priority: Priority, now: float) -> float:
        """Seconds until an image that arrives now would be answered, its own run included."""
        lane = self._lanes[key]
        own_before, place = 0.0, 0
        for other in lane.group.lanes:
            ahead = self._ahead(other, priority, now)
            if other is lane:
                place = ahead
            else:
                own_before += other.costs.drain_seconds(ahead)
        size = lane.costs.favoured(lane.costs.limit)
        own_before += place // size * lane.costs.seconds(size)
        own_run = lane.costs.seconds(place % size + 1)
        # Another group gets no more device time than this one before this image is done: that is what fair means here.
        claim = own_before + own_run
        others = sum(min(claim, _group_seconds(group)) for group in self._groups.values() if group is not lane.group)
        running = sum(max(0.0, batch.started + batch.expected_s - now) for batch in self._running.values())
        return (running + own_before + others) / max(1, self.devices) + own_run

    def _ahead(self, lane: Lane, priority: Priority, now: float) -> int:
        """How many of a lane's images go before one that arrives now; LOW ones in front of HIGH once the oldest has served its handicap."""
        high, low = lane.waiting
        if priority is Priority.HIGH and low and next(iter(low)).rank > now:
            return len(high)
        return len(high) + len(low)

    def backlog_s(self) -> float:
        """Seconds in which the devices drain all that waits, by measured costs."""
        return sum(_group_seconds(group) for group in self._groups.values()) / max(1, self.devices)

    # Service

    def take(self, device: int, now: float) -> Batch | None:
        """The next batch for a free device, or None if nothing waits. Its entries may all be late, then there is nothing to run."""
        group = min((g for g in self._groups.values() if g.images), key=lambda g: (g.used_s, _oldest_rank(g)), default=None)
        if group is None:
            return None
        lane = min((lane for lane in group.lanes if lane.depth), key=_head_rank)
        entries: list[Entry] = []
        late: list[Entry] = []
        size = lane.costs.favoured(lane.depth)
        while len(entries) < size and (entry := lane.head()) is not None:
            self._unqueue(entry)
            too_late = entry.is_late(now + lane.costs.shortest_s)
            entry.phase = "done" if too_late else "running"
            (late if too_late else entries).append(entry)
        batch = Batch(lane, device, entries, late, now, lane.costs.seconds(len(entries)))
        if entries:
            self._virtual_now = max(self._virtual_now, group.used_s)
            group.used_s += batch.expected_s
            lane.running += 1
            self._running[device] = batch
        return batch

    def finish(self, batch: Batch, *, now: float) -> None:
        """The device is free again: charge the group for what the batch really took."""
        del self._running[batch.device]
        batch.lane.running -= 1
        batch.lane.group.used_s += (now - batch.started) - batch.expected_s
        for entry in batch.entries:
            entry.phase = "done"

    def lose(self, device: int) -> list[Entry]:
        """A device is gone for good: withdraw and return what it ran. The others take what waits."""
        self.devices -= 1
        batch = self._running.pop(device, None)
        if batch is None:
            return []
        batch.lane.running -= 1
        entries = [entry for entry in batch.entries if entry.phase == "running"]
        for entry in entries:
            self.withdraw(entry)
        return entries

    def withdraw(self, entry: Entry) -> Phase:
        """Nobody wants this answer any more: a queued entry goes, a running one's result will be dropped. Returns the phase it was in."""
        phase = entry.phase
        if phase == "queued":
            self._unqueue(entry)
        entry.phase = "done"
        return phase

    def expire(self, now: float) -> list[Entry]:
        """Withdraw every entry, waiting or running, whose deadline passed, and return them."""
        late = [entry for entry in self._pending() if entry.is_late(now)]
        for entry in late:
            self.withdraw(entry)
        return late

    def next_deadline(self) -> float | None:
        """The earliest deadline of all that waits or runs."""
        return min((entry.deadline for entry in self._pending() if entry.deadline is not None), default=None)

    def clear(self, *, running: bool) -> list[Entry]:
        """Withdraw and return everything that waits, and with `running` also what devices hold: nothing will answer it."""
        entries = [entry for entry in self._pending() if running or entry.phase == "queued"]
        for entry in entries:
            self.withdraw(entry)
        return entries

    def snapshot(self, now: float) -> Snapshot:
        heads = [next(iter(entries)) for lane in self._lanes.values() for entries in lane.waiting if entries]
        return Snapshot(
            waiting_images=self._images,
            waiting_bytes=self._nbytes,
            oldest_age_s=max((now - entry.arrived for entry in heads), default=0.0),
            running_images=sum(len(batch.entries) for batch in self._running.values()),
            longest_run_s=max((now - batch.started for batch in self._running.values()), default=0.0),
            depths={key: lane.depth for key, lane in self._lanes.items()},
        )

    def _pending(self) -> Iterator[Entry]:
        for lane in self._lanes.values():
            for entries in lane.waiting:
                yield from list(entries)
        for batch in self._running.values():
            yield from (entry for entry in batch.entries if entry.phase == "running")

    def _unqueue(self, entry: Entry) -> None:
        del entry.lane.waiting[entry.priority][entry]
        self._count(entry.lane.group, -1, -entry.nbytes)

    def _count(self, group: Group, images: int, nbytes: int) -> None:
        group.images += images
        group.nbytes += nbytes
        self._images += images
        self._nbytes += nbytes


def _has_room(wanted: int, own: int, total: int, bound: int, others: list[int]) -> bool:
    """Whether `wanted` more fit. Half of the queue is kept in equal parts for the groups, the other half is anybody's.

    So a flood for one model fills its part and the common half, and another model's images still find a place.
    """
    if total + wanted > bound:
        return False
    share = bound // (2 * (len(others) + 1))
    kept_for_others = sum(max(0, share - other) for other in others)
    return own + wanted <= share or total + wanted + kept_for_others <= bound


def _group_seconds(group: Group) -> float:
    return sum(lane.costs.drain_seconds(lane.depth) for lane in group.lanes)


def _head_rank(lane: Lane) -> float:
    head = lane.head()
    assert head is not None  # only asked of lanes with images
    return head.rank


def _oldest_rank(group: Group) -> float:
    return min(_head_rank(lane) for lane in group.lanes if lane.depth)
