"""The ledger: which acks leave, when, and that nothing is forgotten."""

from __future__ import annotations

import struct

import pytest

from shadowsvc.ledger import LAST_COPY, Delivery, Ledger


def packet_ids(acks: bytes) -> list[int]:
    """Read PUBACK packets in their short form (MQTT 5 §3.4)."""
    found = []
    for kind, length, packet_id in struct.iter_unpack(">BBH", acks):
        assert (kind, length) == (0x40, 2)
        found.append(packet_id)
    return found


def account(ledger: Ledger) -> int:
    return ledger.acknowledged + ledger.stale + ledger.abandoned + ledger.done_without_ack


def receive(ledger: Ledger, count: int, first: int = 1) -> list[Delivery]:
    return [ledger.receive(first + number, 10, 1.0) for number in range(count)]


def test_an_empty_ledger_has_nothing_to_say() -> None:
    ledger = Ledger()
    assert ledger.take_acks() == b""
    assert ledger.oldest is None
    assert ledger.unacknowledged == 0


def test_an_ack_waits_for_all_before_it() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    first, second, third = receive(ledger, 3)
    ledger.complete([third])
    assert ledger.take_acks() == b""
    ledger.complete([first])
    assert packet_ids(ledger.take_acks()) == [1]
    assert ledger.take_acks() == b""
    ledger.complete([second])
    assert packet_ids(ledger.take_acks()) == [2, 3]
    assert (ledger.acknowledged, ledger.held, ledger.held_bytes) == (3, 0, 0)


@pytest.mark.parametrize("packet_id", [1, 255, 256, 65535])
def test_a_puback_is_four_bytes_of_the_standard(packet_id: int) -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    ledger.complete([ledger.receive(packet_id, 1, 0.0)])
    assert ledger.take_acks() == b"\x40\x02" + packet_id.to_bytes(2, "big")


@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 1024, 1300, 65535])
def test_a_prefix_of_any_length_leaves_at_once_and_in_order(count: int) -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    deliveries = receive(ledger, count)
    ledger.complete(reversed(deliveries))
    assert packet_ids(ledger.take_acks()) == list(range(1, count + 1))
    assert ledger.acknowledged == count


def test_qos_0_is_never_acknowledged_and_holds_nobody_up() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    silent = ledger.receive(0, 7, 1.0)
    loud = ledger.receive(1, 5, 2.0)
    assert (ledger.held, ledger.held_bytes, ledger.unacknowledged) == (2, 12, 1)
    assert ledger.oldest == 2.0
    ledger.complete([loud])
    assert packet_ids(ledger.take_acks()) == [1]
    ledger.complete([silent])
    assert ledger.take_acks() == b""
    assert (ledger.done_without_ack, ledger.acknowledged, ledger.held) == (1, 1, 0)


def test_completing_twice_counts_once() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    (delivery,) = receive(ledger, 1)
    ledger.complete([delivery, delivery])
    ledger.complete([delivery])
    assert packet_ids(ledger.take_acks()) == [1]
    ledger.complete([delivery])
    assert ledger.take_acks() == b""
    assert (ledger.acknowledged, ledger.held, ledger.held_bytes) == (1, 0, 0)


def test_a_completed_ack_that_has_not_left_is_stale_in_the_next_epoch() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    first, second = receive(ledger, 2)
    ledger.complete([second])
    ledger.begin_epoch()
    ledger.complete([first])
    assert ledger.take_acks() == b""
    assert (ledger.stale, ledger.acknowledged, ledger.held) == (2, 0, 0)


def test_a_packet_id_used_again_is_acknowledged_for_its_own_delivery_only() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    (old,) = receive(ledger, 1)
    ledger.begin_epoch()
    (new,) = receive(ledger, 1)
    ledger.complete([old])
    assert ledger.take_acks() == b""
    ledger.complete([new])
    assert packet_ids(ledger.take_acks()) == [1]
    assert (ledger.stale, ledger.acknowledged) == (1, 1)


def test_a_last_copy_is_kept_until_durable_and_takes_a_place_meanwhile() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    (delivery,) = receive(ledger, 1)
    ledger.begin_epoch()
    assert ledger.is_repeated(delivery)
    ledger.keep(delivery)
    ledger.keep(delivery)
    assert (delivery.epoch, ledger.last_copies) == (LAST_COPY, 1)
    assert not ledger.is_repeated(delivery)
    ledger.begin_epoch()
    assert not ledger.is_repeated(delivery)  # a later session never had it
    ledger.complete([delivery])
    assert ledger.take_acks() == b""
    assert (ledger.last_copies, ledger.done_without_ack, ledger.held) == (0, 1, 0)


def test_what_the_broker_repeats_may_be_abandoned_once() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    (delivery,) = receive(ledger, 1)
    ledger.begin_epoch()
    ledger.abandon(delivery)
    ledger.abandon(delivery)
    ledger.complete([delivery])
    assert (ledger.abandoned, ledger.stale, ledger.held, ledger.held_bytes) == (1, 0, 0, 0)


def test_only_what_the_broker_repeats_can_be_abandoned() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    silent = ledger.receive(0, 10, 1.0)
    (last_copy,) = receive(ledger, 1)
    ledger.begin_epoch()
    ledger.keep(last_copy)
    (present,) = receive(ledger, 1)
    for delivery in (silent, last_copy, present):
        ledger.abandon(delivery)
    assert ledger.take_acks() == b"", "an abandoned delivery would be acknowledged"
    assert (ledger.abandoned, ledger.held, ledger.last_copies) == (0, 3, 1)


def test_a_delivery_of_the_present_epoch_is_no_last_copy() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    (delivery,) = receive(ledger, 1)
    silent = ledger.receive(0, 10, 1.0)
    ledger.keep(delivery)
    ledger.keep(silent)
    assert ledger.last_copies == 0
    ledger.complete([delivery, silent])
    assert packet_ids(ledger.take_acks()) == [1]


def test_every_ack_is_observed_with_its_receive_time() -> None:
    seen: list[tuple[float, int]] = []
    ledger = Ledger(lambda received, count: seen.append((received, count)))
    ledger.begin_epoch()
    times = [5.0, 5.0, 6.0, 5.0, -1.0, -1.0, 7.0]
    deliveries = [ledger.receive(number, 1, time) for number, time in enumerate(times, start=1)]
    ledger.complete(deliveries[:-1])
    ledger.take_acks()
    assert seen == [(5.0, 2), (6.0, 1), (5.0, 1), (-1.0, 2)]
    ledger.complete(deliveries)
    ledger.take_acks()
    assert seen[-1] == (7.0, 1)


def test_the_oldest_is_the_first_whose_ack_has_not_left() -> None:
    ledger = Ledger()
    ledger.begin_epoch()
    first = ledger.receive(1, 1, 3.0)
    ledger.receive(2, 1, 4.0)
    assert (ledger.oldest, ledger.unacknowledged) == (3.0, 2)
    ledger.complete([first])
    ledger.take_acks()
    assert (ledger.oldest, ledger.unacknowledged) == (4.0, 1)
    ledger.begin_epoch()
    assert (ledger.oldest, ledger.unacknowledged) == (None, 0)
    assert account(ledger) + ledger.held == ledger.received == 2
