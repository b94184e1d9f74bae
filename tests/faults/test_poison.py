"""Messages that can never be an update, mixed into good traffic while other things fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from backing import Direction
from tests.bad_documents import BAD
from tests.faults.stage import RECEIVE_MAXIMUM

if TYPE_CHECKING:
    from tests.faults.conftest import MakeStage

pytestmark = pytest.mark.timeout(180)


def test_poison_of_every_kind_costs_its_neighbours_nothing_while_connections_break(
    make_stage: MakeStage,
) -> None:
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic(poison=0.3, max_poison_bytes=2_000_000, rate=200) as traffic:
        for number in range(1, 4):
            pod.wait_more(40, "messages_acknowledged_total")
            assert pod.broker(lambda proxy: proxy.reset()) == 1
            pod.wait_total(number, "sessions_total", state="resumed")
            assert pod.cassandra(lambda proxy: proxy.reset()) > 0
        pod.service.wait_until(
            lambda: traffic.published > 4 * len(BAD) and pod.total("updates_durable_total") > 100,
            "every kind was published",
        )
    verdict = stage.settle()
    poison = [message for message in stage.witness.messages() if message.reason]
    assert {message.reason for message in poison} == {bad.reason for bad in BAD.values()}
    assert verdict.dead_letters == len(poison)
    for reason in {bad.reason for bad in BAD.values()}:
        assert pod.total("dead_letters_total", reason=reason) > 0


def test_more_poison_than_receive_maximum_survives_a_kill(make_stage: MakeStage) -> None:
    """The whole window is poison, and the service dies while it writes it."""
    stage = make_stage().start()
    pod = stage.pod
    pod.cassandra(lambda proxy: proxy.delay(0.05, Direction.TO_CLIENT))
    with stage.traffic(poison=1.0, max_messages=6 * RECEIVE_MAXIMUM) as traffic:
        pod.wait_total(RECEIVE_MAXIMUM, "deliveries_held")
        for _ in range(2):
            pod.wait_more(1, "messages_acknowledged_total")
            pod.service.kill()
            pod.start()
            pod.service.wait_ready()
        traffic.join(30)
    verdict = stage.settle()
    assert verdict.dead_letters == verdict.published == 6 * RECEIVE_MAXIMUM
    assert pod.wire.counts["repeated"] > 0
