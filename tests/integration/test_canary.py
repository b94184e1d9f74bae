"""The canary in real processes: found, refused, and lost when a broker only says it subscribed.

The broker that grants what it does not do is the one in memory: no real one does so on demand.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from backing import Mosquitto
from tests.faults.memory import MemoryServer
from tests.service import ServiceProcess, run_command, variables

if TYPE_CHECKING:
    from pathlib import Path

    import backing
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(180)

CANARY = {
    "CANARY__ENABLED": "true",
    "CANARY__INTERVAL_SECONDS": 0.2,
    "CANARY__TIMEOUT_SECONDS": 3,
}


def test_each_process_finds_its_own_updates_whoever_writes_them(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    unique: str,
    tmp_path: Path,
) -> None:
    settings = variables(
        broker, cassandra, migrated, unique, **CANARY, CANARY__DEVICE=f"{unique}-canary"
    )
    with ExitStack() as stack:
        services = []
        for name in ("one", "two"):
            own = {**settings, "SHADOWSVC_MQTT__CLIENT_ID": f"{unique}-{name}"}
            service = ServiceProcess(own, tmp_path / f"{name}.log")
            services.append(stack.enter_context(service))
        for service in services:
            service.wait_ready()
        for service in services:
            service.wait_until(
                lambda service=service: service.metrics().total("canary_durable_total") >= 10,  # type: ignore[misc]
                "ten updates of the canary were found",
            )
        for name, service in zip(("one", "two"), services, strict=True):
            figures = service.metrics()
            assert figures.total("canary_seconds_count") >= 10
            assert figures.total("canary_lost_total") == 0
            assert figures.total("canary_unpublished_total") == 0
            # Both write updates of either, and of more than their own.
            assert figures.total("updates_durable_total") > 0
            assert service.ready_reasons() == set()
            shown = run_command(
                settings, "get", f"{unique}-canary", "--shadow", f"{unique}-{name}", "--json"
            )
            assert json.loads(shown.stdout)["state"]["reported"]


def test_a_broker_that_refuses_the_canary_disturbs_nothing_else(
    serve: Serve, unique: str, tmp_path: Path
) -> None:
    rights = tmp_path / "acl"
    rights.write_text(f"topic read {unique}/#\ntopic readwrite {unique}/allowed/#\n")
    with (
        Mosquitto(extra_config=[f"acl_file {rights}"]) as broker,
        serve(broker, **CANARY) as (service, oracle),
    ):
        # This mosquitto closes the connection at the publish after one that it refused.
        service.wait_until(
            lambda: (
                service.metrics().total("canary_unpublished_total", reason="publish_refused") >= 3
            ),
            "the canary was refused three times",
            limit_seconds=60,
        )
        oracle.update("allowed", {"reported": {"a": 1}})
        oracle.wait_taken()
        oracle.wait_right()
        assert service.ready_reasons() == set()
        assert service.metrics().total("canary_published_total") == 0
        told = service.events("the canary is not published")
        assert "SHADOWSVC_MQTT__USERNAME" in told[0]["advice"]


def test_a_subscription_that_was_only_granted_is_found_out_and_made(
    cassandra: backing.Database, migrated: str, unique: str, tmp_path: Path
) -> None:
    with MemoryServer() as server:
        server.do(lambda broker: setattr(broker, "subscribes_nothing", True))
        server.do(lambda broker: setattr(broker, "takes_publishes", True))
        settings = variables(
            server,  # type: ignore[arg-type]  # asked for its address alone
            cassandra,
            migrated,
            unique,
            **CANARY,
            MQTT__RESUBSCRIBE_SECONDS=0,
        )
        with ServiceProcess(settings, tmp_path / "service.log") as service:
            service.wait_reasons({"canary_lost"})
            figures = service.metrics()
            assert figures.total("canary_published_total") > 0
            assert figures.total("canary_durable_total") == 0
            assert figures.total("resubscriptions_total") > 0
            assert figures.total("disconnects_total") == 0
            assert server.do(lambda broker: broker.unrouted) > 0
            assert service.live()
            service.wait_until(
                lambda: service.metrics().total("canary_lost_total") > 0, "one counts as lost"
            )
            server.do(lambda broker: setattr(broker, "subscribes_nothing", False))
            service.wait_ready()
            figures = service.metrics()
            assert figures.total("canary_durable_total") > 0
            assert figures.total("disconnects_total") == 0
            assert service.events("the canary is no longer lost")
