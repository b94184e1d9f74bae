"""A pipeline with everything around it but sockets and Cassandra, for tests of one part.

Lives here: `Line`, made by `line`, and `nothing_lost`, which tests of other parts use as well.
Rules: the store is the double of `faulty_store`; everything else is the real thing; the accounts
are checked at the end. Must not come in: what a pipeline promises.
"""

from __future__ import annotations

import asyncio
import struct
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import mqtt5
import orjson

from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Metrics
from shadowsvc.pipeline import Options, Pipeline
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from tests.faulty_store import FaultyStore
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


class Line:
    """A pipeline with its surroundings."""

    def __init__(self, **more: Any) -> None:
        figures = {
            "client_id": "client",
            "linger_seconds": 0.001,
            "retry_min_seconds": 0.001,
            "retry_max_seconds": 0.004,
            "concurrency": 8,
            "min_concurrency": 8,
            "failing_after_seconds": 0,
        }
        partitions = more.pop("max_partitions", 10)
        max_bytes = more.pop("max_request_bytes", 5120)
        group: Callable[[str], int] | None = more.pop("group", None)
        options = Options(**{**figures, **more})
        self.store = FaultyStore()
        self.ledger = Ledger()
        self.metrics = Metrics()
        self.sent: list[bytes] = []
        batcher = Batcher(group or (lambda _: 0), max_partitions=partitions, max_bytes=max_bytes)
        self.pipeline = Pipeline(
            options,
            Decoder(TopicParser("things"), Limits()),
            batcher,
            self.store,
            self.ledger,
            self.metrics,
            self.sent.append,
        )
        self._number = 0

    @property
    def acks(self) -> list[int]:
        """Packet ids acknowledged, in the order in which they left."""
        ids = []
        for first, length, packet_id in struct.iter_unpack(">BBH", b"".join(self.sent)):
            assert (first, length) == (0x40, 2)
            ids.append(packet_id)
        return ids

    def deliver(
        self,
        *devices: str,
        first_id: int | None = 1,
        payload: bytes | None = None,
        duplicate: bool = False,
    ) -> None:
        """Hand over one chunk of messages, one a device; `first_id` None is QoS 0."""
        pipeline = self.pipeline
        pipeline.begin_chunk()
        for at, device in enumerate(devices):
            self._number += 1
            document = {
                "state": {"reported": {"n": self._number}},
                "timestamp": _stamp(self._number),
            }
            pipeline.publish(
                f"things/{device}/shadow/update",
                mqtt5.PublishPacket(
                    f"things/{device}/shadow/update",
                    orjson.dumps(document) if payload is None else payload,
                    qos=mqtt5.QoS.AT_MOST_ONCE if first_id is None else mqtt5.QoS.AT_LEAST_ONCE,
                    packet_id=None if first_id is None else first_id + at,
                    duplicate=duplicate,
                ),
            )
        pipeline.end_chunk()

    async def connect(self, *, session_present: bool) -> int:
        """Lose the connection, if there was one, and come back; return what was announced."""
        self.pipeline.disconnected("network")
        announced = await self.pipeline.begin_connection()
        self.pipeline.connected(session_present=session_present)
        self.pipeline.subscribed_now()
        return announced

    async def settle(self) -> None:
        """Wait until nothing is held and every ack that may leave has left."""
        await until(lambda: not self.ledger.held and not self.pipeline._acks_due)

    def check_accounts(self) -> None:
        """Nothing is forgotten."""
        check_accounts(self.ledger)


def check_accounts(ledger: Ledger) -> None:
    """Every delivery ended as exactly one thing or is still there."""
    waiting = sum(delivery.done for delivery in ledger._queue)
    assert ledger.received == (
        ledger.acknowledged
        + ledger.stale
        + ledger.abandoned
        + ledger.done_without_ack
        + ledger.held
        + waiting
    )
    assert ledger.held >= 0
    assert ledger.held_bytes >= 0
    assert ledger.last_copies >= 0
    assert ledger.held or not ledger.held_bytes


def _stamp(number: int) -> int:
    return (time.time_ns() // 1_000_000_000_000) * 1_000_000_000 + number


@contextmanager
def nothing_lost() -> Iterator[None]:
    """Fail at the end when something has reached the loop's handler of last resort."""
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
    yield
    assert lost == []


async def turns(count: int = 30) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0.001)


@asynccontextmanager
async def line(**more: Any) -> AsyncIterator[Line]:
    with nothing_lost():
        made = Line(**more)
        await made.pipeline.begin_connection()
        made.pipeline.connected(session_present=False)
        made.pipeline.subscribed_now()
        try:
            yield made
        finally:
            await made.pipeline.close()
        made.check_accounts()
