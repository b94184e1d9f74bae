"""Batches: who is written together, and that nobody is lost or written twice."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shadowsvc.shadow.update import Update
from shadowsvc.store.batch import Batch, Batcher, halves

thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

DEVICES = [f"d{number}" for number in range(9)]
ARRIVALS = st.lists(st.tuples(st.sampled_from(DEVICES), st.integers(1, 60)), max_size=60)


def group_of(device: str) -> int:
    return int(device[1:]) % 3


def update(device: str, size: int = 10, time_us: int = 1) -> Update:
    return Update.of(device, "", time_us, [("reported", "/a", b"1")], [], size)


def arrive(batcher: Batcher, arrivals: list[tuple[str, int]]) -> list[Update]:
    updates = [update(device, size, tick) for tick, (device, size) in enumerate(arrivals)]
    for one in updates:
        batcher.add(one)
    return updates


def drain(batcher: Batcher) -> list[Batch]:
    batcher.seal()
    found = list(batcher.ready)
    batcher.ready.clear()
    return found


@thorough
@given(ARRIVALS, st.integers(1, 5), st.integers(20, 200))
def test_every_update_is_in_one_batch_and_batches_keep_their_bounds(
    arrivals: list[tuple[str, int]], max_partitions: int, max_bytes: int
) -> None:
    batcher = Batcher(group_of, max_partitions=max_partitions, max_bytes=max_bytes)
    updates = arrive(batcher, arrivals)
    batches = drain(batcher)
    written = [one for batch in batches for one in batch.updates()]
    assert sorted(map(id, written)) == sorted(map(id, updates))
    for batch in batches:
        assert {group_of(device) for device in batch.devices} == {batch.group}
        assert all(half.group == batch.group for half in halves(batch) or ())
        assert len(batch.devices) <= max_partitions
        assert len(batch) == len(list(batch.updates())) > 0
        assert batch.size_bytes == sum(one.size_bytes for one in batch.updates())
        assert batch.size_bytes <= max_bytes or len(batch) == 1
        for device, own in batch.devices.items():
            assert {one.device for one in own} == {device}
    # Times were given in the order of arrival.
    for device in DEVICES:
        times = [one.time_us for one in written if one.device == device]
        assert times == sorted(times)
    assert not batcher.is_open
    assert not list(batcher.batches())


@thorough
@given(ARRIVALS, st.sets(st.integers(0, 59)))
def test_what_is_dropped_is_gone_and_the_rest_is_as_it_was(
    arrivals: list[tuple[str, int]], doomed: set[int]
) -> None:
    batcher = Batcher(group_of, max_partitions=3, max_bytes=100)
    updates = arrive(batcher, arrivals)
    before = [one for batch in batcher.batches() for one in batch.updates()]
    dropped = batcher.drop(lambda one: one.time_us in doomed)
    kept = [one for batch in batcher.batches() for one in batch.updates()]
    assert {one.time_us for one in dropped} == doomed & {one.time_us for one in updates}
    assert kept == [one for one in before if one.time_us not in doomed]
    for batch in batcher.batches():
        assert batch.devices
        assert all(batch.devices.values())
        assert batch.size_bytes == sum(one.size_bytes for one in batch.updates())
    drain(batcher)
    assert not batcher.is_open


def test_devices_of_different_replica_sets_never_share_a_batch() -> None:
    batcher = Batcher(group_of)
    arrive(batcher, [("d0", 1), ("d1", 1), ("d3", 1), ("d4", 1)])
    assert [list(batch.devices) for batch in drain(batcher)] == [["d0", "d3"], ["d1", "d4"]]


def test_without_groups_all_devices_share() -> None:
    batcher = Batcher(group_of)
    batcher.group = None
    arrive(batcher, [("d0", 1), ("d1", 1)])
    assert [list(batch.devices) for batch in drain(batcher)] == [["d0", "d1"]]


def test_a_full_batch_is_ready_at_once() -> None:
    batcher = Batcher(group_of, max_partitions=2)
    arrive(batcher, [("d0", 1), ("d0", 1)])
    assert not batcher.ready
    assert batcher.is_open
    arrive(batcher, [("d3", 1)])
    assert [len(batch) for batch in batcher.ready] == [3]
    assert not batcher.is_open


def test_an_update_larger_than_a_batch_stands_alone() -> None:
    batcher = Batcher(group_of, max_bytes=100)
    arrive(batcher, [("d0", 60), ("d0", 500), ("d3", 60), ("d3", 40), ("d3", 1)])
    assert [batch.size_bytes for batch in drain(batcher)] == [60, 500, 100, 1]


def test_groups_that_are_to_be_kept_stay_open() -> None:
    batcher = Batcher(group_of)
    arrive(batcher, [("d0", 1), ("d1", 1), ("d2", 1)])
    batcher.seal(lambda group: group == 1)
    assert {batch.group for batch in batcher.ready} == {0, 2}
    assert batcher.is_open
    batcher.seal()
    assert {batch.group for batch in batcher.ready} == {0, 1, 2}
    assert not batcher.is_open


def test_sealing_nothing_makes_no_batch() -> None:
    batcher = Batcher(group_of)
    batcher.seal()
    assert batcher.ready == deque()


@pytest.mark.parametrize("max_partitions", [1, 2])
def test_a_batch_of_one_device_takes_every_update_of_it(max_partitions: int) -> None:
    batcher = Batcher(group_of, max_partitions=max_partitions)
    arrive(batcher, [("d0", 1)] * 4)
    assert sum(len(batch) for batch in drain(batcher)) == 4


@thorough
@given(ARRIVALS.filter(bool))
def test_halving_ends_with_every_update_alone_and_loses_none(
    arrivals: list[tuple[str, int]],
) -> None:
    batcher = Batcher(lambda _: 0, max_partitions=100, max_bytes=100_000)
    updates = arrive(batcher, arrivals)
    (whole,) = drain(batcher)
    waiting = [whole]
    alone: list[Update] = []
    while waiting:
        batch = waiting.pop()
        parts = halves(batch)
        if parts is None:
            alone.extend(batch.updates())
            continue
        assert all(0 < len(part) < len(batch) for part in parts)
        assert sum(map(len, parts)) == len(batch)
        assert sum(part.size_bytes for part in parts) == batch.size_bytes
        if len(batch.devices) > 1:
            assert not parts[0].devices.keys() & parts[1].devices.keys()
        waiting.extend(parts)
    assert sorted(map(id, alone)) == sorted(map(id, updates))


def test_a_culprit_among_devices_is_found_in_few_steps() -> None:
    batcher = Batcher(lambda _: 0, max_partitions=100)
    arrive(batcher, [(device, 1) for device in DEVICES])
    (batch,) = drain(batcher)
    steps = 0
    while (parts := halves(batch)) is not None:
        batch = next(part for part in parts if "d5" in part.devices)
        steps += 1
    assert list(batch.devices) == ["d5"]
    assert steps <= 4


def test_a_batch_of_nothing_cannot_be_halved() -> None:
    assert halves(Batch()) is None
