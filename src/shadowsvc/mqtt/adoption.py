"""Empty the session of an orphaned slot: one attempt, on a connection of its own.

Lives here: `Adoption`, which runs `mqtt.adopted` over `mqtt.transport` and decides when the session
may be ended; and `publish_marker`, over a third connection. Rules: the session is ended, and so
everything in it thrown away, only when the marker came, all that was delivered is acknowledged and
nothing came for a while; whatever else happens, cancellation too, it is left as it is (DISCONNECT
keeping the session), and another attempt gets it all. A connection that is lost under the last
DISCONNECT leaves an empty session without the share behind. Must not come in: leases, slots,
retries.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shadowsvc.errors import ConnectionLost, MqttError, MqttRefused
from shadowsvc.mqtt.adopted import AdoptedSession, Marker, Step
from shadowsvc.mqtt.transport import Endpoint, Ingest, Wire, open_wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from shadowsvc.mqtt.session import SessionOptions
    from shadowsvc.settings import Mqtt

__all__ = ["Adoption", "Emptier", "End", "Patience", "Watch", "publish_marker"]

_POLL_SECONDS = 0.02
_UNSEEN_SECONDS = 0.5


class End(enum.Enum):
    """How an adoption ended that ended well."""

    EMPTIED = "emptied"
    """All was fetched, and the broker has forgotten the session."""
    ABSENT = "absent"
    """The broker knew no such session."""


class Emptier(Ingest, Protocol):
    """What takes the messages of an adopted session."""

    @property
    def settled(self) -> bool:
        """Whether everything that came is durable and its acks have left."""

    @property
    def finished(self) -> int:
        """How many deliveries have ended, ever: what grows while there is progress."""


class Patience(NamedTuple):
    """How long things may take, in seconds."""

    quiet_seconds: float = 10.0
    """No message for so long after the marker, and the session may be ended."""
    stalled_seconds: float = 30.0
    """An answer, a message or an ack has to come within."""
    restless_seconds: float = 300.0
    """No message may come later than this after the marker."""


class Watch:
    """Decides when a session may be ended, and when to give up; times are handed in, seconds.

    Quiet is what was listened to: time for which nobody looked (a process that was stopped) does
    not count, since messages may wait unread.
    """

    def __init__(self, patience: Patience, now: float) -> None:
        self._patience = patience
        self._seen = (Step.CONNECT, 0, -1)
        self._last_look = self._last_progress = self._last_message = now
        self._marked_at: float | None = None

    def look(
        self,
        now: float,
        step: Step,
        received: int,
        finished: int,
        settled: bool,  # noqa: FBT001
    ) -> End | None:
        """Return how it ended, None while it goes on.

        Args:
            now: the time.
            step: of the session.
            received: messages so far.
            finished: deliveries that have ended so far.
            settled: whether nothing that came waits for its ack.

        Raises:
            ConnectionLost: it takes longer than patience lasts.
        """
        self._note(now, (step, received, finished))
        if step is Step.ABSENT:
            return End.ABSENT
        if step is Step.MARKED:
            if self._marked_at is None:
                self._marked_at = now
            if settled and now - self._last_message >= self._patience.quiet_seconds:
                return End.EMPTIED
            if self._last_message - self._marked_at > self._patience.restless_seconds:
                raise ConnectionLost(
                    "restless",
                    "messages go on coming although the share was given up: the session has a "
                    "subscription that these settings do not name",
                )
            if settled:
                return None  # the quiet is what is waited for
        if now - self._last_progress > self._patience.stalled_seconds:
            raise ConnectionLost(
                f"stalled_{step.value}",
                f"nothing happened for {now - self._last_progress:.1f} s in the step "
                f"{step.value!r} of an adoption",
            )
        return None

    def _note(self, now: float, seen: tuple[Step, int, int]) -> None:
        unseen = now - self._last_look
        self._last_look = now
        if unseen > _UNSEEN_SECONDS:
            self._last_progress += unseen
            self._last_message += unseen
            if self._marked_at is not None:
                self._marked_at += unseen
        if seen[1] != self._seen[1]:
            self._last_message = now
        if seen != self._seen:
            self._seen = seen
            self._last_progress = now


class Adoption:
    """One attempt at one session. Belongs to the running loop; `run` may be cancelled."""

    def __init__(
        self,
        endpoint: Endpoint,
        options: SessionOptions,
        share: Sequence[str],
        marker_topic: str,
        emptier: Emptier,
        publish: Callable[[Marker], Awaitable[None]],
        patience: Patience,
    ) -> None:
        """Make it; nothing happens before `run`.

        Args:
            endpoint: where the broker is.
            options: of the orphan's session: its client id, the usual session expiry.
            share: the topic filters to give up.
            marker_topic: where the marker is published; nobody else subscribes it.
            emptier: takes the messages.
            publish: publishes the marker from another connection; raises `MqttError`.
            patience: how long things may take.
        """
        self.endpoint = endpoint
        self.patience = patience
        self._marker = Marker(marker_topic, secrets.token_hex(16).encode())
        self._session = AdoptedSession(options, share, self._marker, emptier.publish)
        self._emptier = emptier
        self._publish = publish
        self._wire: Wire | None = None

    @property
    def step(self) -> Step:
        """How far it is."""
        return self._session.step

    def send(self, data: bytes) -> None:
        """Write acks to the connection; without one they are dropped."""
        if self._wire is not None:
            self._wire.send(data)

    async def run(self) -> End:
        """Fetch all that waits in the session and end it.

        Raises:
            MqttError: it did not come to that; the broker keeps the session.
        """
        loop = asyncio.get_running_loop()
        emptier = self._emptier
        receive_maximum = await emptier.begin_connection()
        wire = Wire(self._session, emptier, loop)
        reason = "cancelled"
        try:
            deadline = loop.time() + self.endpoint.connect_timeout_seconds
            await open_wire(self.endpoint, wire, deadline)
            self._wire = wire
            wire.start(receive_maximum, deadline)
            end = await self._until_over(wire)
            reason = end.value
            # What the broker forgets by this is empty: there is nothing to keep.
            wire.fail(ConnectionLost(reason, "the session is ended"), farewell=self._session.end())
            closed = await wire.close_gently()
            if end is End.EMPTIED and not closed:
                raise ConnectionLost(
                    "end_unconfirmed", "the broker did not confirm the end of the session"
                )
        except MqttError as error:
            reason = error.reason
            raise
        finally:
            wire.fail(ConnectionLost(reason, "leaving with the session kept"), farewell=0)
            wire.stop_timers()
            try:
                await wire.close_gently()
            finally:  # a stop that has no time left cancels this too
                self._wire = None
                emptier.disconnected(reason)
        return end

    async def _until_over(self, wire: Wire) -> End:
        """Return when the session may be ended; raise what came in between."""
        session, emptier = self._session, self._emptier
        loop = asyncio.get_running_loop()
        watch = Watch(self.patience, loop.time())
        publishing: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.wait([wire.ended], timeout=_POLL_SECONDS)
                if wire.ended.done():
                    wire.ended.result()
                if session.step is Step.PUBLISH and publishing is None:
                    publishing = asyncio.create_task(self._publish_marker(), name="marker")
                if publishing is not None and publishing.done():
                    publishing.result()
                end = watch.look(
                    loop.time(), session.step, session.received, emptier.finished, emptier.settled
                )
                if end is not None:
                    return end
        finally:
            if publishing is not None:
                publishing.cancel()
                await asyncio.gather(publishing, return_exceptions=True)

    async def _publish_marker(self) -> None:
        await self._publish(self._marker)


async def publish_marker(settings: Mqtt, marker: Marker) -> None:
    """Publish a marker from a connection of its own, within the connect time limit each.

    Raises:
        ConnectionLost: no connection, or no answer.
        MqttRefused: the broker refused it, or nobody gets it: the subscription is not there.
    """
    # Imported here: few processes ever need aiomqtt.
    from shadowsvc.mqtt.publisher import NO_MATCHING_SUBSCRIBERS, Publisher  # noqa: PLC0415

    name = f"{settings.share_group}-marker-{secrets.token_hex(4)}"
    async with Publisher(settings, client_id=name, max_in_flight=1, reconnect=False) as publisher:
        code = await publisher.publish(
            marker.topic, marker.payload, limit_seconds=settings.connect_timeout_seconds
        )
    if code == NO_MATCHING_SUBSCRIBERS:
        raise MqttRefused("marker_unrouted", f"nobody gets what is published to {marker.topic}")
