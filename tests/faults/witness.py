"""The oracle of the fault suite: what must be durable, and whether it is.

Two obligations:

a) What a service acknowledged, as the proxy saw it on the wire, is in the shadow or a dead letter.
   Always; no fault excuses it.
b) What the broker acknowledged to its publisher is there too, unless the broker itself was killed
   or restarted: then it may lose what `excuse` computes at that moment, and nothing else.

Beside these: no row that nobody published; no row that went back in time, in samples during the run
and at the end; no PUBACK before its write, looked up in Cassandra as each sampled PUBACK passes; no
dead letter of a good update.

Rules: the witness reads Cassandra by connections of its own, past every proxy; what it could not
read because Cassandra was away is counted and looked at again at the end. It gives no percentages.
Must not come in: faults, processes.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from cassandra import DriverException
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, NoHostAvailable
from cassandra.concurrent import execute_concurrent_with_args
from cassandra.policies import ConstantReconnectionPolicy, WhiteListRoundRobinPolicy

from tests.oracle import Difference, _compare, select_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from collections.abc import Set as AbstractSet
    from typing import Self

    import backing
    from tests.faults.publisher import Message, Publisher
    from tests.faults.wire import Delivery, Key, Wire

__all__ = ["Verdict", "Witness"]

_LOOK_SECONDS = 0.2
_REST_SECONDS = 0.02
_MAX_SHOWN = 15
_MAX_TOPIC_CHARS = 1024
_UNREADABLE = (DriverException, NoHostAvailable, OSError)


@dataclass
class Verdict:
    """What a run came to; counts are of published messages."""

    published: int = 0
    unanswered: int = 0
    without_subscriber: int = 0
    acknowledged_to_publisher: int = 0
    acknowledged_by_service: int = 0
    durable: int = 0
    dead_letters: int = 0
    excused: int = 0
    """Acknowledged to the publisher, and what the broker may have lost."""
    lost_by_broker: int = 0
    """Those among them that are not durable."""
    looked_up_at_once: int = 0
    """PUBACKs whose row was looked up as they passed."""
    forbidden: list[str] = field(default_factory=list)
    """What must not be; empty if every promise was kept."""

    def lines(self) -> list[str]:
        """Return the ledger for people."""
        rows = [
            ("published", self.published),
            ("acknowledged to the publisher", self.acknowledged_to_publisher),
            ("acknowledged by the service", self.acknowledged_by_service),
            ("durable", self.durable),
            ("  of these as a dead letter", self.dead_letters),
            ("without an answer", self.unanswered),
            ("without a subscriber", self.without_subscriber),
            ("what the broker may have lost", self.excused),
            ("  of these lost", self.lost_by_broker),
            ("acks looked up at once", self.looked_up_at_once),
            ("forbidden", len(self.forbidden)),
        ]
        width = max(len(name) for name, _ in rows)
        shown = self.forbidden[:_MAX_SHOWN]
        return [*(f"{name:<{width}}  {count:>9,}" for name, count in rows), *shown]


class Witness:
    """Watches one run; a context manager.

    Args:
        database: read directly.
        keyspace: of the services.
        prefix: topic prefix of the run; dead letters of other topics are not looked at.
        seed: of the samples.
    """

    def __init__(
        self, database: backing.Database, keyspace: str, prefix: str, *, seed: int = 0
    ) -> None:
        self.publishers: list[Publisher] = []
        self.wires: list[Wire] = []
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        """`looked up`, `not readable`, `sampled rows`."""
        self.letters_allowed: set[str] = set()
        """Reasons for which a good update may be a dead letter."""
        self.excuses: list[_Excuse] = []
        self._database = database
        self._keyspace = keyspace
        self._prefix = prefix
        self._random = random.Random(seed)
        self._acks: SimpleQueue[Delivery] = SimpleQueue()
        self._over = threading.Event()
        self._latest: dict[tuple[str, ...], int] = {}
        self._threads = [
            threading.Thread(target=self._look_up_acks, name="witness of acks", daemon=True),
            threading.Thread(target=self._look_back, name="witness of times", daemon=True),
        ]

    def __enter__(self) -> Self:
        """Connect and begin to watch."""
        self._cluster = _cluster(self._database)
        self.session = self._cluster.connect()
        self._rows = self.session.prepare(select_device(self._keyspace))
        self._one = self.session.prepare(
            f"SELECT WRITETIME(value) AS time_us FROM {self._keyspace}.shadow "  # noqa: S608
            "WHERE device = ? AND shadow = ? AND section = 'reported' AND path = ?"
        )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._cluster.shutdown()

    # ---------------------------------------------------------------- during the run

    def on_ack(self, delivery: Delivery) -> None:
        """Take a PUBACK that has just passed; for `Wire(on_ack=…)`."""
        self._acks.put(delivery)

    def messages(self) -> list[Message]:
        """Return every message published so far."""
        return [message for publisher in self.publishers for message in publisher.sent]

    def acked(self) -> dict[Key, float]:
        """Return when each message was first acknowledged by a service."""
        found: dict[Key, float] = {}
        for wire in self.wires:
            for key, at in wire.acked.items():
                found[key] = min(at, found.get(key, at))
        return found

    def excuse(
        self,
        fault: str,
        *,
        saved_at: float | None,
        at: float,
        handed_out: AbstractSet[Key] = frozenset(),
    ) -> None:
        """Note a fault of the broker's own, at `at`, and so what it may lose.

        That is what no service ever acknowledges, and
        - is in `handed_out`: it was handed out then, its PUBACK had not arrived, and the broker
          does not keep what is in flight, or
        - was acknowledged to its publisher after the broker last saved, `saved_at`, and before
          `at` (both seconds since 1970; `saved_at` None: it saves nothing, or its file is gone).

        A PUBACK seen before `saved_at` was sent before it: mosquitto answers nobody while it saves.
        Call it when every publisher has seen the broker go.
        """
        self.excuses.append(_Excuse(fault, saved_at, at, frozenset(handed_out)))

    def _excused(self, message: Message) -> bool:
        at = message.answered_at
        return any(
            message.key in excuse.handed_out
            or (at is not None and at <= excuse.at and (excuse.saved_at or 0) <= at)
            for excuse in self.excuses
        )

    def _required(self, message: Message, acked: dict[Key, float]) -> str | None:
        """Say why a message must be durable; None if it need not be."""
        if message.key in acked:
            return f"the service acknowledged it at {acked[message.key]:.3f}"
        if message.qos and message.taken and not self._excused(message):
            return f"the broker acknowledged it to its publisher at {message.answered_at:.3f}"
        return None

    # ---------------------------------------------------------------- at the end

    def not_durable(self, keys: Iterable[Key]) -> set[Key]:
        """Return those that are neither in the shadow nor a dead letter."""
        return set(keys) - self._present()

    def missing(self) -> int:
        """Return how many messages that must be durable are not."""
        acked = self.acked()
        present = self._present()
        return sum(
            message.key not in present and self._required(message, acked) is not None
            for message in self.messages()
        )

    def verdict(self) -> Verdict:
        """Read everything back and compare; nobody publishes any more."""
        messages, acked, present = self.messages(), self.acked(), self._present()
        verdict = Verdict(published=len(messages), looked_up_at_once=self.counts["looked up"])
        verdict.forbidden += self.violations
        for wire in self.wires:
            verdict.forbidden += wire.violations
        for message in messages:
            durable = message.key in present
            verdict.durable += durable
            verdict.dead_letters += message.reason is not None and durable
            verdict.acknowledged_by_service += message.key in acked
            verdict.unanswered += bool(message.qos) and message.code is None
            verdict.without_subscriber += message.code is not None and not message.taken
            if message.qos and message.taken:
                verdict.acknowledged_to_publisher += 1
                if message.key not in acked and self._excused(message):
                    verdict.excused += 1
                    verdict.lost_by_broker += not durable
            why = self._required(message, acked)
            if why and not durable:
                text = f"{message.topic} {message.payload[:80]!r}"
                verdict.forbidden.append(f"missing: {text}: {why}")
        verdict.forbidden += self._compare_shadows(messages, acked)
        verdict.forbidden += self._compare_letters()
        return verdict

    def _compare_shadows(self, messages: list[Message], acked: dict[Key, float]) -> list[str]:
        devices: dict[str, list[Message]] = defaultdict(list)
        for message in messages:
            if message.device:
                devices[message.device].append(message)
        found: list[Difference] = []
        names = list(devices)
        for name, rows in zip(names, self._read(names), strict=True):
            of_device = [
                _Judged(message, taken=self._required(message, acked) is not None)
                for message in devices[name]
            ]
            found += _compare(name, of_device, rows)  # type: ignore[arg-type]  # alike
            for row in rows:
                self._no_step_back(name, row)
        return [f"{one.kind}: {one.device} {'/'.join(one.where)}: {one.detail}" for one in found]

    def _compare_letters(self) -> Iterator[str]:
        known = {
            _digest(message.key): message
            for publisher in self.publishers
            for message in publisher.by_key.values()
        }
        for digest, found in self._letters().items():
            message = known.get(digest)
            if message is None:
                yield f"never published: a dead letter of {digest[0]}"
            elif wrong := found - {message.reason} - self.letters_allowed:
                yield f"wrong: a dead letter of {digest[0]} says {wrong}, not {message.reason}"

    def _present(self) -> set[Key]:
        """Return the messages that are in the shadow or a dead letter."""
        letters = self._letters()
        devices = {message.device for message in self.messages() if message.device}
        names = list(devices)
        times = {
            (name, row.shadow, row.path): row.time_us
            for name, rows in zip(names, self._read(names), strict=True)
            for row in rows
            if row.section == "reported"
        }
        found: set[Key] = set()
        for message in self.messages():
            if message.only is not None:
                time_us = times.get((message.device, message.shadow, message.only))
                if time_us is not None and time_us >= message.time_us:
                    found.add(message.key)
            if _digest(message.key) in letters:
                found.add(message.key)
        return found

    def _letters(self) -> dict[tuple[str, bytes], set[str]]:
        found: dict[tuple[str, bytes], set[str]] = defaultdict(set)
        for row in self.session.execute(
            f"SELECT topic, payload_sha256, reason FROM {self._keyspace}.dead_letter",  # noqa: S608
            timeout=30,
        ):
            if row.topic.startswith(f"{self._prefix}/"):
                found[row.topic, bytes(row.payload_sha256)].add(row.reason)
        return found

    def _read(self, devices: list[str]) -> Iterable[list[Any]]:
        results = execute_concurrent_with_args(
            self.session, self._rows, [(device,) for device in devices], concurrency=16
        )
        for _, rows in results:
            yield list(rows)

    # ---------------------------------------------------------------- threads

    def _look_up_acks(self) -> None:
        while not self._over.is_set():
            try:
                delivery = self._acks.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
            while not self._acks.empty():  # the newest tells most
                delivery = self._acks.get()
            message = self._of(delivery.key)
            if message is not None and message.only is not None:
                self._guard(self._look_up, message)
            self._over.wait(_REST_SECONDS)

    def _look_up(self, message: Message) -> None:
        rows = self.session.execute(
            self._one, (message.device, message.shadow, message.only), timeout=2
        )
        row = rows.one()
        self.counts["looked up"] += 1
        if row is None or row.time_us < message.time_us:
            text = f"{message.topic} {message.payload[:80]!r}"
            self.violations.append(f"acknowledged before it was written: {text}")

    def _of(self, key: Key) -> Message | None:
        for publisher in self.publishers:
            if key in publisher.by_key:
                return publisher.by_key[key]
        return None

    def _look_back(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            devices = sorted(
                {
                    message.device
                    for publisher in self.publishers
                    for message in publisher.sent[-500:]
                    if message.device
                }
            )
            if devices:
                self._guard(self._look_back_at, self._random.choice(devices))

    def _look_back_at(self, device: str) -> None:
        for row in self.session.execute(self._rows, (device,), timeout=2):
            self._no_step_back(device, row)

    def _no_step_back(self, device: str, row: Any) -> None:
        if row.value is None:
            return
        key = (device, row.shadow, row.section, row.path)
        before = self._latest.get(key, -1)
        self.counts["sampled rows"] += 1
        if row.time_us < before:
            self.violations.append(f"went back in time: {key} from {before} to {row.time_us}")
        else:
            self._latest[key] = row.time_us

    def _guard(self, look: Callable[[Any], None], what: object) -> None:
        try:
            look(what)
        except _UNREADABLE:
            self.counts["not readable"] += 1


class _Excuse(NamedTuple):
    """A fault of the broker's own."""

    fault: str
    saved_at: float | None
    at: float
    handed_out: AbstractSet[Key]


class _Judged:
    """A message as `_compare` takes it: `taken` says that it must be there."""

    def __init__(self, message: Message, *, taken: bool) -> None:
        self.taken = taken
        self.shadow = message.shadow
        self.time_us = message.time_us
        self.writes = message.writes
        self.deletes = message.deletes


def _digest(key: Key) -> tuple[str, bytes]:
    """Return how a dead letter names a message."""
    return key[0][:_MAX_TOPIC_CHARS], hashlib.sha256(key[1]).digest()


def _cluster(database: backing.Database) -> Cluster:
    profile = ExecutionProfile(
        load_balancing_policy=WhiteListRoundRobinPolicy(list(database.contact_points)),
        request_timeout=20,
    )
    return Cluster(
        list(database.contact_points),
        port=database.port,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        reconnection_policy=ConstantReconnectionPolicy(0.5, None),
        connect_timeout=5,
        control_connection_timeout=5,
    )
