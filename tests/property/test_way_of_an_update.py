"""Session, ledger and pipeline together, against a broker in memory and a store full of faults.

Everything but the store is the real thing; sockets and the passing of time are not. Time is
virtual: a loop whose clock jumps to the next timer, so that minutes of retries take no time.

What must hold after every step, whatever was published, lost, refused or slow:

- what the broker got a PUBACK for is durable: in the shadow's writes or in a dead letter;
- on each connection PUBACKs leave in the order of the PUBLISH packets, each once, none for another;
- every delivery is accounted for, and no more than two windows are held;
- at the end, with all faults over, everything that the broker or the service still had is durable.
"""

from __future__ import annotations

import asyncio
import json
import selectors
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import shadowsvc.pipeline as pipeline_module
import shadowsvc.writers as writers_module
from shadowsvc.errors import MqttError, StoreUnavailable
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Metrics
from shadowsvc.mqtt.session import Connected, Session, SessionOptions, Subscribed
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import AWAY, FaultyStore
from tests.line import check_accounts
from tests.memory_broker import ClientSession, Link, MemoryBroker, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    import mqtt5

WINDOW = 6
CLIENT = "client"
FILTERS = ("$share/g/things/+/shadow/update", "$share/g/things/+/shadow/name/+/update")
DEVICES = ("a", "b", "c", "d")
POISON = "poison"
EPOCH_US = 1_700_000_000_000_000
_ROOMS = (pipeline_module, writers_module)
"""Those that read a clock."""
OVERLOADED = StoreUnavailable("server_overloaded", "not now", overload=True)


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never waits: its clock jumps to whatever is due next."""

    def __init__(self) -> None:
        super().__init__(_NoWaiting(self))
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class _NoWaiting(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that cannot come"
            # At least a tick: what is due "now" by rounding must come.
            self._loop.now += max(timeout, 1e-6)
        return ready


class RecordingBroker(MemoryBroker):
    """Looks at each PUBACK when it comes."""

    def __init__(self, is_durable: Callable[[Message], bool]) -> None:
        super().__init__()
        self._is_durable = is_durable
        self.confirmed: dict[Link, list[int]] = {}
        self.lost: list[bytes] = []
        """Payloads that the broker lost by itself, and those that it never had a place for."""

    def publish(self, topic: str, payload: bytes, **more: Any) -> None:
        before = self.unrouted
        super().publish(topic, payload, **more)
        if self.unrouted > before:
            self.lost.append(payload)

    def take_ack(self, link: Link, packet: mqtt5.PubAckPacket) -> None:
        assert link.session is not None
        message = link.session.in_flight.get(packet.packet_id)
        assert message is not None, "a PUBACK for what is not in flight"
        assert self._is_durable(message), f"acknowledged and not durable: {message}"
        self.confirmed.setdefault(link, []).append(packet.packet_id)
        super().take_ack(link, packet)

    def restart(self) -> None:
        for session in self.sessions.values():
            if session.link is not None:
                self.lost += [message.payload for message in session.in_flight.values()]
        super().restart()

    def forget(self, session: ClientSession, held: set[bytes]) -> None:
        """Lose a session with all that is in it; what somebody else has is not lost yet."""
        both = [*session.in_flight.values(), *session.queue]
        self.lost += [message.payload for message in both if message.payload not in held]
        del self.sessions[session.client_id]


class RecordingLink(Link):
    """Notes the packet ids of what is sent."""

    def __init__(self, broker: MemoryBroker, write: Callable[[bytes], None]) -> None:
        super().__init__(broker, write, lambda: None)
        self.sent_ids: list[int] = []

    def send_message(self, message: Message, packet_id: int | None, **more: Any) -> bool:
        if packet_id is not None:
            self.sent_ids.append(packet_id)
        return super().send_message(message, packet_id, **more)


class Wire:
    """One connection: the session, its link to the broker, and bytes under way in either way."""

    def __init__(self, machine: Ways, announced: int) -> None:
        self._pipeline = machine.pipeline
        self.up = True
        self.session = Session(SessionOptions(CLIENT, FILTERS), self._pipeline.publish)
        self.link = RecordingLink(machine.broker, self._arrived)
        self.inbox = bytearray()
        self.session.connect(0.0, announced)
        self.flush()

    def _arrived(self, data: bytes) -> None:
        self.inbox += data

    def flush(self) -> None:
        while self.up and self.session.outgoing:
            self.link.receive(self.session.outgoing.pop(0))

    def read(self, count: int | None = None) -> None:
        """Take so many bytes of what has arrived, or all."""
        while self.up and self.inbox:
            pipeline = self._pipeline
            data = bytes(self.inbox if count is None else self.inbox[:count])
            pipeline.begin_chunk()
            used = self.session.receive(memoryview(data), 0.0)
            for event in self.session.events:
                if isinstance(event, Connected):
                    pipeline.connected(session_present=event.session_present)
                elif isinstance(event, Subscribed):
                    pipeline.subscribed_now()
            self.session.events.clear()
            pipeline.end_chunk()
            self.flush()
            del self.inbox[:used]
            if count is not None or not used:
                return


class Ways(RuleBasedStateMachine):
    """A broker, a service without its sockets, and a store."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self._clock = _ROOMS[0].__dict__["time"]
        clock = SimpleNamespace(
            monotonic=lambda: self.loop.now,
            time=lambda: EPOCH_US / 1e6 + self.loop.now,
            time_ns=lambda: EPOCH_US * 1000 + int(self.loop.now * 1e9),
        )
        for room in _ROOMS:
            room.__dict__["time"] = clock
        self.number = 0
        self.published: list[Message] = []
        self.broker = RecordingBroker(self.is_durable)
        self.wire: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.connects = 0
        self.received = 0
        self.run(self._build())

    async def _build(self) -> None:
        self.store = FaultyStore()
        self.store.refused_devices = {POISON}
        self.ledger = Ledger()
        self.metrics = Metrics()
        self.pipeline = Pipeline(
            Options(
                CLIENT,
                receive_maximum=WINDOW,
                concurrency=3,
                linger_seconds=0.002,
                retry_min_seconds=0.01,
                retry_max_seconds=1.0,
            ),
            Decoder(TopicParser("things"), Limits()),
            Batcher(lambda device: ord(device[0]) % 2, max_partitions=3),
            self.store,
            self.ledger,
            self.metrics,
            self._send,
        )
        self.pipeline.leave = self._leave

    def teardown(self) -> None:
        try:
            self.run(self._to_the_end())
        finally:
            self.run(self.pipeline.close())
            for room in _ROOMS:
                room.__dict__["time"] = self._clock
            self.loop.close()
            asyncio.set_event_loop(None)

    def run(self, what: Any) -> Any:
        return self.loop.run_until_complete(what)

    # ---------------------------------------------------------------- the service's surroundings

    def _send(self, data: bytes) -> None:
        if self.wire is not None and self.wire.up:
            self.wire.link.receive(data)

    def _leave(self, reason: str) -> None:
        """As the connection does: leave with the session kept, then connect anew."""
        if self.wire is not None and self.wire.up:
            self.wire.link.receive(self.wire.session.farewell(0))
            self.lose(reason)

    def lose(self, reason: str) -> None:
        """The network connection ends, with all that was under way on it."""
        wire, self.wire = self.wire, None
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if wire is not None:
            wire.up = False
            wire.link.drop()
        self.pipeline.disconnected(reason)

    async def _connect(self) -> None:
        announced = await self.pipeline.begin_connection()
        assert 1 <= announced <= WINDOW
        self.connects += 1
        self.wire = Wire(self, announced)

    async def _settle(self, seconds: float) -> None:
        """Let time pass, and bytes arrive."""
        until = self.loop.now + seconds
        while True:
            if self.wire is None:
                if self._connecting is None or self._connecting.done():
                    self._connecting = asyncio.create_task(self._connect())
            elif self.wire.inbox:
                self.wire.read()
            left = until - self.loop.now
            if left <= 0:
                return
            await asyncio.sleep(min(left, 0.05))

    def is_durable(self, message: Message) -> bool:
        device = message.topic.split("/")[1]
        payload = message.payload
        if any(bytes(letter.payload) == payload for letter in self.store.letters):
            return True
        try:
            state = json.loads(payload)["state"]["reported"]
        except ValueError:  # a bad one has a dead letter or nothing
            return False
        return all(
            (device, f"/{key}", str(value).encode()) in self._written
            for key, value in state.items()
        )

    @property
    def _written(self) -> set[tuple[str, str, bytes]]:
        return {(write[0], write[4], write[5]) for write in self.store.durable}

    # ---------------------------------------------------------------- what happens

    @initialize()
    def start(self) -> None:
        self.run(self._settle(0.2))
        assert self.pipeline.subscribed

    @rule(
        devices=st.lists(st.sampled_from([*DEVICES, POISON]), min_size=1, max_size=8),
        qos=st.sampled_from([1, 1, 1, 0]),
        kind=st.sampled_from(["good", "good", "good", "bad", "empty"]),
        late=st.booleans(),
    )
    def publish(self, devices: list[str], qos: int, kind: str, late: bool) -> None:  # noqa: FBT001
        for device in devices:
            self.number += 1
            # A leaf of its own, so that no later update hides a loss.
            state: dict[str, int] = {f"only-{self.number}": self.number}
            document: dict[str, Any] = {"state": {"reported": {} if kind == "empty" else state}}
            document["timestamp"] = EPOCH_US + self.number - (1000 if late else 0)
            payload = json.dumps(document).encode()
            if kind == "bad":
                payload = b"bad %d" % self.number
            self.broker.publish(f"things/{device}/shadow/update", payload, qos=qos)
            if qos:
                self.published.append(Message(f"things/{device}/shadow/update", payload))

    @rule(count=st.integers(1, 200))
    def some_bytes_arrive(self, count: int) -> None:
        async def read() -> None:
            if self.wire is not None:
                self.wire.read(count)

        self.run(read())

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.01, 0.3, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(self._settle(seconds))

    @rule()
    def the_connection_is_lost(self) -> None:
        self.lose("network")

    @rule()
    def the_broker_restarts(self) -> None:
        """Queues survive; what is in flight to a present session does not."""
        self.broker.restart()
        self.lose("closed_by_broker")

    @rule()
    def the_broker_loses_the_session(self) -> None:
        session = self.broker.sessions.get(CLIENT)
        self.lose("closed_by_broker")
        if session is not None and CLIENT in self.broker.sessions:
            self.broker.forget(session, self.held())

    def held(self) -> set[bytes]:
        """Payloads that the service has in memory."""
        found = set()
        for delivery in self.pipeline._waiting_deliveries():
            if not delivery.done and delivery.message is not None:
                found.add(delivery.message[1])
        jobs = self.pipeline.writers._jobs
        return found | {bytes(job.letter.payload) for job in jobs if job.letter is not None}

    @rule(error=st.sampled_from([AWAY, OVERLOADED]), count=st.sampled_from([1, 2, 5, 10**9]))
    def the_store_fails(self, error: Exception, count: int) -> None:
        self.store.error = error
        self.store.errors_left = count

    @rule(which=st.sampled_from([0, 1]), seconds=st.sampled_from([0, 0.1, 3.0]))
    def a_replica_set_is_away(self, which: int, seconds: float) -> None:
        self.store.away_seconds = seconds
        self.store.away = lambda device: ord(device[0]) % 2 == which

    @rule()
    def the_store_is_slow(self) -> None:
        self.store.open.clear()

    @rule()
    def dead_letters_fail(self) -> None:
        self.store.letter_error = AWAY

    @rule()
    def the_store_recovers(self) -> None:
        self.store.away = lambda _: False
        self.store.error = None
        self.store.letter_error = None
        self.run(self._opened())

    async def _opened(self) -> None:
        self.store.open.set()

    @precondition(lambda self: self.wire is not None and not self.wire.inbox)
    @rule()
    def the_broker_sends_what_it_likes(self) -> None:
        """Bytes that MQTT forbids: the session ends, the next one begins anew."""
        wire = self.wire
        assert wire is not None
        wire.inbox += b"\xf0\x00"
        with suppress(MqttError):
            wire.read()
            raise AssertionError("the session took what MQTT forbids")
        self.lose("protocol_error")

    # ---------------------------------------------------------------- what must hold

    @invariant()
    def acks_leave_in_the_order_of_receipt_each_once(self) -> None:
        for link in self.broker.links:
            assert not link.strangers
            confirmed = self.broker.confirmed.get(link, [])
            assert isinstance(link, RecordingLink)
            assert confirmed == link.sent_ids[: len(confirmed)]

    @invariant()
    def every_delivery_is_accounted_for(self) -> None:
        check_accounts(self.ledger)
        metrics = self.metrics
        assert sum(metrics.messages) == self.ledger.received + metrics.qos0_dropped

    @invariant()
    def memory_is_bounded(self) -> None:
        # A window whose writes hang, its repetition in a resumed session, and what comes before a
        # session of which that turned out to be doubtful is left: then connecting waits.
        assert self.ledger.held <= 3 * WINDOW
        assert len(self.pipeline._waiting_deliveries()) <= self.ledger.held + WINDOW
        assert self.store.in_flight <= self.pipeline.options.concurrency

    @invariant()
    def nobody_has_given_up(self) -> None:
        assert not any(worker.done() for worker in self.pipeline.writers._workers)

    async def _to_the_end(self) -> None:
        """End every fault and see that nothing is missing."""
        self.store.error = self.store.letter_error = None
        self.store.away = lambda _: False
        self.store.open.set()
        for _ in range(200):
            await self._settle(1.0)
            session = self.broker.sessions.get(CLIENT)
            if (
                not self.ledger.held
                and not self.ledger.unacknowledged
                and not self.pipeline.writers._jobs  # one may write what was left to the broker
                and session is not None
                and session.link is not None
                and not session.in_flight
                and not session.queue
            ):
                break
        else:
            raise AssertionError(f"it does not come to an end: held {self.ledger.held}")
        self.every_delivery_is_accounted_for()
        # Gauges that are added to and taken from end where they began.
        assert self.metrics.retries_waiting == self.metrics.replica_sets_in_doubt == 0
        lost = set(self.broker.lost)
        for message in self.published:
            assert message.payload in lost or self.is_durable(message), f"missing: {message}"


TestWays = Ways.TestCase
TestWays.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
