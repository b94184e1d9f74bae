"""The service itself is ended, killed and frozen, at moments that hurt."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.stage import KEEP_ALIVE_SECONDS
from tests.proxied import away

if TYPE_CHECKING:
    from tests.faults.conftest import MakeStage

pytestmark = pytest.mark.timeout(180)

DURABLE = "updates_durable_total"
SIGTERM_BEFORE_IT_LISTENS = -15


def test_sigterm_under_load_ends_with_0_and_nothing_is_sent_twice(make_stage: MakeStage) -> None:
    stage = make_stage().start()
    pod = stage.pod
    draw = random.Random(5)
    with stage.traffic():
        for _ in range(3):
            pod.wait_more(50, DURABLE)
            time.sleep(draw.uniform(0, 0.2))
            assert pod.service.terminate() == 0
            pod.start()
            pod.service.wait_ready()
    verdict = stage.settle()
    assert verdict.excused == 0
    assert [stop["drained"] for stop in pod.service.events("stopped")] == [True] * 3
    assert pod.wire.counts["resumed"] == 3
    assert pod.wire.counts["DISCONNECT NORMAL_DISCONNECTION"] == 3
    # What comes while it drains is left to the broker, which then sends it as new or with DUP;
    # what it had acknowledged never comes again.
    assert pod.total("messages_received_total", dup="1") <= 50


def test_sigterm_while_it_reconnects_ends_with_0(make_stage: MakeStage) -> None:
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        pod.broker(away)
        pod.wait_total(3, "disconnects_total")
        assert pod.service.terminate() == 0
        assert pod.broker(lambda proxy: proxy.counts.refused) > 0
        pod.heal()
        pod.start()
        pod.service.wait_ready()
        pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["resumed"] == 1


def test_sigterm_while_it_starts_ends_it_and_costs_nothing(make_stage: MakeStage) -> None:
    stage = make_stage().start()
    pod = stage.pod
    draw = random.Random(9)
    codes = []
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        assert pod.service.terminate() == 0
        for _ in range(5):
            pod.start()
            time.sleep(draw.uniform(0.1, 1.5))
            codes.append(pod.service.terminate())
        pod.start()
        pod.service.wait_ready()
    verdict = stage.settle()
    assert verdict.excused == 0
    # Python itself needs a moment before any program can take a signal.
    assert set(codes) <= {0, SIGTERM_BEFORE_IT_LISTENS}


def test_sigterm_while_the_driver_connects_ends_with_0(make_stage: MakeStage) -> None:
    """Freeing a session of the driver that is half connected blocks its thread for ever."""
    stage = make_stage().start()
    pod = stage.pod
    assert pod.service.terminate() == 0
    pod.cassandra(lambda proxy: proxy.hold())
    before = pod.cassandra(lambda proxy: proxy.counts.accepted)
    pod.start()
    pod.service.wait_until(
        lambda: pod.cassandra(lambda proxy: proxy.counts.accepted) > before, "the driver connects"
    )
    assert pod.service.terminate() == 0
    (stop,) = pod.service.events("stopped", this_life=True)
    assert stop["drained"] is True


def test_sigterm_while_cassandra_is_away_ends_with_0_at_its_deadline(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(LIMITS__DRAIN_TIMEOUT_SECONDS=1).start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        pod.cassandra(away)
        pod.wait_more(1, "write_retries_total")
        assert pod.service.terminate() == 0
        (stop,) = pod.service.events("stopped")
        assert stop["drained"] is False
        assert stop["left_to_the_broker"] > 0
        pod.heal()
        pod.start()
        pod.service.wait_ready()
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["repeated"] > 0


def test_kill_9_in_the_middle_of_batches_loses_nothing_and_acknowledges_nothing_too_early(
    make_stage: MakeStage,
) -> None:
    """Writes take long, so that each kill meets some: applied unseen, or not applied at all."""
    stage = make_stage().start()
    pod = stage.pod
    draw = random.Random(7)
    pod.cassandra(lambda proxy: proxy.delay(0.05))
    with stage.traffic(rate=100):
        for _ in range(4):
            pod.wait_more(20, DURABLE)
            time.sleep(draw.uniform(0, 0.2))
            pod.wait_total(1, "writes_in_flight")
            pod.service.kill()
            pod.start()
            pod.service.wait_ready()
    verdict = stage.settle()
    assert verdict.excused == 0
    assert pod.wire.counts["resumed"] == 4
    assert pod.wire.counts["repeated"] > 0


# mosquitto looks only every six seconds who was silent for more than 1.5 keep-alives.
@pytest.mark.parametrize(
    "seconds", [0.7, pytest.param(6 * KEEP_ALIVE_SECONDS, marks=pytest.mark.slow)]
)
def test_a_service_that_is_stopped_for_a_while_goes_on_as_if_nothing_were(
    make_stage: MakeStage, seconds: float
) -> None:
    """SIGSTOP for less, and for more than the broker waits."""
    stage = make_stage().start()
    pod = stage.pod
    with stage.traffic():
        pod.wait_more(50, DURABLE)
        pod.pause()
        time.sleep(seconds)
        pod.resume()
        pod.wait_more(50, DURABLE)
        pod.service.wait_ready()
    verdict = stage.settle()
    assert verdict.excused == 0
    if seconds > KEEP_ALIVE_SECONDS:
        assert pod.total("disconnects_total") >= 1
        assert pod.wire.counts["resumed"] >= 1
    else:
        assert pod.wire.counts["connections"] == 1
