"""A pause under load, with a restart of the broker inside it; subscribing again under load.

mosquitto keeps what is in flight over a clean restart, and so can't show the loss that a pause is
for; `tests/unit/test_pause.py` does that with a broker that behaves as VerneMQ does.
"""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.oracle import Load
from tests.service import ServiceProcess, run_command

if TYPE_CHECKING:
    from pathlib import Path

    from backing import Mosquitto
    from tests.service import Figures
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(180)

SCALED = {
    "MQTT__KEEP_ALIVE_SECONDS": 2,
    "MQTT__CONNECT_TIMEOUT_SECONDS": 3,
    "MQTT__RECEIVE_MAXIMUM": 50,
    "DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE": 1_000_000,
}


def pause(service: ServiceProcess, *arguments: str) -> str:
    """Run `shadowsvc pause`; return what it said."""
    url = f"http://127.0.0.1:{service.port}"
    done = run_command({}, "pause", *arguments, "--url", url)
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(service: ServiceProcess) -> dict[str, Any]:
    """Ask how far the pause is."""
    fields: dict[str, Any] = json.loads(service.get("/pause").body)
    return fields


def held(figures: Figures) -> float:
    return figures.total("unacknowledged_deliveries") + figures.total("deliveries_held")


def wait_durable(service: ServiceProcess, count: int) -> None:
    before = service.metrics()
    service.wait_until(
        lambda: service.metrics().since(before, "updates_durable_total") > count,
        f"{count} more updates are durable",
    )


def test_a_broker_restarted_inside_a_pause_loses_nothing(
    serve: Serve, own_broker: Mosquitto, unique: str
) -> None:
    with serve(own_broker, **SCALED) as (service, oracle):
        with Load(oracle, unique):
            wait_durable(service, 200)
            for number in range(1, 3):
                said = pause(service, "--seconds", "60")
                assert "durable and acknowledged" in said
                assert service.ready_reasons() == {"paused"}
                assert service.live()
                away = service.metrics()
                assert held(away) == 0
                assert away.total("pauses_total") == number
                assert away.total("pause_left_seconds") > 30
                assert away.total("disconnects_total", reason="paused") == number
                own_broker.restart()
                later = service.metrics()
                assert later.since(away, "messages_received_total") == 0
                assert later.since(away, "disconnects_total") == 0
                pause(service, "--resume")
                service.wait_ready()
                wait_durable(service, 200)
        oracle.wait_right()
        figures = service.metrics()
        assert figures.total("sessions_total", state="resumed") == 2
        assert figures.total("sessions_total", state="new") == 1
        assert figures.total("pause_left_seconds") == 0


def test_a_pause_ends_by_itself_and_asking_again_makes_it_longer(serve: Serve, unique: str) -> None:
    with serve(**SCALED) as (service, oracle):
        pause(service, "--seconds", "6")
        pause(service, "--seconds", "12")
        assert 6 < status(service)["left_seconds"] <= 12
        pause(service, "--seconds", "1")
        assert status(service)["left_seconds"] > 1
        oracle.update(unique, {"reported": {"a": 1}})
        oracle.wait_taken()
        service.wait_ready()
        assert status(service) == {"state": "off", "left_seconds": 0, "drained": True}
        oracle.wait_right()
        assert service.metrics().total("pauses_total") == 1


def test_sigterm_inside_a_pause_ends_with_0_and_loses_nothing(serve: Serve, unique: str) -> None:
    with serve(**SCALED) as (service, oracle):
        with Load(oracle, unique):
            wait_durable(service, 100)
            pause(service, "--seconds", "300")
            service.signal(signal.SIGTERM)
            assert service.wait_exit() == 0
            service.start()
            service.wait_ready()
            wait_durable(service, 100)
        oracle.wait_right()
        assert service.metrics().total("sessions_total", state="resumed") == 1


def test_a_pause_longer_than_a_lease_keeps_the_slot_and_its_session(
    serve: Serve, unique: str, tmp_path: Path
) -> None:
    slots = {
        "MQTT__CLIENT_ID": "",
        "SLOTS__BROKER": unique,
        "SLOTS__LEASE_SECONDS": 3,
        "SLOTS__RENEW_SECONDS": 0.5,
        "SLOTS__ORPHAN_AFTER_SECONDS": 4,
    }
    with serve(**SCALED, **slots) as (service, oracle):
        pause(service, "--seconds", "300")
        oracle.update(unique, {"reported": {"a": 1}})
        oracle.wait_taken()
        with ServiceProcess(service.settings, tmp_path / "other.log") as other:
            other.wait_ready()
            service.wait_until(
                lambda: status(service)["left_seconds"] < 292, "it was away for two leases"
            )
            figures = other.metrics()
            assert figures.total("adoptions_total") == 0
            assert figures.total("orphaned_slots") == 0
        assert service.metrics().total("slot_state", state="held") == 1
        assert service.metrics().total("slot_losses_total") == 0
        pause(service, "--resume")
        service.wait_ready()
        oracle.wait_right()
        assert service.metrics().total("sessions_total", state="resumed") == 1


def test_subscribing_again_under_load_neither_repeats_nor_loses_anything(
    serve: Serve, unique: str
) -> None:
    with serve(**SCALED, MQTT__RESUBSCRIBE_SECONDS=0.05) as (service, oracle):
        # A queue to resume with, and a resumed subscription that is subscribed again.
        pause(service, "--seconds", "60")
        with Load(oracle, unique):
            pause(service, "--resume")
            service.wait_ready()
            before = service.metrics()
            wait_durable(service, 500)
            service.wait_until(
                lambda: service.metrics().since(before, "resubscriptions_total") >= 40,
                "it subscribed again forty times",
            )
        oracle.wait_taken()
        oracle.wait_right()
        service.wait_until(lambda: held(service.metrics()) == 0, "everything is acknowledged")
        figures = service.metrics()
        assert figures.total("messages_received_total", dup="0") == len(oracle.sent)
        assert figures.total("messages_received_total", dup="1") == 0
        assert figures.total("messages_acknowledged_total") == len(oracle.sent)
        assert figures.total("disconnects_total") == 1
        assert service.ready_reasons() == set()
