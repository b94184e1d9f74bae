"""What the running service promises, with a real broker and a real Cassandra and no fault."""

from __future__ import annotations

import json
import signal
import socket
import uuid
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

from shadowsvc import __version__
from tests.oracle import Oracle
from tests.proxied import Proxied
from tests.service import Figures, ServiceProcess, run_command, variables
from tests.serving import settle, through

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(120)

MAX_PAYLOAD_BYTES = 65_536
REPORTED = "reported"


class Running(NamedTuple):
    """A service that the tests of this file share, and the proxy between it and the broker."""

    service: ServiceProcess
    proxy: Proxied
    keyspace: str
    prefix: str


@pytest.fixture(scope="module")
def running(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    name = f"t{uuid.uuid4().hex[:12]}"
    with Proxied(broker.host, broker.port) as proxy:
        settings = variables(
            broker, cassandra, migrated, name, MQTT__URL=f"mqtt://127.0.0.1:{proxy.port}"
        )
        log = tmp_path_factory.mktemp("service") / "service.log"
        with ServiceProcess(settings, log) as service:
            service.wait_ready()
            yield Running(service, proxy, migrated, name)


@pytest.fixture
def service(running: Running) -> ServiceProcess:
    return running.service


@pytest.fixture
def oracle(running: Running, broker: backing.Broker, cql: Any) -> Iterator[Oracle]:
    with Oracle(broker, cql, running.keyspace, running.prefix) as oracle:
        yield oracle


# ------------------------------------------------------------------ ways of publishing


def test_every_qos_1_update_is_written_and_acknowledged_once(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    before = service.metrics()
    for number in range(200):
        state = {REPORTED: {"on": number % 2 == 0, "level": number, "at": {"x": number / 4}}}
        oracle.update(f"{unique}-{number % 40}", state)
    settle(service, oracle)
    now = service.metrics()
    for name in (
        "messages_received_total",
        "updates_decoded_total",
        "updates_durable_total",
        "messages_acknowledged_total",
        "receive_to_ack_seconds_count",
        "device_to_durable_seconds_count",
    ):
        assert now.since(before, name) == 200, name
    assert now.since(before, "messages_received_total", qos="1", dup="0") == 200
    assert now.since(before, "received_bytes_total") == sum(
        len(sent.topic) + len(sent.payload) for sent in oracle.sent
    )
    assert now.since(before, "updates_rejected_total") == 0
    assert now.since(before, "updates_without_device_time_total") == 0
    assert now.total("unacknowledged_deliveries") == 0


def test_qos_0_updates_are_written_and_not_acknowledged(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    before = service.metrics()
    for number in range(20):
        oracle.update(unique, {REPORTED: {"level": number}}, qos=0)
    settle(service, oracle)
    now = service.metrics()
    assert now.since(before, "messages_received_total", qos="0") == 20
    assert now.since(before, "deliveries_done_without_ack_total") == 20
    assert now.since(before, "messages_acknowledged_total") == 0


def test_a_retained_publish_is_an_update_like_any_other(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    before = service.metrics()
    oracle.update(unique, {REPORTED: {"level": 1}}, retain=True)
    oracle.update(unique, {REPORTED: {"level": 2}})
    settle(service, oracle)
    assert service.metrics().since(before, "updates_durable_total") == 2


def test_what_the_broker_repeats_after_a_lost_connection_changes_nothing(
    running: Running, oracle: Oracle, unique: str
) -> None:
    service, proxy = running.service, running.proxy
    before = service.metrics()
    proxy.do(lambda one: one.hold("to_server"))  # the acks wait on their way
    for number in range(10):
        oracle.update(f"{unique}-{number}", {REPORTED: {"level": number, "old": None}})
    oracle.wait_taken()
    oracle.wait_right()
    assert proxy.do(lambda one: one.reset()) == 1
    proxy.do(lambda one: one.heal())

    def repeated() -> bool:
        figures = service.metrics()
        return (
            figures.since(before, "messages_received_total", qos="1", dup="1") == 10
            and figures.since(before, "messages_acknowledged_total") == 20
        )

    service.wait_until(repeated, "ten messages come again, and are acknowledged again")
    settle(service, oracle)
    assert service.metrics().since(before, "sessions_total", state="resumed") == 1


def test_a_publish_repeated_by_the_device_changes_nothing(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    first = oracle.update(unique, {REPORTED: {"a": 1, "b": {"c": 2}}})
    oracle.update(unique, {REPORTED: {"a": 3, "b": None}})
    oracle.raw(first.topic, first.payload)
    settle(service, oracle)


def test_an_update_that_comes_late_does_not_undo_a_newer_one(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    old, new = oracle.time_us() - 5_000_000, oracle.time_us()
    oracle.update(unique, {REPORTED: {"level": "new", "gone": None}}, time_us=new)
    settle(service, oracle)
    oracle.update(unique, {REPORTED: {"level": "old", "gone": 1, "other": 1}}, time_us=old)
    settle(service, oracle)


def test_packets_that_come_byte_by_byte_are_put_together(
    running: Running, oracle: Oracle, unique: str
) -> None:
    before = running.service.metrics()
    running.proxy.do(lambda one: one.one_byte_at_a_time())
    try:
        for number in range(10):
            oracle.update(f"{unique}-{number}", {REPORTED: {"text": "ü" * 20}})
        settle(running.service, oracle)
    finally:
        running.proxy.do(lambda one: one.heal())
    assert running.service.metrics().since(before, "updates_durable_total") == 10


def test_updates_of_one_device_that_come_together_are_merged_into_the_last(
    running: Running, oracle: Oracle, unique: str
) -> None:
    before = running.service.metrics()
    running.proxy.do(lambda one: one.hold("to_client"))
    for number in range(300):
        oracle.update(unique, {REPORTED: {"level": number, f"of-{number % 7}": number}})
    oracle.wait_taken()
    running.proxy.do(lambda one: one.heal())
    settle(running.service, oracle)
    now = running.service.metrics()
    assert now.since(before, "updates_durable_total") == 300
    assert now.since(before, "updates_merged_total") > 0
    assert now.since(before, "leaves_merged_away_total") > 0


# ------------------------------------------------------------------ time


@pytest.mark.parametrize("unit_us", [1, 1_000, 1_000_000])
def test_the_user_properties_timestamp_and_seq_give_the_time(
    service: ServiceProcess, oracle: Oracle, unique: str, unit_us: int
) -> None:
    stamp = oracle.time_us() // unit_us
    time_us = stamp * unit_us + 7 % unit_us
    oracle.update(
        unique,
        {REPORTED: {"a": 1}},
        time_us=time_us,
        more={},
        properties=[("timestamp", str(stamp)), ("seq", "7"), ("other", "x")],
    )
    settle(service, oracle)


def test_the_document_goes_before_the_user_properties(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    stamp_ms = oracle.time_us() // 1000
    oracle.update(
        unique,
        {REPORTED: {"a": 1}},
        time_us=stamp_ms * 1000 + 42,
        more={"timestamp": stamp_ms, "version": 1042, "clientToken": "x"},
        properties=[("timestamp", "1700000000"), ("seq", "1")],
    )
    settle(service, oracle)


def test_an_update_without_a_time_gets_the_time_of_receipt(
    running: Running, oracle: Oracle, unique: str, cql: Any
) -> None:
    before, start_us = running.service.metrics(), oracle.time_us()
    for number in range(5):
        oracle.raw(oracle.topic(unique), b'{"state":{"reported":{"n":%d}}}' % number)
    oracle.wait_taken()

    def stored() -> bool:
        return running.service.metrics().since(before, "updates_durable_total") == 5

    running.service.wait_until(stored, "five updates are durable")
    now = running.service.metrics()
    assert now.since(before, "updates_without_device_time_total") == 5
    (row,) = cql.execute(
        f"SELECT value, WRITETIME(value) AS time_us FROM {running.keyspace}.shadow "  # noqa: S608
        "WHERE device = %s",
        (unique,),
    )
    assert row.value == "4"
    assert start_us <= row.time_us <= oracle.time_us()


# ------------------------------------------------------------------ documents


def test_a_payload_of_exactly_the_maximum_is_taken(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    bare = len(json.dumps({"state": {REPORTED: {"a": ""}}, "timestamp": oracle.time_us()}))
    sent = oracle.update(unique, {REPORTED: {"a": "x" * (MAX_PAYLOAD_BYTES - bare)}})
    assert len(sent.payload) == MAX_PAYLOAD_BYTES
    settle(service, oracle)


def test_a_payload_above_the_maximum_is_a_dead_letter(
    running: Running, oracle: Oracle, unique: str
) -> None:
    before = running.service.metrics()
    payload = json.dumps({"state": {REPORTED: {"a": "x" * MAX_PAYLOAD_BYTES}}}).encode()
    oracle.raw(oracle.topic(unique), payload)
    oracle.update(unique, {REPORTED: {"b": 1}})
    settle(running.service, oracle)
    now = running.service.metrics()
    assert now.since(before, "dead_letters_total", reason="payload_too_large") == 1
    (letter,) = [one for one in oracle.dead_letters(running.prefix) if one.device == unique]
    assert letter.payload == payload[:MAX_PAYLOAD_BYTES]
    assert letter.payload_bytes == len(payload)


def test_an_update_of_many_leaves_is_written_whole(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    oracle.update(unique, {REPORTED: {f"leaf-{number}": "x" * 90 for number in range(500)}})
    settle(service, oracle)


def test_an_empty_update_is_acknowledged_and_changes_nothing(
    service: ServiceProcess, oracle: Oracle, unique: str
) -> None:
    before = service.metrics()
    oracle.raw(oracle.topic(unique), b'{"state":{"reported":{}},"timestamp":%d}' % oracle.time_us())
    oracle.wait_taken()

    def acknowledged() -> bool:
        return service.metrics().since(before, "messages_acknowledged_total") == 1

    service.wait_until(acknowledged, "it is acknowledged")
    assert service.metrics().since(before, "updates_empty_total") == 1


def test_every_number_that_is_taken_keeps_its_value(
    running: Running, oracle: Oracle, unique: str, cql: Any
) -> None:
    texts = [
        "0", "-0", "-0.0", "1e5", "1E-7", "0.1", "18446744073709551615", "-9223372036854775808",
        "9007199254740993", "1.7976931348623157e308", "5e-324", "100000000000000000000",
    ]  # fmt: skip
    members = ",".join(f'"n{number}":{text}' for number, text in enumerate(texts))
    payload = f'{{"state":{{"reported":{{{members}}}}},"timestamp":{oracle.time_us()}}}'
    before = running.service.metrics()
    oracle.raw(oracle.topic(unique), payload.encode())
    oracle.wait_taken()

    def durable() -> bool:
        return running.service.metrics().since(before, "updates_durable_total") == 1

    running.service.wait_until(durable, "the update is durable")
    rows = cql.execute(
        f"SELECT path, value FROM {running.keyspace}.shadow WHERE device = %s",  # noqa: S608
        (unique,),
    )
    assert {row.path: Decimal(row.value) for row in rows} == {
        f"/n{number}": Decimal(text) for number, text in enumerate(texts)
    }


def test_sections_named_shadows_and_deletes_end_as_the_rules_say(
    running: Running, oracle: Oracle, unique: str
) -> None:
    """A history that uses every rule, read back by the oracle and by `shadowsvc get`."""
    update = oracle.update
    update(unique, {REPORTED: {"light": {"on": True, "level": 80}, "a/b": {"~": [1, None]}}})
    update(unique, {REPORTED: {"light": "broken"}, "desired": {"light": {"on": False}}})
    update(unique, {REPORTED: {"light": {"level": 5}, "fan": {"a": 1, "b": {"c": 2}}}})
    update(unique, {REPORTED: {"fan": {"b": None}}, "desired": None})
    update(unique, {"desired": {"mode": "ü"}})
    update(unique, {REPORTED: {"version": "1.2"}}, shadow="firmware")
    update(unique, {REPORTED: {"x": 1}, "desired": {"y": 1}}, shadow="gone")
    update(unique, None, shadow="gone")
    last = update(unique, {REPORTED: {"url": None}}, shadow="firmware")
    settle(running.service, oracle)

    unnamed = get(running, unique)
    assert unnamed["state"] == {
        "reported": {"light": {"level": 5}, "a/b": {"~": [1, None]}, "fan": {"a": 1}},
        "desired": {"mode": "ü"},
    }
    first_us, third_us = oracle.sent[0].time_us, oracle.sent[2].time_us
    assert unnamed["metadata"] == {
        "reported": {
            "light": {"level": stamp(third_us)},
            "a/b": {"~": stamp(first_us)},
            "fan": {"a": stamp(third_us)},
        },
        "desired": {"mode": stamp(oracle.sent[4].time_us)},
    }
    assert unnamed["version"] == last.time_us
    assert unnamed["timestamp"] == last.time_us // 1_000_000
    firmware = get(running, unique, "--shadow", "firmware")
    assert firmware["state"] == {"reported": {"version": "1.2"}}
    gone = run_command(running.service.settings, "get", unique, "--shadow", "gone", "--json")
    assert gone.returncode == 1
    assert json.loads(gone.stdout)["state"] == {}


def get(running: Running, device: str, *options: str) -> Any:
    done = run_command(running.service.settings, "get", device, *options, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stamp(time_us: int) -> dict[str, int]:
    return {"timestamp": time_us // 1_000_000}


# ------------------------------------------------------------------ HTTP


def test_probes_say_yes_while_all_is_well(service: ServiceProcess) -> None:
    for path in ("/livez", "/readyz", "/startupz"):
        assert service.get(path).status == 200, path
    assert json.loads(service.get("/readyz").body) == {"ready": True, "reasons": []}
    assert service.get("/nothing").status == 404
    port = {**service.settings, "SHADOWSVC_HTTP__PORT": str(service.port)}
    for what in ("live", "ready"):
        assert run_command(port, "probe", what).returncode == 0, what


def test_metrics_are_prometheus_text_and_openmetrics(service: ServiceProcess) -> None:
    text = service.get("/metrics")
    assert text.content_type.startswith("text/plain; version=")
    wanted = "application/openmetrics-text; version=1.0.0"
    page = service.get("/metrics", accept=wanted)
    assert page.content_type.startswith("application/openmetrics-text")
    families = list(openmetrics(page.body))
    strict = Figures(sample for family in families for sample in family.samples)
    plain = service.metrics()
    for name in ("updates_durable_total", "messages_received_total", "write_seconds_count"):
        assert strict.total(name) == plain.total(name) > 0, name
    assert plain.total("build_info", version=__version__) == 1
    assert plain.total("ready") == 1
    names = {family.name for family in families}
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "python_info"} <= names


# ------------------------------------------------------------------ start and end


def test_every_mistake_in_the_configuration_is_one_line_and_the_exit_code_is_2(
    broker: backing.Broker, cassandra: backing.Database, unique: str
) -> None:
    settings = variables(
        broker,
        cassandra,
        "shadowsvc",
        unique,
        MQTT__URL="http://127.0.0.1",
        MQTT__RECEIVE_MAXIMUM=0,
        MQTT__KEEPALIVE_SECONDS=30,
        CASSANDRA__LOCAL_DC="",
        CASSANDRA__CONSISTENCY="SOME",
    )
    done = run_command(settings, "run")
    assert done.returncode == 2
    assert done.stdout == ""
    named = sorted(line.partition(":")[0] for line in done.stderr.splitlines())
    assert named == [
        "SHADOWSVC_CASSANDRA__CONSISTENCY",
        "SHADOWSVC_CASSANDRA__LOCAL_DC",
        "SHADOWSVC_MQTT__KEEPALIVE_SECONDS",
        "SHADOWSVC_MQTT__RECEIVE_MAXIMUM",
        "SHADOWSVC_MQTT__URL",
    ]


def test_a_port_in_use_ends_it_with_the_name_of_the_setting(
    broker: backing.Broker, cassandra: backing.Database, unique: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = variables(broker, cassandra, "shadowsvc", unique, HTTP__PORT=port)
        done = run_command(settings, "run")
    assert done.returncode == 2
    assert f"SHADOWSVC_HTTP__PORT: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_schema_that_is_behind_is_waited_for(
    broker: backing.Broker,
    cassandra: backing.Database,
    keyspace: str,
    unique: str,
    cql: Any,
    tmp_path: Path,
) -> None:
    settings = variables(broker, cassandra, keyspace, unique)
    with ServiceProcess(settings, tmp_path / "service.log") as service:
        service.wait_reasons({"schema_behind", "not_subscribed"})
        assert service.live()
        assert service.get("/startupz").status == 200
        cql.execute(
            f"CREATE KEYSPACE {keyspace} WITH replication = "
            "{'class': 'SimpleStrategy', 'replication_factor': 1}",
            timeout=60,
        )
        service.wait_until(
            lambda: any("migrate" in event["error"] for event in service.events("not usable yet")),
            "the log says what to do",
        )
        assert service.ready_reasons() == {"schema_behind", "not_subscribed"}
        pid = service.pid
        done = run_command(settings, "migrate")
        assert done.returncode == 0, done.stderr
        service.wait_ready()
        assert service.pid == pid
        with Oracle(broker, cql, keyspace, unique) as oracle:
            oracle.update(unique, {REPORTED: {"a": 1}})
            settle(service, oracle)


def test_migrate_on_start_makes_the_schema(
    broker: backing.Broker, cassandra: backing.Database, keyspace: str, unique: str, tmp_path: Path
) -> None:
    settings = variables(broker, cassandra, keyspace, unique, CASSANDRA__MIGRATE_ON_START="true")
    with ServiceProcess(settings, tmp_path / "service.log") as service:
        service.wait_ready()
        assert service.terminate() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_flight_and_ends_with_0(
    serve: Serve, unique: str, number: signal.Signals
) -> None:
    with serve(CASSANDRA__LINGER_SECONDS=1) as (service, oracle):
        for one in range(20):
            oracle.update(f"{unique}-{one}", {REPORTED: {"a": one}})
        oracle.wait_taken()
        service.wait_until(
            lambda: service.metrics().total("messages_received_total") == 20, "all have come"
        )
        service.signal(number)
        assert service.wait_exit() == 0
        # At once: nothing of it waits for a next life of the service.
        assert oracle.differences() == []
        (stopped,) = service.events("stopped")
        assert stopped["drained"] is True
        assert stopped["acknowledged"] == 20
        assert stopped["left_to_the_broker"] == 0


@contextmanager
def holding_one(
    serve: Serve, cassandra: backing.Database, device: str, **settings: object
) -> Iterator[ServiceProcess]:
    """Give a service whose only update can't be written, to be ended; it is written afterwards."""
    with (
        Proxied(cassandra.contact_points[0], cassandra.port) as proxy,
        serve(**settings, **through(proxy)) as (service, oracle),
    ):
        proxy.do(lambda one: one.hold())  # so that draining can't end
        oracle.update(device, {REPORTED: {"a": 1}})
        oracle.wait_taken()
        service.wait_until(
            lambda: service.metrics().total("deliveries_held") == 1, "the update is held"
        )
        yield service
        # Unacknowledged, so it stayed with the broker, whole.
        proxy.do(lambda one: one.heal())
        service.start()
        service.wait_ready()
        settle(service, oracle)


def test_a_second_signal_ends_it_at_once(
    serve: Serve, cassandra: backing.Database, unique: str
) -> None:
    with holding_one(serve, cassandra, unique, LIMITS__DRAIN_TIMEOUT_SECONDS=600) as service:
        service.signal(signal.SIGTERM)
        service.wait_until(
            lambda: "draining" in service.ready_reasons(), "/readyz says that it drains"
        )
        assert service.live()
        assert service.terminate() == 128 + signal.SIGTERM


def test_it_ends_with_0_when_cassandra_is_away_and_the_deadline_has_come(
    serve: Serve, cassandra: backing.Database, unique: str
) -> None:
    with holding_one(serve, cassandra, unique, LIMITS__DRAIN_TIMEOUT_SECONDS=1) as service:
        assert service.terminate() == 0
        (stopped,) = service.events("stopped")
        assert stopped["drained"] is False
        assert stopped["left_to_the_broker"] == 1
        assert stopped["acknowledged"] == 0
