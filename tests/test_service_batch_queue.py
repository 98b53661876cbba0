"""The queue's state machine against a fake clock: bounds, order, fairness, deadlines, and that nothing is lost or answered twice."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.batch_costs import BatchCosts
from service.batch_queue import Batch, BatchQueue, Entry, Priority
from service.errors import NotReady, QueueFull, WouldMissDeadline

HANDICAP_S = 1.0
TABLE = {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.024}


def make_queue(lanes: dict[str, str], *, devices: int = 1, max_images: int = 32, max_bytes: int = 10_000, batch: int = 8) -> BatchQueue:
    """A queue with lanes named by key, each in the group it maps to."""
    queue = BatchQueue(devices=devices, max_images=max_images, max_bytes=max_bytes, low_priority_handicap_s=HANDICAP_S)
    for key, group in lanes.items():
        queue.add_lane(key, group, BatchCosts(TABLE, batch), None)
    return queue


def admit(queue: BatchQueue, key: str, now: float, item: Any = None, **options: Any) -> Entry:
    options = {"nbytes": 1, "deadline": None, "priority": Priority.HIGH} | options
    return queue.admit(key, item, now=now, **options)


def taken(queue: BatchQueue, now: float, device: int = 0) -> Batch:
    batch = queue.take(device, now)
    assert batch is not None
    return batch


def test_the_oldest_image_picks_the_lane_and_its_lane_fills_the_batch() -> None:
    queue = make_queue({"wide": "m", "tall": "m"})
    first = admit(queue, "tall", 0.0)
    other = admit(queue, "wide", 0.1)
    third = admit(queue, "tall", 0.2)
    batch = taken(queue, 0.3)
    assert batch.entries == [first, third]
    queue.finish(batch, now=0.4)
    assert taken(queue, 0.4).entries == [other]
    assert queue.take(1, 0.5) is None


def test_high_priority_goes_first_and_low_fills_what_is_left() -> None:
    queue = make_queue({"a": "m"}, batch=2)
    low = [admit(queue, "a", 0.0, priority=Priority.LOW) for _ in range(2)]
    high = admit(queue, "a", 0.5)
    batch = taken(queue, 0.6)
    assert batch.entries == [high, low[0]]


def test_low_priority_is_overtaken_only_within_its_handicap() -> None:
    queue = make_queue({"a": "m"}, batch=1)
    low = admit(queue, "a", 0.0, priority=Priority.LOW)
    early = admit(queue, "a", HANDICAP_S - 0.01)
    admit(queue, "a", HANDICAP_S + 0.01)
    batch = taken(queue, 2.0)
    assert batch.entries == [early]
    queue.finish(batch, now=2.0)
    assert taken(queue, 2.0).entries == [low]


def test_full_queue_is_refused_with_the_time_it_takes_to_drain() -> None:
    queue = make_queue({"a": "m"}, max_images=16)
    for _ in range(16):
        admit(queue, "a", 0.0)
    with pytest.raises(QueueFull, match="16 of 16 images") as caught:
        admit(queue, "a", 0.0)
    assert caught.value.retry_after_s == pytest.approx(2 * TABLE[8])


def test_bytes_are_bounded_too() -> None:
    queue = make_queue({"a": "m"}, max_bytes=100)
    admit(queue, "a", 0.0, nbytes=60)
    with pytest.raises(QueueFull, match="60 of 100 bytes"):
        admit(queue, "a", 0.0, nbytes=41)
    admit(queue, "a", 0.0, nbytes=40)


def test_a_flood_for_one_model_leaves_room_for_another() -> None:
    queue = make_queue({"a": "flooded", "b": "quiet"}, max_images=32)
    for _ in range(24):  # its own quarter and the common half
        admit(queue, "a", 0.0)
    with pytest.raises(QueueFull):
        admit(queue, "a", 0.0)
    for _ in range(8):
        admit(queue, "b", 0.0)
    with pytest.raises(QueueFull):
        admit(queue, "b", 0.0)


def test_room_kept_for_a_group_never_breaks_the_bound() -> None:
    queue = make_queue({"a": "m"}, max_images=16)
    for _ in range(16):
        admit(queue, "a", 0.0)
    queue.add_lane("b", "new", BatchCosts(TABLE, 8), None)
    with pytest.raises(QueueFull, match="16 of 16"):
        admit(queue, "b", 0.0)


def test_groups_get_equal_device_time_whatever_they_offer() -> None:
    queue = make_queue({"a": "flooded", "b": "quiet"}, max_images=64, batch=4)
    now, served = 0.0, Counter()
    for _ in range(200):
        for key, wanted in (("a", 40), ("b", 6)):
            while queue.snapshot(now).depths[key] < wanted:
                admit(queue, key, now)
        batch = taken(queue, now)
        served[batch.lane.key] += batch.expected_s
        now += batch.expected_s
        queue.finish(batch, now=now)
    assert served["a"] == pytest.approx(served["b"], rel=0.03)


def test_groups_are_charged_what_their_batches_really_take() -> None:
    queue = make_queue({"a": "slower than its table", "b": "as its table"}, max_images=64, batch=4)
    now, served = 0.0, Counter()
    for _ in range(200):
        for key in "ab":
            while queue.snapshot(now).depths[key] < 8:
                admit(queue, key, now)
        batch = taken(queue, now)
        took_s = batch.expected_s * (3 if batch.lane.key == "a" else 1)
        served[batch.lane.key] += took_s
        now += took_s
        queue.finish(batch, now=now)
    assert served["a"] == pytest.approx(served["b"], rel=0.03)


def test_idleness_earns_no_credit() -> None:
    queue = make_queue({"a": "busy", "b": "idle"}, max_images=64, batch=4)
    now = 0.0
    for _ in range(100):  # group a works alone for a while
        admit(queue, "a", now)
        batch = taken(queue, now)
        now += 0.01
        queue.finish(batch, now=now)
    order = []
    for _ in range(6):
        for key in "ab":
            while queue.snapshot(now).depths[key] < 4:
                admit(queue, key, now)
        batch = taken(queue, now)
        order.append(batch.lane.key)
        now += batch.expected_s
        queue.finish(batch, now=now)
    assert Counter(order) == {"a": 3, "b": 3}


def test_estimate_counts_running_waiting_and_own_run() -> None:
    queue = make_queue({"a": "m"}, batch=4)
    for _ in range(4):
        admit(queue, "a", 0.0)
    taken(queue, 0.0)  # 16 ms from now on
    for _ in range(5):
        admit(queue, "a", 0.0)
    # 12 ms of the running batch, one full batch of 16 ms, then two images in 12 ms
    assert queue.estimate_s("a", Priority.HIGH, 0.004) == pytest.approx(0.012 + 0.016 + 0.012)


def test_estimate_of_high_priority_leaves_young_low_ones_out() -> None:
    queue = make_queue({"a": "m"}, batch=4)
    for _ in range(8):
        admit(queue, "a", 0.0, priority=Priority.LOW)
    assert queue.estimate_s("a", Priority.HIGH, 0.1) == pytest.approx(TABLE[1])
    assert queue.estimate_s("a", Priority.HIGH, HANDICAP_S) == pytest.approx(2 * TABLE[4] + TABLE[1])
    assert queue.estimate_s("a", Priority.LOW, 0.1) == pytest.approx(2 * TABLE[4] + TABLE[1])


def test_estimate_with_another_group_is_at_most_twice_the_own_work() -> None:
    queue = make_queue({"a": "flooded", "b": "quiet"}, max_images=400, batch=4)
    for _ in range(100):
        admit(queue, "a", 0.0)
    assert queue.estimate_s("b", Priority.HIGH, 0.0) == pytest.approx(2 * TABLE[1])


def test_an_image_that_would_come_too_late_is_refused_with_the_excess() -> None:
    queue = make_queue({"a": "m"}, batch=4)
    for _ in range(8):
        admit(queue, "a", 0.0)
    estimate_s = queue.estimate_s("a", Priority.HIGH, 0.0)
    with pytest.raises(WouldMissDeadline) as caught:
        admit(queue, "a", 0.0, deadline=estimate_s - 0.005)
    assert caught.value.retry_after_s == pytest.approx(0.005)
    admit(queue, "a", 0.0, deadline=estimate_s + 0.001)


def test_a_free_device_is_tried_whatever_the_estimate_says() -> None:
    queue = make_queue({"a": "m"})
    queue._lanes["a"].costs._drift = 100.0
    admit(queue, "a", 0.0, deadline=0.02)
    assert len(taken(queue, 0.0).entries) == 1


def test_late_images_are_handed_out_to_be_told_and_not_run() -> None:
    queue = make_queue({"a": "m"}, batch=2)
    late = admit(queue, "a", 0.0, deadline=1.0)
    good = [admit(queue, "a", 0.0, deadline=9.0) for _ in range(2)]
    batch = taken(queue, 1.0 - TABLE[1] / 2)  # even alone it would be answered too late
    assert (batch.late, batch.entries) == ([late], good)


def test_a_batch_of_late_images_only_keeps_no_device() -> None:
    queue = make_queue({"a": "m"})
    admit(queue, "a", 0.0, deadline=1.0)
    batch = taken(queue, 2.0)
    assert (len(batch.late), batch.entries) == (1, [])
    assert queue.idle()


def test_expire_withdraws_waiting_and_running_entries() -> None:
    queue = make_queue({"a": "m"}, batch=1)
    running = admit(queue, "a", 0.0, deadline=1.0)
    batch = taken(queue, 0.0)
    waiting = admit(queue, "a", 0.0, deadline=2.0)
    forever = admit(queue, "a", 0.0)
    assert queue.next_deadline() == 1.0
    assert queue.expire(1.0) == []
    assert queue.expire(3.0) == [waiting, running]
    assert queue.next_deadline() is None
    queue.finish(batch, now=3.0)
    assert taken(queue, 3.0).entries == [forever]


def test_closed_lane_serves_what_it_holds_and_refuses_more() -> None:
    queue = make_queue({"a": "m", "b": "m"})
    entry = admit(queue, "a", 0.0)
    queue.close_lane("a")
    with pytest.raises(NotReady, match="no longer loaded"):
        admit(queue, "a", 0.0)
    assert not queue.lane_idle("a")
    batch = taken(queue, 0.0)
    assert batch.entries == [entry]
    assert not queue.lane_idle("a")
    queue.finish(batch, now=0.1)
    queue.remove_lane("a")
    with pytest.raises(NotReady):
        admit(queue, "a", 0.0)
    admit(queue, "b", 0.0)


def test_a_lane_key_is_used_once() -> None:
    queue = make_queue({"a": "m"})
    with pytest.raises(ValueError, match="'a' exists"):
        queue.add_lane("a", "m", BatchCosts(TABLE, 8), None)


@pytest.mark.parametrize("bounds", [{"devices": 0}, {"max_images": 0}, {"max_bytes": 0}])
def test_bounds_below_one_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatchQueue(**({"devices": 1, "max_images": 1, "max_bytes": 1, "low_priority_handicap_s": 1.0} | bounds))


@settings(max_examples=60, deadline=None)
@given(arrivals=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 0.02)), min_size=20, max_size=80), low_at=st.integers(0, 15))
def test_no_lane_and_no_priority_starves(arrivals: list[tuple[str, float]], low_at: int) -> None:
    """However HIGH images arrive in three lanes, a LOW one waits at most for the handicap and what was in the queue by then."""
    queue = make_queue({"a": "m", "b": "m", "c": "m"}, max_images=16)
    now, device_free_at, low, running = 0.0, 0.0, None, None
    for index, (key, gap_s) in enumerate(arrivals * 10):
        now += gap_s
        if index == low_at:
            low = admit(queue, "c", now, priority=Priority.LOW) if queue.snapshot(now).waiting_images < 16 else None
        with contextlib.suppress(QueueFull):
            admit(queue, key, now)
        while device_free_at <= now:
            if running is not None:
                queue.finish(running, now=device_free_at)
            running = queue.take(0, max(device_free_at, now))
            if running is None:
                break
            assert len(running.entries) <= 8
            device_free_at = max(device_free_at, now) + running.expected_s
    if low is not None and low.phase == "queued":
        # 16 may wait, in the worst case each in a batch of its own, and the running one comes on top
        assert now - low.arrived <= HANDICAP_S + 17 * TABLE[8] + 0.02


class QueueMachine(RuleBasedStateMachine):
    """Any order of submits, takes, finishes, withdrawals, expiries and clock steps, against a plain model of what must hold."""

    MAX_IMAGES, MAX_BYTES = 12, 60
    GROUPS = {"a": "one", "b": "one", "c": "two"}  # noqa: RUF012

    @initialize(devices=st.integers(1, 3))
    def start(self, devices: int) -> None:
        self.queue = make_queue(dict(self.GROUPS), devices=devices, max_images=self.MAX_IMAGES, max_bytes=self.MAX_BYTES, batch=4)
        self.now = 0.0
        self.free = set(range(devices))
        self.running: dict[int, Batch] = {}
        self.waiting: list[Entry] = []
        self.ends: Counter[Entry] = Counter()
        self.accepted: list[Entry] = []

    @rule(
        key=st.sampled_from("abc"),
        nbytes=st.integers(0, 20),
        patience=st.one_of(st.none(), st.floats(-0.01, 0.3)),
        priority=st.sampled_from(Priority),
    )
    def submit(self, key: str, nbytes: int, patience: float | None, priority: Priority) -> None:
        deadline = None if patience is None else self.now + patience
        refusal: QueueFull | WouldMissDeadline
        try:
            entry = admit(self.queue, key, self.now, nbytes=nbytes, deadline=deadline, priority=priority)
        except (QueueFull, WouldMissDeadline) as error:
            refusal = error
        else:
            self.waiting.append(entry)
            self.accepted.append(entry)
            return
        assert refusal.retry_after_s is not None
        assert refusal.retry_after_s >= 0
        if isinstance(refusal, WouldMissDeadline):
            assert patience is not None
            assert self.waiting or not self.free, "a free device refuses nobody"
            return
        own = [e for e in self.waiting if e.lane.group.key == self.GROUPS[key]]
        images, held = len(self.waiting), sum(e.nbytes for e in self.waiting)
        # each of the two groups is sure of a quarter of the queue
        assert len(own) + 1 > self.MAX_IMAGES // 4 or sum(e.nbytes for e in own) + nbytes > self.MAX_BYTES // 4
        assert images + 1 + self.MAX_IMAGES // 4 > self.MAX_IMAGES or held + nbytes + self.MAX_BYTES // 4 > self.MAX_BYTES

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        device = data.draw(st.sampled_from(sorted(self.free)))
        batch = self.queue.take(device, self.now)
        if batch is None:
            assert not self.waiting
            return
        members = batch.entries + batch.late
        assert len(members) >= 1
        assert len(batch.entries) <= 4
        assert {e.lane for e in members} == {batch.lane}
        group = [e for e in self.waiting if e.lane.group is batch.lane.group]
        assert min(group, key=lambda e: e.rank).rank == min(e.rank for e in members), "oldest first"
        for priority in Priority:
            queued = [e for e in self.waiting if e.lane is batch.lane and e.priority is priority]
            got = [e for e in queued if e in members]
            assert got == queued[: len(got)], "order of arrival within a lane"
        for entry in members:
            self.waiting.remove(entry)
        self.ends.update(batch.late)
        if batch.entries:
            self.free.discard(device)
            self.running[device] = batch

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        device = data.draw(st.sampled_from(sorted(self.running)))
        batch = self.running.pop(device)
        self.ends.update(e for e in batch.entries if e.phase == "running")
        self.queue.finish(batch, now=self.now)
        self.free.add(device)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.accepted))
        was_waiting, was_done = entry in self.waiting, self.ends[entry] > 0
        phase = self.queue.withdraw(entry)
        assert phase == ("done" if was_done else "queued" if was_waiting else "running")
        if was_waiting:
            self.waiting.remove(entry)
        if not was_done:
            self.ends[entry] += 1

    @rule()
    def expire(self) -> None:
        late = self.queue.expire(self.now)
        assert all(e.is_late(self.now) for e in late)
        self.ends.update(late)
        self.waiting = [e for e in self.waiting if e not in late]
        assert not any(e.is_late(self.now) for e in self.waiting)

    @rule(seconds=st.floats(0, 0.5))
    def advance(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def holds(self) -> None:
        snapshot = self.queue.snapshot(self.now)
        assert snapshot.waiting_images == len(self.waiting) <= self.MAX_IMAGES
        assert snapshot.waiting_bytes == sum(e.nbytes for e in self.waiting) <= self.MAX_BYTES
        assert sum(snapshot.depths.values()) == len(self.waiting)
        assert snapshot.oldest_age_s == max((self.now - e.arrived for e in self.waiting), default=0.0)
        assert self.queue.idle() == (not self.waiting and not self.running)
        assert all(count == 1 for count in self.ends.values()), "answered twice"
        held = {e for batch in self.running.values() for e in batch.entries}
        for entry in self.accepted:
            assert self.ends[entry] == 1 or entry in held or entry in self.waiting, "lost"

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for batch in self.running.values():
            self.ends.update(e for e in batch.entries if e.phase == "running")
            self.queue.finish(batch, now=self.now)
        self.running.clear()
        while (batch := self.queue.take(0, self.now)) is not None:
            self.ends.update(batch.entries + batch.late)
            if batch.entries:
                self.queue.finish(batch, now=self.now)
        assert all(self.ends[entry] == 1 for entry in self.accepted), "everything accepted ends exactly once"
        assert self.queue.idle()


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestQueueMachine = QueueMachine.TestCase
