"""Several services in one share group: what each gets is decided by the broker."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from tests.faults.stage import SLOTS

if TYPE_CHECKING:
    from tests.faults.conftest import MakeStage

pytestmark = pytest.mark.timeout(180)

DURABLE = "updates_durable_total"


def test_repetitions_and_any_order_across_pods_end_in_the_same_shadow(
    make_stage: MakeStage,
) -> None:
    """One device's updates overtake each other: each pod's way to Cassandra takes another time."""
    stage = make_stage(pods=3).start()
    draw = random.Random(2)
    for pod, seconds in zip(stage.pods, (0.0, 0.08, 0.25), strict=True):
        pod.cassandra(lambda proxy, seconds=seconds: proxy.delay(seconds))  # type: ignore[misc]
    with (
        stage.traffic(repeats=0.3, count=5, rate=150, seed=1),
        stage.traffic(repeats=0.3, count=5, rate=150, seed=2),
    ):
        for number in range(1, 3):
            for pod in stage.pods:
                pod.wait_more(20, "messages_acknowledged_total")
            time.sleep(draw.uniform(0, 0.3))
            stage.pods[0].broker(lambda proxy: proxy.reset())
            stage.pods[0].wait_total(number, "sessions_total", state="resumed")
            stage.pods[1].service.kill()
            stage.pods[1].start()
            stage.pods[1].service.wait_ready()
    verdict = stage.settle()
    assert verdict.excused == 0
    assert all(pod.wire.counts["PUBLISH"] > 60 for pod in stage.pods)
    assert sum(pod.wire.counts["repeated"] for pod in stage.pods) > 0
    twice = len(stage.witness.messages()) - len({one.key for one in stage.witness.messages()})
    assert twice > 50
    # Someone really wrote an older value after a newer one, and it did no harm.
    assert stage.witness.counts["sampled rows"] > 0


def test_two_pods_with_one_client_id_take_the_session_from_each_other_and_lose_nothing(
    make_stage: MakeStage,
) -> None:
    """A mistake of the operator's. Each is disconnected whenever the other connects."""
    stage = make_stage(MQTT__RECONNECT_MIN_SECONDS=0.2)
    twin = stage.add_pod(MQTT__CLIENT_ID=stage.pod.name)
    stage.start_some(stage.pod)
    with stage.traffic():
        stage.pod.wait_more(50, DURABLE)
        twin.start()
        twin.service.wait_started()
        stage.pod.wait_total(3, "disconnects_total")
        twin.wait_total(2, "disconnects_total")
        assert twin.service.terminate() == 0
        stage.pod.service.wait_ready()
        stage.pod.wait_more(50, DURABLE)
    verdict = stage.settle()
    assert verdict.excused == 0


@pytest.mark.slow
def test_one_pod_then_four_then_one_then_four_strands_nothing(make_stage: MakeStage) -> None:
    """With client ids of their own: what waits for a pod that left is there when it is back."""
    stage = make_stage(pods=4)
    stage.start_some(stage.pod)
    with stage.traffic(rate=300):
        stage.pod.wait_more(50, DURABLE)
        for _ in range(2):
            stage.start()
            for pod in stage.pods:
                pod.wait_more(20, "messages_acknowledged_total")
            for pod in stage.pods[1:]:
                assert pod.service.terminate() == 0
            stage.pod.wait_more(50, DURABLE)
        stage.start()
    verdict = stage.settle()
    assert verdict.excused == 0
    assert all(pod.wire.counts["resumed"] == 2 for pod in stage.pods[1:])
    assert stage.pod.wire.counts["connections"] == 1


def test_with_slots_one_pod_then_four_then_one_strands_nothing(make_stage: MakeStage) -> None:
    """Nobody comes back: what waits for the three that left is fetched by the one that stays."""
    stage = make_stage(pods=4, **SLOTS)
    stage.start_some(stage.pod)
    with stage.traffic(rate=200):
        stage.pod.wait_more(50, DURABLE)
        stage.start()
        for pod in stage.pods:
            pod.wait_more(20, "messages_acknowledged_total")
        killed, *ended = stage.pods[1:]
        killed.service.kill()
        for pod in ended:
            assert pod.service.terminate() == 0
        stage.pod.wait_more(100, DURABLE)
    verdict = stage.settle(120)
    assert verdict.excused == 0
    stage.pod.service.wait_until(
        lambda: stage.pod.wire.counts["UNSUBSCRIBE"] >= 3, "it has left three adopted shares", 60
    )
    assert [pod.service.running for pod in stage.pods] == [True, False, False, False]


def test_with_slots_a_pod_that_is_killed_and_started_at_once_fetches_what_it_left_behind(
    make_stage: MakeStage,
) -> None:
    """Its lease still runs, so it takes another slot; an orphan of another pod's would wait."""
    times = {
        "SLOTS__LEASE_SECONDS": 20,
        "SLOTS__RENEW_SECONDS": 2,
        "SLOTS__ORPHAN_AFTER_SECONDS": 300,
    }
    stage = make_stage(**SLOTS | times).start()
    pod = stage.pod
    with stage.traffic(rate=200):
        pod.wait_more(50, DURABLE)
        pod.service.kill()
        pod.start()
        pod.service.wait_ready()
        pod.wait_total(1, "slot_takes_total", how="created")
        pod.wait_total(1, "adoptions_total", 60, outcome="emptied")
        pod.wait_more(50, DURABLE)
    assert pod.total("adopted_messages_total") > 1, "more than the marker"
    verdict = stage.settle()
    assert verdict.excused == 0
