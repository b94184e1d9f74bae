"""Whatever a device sends: a bad document is one dead letter, and nobody else notices."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from shadowsvc.shadow.document import REASONS
from tests.bad_documents import BAD, LIMITS
from tests.oracle import Oracle
from tests.service import ServiceProcess, variables
from tests.serving import settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    import backing
    from tests.serving import Serve

pytestmark = pytest.mark.timeout(120)

RECEIVE_MAXIMUM = 20
MAX_PER_DEVICE_PER_MINUTE = 10
KEPT_BYTES = 65_536
HOUR_SECONDS = 3600
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - cassandra-driver's times are naive, in UTC


class Running(NamedTuple):
    """A service that the tests of this file share."""

    service: ServiceProcess
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
    settings = variables(
        broker,
        cassandra,
        migrated,
        name,
        MQTT__RECEIVE_MAXIMUM=RECEIVE_MAXIMUM,
        DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE=MAX_PER_DEVICE_PER_MINUTE,
        **LIMITS,
    )
    log = tmp_path_factory.mktemp("bad-documents") / "service.log"
    with ServiceProcess(settings, log) as service:
        service.wait_ready()
        yield Running(service, migrated, name)


@pytest.fixture
def oracle(running: Running, broker: backing.Broker, cql: Any) -> Iterator[Oracle]:
    with Oracle(broker, cql, running.keyspace, running.prefix) as oracle:
        yield oracle


@pytest.mark.parametrize(("kind", "qos"), [*((kind, 1) for kind in BAD), ("not JSON", 0)])
def test_a_bad_document_is_one_dead_letter_and_its_neighbours_arrive(
    running: Running, oracle: Oracle, unique: str, kind: str, qos: int
) -> None:
    bad, service = BAD[kind], running.service
    topic = bad.topic.format(prefix=running.prefix, device=unique)
    before, sent_at = service.metrics(), time.time()
    oracle.update(unique, {"reported": {"before": 1, "both": 1}})
    oracle.update(f"{unique}-other", {"reported": {"before": 1}})
    oracle.raw(topic, bad.payload, qos=qos, properties=bad.properties)
    oracle.update(unique, {"reported": {"after": 1, "both": 2}})
    oracle.update(f"{unique}-other", {"reported": {"after": 1}})
    settle(service, oracle)

    (letter,) = [one for one in oracle.dead_letters(running.prefix) if one.topic == topic]
    assert letter.reason == bad.reason
    assert letter.reason in REASONS
    assert letter.detail
    assert letter.payload == bad.payload[:KEPT_BYTES]
    assert letter.payload_bytes == len(bad.payload)
    assert letter.payload_sha256 == hashlib.sha256(bad.payload).digest()
    # The name in the topic, and none where it is no name.
    named = None if bad.reason in {"device_name", "topic"} else unique
    assert letter.device == named
    assert (letter.qos, letter.retain, letter.duplicate) == (qos, False, False)
    properties = [list(pair) for pair in bad.properties] or None
    assert (letter.user_properties and json.loads(letter.user_properties)) == properties
    received = letter.received_at - EPOCH
    assert sent_at - 1 <= received.total_seconds() <= time.time() + 1
    bucket = letter.bucket - EPOCH
    assert bucket.total_seconds() == received.total_seconds() // HOUR_SECONDS * HOUR_SECONDS
    assert 0 <= letter.shard < 8

    now = service.metrics()
    assert now.since(before, "updates_rejected_total", reason=bad.reason) == 1
    assert now.since(before, "updates_rejected_total") == 1
    assert now.since(before, "dead_letters_total", reason=bad.reason) == 1
    assert now.since(before, "updates_durable_total") == 4
    assert now.since(before, "messages_acknowledged_total") == 4 + qos
    assert service.ready_reasons() == set()


def test_every_reason_that_a_document_can_have_is_tried() -> None:
    tried = {bad.reason for bad in BAD.values()}
    # User properties are no part of a document; test_hostile has them.
    assert set(REASONS) - tried == {
        "properties_too_large", "refused_by_store", "internal_error"
    }  # fmt: skip


def test_a_retained_bad_document_says_so(running: Running, oracle: Oracle, unique: str) -> None:
    oracle.raw(oracle.topic(unique), b"x", retain=True)
    oracle.update(unique, {"reported": {"a": 1}})
    settle(running.service, oracle)
    (letter,) = [one for one in oracle.dead_letters(running.prefix) if one.device == unique]
    assert letter.payload == b"x"
    assert letter.retain is True


def test_a_flood_of_one_device_is_acknowledged_and_counted(
    running: Running, oracle: Oracle, unique: str
) -> None:
    flood, neighbours, service = 500, 50, running.service
    before = service.metrics()
    for number_ in range(flood):
        oracle.raw(oracle.topic(unique), b"bad %d" % number_)
        if number_ % (flood // neighbours) == 0:
            oracle.update(f"{unique}-{number_}", {"reported": {"a": number_}})
    settle(service, oracle)
    now = service.metrics()
    letters = [one for one in oracle.dead_letters(running.prefix) if one.device == unique]
    # A minute may have ended in between.
    assert MAX_PER_DEVICE_PER_MINUTE <= len(letters) <= 2 * MAX_PER_DEVICE_PER_MINUTE
    assert now.since(before, "updates_rejected_total", reason="not_json") == flood
    assert now.since(before, "dead_letters_suppressed_total") == flood - len(letters)
    assert now.since(before, "updates_durable_total") == neighbours
    assert now.since(before, "messages_acknowledged_total") == flood + neighbours
    assert now.total("unacknowledged_deliveries") == 0
    assert service.ready_reasons() == set()
    assert service.live()


def test_more_poison_than_receive_maximum_does_not_stop_the_service(
    running: Running, oracle: Oracle, unique: str
) -> None:
    poison, service = 10 * RECEIVE_MAXIMUM, running.service
    before = service.metrics()
    for number_ in range(poison):
        oracle.raw(oracle.topic(f"{unique}-{number_}"), b"\xff%d" % number_)
    for number_ in range(20):
        oracle.update(unique, {"reported": {"a": number_}})
    settle(service, oracle)
    letters = [one for one in oracle.dead_letters(running.prefix) if one.payload[:1] == b"\xff"]
    found = {(one.device, one.payload) for one in letters}
    assert found == {(f"{unique}-{one}", b"\xff%d" % one) for one in range(poison)}
    assert len(letters) == poison
    now = service.metrics()
    assert now.since(before, "dead_letters_total", reason="not_utf8") == poison
    assert now.since(before, "messages_acknowledged_total") == poison + 20


# ------------------------------------------------------------------ refused by Cassandra itself


def test_what_cassandra_refuses_is_a_dead_letter_and_its_neighbours_are_written(
    serve_own: Serve, unique: str
) -> None:
    """One update is larger than that server's `max_mutation_size`, in a batch with others."""
    with serve_own(
        SHADOW__MAX_PAYLOAD_BYTES=400_000,
        # All in one batch, which waits for company.
        CASSANDRA__BATCH_MAX_BYTES=1_000_000,
        CASSANDRA__LINGER_SECONDS=1,
    ) as (service, oracle):
        before = service.metrics()
        for number_ in range(5):
            oracle.update(f"{unique}-{number_}", {"reported": {"a": number_}})
        refused = oracle.raw(
            oracle.topic(f"{unique}-large"),
            json.dumps({"state": {"reported": {"a": "x" * 300_000}}}).encode(),
        )
        for number_ in range(5):
            oracle.update(f"{unique}-{number_}", {"reported": {"b": number_}})
        settle(service, oracle)
        (letter,) = oracle.dead_letters(unique)
        assert letter.reason == "refused_by_store"
        assert letter.device == f"{unique}-large"
        assert letter.payload == refused.payload[:KEPT_BYTES]
        assert letter.payload_sha256 == hashlib.sha256(refused.payload).digest()
        now = service.metrics()
        assert now.since(before, "updates_durable_total") == 10
        assert now.since(before, "messages_acknowledged_total") == 11
        assert now.since(before, "dead_letters_total", reason="refused_by_store") == 1
        assert service.ready_reasons() == set()


def test_a_batch_that_cassandra_finds_too_large_is_split(serve_own: Serve, unique: str) -> None:
    """Each update fits that server's `batch_size_fail_threshold`, all together do not."""
    with serve_own(
        CASSANDRA__BATCH_MAX_BYTES=1_000_000,
        CASSANDRA__BATCH_MAX_PARTITIONS=100,
        CASSANDRA__LINGER_SECONDS=0.5,
    ) as (service, oracle):
        for number_ in range(50):
            oracle.update(f"{unique}-{number_}", {"reported": {"a": "x" * 2000}})
        settle(service, oracle)
        figures = service.metrics()
        assert figures.total("batches_split_total") > 0
        assert figures.total("updates_durable_total") == 50
        assert oracle.dead_letters(unique) == []
