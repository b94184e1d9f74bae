"""The way to Cassandra fails, and Cassandra itself.

Each test proves by a counter that its fault happened, and ends with `settle`: the witness finds
nothing forbidden. The connection to the broker stays through all of them.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from backing import Direction
from tests.faults.stage import KEEP_ALIVE_SECONDS, RECEIVE_MAXIMUM
from tests.proxied import away

if TYPE_CHECKING:
    from collections.abc import Callable

    import backing
    from tests.faults.conftest import MakeStage
    from tests.faults.pod import Pod
    from tests.faults.stage import Stage

pytestmark = pytest.mark.timeout(180)

DURABLE = "updates_durable_total"
RETRIES = "write_retries_total"
TIMED_OUT = "lib_request_timed_out"


# ------------------------------------------------------------------ the way to it


def reset(pod: Pod) -> None:
    for _ in range(5):
        assert pod.cassandra(lambda proxy: proxy.reset()) > 0
        pod.service.wait_until(
            lambda: pod.cassandra(lambda proxy: proxy.connections) > 0, "it connects again"
        )
        pod.wait_more(20, DURABLE)
    assert pod.total("write_errors_total") > 0


def delay(pod: Pod) -> None:
    """Writes are under way for long: an ack that did not wait for them would be seen."""
    pod.cassandra(lambda proxy: proxy.delay(0.15))
    pod.wait_more(200, DURABLE)
    assert pod.total("write_seconds_sum") / pod.total("write_seconds_count") > 0.05


def thin_line(pod: Pod) -> None:
    pod.cassandra(lambda proxy: proxy.limit_bandwidth(40_000))
    pod.wait_more(200, DURABLE)


def one_byte_at_a_time(pod: Pod) -> None:
    pod.cassandra(lambda proxy: proxy.one_byte_at_a_time())
    pod.wait_more(100, DURABLE)


def cut_in_a_frame(pod: Pod) -> None:
    draw = random.Random(11)
    for number in range(1, 9):
        after, way = draw.randrange(1, 1500), draw.choice(list(Direction))
        pod.cassandra(lambda proxy, after=after, way=way: proxy.cut_after(after, way))  # type: ignore[misc]
        pod.service.wait_until(
            lambda number=number: pod.cassandra(lambda proxy: proxy.counts.cut) == number,  # type: ignore[misc]
            "the connection is cut",
        )
    pod.wait_more(20, DURABLE)
    assert pod.total("write_errors_total") > 0


def away_for_many_keep_alives(pod: Pod) -> None:
    pod.cassandra(away)
    pod.service.wait_reasons({"cassandra_unavailable"})
    pings = pod.wire.counts["PINGREQ"]
    pod.service.wait_until(lambda: pod.wire.counts["PINGREQ"] >= pings + 5, "five pings went out")
    acked = pod.wire.counts["PUBACK"]
    time.sleep(KEEP_ALIVE_SECONDS)
    assert pod.wire.counts["PUBACK"] == acked
    assert pod.service.live()
    assert pod.total(RETRIES) > 0


@pytest.mark.parametrize(
    "fault",
    [
        reset,
        delay,
        pytest.param(thin_line, marks=pytest.mark.slow),
        one_byte_at_a_time,
        cut_in_a_frame,
        away_for_many_keep_alives,
    ],
)
def test_a_bad_way_to_cassandra_costs_nothing(
    make_stage: MakeStage, fault: Callable[[Pod], None]
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        fault(pod)
        pod.heal()
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert verdict.looked_up_at_once > 0
    assert pod.wire.counts["connections"] == 1
    assert pod.total("disconnects_total") == 0


@pytest.mark.parametrize("poison", [0, 1.0], ids=["updates", "dead letters"])
def test_on_a_long_way_to_cassandra_more_requests_are_under_way_whatever_they_write(
    make_stage: MakeStage, poison: float
) -> None:
    """0.6 s there and back, as to another continent and more."""
    stage = make_stage(
        MQTT__RECEIVE_MAXIMUM=600,
        CASSANDRA__BATCH_MAX_PARTITIONS=1,
        CASSANDRA__REQUEST_TIMEOUT_SECONDS=5,
    ).start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
    pod.cassandra(lambda proxy: proxy.delay(0.3))
    with stage.traffic(rate=2000, count=1000, max_messages=600, poison=poison) as traffic:
        traffic.join(30)
        pod.wait_total(20, "writes_in_flight", 60)
    assert pod.total("writes_limit") >= 20
    verdict = stage.settle(120)
    assert verdict.excused == 0
    assert pod.total("writes_limit_changes_total", reason="overload") == 0


def test_a_service_that_cannot_write_for_too_long_leaves_the_broker_and_comes_back(
    make_stage: MakeStage,
) -> None:
    """Above `isolate_after_seconds`: its share goes to others, its session is kept."""
    stage = make_stage(LIMITS__ISOLATE_AFTER_SECONDS=2).start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        pod.cassandra(away)
        pod.wait_total(1, "disconnects_total", reason="isolated")
        pod.service.wait_reasons({"cassandra_unavailable", "isolated", "not_subscribed"})
        connections = pod.wire.counts["connections"]
        time.sleep(2 * KEEP_ALIVE_SECONDS)
        assert pod.wire.counts["connections"] == connections
        assert pod.service.live()
        pod.heal()
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["resumed"] == 1


@pytest.mark.slow
def test_a_half_open_way_to_cassandra_costs_nothing(make_stage: MakeStage) -> None:
    """Found by the driver's heartbeat, which takes longer than the suite's other waits."""
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic(rate=100):
        pod.wait_more(20, DURABLE)
        pod.cassandra(lambda proxy: proxy.half_open())
        pod.service.wait_reasons({"cassandra_unavailable"})
        pod.cassandra(lambda proxy: proxy.heal())
        pod.service.wait_until(lambda: not pod.service.ready_reasons(), "it is ready", 90)
        pod.wait_more(20, DURABLE)
    stage.settle()
    assert pod.cassandra(lambda proxy: proxy.counts.swallowed_bytes) > 0
    assert pod.wire.counts["connections"] == 1


# ------------------------------------------------------------------ time-outs


def fill_the_window(stage: Stage, **options: Any) -> None:
    """Publish until the service holds its Receive Maximum of the traffic that follows."""
    with stage.traffic(max_messages=2 * RECEIVE_MAXIMUM, **options) as traffic:
        traffic.join(30)
    stage.pod.wait_total(RECEIVE_MAXIMUM, "deliveries_held")
    traffic.publisher.wait_answered()


def test_writes_that_timed_out_and_were_not_applied_are_sent_again(make_stage: MakeStage) -> None:
    stage = make_stage().start()
    pod = stage.pod
    pod.cassandra(lambda proxy: proxy.hold(Direction.TO_SERVER))
    fill_the_window(stage, poison=0)
    pod.wait_total(RECEIVE_MAXIMUM / 10, RETRIES, kind=TIMED_OUT)
    keys = {message.key for message in stage.witness.messages()}
    assert stage.witness.not_durable(keys) == keys, "nothing was applied"
    assert pod.wire.counts["PUBACK"] == 0
    # What was held back is thrown away with its connections: it will never be applied.
    pod.cassandra(lambda proxy: proxy.reset())
    verdict = stage.settle()
    assert verdict.durable == verdict.published


def test_writes_that_timed_out_and_were_applied_are_not_acknowledged_and_do_no_harm(
    make_stage: MakeStage,
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    pod.cassandra(lambda proxy: proxy.hold(Direction.TO_CLIENT))
    fill_the_window(stage, poison=0)
    pod.wait_total(RECEIVE_MAXIMUM / 10, RETRIES, kind=TIMED_OUT)
    # Not all: the number of requests falls while they time out.
    pod.service.wait_until(
        lambda: len(stage.witness.not_durable(pod.wire.reached)) < len(pod.wire.reached),
        "some of what the service holds is applied",
    )
    assert pod.wire.counts["PUBACK"] == 0
    pod.cassandra(lambda proxy: proxy.reset())
    verdict = stage.settle()
    assert verdict.durable == verdict.published
    # A dead letter that was applied unseen may have a second row; an update never has.
    assert verdict.dead_letters == 0


def test_dead_letters_that_timed_out_are_written_before_their_ack(make_stage: MakeStage) -> None:
    stage = make_stage().start()
    pod = stage.pod
    pod.cassandra(lambda proxy: proxy.hold(Direction.TO_SERVER))
    fill_the_window(stage, poison=1.0)
    pod.wait_total(RECEIVE_MAXIMUM / 10, RETRIES)
    assert pod.wire.counts["PUBACK"] == 0
    pod.cassandra(lambda proxy: proxy.reset())
    verdict = stage.settle()
    assert verdict.dead_letters == verdict.published == 2 * RECEIVE_MAXIMUM


# ------------------------------------------------------------------ Cassandra itself


def test_a_cassandra_that_is_killed_loses_nothing_that_was_acknowledged(
    make_own_stage: MakeStage, own_cassandra: backing.Cassandra
) -> None:
    stage = make_own_stage().start()
    pod = stage.pod
    with stage.traffic(rate=200):
        pod.wait_more(100, DURABLE)
        own_cassandra.kill()
        try:
            pod.service.wait_reasons({"cassandra_unavailable"})
            pod.wait_total(1, RETRIES)
        finally:
            own_cassandra.start()
        pod.service.wait_ready()
        pod.wait_more(100, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert stage.witness.counts["not readable"] > 0
    assert pod.wire.counts["connections"] == 1


def test_a_cassandra_that_freezes_costs_nothing(
    make_own_stage: MakeStage, own_cassandra: backing.Cassandra
) -> None:
    stage = make_own_stage().start()
    pod = stage.pod
    with stage.traffic(rate=200):
        pod.wait_more(50, DURABLE)
        own_cassandra.pause()
        try:
            pod.wait_more(1, RETRIES, kind=TIMED_OUT)
            pod.service.wait_reasons({"cassandra_unavailable"})
            time.sleep(2 * KEEP_ALIVE_SECONDS)
        finally:
            own_cassandra.resume()
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["connections"] == 1


def test_an_overloaded_cassandra_is_waited_for(
    make_own_stage: MakeStage, own_cassandra: backing.Cassandra
) -> None:
    """It runs for a fifth of the time: some writes succeed, some time out, applied or not."""
    stage = make_own_stage(CASSANDRA__REQUEST_TIMEOUT_SECONDS=0.2).start()
    pod = stage.pod
    with stage.traffic(rate=300):
        pod.wait_more(50, DURABLE)
        before = pod.total(DURABLE)
        for _ in range(12):
            own_cassandra.pause()
            time.sleep(0.4)
            own_cassandra.resume()
            time.sleep(0.1)
        assert pod.total(RETRIES) > 0
        pod.wait_total(before + 50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.total("dead_letters_total", reason="refused_by_store") == 0
    assert pod.wire.counts["connections"] == 1


# ------------------------------------------------------------------ the schema


def test_a_schema_that_changes_under_load_costs_nothing(
    make_stage: MakeStage, cql: Any, migrated: str
) -> None:
    """Statements that were prepared before are made invalid, again and again."""
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        for number in range(3):
            pod.wait_more(50, DURABLE)
            cql.execute(f"ALTER TABLE {migrated}.shadow ADD added_{stage.name}_{number} int")
            pod.wait_more(50, DURABLE)
            cql.execute(f"ALTER TABLE {migrated}.shadow DROP added_{stage.name}_{number}")
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.total("dead_letters_total", reason="refused_by_store") == 0
    assert pod.wire.counts["connections"] == 1


@pytest.mark.parametrize("table", ["shadow", "dead_letter"])
def test_a_table_that_is_missing_under_load_holds_every_ack_until_it_is_back(
    make_stage_with_keyspace: tuple[MakeStage, str], cql: Any, table: str
) -> None:
    make_stage, keyspace = make_stage_with_keyspace
    stage = make_stage().start()
    pod = stage.pod
    create = _create_statement(cql, keyspace, table)
    cql.execute(f"DROP TABLE {keyspace}.{table}", timeout=60)
    fill_the_window(stage, poison=0 if table == "shadow" else 1.0)
    pod.wait_total(1, RETRIES)
    pod.service.wait_reasons({"cassandra_unavailable"}, 20)
    assert pod.wire.counts["PUBACK"] == 0
    assert pod.service.live()
    cql.execute(create, timeout=60)
    verdict = stage.settle(90)
    assert verdict.durable == verdict.published == 2 * RECEIVE_MAXIMUM
    assert pod.total("dead_letters_total", reason="refused_by_store") == 0
    assert pod.wire.counts["connections"] == 1


def _create_statement(cql: Any, keyspace: str, table: str) -> str:
    (row,) = cql.execute(f"DESCRIBE TABLE {keyspace}.{table}")
    return str(row.create_statement)
