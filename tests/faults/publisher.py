"""Publishers that remember what the broker promised them, and the traffic that they make.

Lives here: `Publisher`, an oracle's publisher whose messages carry the time of their PUBACK, and
`Traffic`, a thread that publishes a mix of all that devices send. Rules:

- Every good update writes a leaf that no other message writes (`only`), so that no later update
  hides the loss of this one.
- Times go back and forth by up to a minute, some messages are published twice, some have QoS 0,
  some are poison: of every kind in turn, each on a topic of its own.
- A publisher outlives its broker: what has no PUBACK is published again by paho.

Must not come in: what must be durable (`tests.faults.witness`).
"""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any

from tests.bad_documents import BAD
from tests.oracle import Oracle, Sent
from tests.waiting import wait_until

if TYPE_CHECKING:
    from typing import Self

    import backing
    from tests.faults.wire import Key

__all__ = ["Message", "Publisher", "Traffic"]

_PATIENCE_SECONDS = 300.0
_MAX_BACK_US = 60_000_000
_MESSAGES_A_GENERATION = 5000


class Message(Sent):
    """One published message, and what the broker said to it."""

    __slots__ = ("answered_at", "only", "qos", "reason")

    def __init__(self, topic: str, payload: bytes) -> None:
        super().__init__(topic, payload)
        self.answered_at: float | None = None
        """When PUBACK came, seconds since 1970."""
        self.only: str | None = None
        """The path of the leaf in `reported` that it alone writes."""
        self.qos = 1
        self.reason: str | None = None
        """Why it must become a dead letter; None for an update."""

    @property
    def key(self) -> Key:
        """How it is known on the wire."""
        return (self.topic, self.payload)


class Publisher(Oracle):
    """Publishes, and notes when each PUBACK came. One thread at a time."""

    make = Message
    patience_seconds = _PATIENCE_SECONDS
    sent: list[Message]  # type: ignore[assignment]  # made by `make`

    def __init__(self, broker: backing.Broker, prefix: str, *, window: int = 500) -> None:
        super().__init__(broker, None, "", prefix, window=window)
        self.by_key: dict[Key, Message] = {}
        """The last message of each topic and payload."""
        self._answered_at: dict[int, float] = {}

    def raw(self, topic: str, payload: bytes, **more: Any) -> Message:
        message = super().raw(topic, payload, **more)
        assert isinstance(message, Message)
        message.qos = more.get("qos", 1)
        if not message.qos:  # nobody answers it, and without a connection it is never sent
            self._pending.popitem()
        self.by_key[message.key] = message
        return message

    @property
    def unanswered(self) -> int:
        """Messages that the broker has not answered yet."""
        self.collect()
        return len(self._pending)

    def wait_gone(self, limit_seconds: float = 10) -> None:
        """Wait until it has seen that its broker is gone: then it has read every PUBACK."""
        wait_until(
            lambda: not self._client.is_connected(),
            "the publisher sees its broker go",
            limit_seconds,
        )

    def wait_answered(self, limit_seconds: float = _PATIENCE_SECONDS) -> None:
        """Wait until every publish has its answer, whatever it says."""
        self._until(lambda: not self._pending, limit_seconds)

    def collect(self) -> None:
        while self._answers:
            mid, code = self._answers.popleft()
            message = self._pending.pop(mid, None)
            at = self._answered_at.pop(mid, None)
            if isinstance(message, Message):
                message.code = code
                message.answered_at = at

    def _on_publish(
        self, _client: object, _userdata: object, mid: int, reason: Any, _properties: object
    ) -> None:
        self._answered_at[mid] = time.time()
        super()._on_publish(_client, _userdata, mid, reason, _properties)


class Traffic(threading.Thread):
    """Publishes a mix until the context is left; owns its publisher. A context manager.

    Args:
        publisher: connected, or connected soon.
        name: what its devices' names begin with.
        seed: of the mix.
        rate: messages a second, about.
        count: of devices.
        poison: share of messages that can never be an update.
        repeats: share of messages that are published a second time.
        qos_0: share of messages with QoS 0.
        max_messages: ends by itself after so many; 0: goes on.
        max_poison_bytes: leaves out the kinds of poison that are larger.
    """

    def __init__(
        self,
        publisher: Publisher,
        name: str,
        *,
        seed: int = 0,
        rate: float = 250,
        count: int = 40,
        poison: float = 0.03,
        repeats: float = 0.03,
        qos_0: float = 0.02,
        max_messages: int = 0,
        max_poison_bytes: int = 4096,
    ) -> None:
        super().__init__(name=f"traffic {name}", daemon=True)
        self.publisher = publisher
        self.published = 0
        self._name = name
        self._random = random.Random(seed)
        self._rate = rate
        self._count = count
        self._shares = (poison, repeats, qos_0)
        self._max_messages = max_messages
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._bad = 0
        self._kinds = [bad for bad in BAD.values() if len(bad.payload) <= max_poison_bytes]

    def run(self) -> None:
        """Publish; called by the thread."""
        draw = self._random
        poison, repeats, qos_0 = self._shares
        started = time.monotonic()
        last: Message | None = None
        try:
            while not self._over.is_set():
                lot = draw.random()
                if lot < poison:
                    self._publish_poison()
                elif lot < poison + repeats and last is not None:
                    self._publish_again(last)
                else:
                    sent = self._publish_update(0 if lot > 1 - qos_0 else 1)
                    last = sent if sent.qos else last
                self.published += 1
                if self.published == self._max_messages:
                    return
                ahead = self.published / self._rate - (time.monotonic() - started)
                if ahead > 0:
                    self._over.wait(ahead)
                elif ahead < -1:  # the broker was away: nobody catches up in one burst
                    started = time.monotonic() - self.published / self._rate
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error

    def stop(self) -> None:
        """Stop, and raise what went wrong."""
        self._over.set()
        self.join(_PATIENCE_SECONDS)
        assert not self.is_alive(), "the traffic does not end"
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop; raise what went wrong unless something failed already."""
        try:
            self.stop()
        except BaseException:
            if kind is None:
                raise

    def _publish_update(self, qos: int) -> Message:
        draw, publisher, number = self._random, self.publisher, self.published
        # In a long run devices change, so that none grows for ever.
        generation = number // _MESSAGES_A_GENERATION
        device = f"{self._name}-{generation}-{draw.randrange(self._count)}"
        only = f"only-{number}"
        state: dict[str, Any] = {only: number, "last": {"is": number}}
        lot = draw.randrange(16)
        if lot == 0:
            state["last"] = None
        elif lot == 1:
            state["gone"] = {"for": None}
        elif lot == 2:
            state["gone"] = {"for": {"now": number}}
        document: dict[str, Any] = {"reported": state}
        if lot == 3:
            document["desired"] = {"wish": number} if draw.random() < 0.8 else None
        time_us = publisher.time_us()
        if lot < 6:  # late, but later than nothing: its own leaf is still the only one
            time_us -= draw.randrange(_MAX_BACK_US)
        shadow = "named" if lot == 7 else ""
        sent = publisher.update(device, document, shadow=shadow, time_us=time_us, qos=qos)
        assert isinstance(sent, Message)
        sent.only = f"/{only}"
        return sent

    def _publish_again(self, earlier: Message) -> None:
        sent = self.publisher.raw(earlier.topic, earlier.payload)
        sent.device, sent.shadow, sent.time_us = earlier.device, earlier.shadow, earlier.time_us
        sent.writes, sent.deletes, sent.only = earlier.writes, earlier.deletes, earlier.only

    def _publish_poison(self) -> None:
        bad = self._kinds[self._bad % len(self._kinds)]
        self._bad += 1
        topic = bad.topic.format(
            prefix=self.publisher.prefix, device=f"{self._name}-bad-{self.published}"
        )
        sent = self.publisher.raw(topic, bad.payload, properties=bad.properties)
        sent.reason = bad.reason
