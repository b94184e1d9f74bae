"""An MQTT 5 broker in memory, for tests that need a broker's faults on demand.

Lives here: `MemoryBroker`, sessions and routing without I/O, and `serve`, which puts it on a real
loopback socket. It behaves as VerneMQ was measured to behave where a consumer can tell: a shared
subscription goes to a random member that is online; Receive Maximum is honoured exactly; nothing
is sent again on a live connection; a persistent session keeps what is in flight (sent again with
DUP, in order) and what is queued, one with expiry 0 loses all; a restart keeps the queues of absent
sessions and loses what was in flight to present ones; the second CONNECT of a client id takes over
(DISCONNECT 142 to the first); CONNACK carries no properties; QoS 0 is never queued; a retained
message never goes to a share; a packet above the client's Maximum Packet Size vanishes silently.
Rules: every fault is a public attribute, off by default. Must not come in: the code under test.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import mqtt5

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable

_NOT_AUTHORIZED = mqtt5.ConnAckReasonCode.NOT_AUTHORIZED
_TAKEN_OVER = mqtt5.DisconnectReasonCode.SESSION_TAKEN_OVER
_SHARE = "$share/"
_MAX_PACKET_ID = 65_535


@dataclass
class Message:
    """What a publisher sent."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    user_properties: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class ClientSession:
    """What the broker remembers of one client id."""

    client_id: str
    expiry_seconds: int = 0
    link: Link | None = None
    filters: set[str] = field(default_factory=set)
    queue: deque[Message] = field(default_factory=deque)
    in_flight: dict[int, Message] = field(default_factory=dict)
    last_packet_id: int = 0

    def next_packet_id(self) -> int:
        while True:
            self.last_packet_id = self.last_packet_id % _MAX_PACKET_ID + 1
            if self.last_packet_id not in self.in_flight:
                return self.last_packet_id


class MemoryBroker:
    """Sessions, routing and faults; see the module's docstring."""

    def __init__(self, seed: int = 0) -> None:
        self.sessions: dict[str, ClientSession] = {}
        self.links: list[Link] = []
        """Every network connection that there was, oldest first."""
        self.acked: list[Message] = []
        """Messages in the order in which their PUBACK came."""
        self.unrouted = 0
        """Messages acknowledged to their publisher that nobody got."""
        self.refusal: mqtt5.ConnAckReasonCode | None = None
        """The answer to CONNECT instead of success."""
        self.passwords: set[bytes | None] | None = None
        """What CONNECT may bring; another is refused as not authorized. None: anything."""
        self.tried: list[bytes | None] = []
        """The password of every CONNECT."""
        self.connack_properties: dict[str, Any] = {}
        """What CONNACK carries beside `session_present`; VerneMQ: nothing."""
        self.suback: mqtt5.SubAckReasonCode | None = None
        """The answer to every filter instead of what was asked for."""
        self.subscribes_nothing = False
        """A cluster with a node down: SUBACK grants, and nothing is subscribed."""
        self.unsuback: mqtt5.UnsubAckReasonCode | None = None
        """The answer to every pattern that is unsubscribed; nothing is unsubscribed then."""
        self.shares_with_absent = False
        """mosquitto: absent members of a shared subscription get their share too."""
        self.takes_publishes = False
        """Clients may publish too; else it is an error: a consumer has no business with it."""
        self.puback: mqtt5.PubAckReasonCode | None = None
        """The answer to every publish of a client; then nobody gets it."""
        self.silent_on: set[type] = set()
        """Packet types of the client that get no answer."""
        self.dies_on: set[type] = set()
        """Packet types of the client upon which its connection is lost, unread."""
        self.deaf = False
        """A half-open connection: nothing is read, nothing is answered, nothing is closed."""
        self._retained: dict[str, Message] = {}
        self._random = random.Random(seed)

    @property
    def online(self) -> list[ClientSession]:
        """Sessions with a connection."""
        return [session for session in self.sessions.values() if session.link is not None]

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        user_properties: list[tuple[str, str]] | None = None,
    ) -> None:
        """Route a message as if a publisher had sent it."""
        message = Message(topic, payload, qos, retain, user_properties or [])
        if retain:
            self._retained[topic] = message
        reached = False
        groups: dict[str, list[ClientSession]] = {}
        for session in self.sessions.values():
            for pattern in session.filters:
                group, inner = split_share(pattern)
                if not matches(inner, topic):
                    continue
                if group is None:
                    reached |= self._hand_over(session, message)
                else:
                    groups.setdefault(pattern, []).append(session)
        for members in groups.values():
            present = [
                member for member in members if member.link is not None or self.shares_with_absent
            ]
            reached |= self._hand_over(self._random.choice(present or members), message)
        if not reached:
            self.unrouted += 1

    def restart(self) -> None:
        """Stop and start: present sessions lose what is in flight; expiry 0 loses the session."""
        for session in list(self.sessions.values()):
            if session.link is not None:
                session.in_flight.clear()
                session.link.drop()

    def expire(self, client_id: str) -> None:
        """Let the session expiry of an absent client pass."""
        if self.sessions[client_id].link is None:
            del self.sessions[client_id]

    def forget(self, client_id: str) -> None:
        """Lose a session, present or not, with all that it holds."""
        link = self.sessions.pop(client_id).link
        if link is not None:
            link.drop()

    def pump(self, session: ClientSession) -> None:
        """Send what is queued as far as Receive Maximum allows."""
        link = session.link
        if link is None:
            return
        while session.queue and len(session.in_flight) < link.receive_maximum:
            message = session.queue.popleft()
            packet_id = session.next_packet_id()
            session.in_flight[packet_id] = message
            if not link.send_message(message, packet_id):
                del session.in_flight[packet_id]

    def _hand_over(self, session: ClientSession, message: Message) -> bool:
        if message.qos:
            session.queue.append(message)
            self.pump(session)
        elif session.link is None:
            return False
        else:
            session.link.send_message(message, None)
        return True

    # ---------------------------------------------------------------- what links report

    def take_connect(self, link: Link, packet: mqtt5.ConnectPacket) -> None:
        if self.refusal is not None:
            link.write(mqtt5.ConnAckPacket(reason_code=self.refusal).write())
            link.drop()
            return
        self.tried.append(packet.password)
        if self.passwords is not None and packet.password not in self.passwords:
            link.write(mqtt5.ConnAckPacket(reason_code=_NOT_AUTHORIZED).write())
            link.drop()
            return
        session = self.sessions.get(packet.client_id)
        if session is not None and session.link is not None:
            old = session.link
            old.write(mqtt5.DisconnectPacket(reason_code=_TAKEN_OVER).write())
            old.drop()
            session = self.sessions.get(packet.client_id)
        if session is None or packet.clean_start:
            session = self.sessions[packet.client_id] = ClientSession(packet.client_id)
            present = False
        else:
            present = True
        session.expiry_seconds = packet.session_expiry_interval
        session.link = link
        link.session = session
        link.receive_maximum = packet.receive_max
        link.maximum_packet_size = packet.max_packet_size
        link.write(mqtt5.ConnAckPacket(session_present=present, **self.connack_properties).write())
        for packet_id, message in list(session.in_flight.items()):
            link.send_message(message, packet_id, duplicate=True)
        self.pump(session)

    def take_subscribe(self, link: Link, packet: mqtt5.SubscribePacket) -> None:
        session = link.session
        if session is None:
            return
        codes = []
        for topic_filter in packet.topic_filters:
            asked = mqtt5.SubAckReasonCode(int(topic_filter.max_qos))
            code = asked if self.suback is None else self.suback
            codes.append(code)
            if int(code) < 0x80 and not self.subscribes_nothing:
                session.filters.add(topic_filter.pattern)
        link.write(mqtt5.SubAckPacket(packet.packet_id, codes).write())
        for topic_filter in packet.topic_filters:
            group, inner = split_share(topic_filter.pattern)
            if group is None and topic_filter.retain_handling != mqtt5.RetainHandling.SEND_NEVER:
                for topic, message in self._retained.items():
                    if matches(inner, topic):
                        self._hand_over(session, message)

    def take_publish(self, link: Link, packet: mqtt5.PublishPacket) -> None:
        if self.puback is None:
            self.publish(packet.topic, packet.payload, qos=int(packet.qos))
        if packet.packet_id is not None:
            code = self.puback or mqtt5.PubAckReasonCode.SUCCESS
            link.write(mqtt5.PubAckPacket(packet.packet_id, reason_code=code).write())

    def take_unsubscribe(self, link: Link, packet: mqtt5.UnsubscribePacket) -> None:
        session = link.session
        if session is None:
            return
        # What is queued stays: it is delivered after UNSUBACK (measured: 50 of 50).
        codes = [
            self.unsuback
            or (
                mqtt5.UnsubAckReasonCode.SUCCESS
                if pattern in session.filters
                else mqtt5.UnsubAckReasonCode.NO_SUBSCRIPTION_EXISTED
            )
            for pattern in packet.patterns
        ]
        if self.unsuback is None:
            session.filters.difference_update(packet.patterns)
        link.write(mqtt5.UnsubAckPacket(packet.packet_id, codes).write())

    def take_ack(self, link: Link, packet: mqtt5.PubAckPacket) -> None:
        session = link.session
        if session is None:
            return
        message = session.in_flight.pop(packet.packet_id, None)
        if message is None:
            link.strangers.append(packet.packet_id)
            return
        self.acked.append(message)
        self.pump(session)

    def link_closed(self, link: Link) -> None:
        session = link.session
        if session is None or session.link is not link:
            return
        session.link = None
        if not session.expiry_seconds and self.sessions.get(session.client_id) is session:
            del self.sessions[session.client_id]


class Link:
    """One network connection, seen from the broker; fed by `receive` and `closed`."""

    def __init__(
        self, broker: MemoryBroker, write: Callable[[bytes], None], close: Callable[[], None]
    ) -> None:
        self.broker = broker
        self.session: ClientSession | None = None
        self.packets: list[mqtt5.Packet] = []
        """What the client sent, oldest first."""
        self.strangers: list[int] = []
        """Packet ids that were acknowledged and not in flight."""
        self.receive_maximum = _MAX_PACKET_ID
        self.maximum_packet_size: int | None = None
        self.is_closed = False
        self._write = write
        self._close = close
        self._rest = b""
        broker.links.append(self)

    @property
    def farewell(self) -> int | None:
        """Reason code of the client's DISCONNECT; None while there is none."""
        last = self.packets[-1] if self.packets else None
        return int(last.reason_code) if isinstance(last, mqtt5.DisconnectPacket) else None

    def count(self, kind: type) -> int:
        """How many packets of this type the client sent."""
        return sum(isinstance(packet, kind) for packet in self.packets)

    def write(self, data: bytes) -> None:
        """Send bytes, right or wrong, to the client."""
        if not self.is_closed and not self.broker.deaf:
            self._write(data)

    def send_message(
        self, message: Message, packet_id: int | None, *, duplicate: bool = False
    ) -> bool:
        """Send PUBLISH, unless it is larger than the client takes."""
        data = mqtt5.PublishPacket(
            message.topic,
            message.payload,
            qos=mqtt5.QoS.AT_MOST_ONCE if packet_id is None else mqtt5.QoS.AT_LEAST_ONCE,
            packet_id=packet_id,
            duplicate=duplicate,
            retain=message.retain,
            user_properties=message.user_properties,
        ).write()
        if self.maximum_packet_size is not None and len(data) > self.maximum_packet_size:
            return False
        self.write(data)
        return True

    def drop(self) -> None:
        """Close the network connection."""
        if not self.is_closed:
            self.closed()
            self._close()

    def closed(self) -> None:
        """Take note that the network connection is gone."""
        self.is_closed = True
        self.broker.link_closed(self)

    def receive(self, data: bytes) -> None:
        """Take bytes of the client."""
        if self.broker.deaf or self.is_closed:
            return
        self._rest += data
        while self._rest and not self.is_closed:
            try:
                packet, size = mqtt5.read(memoryview(self._rest))
            except IndexError:
                return
            self._rest = self._rest[size:]
            if type(packet) in self.broker.dies_on:
                self.drop()
                return
            self._take(packet)

    def _take(self, packet: mqtt5.Packet) -> None:
        assert self.farewell is None, f"{packet} after DISCONNECT (MQTT-3.14.4-1)"
        self.packets.append(packet)
        if type(packet) in self.broker.silent_on:
            return
        match packet:
            case mqtt5.ConnectPacket():
                self.broker.take_connect(self, packet)
            case mqtt5.SubscribePacket():
                self.broker.take_subscribe(self, packet)
            case mqtt5.UnsubscribePacket():
                self.broker.take_unsubscribe(self, packet)
            case mqtt5.PubAckPacket():
                self.broker.take_ack(self, packet)
            case mqtt5.PublishPacket() if self.broker.takes_publishes:
                self.broker.take_publish(self, packet)
            case mqtt5.PingReqPacket():
                self.write(mqtt5.PingRespPacket().write())
            case mqtt5.DisconnectPacket():
                assert not self._rest, "bytes after DISCONNECT (MQTT-3.14.4-1)"
                if self.session is not None and packet.session_expiry_interval is not None:
                    self.session.expiry_seconds = packet.session_expiry_interval
                self.drop()
            case _:
                raise AssertionError(f"a consumer has no business with {packet}")


def split_share(pattern: str) -> tuple[str | None, str]:
    """Return the group (None: not shared) and the topic filter inside."""
    if not pattern.startswith(_SHARE):
        return None, pattern
    group, _, inner = pattern[len(_SHARE) :].partition("/")
    return group, inner


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic filter matches a topic name (MQTT 5 §4.7)."""
    wanted, given = pattern.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in {"+", "#"}:
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(given) or level not in {"+", given[index]}:
            return False
    return len(wanted) == len(given)


# -------------------------------------------------------------------- on a real socket


class Server:
    """The broker on a loopback port."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.errors: list[BaseException] = []
        """What the client did that no client may do."""
        self.port = 0
        self.resets: list[Exception] = []
        """Connections that ended by a reset: what was under way may have been lost."""
        self.segment_bytes = 0
        """Send so many bytes at a time, each in a segment of its own; 0: as they come."""
        self._tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._transports: set[asyncio.Transport] = set()

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """Listen, on the same port as before if there was one."""
        self._tls = tls or self._tls
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _ServerProtocol(self), "127.0.0.1", self.port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
            for transport in list(self._transports):
                transport.abort()
            await self._server.wait_closed()
            while self._transports:  # noqa: ASYNC110 - a turn of the loop or two
                await asyncio.sleep(0)
            self._server = None


class _ServerProtocol(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server
        self._waiting: deque[bytes] = deque()
        self._sender: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._server._transports.add(self._transport)
        self._link = Link(self._server.broker, self._write, self._close)

    def data_received(self, data: bytes) -> None:
        try:
            self._link.receive(data)
        except AssertionError as error:
            self._server.errors.append(error)

    def eof_received(self) -> bool:
        broker = self._server.broker
        return broker.deaf or mqtt5.DisconnectPacket in broker.silent_on  # stays half-open

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._server.resets.append(exc)
        self._server._transports.discard(self._transport)
        if self._sender is not None:
            self._sender.cancel()
        self._link.closed()

    def _write(self, data: bytes) -> None:
        size = self._server.segment_bytes
        if not size:
            self._transport.write(data)
            return
        self._waiting.extend(data[at : at + size] for at in range(0, len(data), size))
        if self._sender is None:
            self._send_next()

    def _send_next(self) -> None:
        self._sender = None
        if self._waiting and not self._transport.is_closing():
            self._transport.write(self._waiting.popleft())
            self._sender = asyncio.get_running_loop().call_later(0, self._send_next)

    def _close(self) -> None:
        self._transport.close()


@asynccontextmanager
async def serve(
    broker: MemoryBroker | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """Run a broker on a free loopback port; fail when the client broke the protocol."""
    server = Server(broker or MemoryBroker())
    await server.start(tls)
    try:
        yield server
    finally:
        await server.stop()
    if server.errors:
        raise server.errors[0]
