"""What the production broker does and mosquitto does not, by the broker in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mqtt5
import pytest

from tests.faults.memory import MemoryServer
from tests.faults.stage import RECEIVE_MAXIMUM, Stage
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import backing
    from tests.memory_broker import MemoryBroker

pytestmark = pytest.mark.timeout(180)

DURABLE = "updates_durable_total"
REFUSED = mqtt5.ConnAckReasonCode.SERVER_UNAVAILABLE
NOT_GRANTED = mqtt5.SubAckReasonCode.UNSPECIFIED_ERROR


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    with MemoryServer() as server:
        yield server


@pytest.fixture
def stage(
    server: MemoryServer, cassandra: backing.Database, migrated: str, unique: str, tmp_path: Path
) -> Iterator[Stage]:
    settings = {"MQTT__RESUBSCRIBE_SECONDS": 0.5, "MQTT__RECONNECT_MAX_SECONDS": 0.3}
    with Stage(server, cassandra, migrated, unique, tmp_path, settings=settings) as stage:
        yield stage


def test_a_restart_costs_no_more_than_was_in_flight(stage: Stage, server: MemoryServer) -> None:
    """The session is kept and its queue too, but what was handed out is never sent again."""
    pod = stage.start().pod
    pod.cassandra(lambda proxy: proxy.delay(0.1))
    with stage.traffic():
        for number in range(1, 5):
            pod.wait_more(50, DURABLE)
            earlier = {key for one in stage.witness.excuses for key in one.handed_out}
            before = pod.wire.unacked() - earlier
            stage.restart_memory_broker()
            handed_out = stage.witness.excuses[-1].handed_out
            # What the broker really forgot the oracle allows, and it is bounded as promised.
            assert server.lost(before) - set(pod.wire.acked) <= handed_out
            assert len(handed_out) <= RECEIVE_MAXIMUM
            pod.wait_total(number, "sessions_total", state="resumed")
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused > 0
    assert verdict.lost_by_broker <= 4 * RECEIVE_MAXIMUM


def test_a_subscription_that_was_granted_and_not_made_is_made_again(
    stage: Stage, server: MemoryServer
) -> None:
    def filters(broker: MemoryBroker) -> int:
        return sum(len(session.filters) for session in broker.sessions.values())

    server.do(lambda broker: setattr(broker, "subscribes_nothing", True))
    pod = stage.start().pod
    with stage.traffic():
        pod.service.wait_until(
            lambda: server.do(lambda broker: broker.unrouted) > 20, "messages go nowhere"
        )
        assert server.do(filters) == 0
        assert pod.total("messages_received_total") == 0
        server.do(lambda broker: setattr(broker, "subscribes_nothing", False))
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.without_subscriber > 0
    assert verdict.excused == 0
    assert pod.wire.counts["connections"] == 1
    assert pod.wire.counts["SUBSCRIBE"] > 1


def test_a_session_that_is_taken_over_is_resumed_and_nothing_is_lost(
    stage: Stage, server: MemoryServer
) -> None:
    """Somebody else connects with the same client id, and leaves again."""
    pod = stage.start().pod
    with stage.traffic():
        for number in range(1, 4):
            pod.wait_more(50, DURABLE)
            server.do(taken_over(pod.name))
            pod.wait_total(number, "disconnects_total", reason="session_taken_over")
            pod.wait_total(number, "sessions_total", state="resumed")
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["DISCONNECT SESSION_TAKEN_OVER"] == 3


def taken_over(client_id: str) -> Callable[[MemoryBroker], None]:
    """Return what does to the present connection as a second CONNECT does."""

    def take_over(broker: MemoryBroker) -> None:
        link = broker.sessions[client_id].link
        assert link is not None
        code = mqtt5.DisconnectReasonCode.SESSION_TAKEN_OVER
        link.write(mqtt5.DisconnectPacket(reason_code=code).write())
        link.drop()

    return take_over


def test_a_cluster_that_refuses_for_a_while_is_asked_again_and_nothing_is_lost(
    stage: Stage, server: MemoryServer
) -> None:
    """CONNACK 136 and SUBACK 128, as while a node of the cluster is down."""
    pod = stage.start().pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        server.do(lambda broker: setattr(broker, "refusal", REFUSED))
        pod.broker(lambda proxy: proxy.reset())
        pod.wait_total(2, "disconnects_total", reason="connack_server_unavailable")
        assert pod.service.ready_reasons() == {"not_subscribed"}
        assert pod.service.live()
        server.do(lambda broker: setattr(broker, "suback", NOT_GRANTED))
        server.do(lambda broker: setattr(broker, "refusal", None))
        pod.wait_total(2, "disconnects_total", reason="suback_unspecified_error")
        server.do(lambda broker: setattr(broker, "suback", None))
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0


def wait_queued(server: MemoryServer, client_id: str) -> None:
    """Wait until messages wait for a session whose service is away."""
    wait_until(
        lambda: server.do(lambda broker: len(broker.sessions[client_id].queue)) > 20,
        "messages are queued",
        30,
    )


def test_a_service_that_comes_back_after_a_restart_that_forgot_its_expiry_gets_its_queue(
    stage: Stage, server: MemoryServer
) -> None:
    """After a restart an absent session stays for ever: late is not too late."""
    pod = stage.start().pod
    with stage.traffic(qos_0=0):
        pod.wait_more(50, DURABLE)
        assert pod.service.terminate() == 0
        wait_queued(server, pod.name)
        stage.restart_memory_broker()
        assert stage.witness.excuses[-1].handed_out <= pod.wire.reached
        queued = server.do(lambda broker: len(broker.sessions[pod.name].queue))
        assert queued > 0
        stage.start()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.lost_by_broker == 0
    assert pod.wire.counts["resumed"] == 1


def test_of_a_session_that_is_forgotten_what_the_service_holds_is_durable(stage: Stage) -> None:
    """The connection is reset, and the broker says that the session is new."""
    pod = stage.start().pod
    with stage.traffic(qos_0=0):
        pod.wait_more(30, DURABLE)
        pod.cassandra(lambda proxy: proxy.hold())
        # Some of them may be written, and wait for their turn to be acknowledged.
        pod.wait_total(RECEIVE_MAXIMUM, "unacknowledged_deliveries")
        held = pod.wire.oldest_unacked(RECEIVE_MAXIMUM)
        stage.forget_session(pod)
        pod.wait_total(2, "sessions_total", state="new")
        pod.cassandra(lambda proxy: proxy.heal())
        pod.wait_total(1, "deliveries_done_without_ack_total")
        pod.service.wait_ready()
        pod.wait_more(30, DURABLE)
    verdict = stage.settle()
    assert len(held) > RECEIVE_MAXIMUM / 2
    assert stage.witness.not_durable(held) == set()
    assert verdict.lost_by_broker <= verdict.excused
    assert pod.wire.counts["new"] == 2


def test_a_session_that_expired_while_the_service_was_away_is_made_anew(
    stage: Stage, server: MemoryServer
) -> None:
    """What was queued is wiped by the broker, as its session expiry says; nothing else is lost."""
    pod = stage.start().pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        assert pod.service.terminate() == 0
        wait_queued(server, pod.name)
        server.do(lambda broker: broker.expire(pod.name))
        stage._excuse("session expired", saved_at=None)
        stage.start()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused > 0
    assert pod.wire.counts["new"] == 2
