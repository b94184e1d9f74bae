"""The in-memory broker as the broker of a stage: for what mosquitto does not do on demand.

Lives here: `MemoryServer`, which serves it on a loop of its own, and `MemoryPublisher`, whose
messages enter it directly. Rules: everything that touches the broker runs on that loop; a message
that nobody gets counts as without a subscriber, as PUBACK 0x10 says it elsewhere. Must not come in:
how the broker behaves (`tests.memory_broker`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tests.faults.publisher import Message, Publisher
from tests.memory_broker import MemoryBroker, Server
from tests.proxied import LoopThread

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.wire import Key

__all__ = ["MemoryPublisher", "MemoryServer"]

Result = TypeVar("Result")

_NO_MATCHING_SUBSCRIBERS = 0x10


class MemoryServer:
    """The broker on a loopback port; a context manager, and a `backing.Broker` as far as needed."""

    host = "127.0.0.1"

    def __init__(self, seed: int = 0) -> None:
        self.server = Server(MemoryBroker(seed))
        self._loop = LoopThread("memory broker")

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.port

    @property
    def url(self) -> str:
        """Address for clients."""
        return f"mqtt://{self.host}:{self.port}"

    def do(self, call: Callable[[MemoryBroker], Result]) -> Result:
        """Return what `call` says, made on the broker's loop."""
        return self._loop.do(lambda: call(self.server.broker))

    def lost(self, before: set[Key]) -> set[Key]:
        """Return which of these the broker has neither in a queue nor in flight nor acked."""

        def look(broker: MemoryBroker) -> set[Key]:
            kept = list(broker.acked)
            for session in broker.sessions.values():
                kept += [*session.queue, *session.in_flight.values()]
            return before - {(message.topic, message.payload) for message in kept}

        return self.do(look)

    def __enter__(self) -> Self:
        """Listen."""
        self._loop.start()
        self._loop.wait(self.server.start())
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop; fail when a client broke the protocol."""
        self._loop.wait(self.server.stop())
        self._loop.close()
        if self.server.errors and kind is None:
            raise self.server.errors[0]


class MemoryPublisher(Publisher):
    """Publishes into a `MemoryServer`, which answers at once."""

    def __init__(self, broker: MemoryServer, prefix: str) -> None:
        super().__init__(broker, prefix)  # type: ignore[arg-type]  # only asked for its address
        self._server = broker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_gone(self, limit_seconds: float = 0) -> None:
        """Nothing is ever under way."""

    def raw(self, topic: str, payload: bytes, **more: Any) -> Message:
        says = more.pop("says", None)
        qos = more.get("qos", 1)
        message = self.make(topic, payload)
        message.qos = qos
        if says is not None:
            self._fill_in(message, says)
        self.sent.append(message)
        self.by_key[message.key] = message

        def publish(broker: MemoryBroker) -> bool:
            unrouted = broker.unrouted
            broker.publish(
                topic, payload, qos=qos, user_properties=list(more.get("properties", ()))
            )
            # Here: this thread may wake up after a fault that came after the answer.
            message.answered_at = time.time()
            return broker.unrouted == unrouted

        message.code = 0 if self._server.do(publish) else _NO_MATCHING_SUBSCRIBERS
        return message
