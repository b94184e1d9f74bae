"""What the writers promise when the store fails: nobody else pays, and nothing is given up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import orjson
import pytest
from blockbuster import blockbuster_ctx

from tests.faulty_store import AWAY, DOUBTFUL, OVERLOADED, REFUSED
from tests.line import line, turns
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _loop_never_blocked() -> Iterator[None]:
    with blockbuster_ctx(scanned_modules="shadowsvc"):
        yield


def by_first_letter(device: str) -> int:
    return ord(device[0])


def devices(letter: str, count: int) -> list[str]:
    return [f"{letter}{number}" for number in range(count)]


# -------------------------------------------------------------------- one replica set is away


async def test_while_one_replica_set_times_out_all_others_are_written() -> None:
    async with line(
        group=by_first_letter,
        max_partitions=1,
        concurrency=8,
        retry_min_seconds=0.001,
        retry_max_seconds=0.002,
    ) as made:
        store = made.store
        store.away = lambda device: device[0] == "x"
        store.away_seconds = 0.05
        sick, well = devices("x", 60), [device for one in "abcde" for device in devices(one, 40)]
        made.deliver("well")  # so that there are known to be several
        await until(lambda: store.durable)
        made.deliver(*sick, first_id=2)  # first, and more than there are places
        made.deliver(*well, first_id=62)
        await until(lambda: len(store.durable) == len(well) + 1)
        # The sick ones were tried and took their share of the places, no more.
        await until(lambda: made.metrics.write_retries[AWAY.kind] >= 6)
        assert store.most_at_away <= 6
        assert made.metrics.replica_sets_in_doubt == 1
        assert made.ledger.held == len(sick)
        assert made.acks == [1]  # they keep their order
        await until(lambda: store.at_away <= 1)
        store.away = lambda _: False
        await made.settle()
        assert made.acks == [*range(1, 262)]
        assert made.metrics.replica_sets_in_doubt == 0
        assert made.metrics.retries_waiting == 0


async def test_many_replica_sets_that_are_away_leave_places_for_those_that_are_not() -> None:
    async with line(group=by_first_letter, max_partitions=1, concurrency=8) as made:
        store = made.store
        store.away = str.isupper
        store.away_seconds = 0.05
        made.deliver(*[f"{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"])
        made.deliver("warm", first_id=27)
        # Once they are known to be away, they share a quarter of the places.
        await until(lambda: made.metrics.replica_sets_in_doubt >= 20)
        await until(lambda: store.at_away <= 2)
        made.deliver(*devices("a", 100), first_id=28)
        most = 0
        while len(store.durable) < 101:
            await asyncio.sleep(0.001)
            most = max(most, store.at_away)
        assert 1 <= most <= 2 + 6  # those that were not tried before are in no doubt yet
        store.away = lambda _: False
        await made.settle()
        assert len(made.acks) == 127


async def test_a_batch_that_waits_for_its_next_attempt_has_no_writer() -> None:
    async with line(concurrency=1, max_partitions=1, retry_min_seconds=0.2) as made:
        made.store.error = AWAY
        made.store.errors_left = 1
        made.deliver("first")
        await until(lambda: made.metrics.retries_waiting == 1)
        made.deliver(*devices("a", 20), first_id=2)
        await until(lambda: len(made.store.durable) == 20, seconds=0.1)
        assert made.sent == []
        await made.settle()
        assert made.acks == [*range(1, 22)]


async def test_dead_letters_that_fail_do_not_stop_updates() -> None:
    async with line(concurrency=4, receive_maximum=500) as made:
        made.store.letter_error = AWAY
        made.deliver(*devices("bad", 100), payload=b"rubbish")
        await until(lambda: made.metrics.retries_waiting)
        made.deliver(*devices("good", 100), first_id=101)
        await until(lambda: len(made.store.durable) == 100)
        made.store.letter_error = None
        await made.settle()
        assert made.acks == [*range(1, 201)]


@pytest.mark.parametrize("what", ["dead letters", "one replica set of several"])
async def test_what_may_not_have_every_place_widens_the_window_too(what: str) -> None:
    """On a long way to Cassandra the window is what holds back whatever is written."""
    async with line(
        group=by_first_letter,
        max_partitions=1,
        concurrency=32,
        min_concurrency=4,
        receive_maximum=1000,
    ) as made:
        store = made.store
        made.deliver("a", "b")
        await until(lambda: len(store.durable) == 2)
        store.seconds = 0.02
        letters = what == "dead letters"
        made.deliver(*devices("c", 900), first_id=3, payload=b"rubbish" if letters else None)
        await until(lambda: store.most_in_flight >= 20)
        assert made.metrics.window_changes["growth"] > 10
        await made.settle()
        assert store.most_in_flight == 24, "three quarters of the most"
        assert len(store.letters if letters else store.durable[2:]) == 900


async def test_while_a_replica_set_is_away_its_open_batches_fill_up() -> None:
    async with line(group=by_first_letter, max_partitions=10, linger_seconds=0.001) as made:
        made.store.away = lambda device: device[0] == "x"
        made.deliver("x", "a")
        await until(lambda: made.metrics.retries_waiting)
        for number in range(50):
            made.deliver(f"x{number}", first_id=10 + number)
            await asyncio.sleep(0.002)
        made.store.away = lambda _: False
        await made.settle()
        batches = [asked for asked in made.store.asked if asked[0][0].startswith("x")]
        assert max(map(len, batches)) == 10


async def test_in_a_long_outage_no_more_is_in_memory_than_was_delivered() -> None:
    async with line(group=by_first_letter, max_partitions=2, receive_maximum=50) as made:
        made.store.error = AWAY
        made.deliver(*[f"{'abcdefg'[number % 7]}{number}" for number in range(50)])
        for _ in range(20):
            await turns(5)
            assert len(list(made.pipeline.writers.deliveries())) <= 50
            assert made.ledger.held == 50
        assert made.metrics.write_retries[AWAY.kind] > 50
        made.store.error = None
        await made.settle()
        assert made.acks == [*range(1, 51)]


async def test_reconnects_in_an_outage_leave_nothing_of_old_connections_in_memory() -> None:
    async with line(max_partitions=1, retry_min_seconds=5, retry_max_seconds=5) as made:
        made.store.error = AWAY
        for _ in range(10):
            made.deliver(*devices("a", 50), duplicate=True)
            await until(lambda: made.metrics.retries_waiting)
            await made.connect(session_present=True)
            assert made.ledger.held == 0
            await until(lambda: made.pipeline._waiting_deliveries() == [])
            assert made.metrics.replica_sets_in_doubt == 0  # nothing is left that could end it
            assert made.metrics.retries_waiting == 0
            assert made.pipeline.failing
        made.store.error = None
        made.deliver(*devices("a", 50), duplicate=True)
        await made.settle()
        assert made.acks == [*range(1, 51)]


# -------------------------------------------------------------------- overload


async def test_overload_lowers_the_limit_and_success_raises_it_again() -> None:
    async with line(max_partitions=1, concurrency=16, min_concurrency=2) as made:
        made.deliver(*devices("a", 400))
        await made.settle()
        before = made.pipeline.concurrency
        assert before == 16
        made.store.error = OVERLOADED
        made.store.errors_left = 3
        made.deliver(*devices("b", 3), first_id=401)
        await made.settle()
        assert made.metrics.window_changes["overload"] == 1
        assert made.pipeline.concurrency < before
        for number in range(20):
            made.deliver(*devices("c", 100), first_id=1000 + 100 * number)
            await made.settle()
        assert made.pipeline.concurrency > before // 2
        assert made.metrics.window_changes["growth"] > 0


async def test_a_limit_below_the_number_of_writers_is_kept() -> None:
    async with line(max_partitions=1, concurrency=16, min_concurrency=3) as made:
        made.store.open.clear()
        made.deliver(*devices("a", 100))
        await turns()
        assert made.store.in_flight == made.pipeline.in_flight == made.pipeline.concurrency == 3
        made.store.open.set()
        await made.settle()


async def test_an_outage_that_is_no_overload_leaves_the_limit_alone() -> None:
    async with line(max_partitions=1, concurrency=16, min_concurrency=2) as made:
        made.deliver(*devices("a", 400))
        await made.settle()
        made.store.error = AWAY
        made.store.errors_left = 100
        made.deliver(*devices("b", 50), first_id=401)
        await made.settle()
        assert made.pipeline.concurrency == 16
        assert made.metrics.window_changes["overload"] == 0


# -------------------------------------------------------------------- refusals and doubt


async def test_more_poison_than_receive_maximum_costs_the_good_nothing() -> None:
    async with line(receive_maximum=20, max_dead_letters_per_minute=10_000) as made:
        poison = set(devices("bad", 200))
        made.store.refused_devices = poison
        for number in range(20):
            bad = devices("bad", 200)[number * 10 : number * 10 + 10]
            made.deliver(*bad, *devices(f"good{number}-", 10), first_id=1)
            await made.settle()
        assert {letter.device for letter in made.store.letters} == poison
        assert len(made.store.letters) == 200
        assert len(made.store.durable) == 200
        assert len(made.acks) == 400


async def test_a_doubtful_error_is_no_dead_letter_and_holds_up_no_neighbour() -> None:
    async with line() as made:
        made.store.doubted_devices = {"doubted"}
        made.deliver("a", "doubted", "b", "c")
        await until(lambda: len(made.store.durable) == 3)
        await until(lambda: made.metrics.write_retries[DOUBTFUL.kind] > 10)
        assert made.metrics.batches_split >= 2
        assert made.store.letters == []
        assert made.acks == [1]
        made.store.doubted_devices = set()
        await made.settle()
        assert made.acks == [1, 2, 3, 4]


async def test_an_outage_between_two_refusals_does_not_make_a_culprit() -> None:
    """Refused, then an outage at the probe, then written: that is no poison."""
    async with line() as made:
        made.store.refused_devices = {"a"}
        made.store.probe_error = REFUSED
        made.deliver("a")
        await until(lambda: made.store.probes >= 3)
        made.store.refused_devices = set()
        made.store.probe_error = None
        await made.settle()
        assert made.store.letters == []
        assert made.acks == [1]


# -------------------------------------------------------------------- failing


async def test_a_single_failure_that_passes_does_not_make_the_service_not_ready() -> None:
    async with line(failing_after_seconds=5) as made:
        made.store.error = AWAY
        made.store.errors_left = 3
        made.deliver("a")
        await until(lambda: made.metrics.write_retries[AWAY.kind])
        assert made.pipeline.failing is None
        await made.settle()
        assert made.metrics.write_retries[AWAY.kind] == 3


async def test_in_a_partial_outage_failing_does_not_flap() -> None:
    async with line(group=by_first_letter, max_partitions=1, failing_after_seconds=0.02) as made:
        made.store.away = lambda device: device[0] == "x"
        made.deliver("x1", "x2")
        await until(lambda: made.pipeline.failing)
        for number in range(30):
            made.deliver(f"a{number}", first_id=10 + number)
            await turns(2)
            assert made.pipeline.failing == "server_write_timeout: no answer"
        assert len(made.store.durable) == 30
        # One of the two succeeded: the other is still being retried.
        made.store.away = lambda device: device == "x2"
        await until(lambda: len(made.store.durable) == 31)
        assert made.pipeline.failing
        assert made.pipeline.failing_since is None or made.ledger.held == 1
        made.store.away = lambda _: False
        await made.settle()
        assert made.pipeline.failing is None
        assert made.pipeline.failing_since is None


async def test_any_success_ends_the_time_without_one() -> None:
    async with line(group=by_first_letter, max_partitions=1) as made:
        made.store.error = AWAY
        made.deliver("x")
        await until(lambda: made.pipeline.failing_since)
        made.store.away = lambda device: device == "x"
        made.store.error = None
        made.deliver("a", first_id=2)
        await until(lambda: made.store.durable)
        made.store.away = lambda _: False
        await made.settle()
        assert made.pipeline.failing_since is None


# -------------------------------------------------------------------- wedges


async def test_a_future_that_never_resolves_is_a_wedge_until_it_does() -> None:
    async with line(request_timeout_seconds=0.01) as made:
        made.store.open.clear()
        made.deliver("a")
        await until(lambda: made.pipeline.wedged(time.monotonic()))
        assert "has had no answer for" in str(made.pipeline.wedged(time.monotonic()))
        made.store.open.set()
        await made.settle()
        assert made.pipeline.wedged(time.monotonic()) is None
        assert made.pipeline.wedged(time.monotonic() + 1000) is None


async def test_others_go_on_beside_a_future_that_never_resolves() -> None:
    async with line(concurrency=2, max_partitions=1) as made:
        made.store.open.clear()
        made.deliver("stuck")
        await until(lambda: made.store.in_flight == 1)
        stuck, made.store.open = made.store.open, asyncio.Event()
        made.store.open.set()
        made.deliver(*devices("a", 10), first_id=2)
        await until(lambda: len(made.store.durable) == 10)
        assert made.pipeline.wedged(time.monotonic() + 1000) is not None
        stuck.set()
        await made.settle()


async def test_an_update_of_many_slow_parts_is_no_wedge() -> None:
    async with line(max_request_bytes=600, request_timeout_seconds=0.01) as made:
        made.store.slow_parts = 200
        leaves = {f"leaf{number}": "x" * 20 for number in range(50)}
        made.deliver("big", payload=orjson.dumps({"state": {"reported": leaves}}))
        looks: Counter[bool] = Counter()
        started = time.monotonic()
        while made.ledger.held:
            await asyncio.sleep(0.001)
            # All of it takes several times as long as one request may.
            looks[made.pipeline.wedged(time.monotonic()) is None] += 1
        assert time.monotonic() - started > 0.1
        assert looks[True] > looks[False]
        assert looks[True] > 50


async def test_an_outage_of_any_length_is_no_wedge() -> None:
    async with line(max_partitions=1, concurrency=2) as made:
        made.store.error = AWAY
        made.deliver(*devices("a", 20))
        await until(lambda: made.metrics.write_retries[AWAY.kind] > 20)
        for hours in range(100):
            await asyncio.sleep(0)
            if not made.pipeline.in_flight:
                assert made.pipeline.wedged(time.monotonic() + 3600 * hours) is None
        made.store.error = None
        await made.settle()
