"""What each stage of an update's way costs: CPU microseconds an update, stage by stage.

Every stage runs over the same messages as the load generator's, in one process, without broker;
the write stage writes to the real Cassandra, in batches as large as it allows. CPU is the process's
own, the driver's threads included. Rounds are interleaved; the median and the smallest are shown.

    python -m bench.stages --cassandra 127.0.0.1:9042 --dc dc1 --keyspace KEYSPACE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import mqtt5
import uvloop

from shadowsvc.app import tame_garbage_collector
from shadowsvc.config import Settings
from shadowsvc.ledger import Ledger
from shadowsvc.mqtt.session import Session, SessionOptions, State
from shadowsvc.shadow.document import Decoder, Limits
from shadowsvc.shadow.merge import merge
from shadowsvc.shadow.topic import TopicParser
from shadowsvc.store.batch import Batcher
from shadowsvc.store.cassandra import CassandraStore
from shadowsvc.store.frames import CONSISTENCIES, BatchBody
from shadowsvc.store.topology import Replica, Snapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shadowsvc.shadow.update import Update

DEVICES = 20_000
CHUNK_BYTES = 32 * 1024


def packets(count: int, seed: int) -> list[bytes]:
    """Return PUBLISH packets of four leaves and about 100 bytes."""
    chance = random.Random(seed)
    now_ms = time.time_ns() // 1_000_000
    made = []
    for number in range(count):
        payload = (
            b'{"state":{"reported":{"temp":%.1f,"battery":%d,"power":{"state":"on"},"volume":%d}},'
            b'"timestamp":%d}'
            % (
                chance.uniform(15, 30),
                chance.randrange(100),
                chance.randrange(30),
                now_ms + number // 20,
            )
        )
        made.append(
            mqtt5.PublishPacket(
                f"things/device-{chance.randrange(DEVICES):06d}/shadow/update",
                payload,
                qos=mqtt5.QoS.AT_LEAST_ONCE,
                packet_id=number % 65535 + 1,
            ).write()
        )
    return made


class Bench:
    """The rooms, joined by hand so that each can be timed alone, some messages at a time."""

    def __init__(self, store: CassandraStore, stream: bytes) -> None:
        self.store = store
        self.seen: list[tuple[str, mqtt5.PublishPacket]] = []
        self.updates: list[Update] = []
        self.batches: list[Any] = []
        self.mutations: list[Any] = []
        self._stream = memoryview(stream)
        ids = {name: (bytes(16), text.count("?")) for name, text in store.direct.statements.items()}
        self._body = BatchBody(ids, CONSISTENCIES["LOCAL_QUORUM"])
        self._session = Session(SessionOptions("bench", ("things/#",)), self._publish)
        self._session.state = State.LIVE
        self._decoder = Decoder(TopicParser("things"), Limits())
        self._ledger = Ledger(lambda _received, _count: None)
        self._ledger.begin_epoch()

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._stream)

    def session(self) -> None:
        """Bytes to packets."""
        self.seen = []
        used = self._session.receive(self._stream[:CHUNK_BYTES], 0.0)
        self._stream = self._stream[used:]

    def _publish(self, topic: str, packet: mqtt5.PublishPacket) -> None:
        self.seen.append((topic, packet))

    def decode(self) -> None:
        """Packets to updates."""
        decode = self._decoder.decode
        now_us = time.time_ns() // 1000
        self.updates = [
            decode(topic, packet.payload, packet.user_properties, now_us)
            for topic, packet in self.seen
        ]

    def ledger(self) -> None:
        """Deliveries in, acks out."""
        receive = self._ledger.receive
        deliveries = [receive(packet.packet_id or 0, 100, 1.0) for _, packet in self.seen]
        for at in range(0, len(deliveries), 40):
            self._ledger.complete(deliveries[at : at + 40])
            self._ledger.take_acks()

    def plan(self) -> None:
        """Updates to batches."""
        batcher = Batcher(None, *self.store.limits)
        for update in self.updates:
            batcher.add(update)
        batcher.seal()
        self.batches = list(batcher.ready)

    def merge(self) -> None:
        """Batches to mutations."""
        self.mutations = [
            [
                updates[0] if len(updates) == 1 else merge(updates)
                for updates in batch.devices.values()
            ]
            for batch in self.batches
        ]

    def encode(self) -> None:
        """Mutations to the bodies of requests, the first part of a write."""
        for mutations in self.mutations:
            self._body.encode(mutations)

    async def write(self) -> None:
        """Mutations to confirmed rows, encoding included."""
        await asyncio.gather(*map(self.store.write, self.mutations))


async def run(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Run every stage in turn, `rounds` times."""
    host, _, port = arguments.cassandra.rpartition(":")
    settings = Settings.model_validate(
        {
            "cassandra": {
                "contact_points": (host,),
                "port": int(port),
                "local_dc": arguments.dc,
                "keyspace": arguments.keyspace,
                "request_timeout_seconds": 30,
            }
        }
    )
    store = CassandraStore(settings.cassandra, dead_letter_ttl_seconds=3600)
    await store.connect()
    if not arguments.driver:
        here = Replica(host, int(port), host)
        store.follow(Snapshot.build([(0, frozenset({here}))], 1))
        async with asyncio.timeout(10):
            while not store.direct.connections:  # noqa: ASYNC110 - once, at the start
                await asyncio.sleep(0.01)
    tame_garbage_collector()  # as the service does
    stages = ("session", "decode", "ledger", "plan", "merge", "encode", "write")
    costs: dict[str, list[float]] = {stage: [] for stage in stages}
    stream = b"".join(packets(arguments.updates, arguments.seed))
    for number in range(arguments.rounds + 1):
        bench = Bench(store, stream)
        spent = dict.fromkeys(stages, 0.0)
        while bench.left:
            for stage in stages:
                spent[stage] += await _cost(getattr(bench, stage))
        if number:  # the first round warms up
            for stage in stages:
                costs[stage].append(spent[stage] / arguments.updates * 1e6)
        if sys.stderr.isatty():
            sys.stderr.write(f"\rround {number} of {arguments.rounds}")
            sys.stderr.flush()
    await store.close()
    return costs


async def _cost(stage: Callable[[], Awaitable[None] | None]) -> float:
    started = time.process_time()
    result = stage()
    if result is not None:
        await result
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cassandra", default="127.0.0.1:9042", help="host:port")
    parser.add_argument("--dc", default="dc1", help="local data centre")
    parser.add_argument("--keyspace", default="shadowsvc", help="with the schema")
    parser.add_argument("--updates", type=int, default=20_000, help="messages a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--driver", action="store_true", help="write by acsylla alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    costs = uvloop.run(run(arguments))
    if arguments.json:
        print(json.dumps(costs))
        return
    print(f"{'stage':<10}{'median':>8}{'least':>8}   CPU microseconds an update")
    total = 0.0
    for stage, values in costs.items():
        print(f"{stage:<10}{statistics.median(values):>8.2f}{min(values):>8.2f}")
        total += statistics.median(values) if stage != "encode" else 0.0
    print(f"{'sum':<10}{total:>8.2f}{'':>8}   (write includes encode)")


if __name__ == "__main__":
    main()
