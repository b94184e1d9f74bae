"""The way to the broker fails, and the broker itself.

Each test proves by a counter that its fault happened, and ends with `settle`: the witness finds
nothing forbidden.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from backing import Direction
from tests.faults.stage import KEEP_ALIVE_SECONDS, RECEIVE_MAXIMUM
from tests.proxied import away

if TYPE_CHECKING:
    from collections.abc import Callable

    from backing import Mosquitto
    from tests.faults.conftest import MakeStage
    from tests.faults.pod import Pod
    from tests.faults.wire import Key

pytestmark = pytest.mark.timeout(180)

DURABLE = "updates_durable_total"


def test_nothing_is_lost_where_nothing_fails(make_stage: MakeStage) -> None:
    """The witness itself: it sees every kind of message, and looks up acks at once."""
    stage = make_stage().start()
    with stage.traffic(max_messages=600) as traffic:
        traffic.join(30)
    verdict = stage.settle()
    assert verdict.published == 600
    # What is published with QoS 0 may go where the broker finds its queue or a buffer full.
    assert verdict.durable >= verdict.acknowledged_to_publisher
    assert verdict.acknowledged_by_service == verdict.acknowledged_to_publisher > 500
    assert verdict.dead_letters > 0
    assert verdict.looked_up_at_once > 10
    assert stage.witness.counts["sampled rows"] > 50
    assert stage.pod.wire.counts["connections"] == 1
    assert stage.pod.most_rss_bytes > 0


# ------------------------------------------------------------------ the way to it


def reset(pod: Pod) -> None:
    for number in range(1, 6):
        assert pod.broker(lambda proxy: proxy.reset()) == 1
        pod.wait_total(number, "sessions_total", state="resumed")
    assert pod.broker(lambda proxy: proxy.counts.reset) == 5


def half_open(pod: Pod) -> None:
    pod.broker(lambda proxy: proxy.half_open())
    pod.wait_total(1, "disconnects_total", reason="keep_alive")
    assert pod.broker(lambda proxy: proxy.counts.silenced) > 0
    assert pod.broker(lambda proxy: proxy.counts.swallowed_bytes) > 0


def delay(pod: Pod) -> None:
    pod.broker(lambda proxy: proxy.delay(0.3))
    pod.wait_more(200, DURABLE)
    assert pod.total("disconnects_total") == 0


def thin_line(pod: Pod) -> None:
    pod.broker(lambda proxy: proxy.limit_bandwidth(15_000))
    pod.wait_more(200, DURABLE)
    assert pod.total("disconnects_total") == 0


def one_byte_at_a_time(pod: Pod) -> None:
    pod.broker(lambda proxy: proxy.one_byte_at_a_time())
    pod.wait_more(100, DURABLE)
    assert pod.total("disconnects_total") == 0


def cut_in_a_packet(pod: Pod) -> None:
    draw = random.Random(11)
    for number in range(1, 9):
        after, way = draw.randrange(1, 1500), draw.choice(list(Direction))
        pod.broker(lambda proxy, after=after, way=way: proxy.cut_after(after, way))  # type: ignore[misc]
        pod.wait_total(number, "sessions_total", state="resumed")
    assert pod.broker(lambda proxy: proxy.counts.cut) == 8


def stands_still(pod: Pod) -> None:
    pod.broker(lambda proxy: proxy.hold())
    pod.wait_total(1, "disconnects_total", reason="keep_alive")


def away_for_many_keep_alives(pod: Pod) -> None:
    pod.broker(away)
    time.sleep(4 * KEEP_ALIVE_SECONDS)
    assert pod.broker(lambda proxy: proxy.counts.refused) > 4
    assert pod.service.live()
    assert pod.service.ready_reasons() == {"not_subscribed"}


@pytest.mark.parametrize(
    "fault",
    [
        reset,
        half_open,
        delay,
        pytest.param(thin_line, marks=pytest.mark.slow),
        one_byte_at_a_time,
        cut_in_a_packet,
        pytest.param(stands_still, marks=pytest.mark.slow),
        pytest.param(away_for_many_keep_alives, marks=pytest.mark.slow),
    ],
)
def test_a_bad_way_to_the_broker_costs_nothing(
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
    if fault not in (delay, thin_line, one_byte_at_a_time):
        assert pod.wire.counts["resumed"] > 0
        assert pod.wire.counts["new"] == 1
        assert pod.wire.counts["repeated"] > 0


# ------------------------------------------------------------------ the broker itself


def test_a_killed_broker_loses_no_more_than_it_had_not_saved(
    make_stage: MakeStage, own_broker: Mosquitto
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    own_broker.save()  # the session, or the first kill would make it a lost one
    draw = random.Random(3)
    with stage.traffic():
        for number in range(1, 4):
            pod.wait_more(50, DURABLE)
            time.sleep(draw.uniform(0, 1))
            stage.kill_broker()
            own_broker.start()
            pod.wait_total(number, "sessions_total", state="resumed")
        pod.wait_more(50, DURABLE)
    stage.settle()
    assert pod.wire.counts["new"] == 1
    assert len(stage.witness.excuses) == 3


def test_what_a_killed_broker_had_saved_is_not_excused(
    make_stage: MakeStage, own_broker: Mosquitto
) -> None:
    """Cassandra stands still, so that the broker holds everything when it is saved and killed."""
    stage = make_stage().start()
    pod = stage.pod
    pod.cassandra(lambda proxy: proxy.hold())
    with stage.traffic(max_messages=10 * RECEIVE_MAXIMUM) as traffic:
        traffic.join(30)
        assert not traffic.is_alive()
    traffic.publisher.wait_answered()
    own_broker.save()
    stage.kill_broker()
    own_broker.start()
    pod.wait_total(1, "sessions_total", state="resumed")
    verdict = stage.settle()
    assert verdict.excused == 0
    assert verdict.acknowledged_by_service == verdict.acknowledged_to_publisher > 0
    assert pod.wire.counts["repeated"] >= RECEIVE_MAXIMUM


def test_a_broker_that_is_restarted_under_load_loses_nothing(
    make_stage: MakeStage, own_broker: Mosquitto
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        for number in range(1, 4):
            pod.wait_more(50, DURABLE)
            stage.stop_broker()
            pod.service.wait_reasons({"not_subscribed"})
            own_broker.start()
            pod.wait_total(number, "sessions_total", state="resumed")
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["new"] == 1


@pytest.mark.parametrize("fault", ["killed", "restarted"])
def test_of_a_broker_that_loses_its_sessions_what_the_service_holds_is_durable(
    make_stage: MakeStage, own_broker: Mosquitto, fault: str
) -> None:
    """More than is owed: the broker may lose what it has handed out, the service does not."""
    stage = make_stage().start()
    pod = stage.pod
    held: set[Key] = set()
    with stage.traffic(qos_0=0):
        for number in range(2, 4):
            pod.wait_more(50, DURABLE)
            pod.cassandra(lambda proxy: proxy.hold())
            # Some of them may be written, and wait for their turn to be acknowledged.
            pod.wait_total(RECEIVE_MAXIMUM, "unacknowledged_deliveries")
            # mosquitto may have sent more: what is beyond the window is not read yet.
            held |= pod.wire.oldest_unacked(RECEIVE_MAXIMUM)
            stage.lose_broker(kill=fault == "killed")
            own_broker.start()
            # A service that holds too much does not read, and sees no end before it may write.
            pod.cassandra(lambda proxy: proxy.heal())
            pod.wait_total(number, "sessions_total", state="new")
            pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert len(held) > RECEIVE_MAXIMUM
    assert stage.witness.not_durable(held) == set()
    assert verdict.lost_by_broker <= verdict.excused
    assert verdict.excused > 0
    assert pod.wire.counts["new"] >= 3


def test_a_broker_that_freezes_is_left_and_joined_again(
    make_stage: MakeStage, own_broker: Mosquitto
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        own_broker.pause()
        pod.wait_total(1, "disconnects_total", reason="keep_alive")
        own_broker.resume()
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["resumed"] > 0


def test_a_broker_that_is_away_for_many_keep_alives_is_waited_for(
    make_stage: MakeStage, own_broker: Mosquitto
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        stage.stop_broker()
        time.sleep(4 * KEEP_ALIVE_SECONDS)
        assert pod.service.live()
        assert pod.service.ready_reasons() == {"not_subscribed"}
        assert pod.broker(lambda proxy: proxy.counts.unreachable) > 4
        own_broker.start()
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["resumed"] == 1
