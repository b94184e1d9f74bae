"""The ledger over every order of deliveries, completions, lost connections and answers."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shadowsvc.ledger import Delivery, Ledger


@dataclass
class Entry:
    """What the machine knows of one delivery, by its own account."""

    delivery: Delivery
    epoch: int
    packet_id: int
    size_bytes: int
    received: float
    fate: str = "held"
    last_copy: bool = False


class Ledgers(RuleBasedStateMachine):
    """A ledger beside a list of all that ever happened to it."""

    def __init__(self) -> None:
        super().__init__()
        self.observed = 0
        self.ledger = Ledger(self.observe)
        self.entries: list[Entry] = []
        self.epoch = 0
        self.packet_id = 0
        self.clock = 0.0
        self.acked: dict[int, list[int]] = {}

    def observe(self, received: float, count: int) -> None:
        assert any(entry.received == received for entry in self.entries)
        assert count > 0
        self.observed += count

    def pick(self, data: Any, fates: set[str]) -> list[Entry]:
        choice = [entry for entry in self.entries if entry.fate in fates]
        if not choice:
            return []
        return data.draw(st.lists(st.sampled_from(choice), max_size=6))  # type: ignore[no-any-return]

    def fates(self, fate: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.fate == fate]

    @initialize()
    def connect(self) -> None:
        self.epoch = self.ledger.begin_epoch()

    @rule(qos=st.integers(0, 1), size=st.integers(0, 50), tick=st.sampled_from([0.0, 0.5]))
    def receive(self, qos: int, size: int, tick: float) -> None:
        self.clock += tick
        if qos:
            self.packet_id += 1
        packet_id = self.packet_id if qos else 0
        delivery = self.ledger.receive(packet_id, size, self.clock)
        self.entries.append(Entry(delivery, self.epoch, packet_id, size, self.clock))

    @rule(data=st.data())
    def complete(self, data: Any) -> None:
        chosen = self.pick(data, {"held", "unsent", "acknowledged", "abandoned", "stale"})
        self.ledger.complete([entry.delivery for entry in chosen])
        for entry in chosen:
            if entry.fate != "held":
                continue
            if not entry.packet_id or entry.last_copy:
                entry.fate = "done_without_ack"
            elif entry.epoch == self.epoch:
                entry.fate = "unsent"
            else:
                entry.fate = "stale"

    @rule()
    def send(self) -> None:
        sent = struct.iter_unpack(">HH", self.ledger.take_acks())
        leaving = []
        for entry in self.entries:
            if entry.packet_id and entry.epoch == self.epoch and entry.fate != "acknowledged":
                if entry.fate != "unsent":
                    break
                entry.fate = "acknowledged"
                leaving.append(entry.packet_id)
        assert list(sent) == [(0x4002, packet_id) for packet_id in leaving]
        self.acked.setdefault(self.epoch, []).extend(leaving)

    @rule(data=st.data(), answer=st.sampled_from(["present", "absent", "none"]))
    def reconnect(self, data: Any, answer: str) -> None:
        """Begin an epoch; CONNACK says what the broker remembers, or never comes."""
        self.epoch = self.ledger.begin_epoch()
        self.packet_id = 0
        for entry in self.fates("unsent"):
            entry.fate = "stale"
        if answer == "present":
            for entry in self.pick(data, {"held"}):
                if self.ledger.is_repeated(entry.delivery):
                    self.ledger.abandon(entry.delivery)
                    entry.fate = "abandoned"
        elif answer == "absent":
            for entry in self.fates("held"):
                self.ledger.keep(entry.delivery)
                entry.last_copy = bool(entry.packet_id)

    @rule(data=st.data())
    def abandon_what_is_not_repeated(self, data: Any) -> None:
        for entry in self.pick(data, {"held", "unsent", "acknowledged", "stale"}):
            if not self.ledger.is_repeated(entry.delivery):
                self.ledger.abandon(entry.delivery)

    @rule(data=st.data())
    def keep_what_is_of_this_epoch(self, data: Any) -> None:
        for entry in self.pick(data, {"held", "unsent"}):
            if entry.epoch == self.epoch:
                self.ledger.keep(entry.delivery)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        ledger = self.ledger
        unsent = len(self.fates("unsent"))
        assert ledger.received == len(self.entries)
        assert ledger.received == (
            ledger.acknowledged
            + ledger.stale
            + ledger.abandoned
            + ledger.done_without_ack
            + ledger.held
            + unsent
        )
        for fate in ("acknowledged", "stale", "abandoned", "done_without_ack", "held"):
            assert getattr(ledger, fate) == len(self.fates(fate)), fate
        assert ledger.held_bytes == sum(entry.size_bytes for entry in self.fates("held"))
        assert ledger.last_copies == sum(entry.last_copy for entry in self.fates("held"))
        assert self.observed == ledger.acknowledged

    @invariant()
    def what_waits_is_of_this_epoch(self) -> None:
        waiting = [
            entry
            for entry in self.entries
            if entry.packet_id and entry.epoch == self.epoch and entry.fate in {"held", "unsent"}
        ]
        assert self.ledger.unacknowledged == len(waiting)
        assert self.ledger.oldest == (waiting[0].received if waiting else None)

    @invariant()
    def acks_left_in_receive_order(self) -> None:
        # Packet ids start anew with each epoch and count up, so order and epoch both show in them.
        for acked in self.acked.values():
            assert acked == list(range(1, len(acked) + 1))


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
