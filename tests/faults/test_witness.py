"""The oracle finds what it has to find: each broken promise, made by hand, is forbidden."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import mqtt5
import pytest

from backing import Direction
from tests.faults.publisher import Message, Publisher
from tests.faults.wire import Delivery, Wire
from tests.faults.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.faults.wire import Key

TOPIC = "p/lamp/shadow/update"


class Row(NamedTuple):
    """As the witness reads it."""

    path: str
    value: str
    time_us: int
    shadow: str = ""
    section: str = "reported"

    @property
    def heard_us(self) -> int:
        return self.time_us

    @property
    def heard_ms(self) -> int:
        return self.time_us // 1000


class Told(Witness):
    """A witness that is told what Cassandra holds."""

    def __init__(self) -> None:
        super().__init__(None, "", "p")  # type: ignore[arg-type]  # it is never entered
        self.rows: dict[str, list[Row]] = {}
        self.kept: dict[tuple[str, bytes], set[str]] = {}
        self.publishers.append(Silent())
        self.wires.append(Wire("pod", self.on_ack))

    def say(self, number: int, *, code: int | None = 0, qos: int = 1) -> Message:
        return self.publishers[0].say(number, code=code, qos=qos)  # type: ignore[attr-defined,no-any-return]

    def store(self, message: Message, *, time_us: int | None = None) -> None:
        assert message.only is not None
        time_us = message.time_us if time_us is None else time_us
        rows = self.rows.setdefault(message.device, [])
        rows.append(Row(message.only, message.writes[0][2].decode(), time_us))

    def acknowledge(self, message: Message) -> None:
        self.wires[0]._was_acked(Delivery(message.key, 1, 1, duplicate=False))

    def _read(self, devices: list[str]) -> Iterable[list[Any]]:
        return [self.rows.get(device, []) for device in devices]

    def _letters(self) -> dict[tuple[str, bytes], set[str]]:
        return self.kept


class Silent(Publisher):
    """A publisher that publishes nowhere; each message has a device of its own."""

    def __init__(self) -> None:
        self.sent = []
        self.by_key: dict[Key, Message] = {}
        self._pending = {}

    def collect(self) -> None:
        pass

    def say(self, number: int, *, code: int | None, qos: int) -> Message:
        message = Message(f"p/lamp-{number}/shadow/update", b"%d" % number)
        message.device, message.time_us, message.qos = f"lamp-{number}", 1000 * number, qos
        message.only, message.writes = f"/{number}", [("reported", f"/{number}", b"1")]
        message.code, message.answered_at = code, time.time()
        self.sent.append(message)
        self.by_key[message.key] = message
        return message


@pytest.fixture
def witness() -> Told:
    return Told()


def test_what_is_durable_is_fine(witness: Told) -> None:
    for number in (1, 2, 3):
        message = witness.say(number)
        witness.store(message)
        witness.acknowledge(message)
    verdict = witness.verdict()
    assert verdict.forbidden == []
    assert verdict.published == verdict.durable == verdict.acknowledged_by_service == 3


def test_an_update_that_the_service_acknowledged_and_nobody_has_is_forbidden(witness: Told) -> None:
    """Whatever else happened: that the broker was killed is no excuse."""
    witness.acknowledge(witness.say(1))
    witness.excuse("broker lost", saved_at=None, at=time.time() + 1)
    (missing, difference, heard) = witness.verdict().forbidden
    assert "the service acknowledged it" in missing
    assert difference.startswith("missing: lamp-1")
    assert "updated_at" in heard


def test_an_update_that_the_broker_acknowledged_and_nobody_has_is_forbidden(witness: Told) -> None:
    witness.say(1)
    assert witness.missing() == 1
    assert "the broker acknowledged it to its publisher" in witness.verdict().forbidden[0]


@pytest.mark.parametrize(("code", "qos"), [(None, 1), (0x10, 1), (0x97, 1), (0, 0)])
def test_what_nobody_promised_may_be_missing(witness: Told, code: int | None, qos: int) -> None:
    witness.say(1, code=code, qos=qos)
    assert witness.verdict().forbidden == []


def test_a_killed_broker_excuses_what_it_had_not_saved_and_nothing_before_or_after(
    witness: Told,
) -> None:
    before, unsaved, after = (witness.say(number) for number in (1, 2, 3))
    before.answered_at, unsaved.answered_at, after.answered_at = 100.0, 200.0, 300.0
    witness.excuse("broker killed", saved_at=150, at=250)
    verdict = witness.verdict()
    assert (verdict.excused, verdict.lost_by_broker) == (1, 1)
    assert [line for line in verdict.forbidden if "the broker acknowledged" in line] == [
        line for line in verdict.forbidden if "lamp-1/" in line or "lamp-3/" in line
    ]
    assert witness.missing() == 2


def test_what_was_handed_out_is_excused_where_the_broker_forgets_it(witness: Told) -> None:
    handed_out, queued = witness.say(1), witness.say(2)
    witness.excuse("restarted", saved_at=time.time(), at=time.time(), handed_out={handed_out.key})
    assert witness._excused(handed_out)
    assert not witness._excused(queued)


def test_a_row_that_nobody_published_is_forbidden(witness: Told) -> None:
    message = witness.say(1)
    witness.store(message)
    witness.rows["lamp-1"].append(Row("/strange", "1", 1000))
    (line,) = witness.verdict().forbidden
    assert line.startswith("never published: lamp-1")


def test_an_older_value_than_what_was_acknowledged_is_forbidden(witness: Told) -> None:
    message = witness.say(5)
    witness.store(message, time_us=message.time_us - 1)
    assert any(line.startswith("missing") for line in witness.verdict().forbidden)


def test_a_row_that_goes_back_in_time_is_seen_in_samples(witness: Told) -> None:
    for time_us in (10, 20, 20, 15):
        witness._no_step_back("lamp", Row("/a", "1", time_us))
    (line,) = witness.violations
    assert line.startswith("went back in time")
    assert witness.verdict().forbidden == [line]


def test_a_dead_letter_of_a_good_update_is_forbidden_unless_it_is_expected(witness: Told) -> None:
    message = witness.say(1)
    digest = hashlib.sha256(message.payload).digest()
    witness.kept[message.topic, digest] = {"refused_by_store"}
    assert any("refused_by_store" in line for line in witness.verdict().forbidden)
    witness.letters_allowed.add("refused_by_store")
    assert not any("refused_by_store" in line for line in witness.verdict().forbidden)


def test_a_dead_letter_that_nobody_published_is_forbidden(witness: Told) -> None:
    witness.kept["p/x/shadow/update", b"digest"] = {"not_json"}
    (line,) = witness.verdict().forbidden
    assert line.startswith("never published")


# ------------------------------------------------------------------ the wire


def publish(packet_id: int, payload: bytes = b"x") -> bytes:
    return mqtt5.PublishPacket(
        TOPIC, payload, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=packet_id
    ).write()


def puback(packet_id: int) -> bytes:
    return mqtt5.PubAckPacket(packet_id).write()


def pass_on(link: Any, direction: Direction, data: bytes) -> None:
    link.came(direction, data)
    link.went(direction, len(data))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_wire_reads_packets_however_they_are_split(size: int) -> None:
    wire = Wire("pod")
    link = wire.watch()
    data = b"".join(publish(number, b"%d" % number) for number in range(1, 50))
    for at in range(0, len(data), size):
        pass_on(link, Direction.TO_CLIENT, data[at : at + size])
    assert wire.reached == wire.unacked() == {(TOPIC, b"%d" % number) for number in range(1, 50)}
    acks = b"".join(puback(number) for number in range(1, 50))
    for at in range(0, len(acks), size):
        pass_on(link, Direction.TO_SERVER, acks[at : at + size])
    assert set(wire.acked) == wire.reached
    assert wire.unacked() == set()
    assert wire.violations == []


def test_an_ack_out_of_order_or_for_nothing_is_a_violation() -> None:
    wire = Wire("pod")
    link = wire.watch()
    pass_on(link, Direction.TO_CLIENT, publish(1) + publish(2, b"y"))
    pass_on(link, Direction.TO_SERVER, puback(2))
    pass_on(link, Direction.TO_SERVER, puback(2))
    pass_on(link, Direction.TO_SERVER, puback(2))
    assert len(wire.violations) == 2
    assert "the oldest delivery is 1" in wire.violations[0]
    assert "nothing waits" in wire.violations[1]


def test_an_ack_of_an_older_connection_is_a_violation() -> None:
    wire = Wire("pod")
    pass_on(wire.watch(), Direction.TO_CLIENT, publish(1))
    pass_on(wire.watch(), Direction.TO_SERVER, puback(1))
    assert len(wire.violations) == 1


def test_an_ack_for_what_never_reached_the_service_is_a_violation() -> None:
    wire = Wire("pod")
    link = wire.watch()
    link.came(Direction.TO_CLIENT, publish(1))
    link.came(Direction.TO_SERVER, puback(1))
    assert "has not reached" in wire.violations[0]


def test_an_ack_that_a_fault_swallows_was_said_all_the_same() -> None:
    wire = Wire("pod")
    link = wire.watch()
    pass_on(link, Direction.TO_CLIENT, publish(1))
    link.came(Direction.TO_SERVER, puback(1))
    assert set(wire.acked) == wire.unacked() == {(TOPIC, b"x")}


def test_what_is_handed_out_again_counts_for_its_last_connection() -> None:
    wire = Wire("pod")
    pass_on(wire.watch(), Direction.TO_CLIENT, publish(1, b"once") + publish(2, b"twice"))
    pass_on(wire.watch(), Direction.TO_CLIENT, publish(2, b"twice"))
    assert wire.unacked(1) == {(TOPIC, b"once")}
    assert wire.unacked() == {(TOPIC, b"once"), (TOPIC, b"twice")}
