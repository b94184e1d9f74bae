"""What has to be in Cassandra: publish, remember what the broker took, read back, compare.

Lives here: an independent publisher (paho), the expected rows, and the list of differences. The
rows come from the rules of merging alone (`tests.property.cassandra_model`) and from a JSON
flattener of its own; no code of the service's way of an update vouches for itself. Rules:

- An update counts as *taken* when its PUBACK said that somebody gets it (for QoS 0: when it was
  written). All of these must be in Cassandra.
- What was published without such an answer may be there or not.
- Nothing else may be there.

Must not come in: how the service is started and ended (`tests.service`).
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from cassandra.concurrent import execute_concurrent_with_args
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.property.cassandra_model import Partition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import backing

__all__ = ["Difference", "Load", "Oracle", "Sent", "select_device"]

_CONNECT_SECONDS = 10.0
_ACK_SECONDS = 30.0
_NO_MATCHING_SUBSCRIBERS = 0x10
_FIRST_FAILURE_CODE = 0x80
_MAX_SHOWN = 20


class Difference(NamedTuple):
    """One thing that is not as it must be."""

    kind: str
    """`missing`, `wrong` or `never published`"""
    device: str
    where: tuple[str, ...]
    detail: str


class Sent:
    """One published message, and what it says if it is an update."""

    __slots__ = ("code", "deletes", "device", "payload", "shadow", "time_us", "topic", "writes")

    def __init__(self, topic: str, payload: bytes) -> None:
        self.topic = topic
        self.payload = payload
        self.code: int | None = None
        """The reason code of PUBACK; None without one."""
        self.device = ""
        """Empty if it is no update."""
        self.shadow = ""
        self.time_us = 0
        self.writes: list[tuple[str, str, bytes]] = []
        self.deletes: list[tuple[str, str]] = []

    @property
    def taken(self) -> bool:
        """Whether the broker confirmed it and somebody gets it."""
        return (
            self.code is not None
            and self.code < _FIRST_FAILURE_CODE
            and self.code != _NO_MATCHING_SUBSCRIBERS
        )


class Oracle:
    """A publisher that knows what must come of it; a context manager. One thread at a time.

    Args:
        broker: where to publish.
        session: of cassandra-driver.
        keyspace: where the service writes.
        prefix: the service's topic prefix.
        window: unacknowledged publishes at most; below the 65,535 packet ids.
    """

    make = Sent
    """What a published message is remembered as."""
    patience_seconds = _ACK_SECONDS
    """How long a publish waits for room in the window."""

    def __init__(
        self, broker: backing.Broker, session: Any, keyspace: str, prefix: str, *, window: int = 500
    ) -> None:
        self.sent: list[Sent] = []
        self.prefix = prefix
        self.session = session
        self._keyspace = keyspace
        self._window = window
        self._last_us = 0
        self._pending: dict[int, Sent] = {}
        self._answers: deque[tuple[int, int]] = deque()
        self._answered = threading.Event()
        self._connected = threading.Event()
        self._broker = broker
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_inflight_messages_set(0)  # the window is ours
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda *_: self._connected.set()
        self._client.on_publish = self._on_publish

    # ---------------------------------------------------------------- publishing

    def __enter__(self) -> Self:
        """Connect."""
        url = urlsplit(self._broker.url)
        if url.username:
            self._client.username_pw_set(unquote(url.username), unquote(url.password or ""))
        self._client.connect(self._broker.host, self._broker.port, keepalive=30)
        self._client.loop_start()
        assert self._connected.wait(_CONNECT_SECONDS), "the publisher has no CONNACK"
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def time_us(self) -> int:
        """Return the time of the next update: now, and later than all before."""
        self._last_us = max(time.time_ns() // 1000, self._last_us + 1)
        return self._last_us

    def update(
        self,
        device: str,
        state: Any,
        *,
        shadow: str = "",
        time_us: int | None = None,
        more: dict[str, Any] | None = None,
        qos: int = 1,
        retain: bool = False,
        properties: Sequence[tuple[str, str]] = (),
    ) -> Sent:
        """Publish a document and expect what it says.

        Args:
            device: the name.
            state: of the document.
            shadow: a named one.
            time_us: of the update; `time_us()` when None.
            more: further members of the document, in place of `timestamp` in microseconds.
            qos: of the publish.
            retain: likewise.
            properties: user properties.
        """
        time_us = self.time_us() if time_us is None else time_us
        members = {"timestamp": time_us} if more is None else more
        payload = json.dumps({"state": state} | members, ensure_ascii=False).encode()
        return self.raw(
            self.topic(device, shadow),
            payload,
            qos=qos,
            retain=retain,
            properties=properties,
            says=(device, shadow, time_us, state),
        )

    def topic(self, device: str, shadow: str = "") -> str:
        """Return the topic of a device's shadow."""
        name = f"name/{shadow}/" if shadow else ""
        return f"{self.prefix}/{device}/shadow/{name}update"

    def raw(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        properties: Sequence[tuple[str, str]] = (),
        says: tuple[str, str, int, Any] | None = None,
    ) -> Sent:
        """Publish anything; expect nothing of it, or what `says` tells.

        `says` is device, shadow, time in microseconds and state.
        """
        sent = self.make(topic, payload)
        if says is not None:
            self._fill_in(sent, says)
        self._room()
        known: Properties | None = None
        if properties:
            known = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            known.UserProperty = list(properties)
        self.sent.append(sent)
        info = self._client.publish(topic, payload, qos, retain, known)
        self._pending[info.mid] = sent
        return sent

    def _fill_in(self, sent: Sent, says: tuple[str, str, int, Any]) -> None:
        sent.device, sent.shadow, sent.time_us, state = says
        _flatten(state, sent)

    def collect(self) -> None:
        """Take in the answers that have come."""
        while self._answers:
            mid, code = self._answers.popleft()
            sent = self._pending.pop(mid, None)
            if sent is not None:
                sent.code = code

    def wait_taken(self, limit_seconds: float = _ACK_SECONDS) -> None:
        """Wait until every publish has its answer, and see that the service gets them all."""
        self._until(lambda: not self._pending, limit_seconds)
        lost = [sent for sent in self.sent if not sent.taken]
        assert not lost, f"{len(lost)} messages have no subscriber, the first: {lost[0].topic}"

    def _room(self) -> None:
        if len(self._pending) >= self._window:
            self._until(lambda: len(self._pending) < self._window, self.patience_seconds)

    def _until(self, condition: Callable[[], bool], limit_seconds: float) -> None:
        deadline = time.monotonic() + limit_seconds
        while True:
            self._answered.clear()
            self.collect()
            if condition():
                return
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self._pending)} publishes have no answer"
            self._answered.wait(min(left, 0.5))

    def _on_publish(
        self, _client: object, _userdata: object, mid: int, reason: Any, _properties: object
    ) -> None:
        # In paho's thread, which may be quicker than the return of `publish`.
        self._answers.append((mid, reason.value))
        self._answered.set()

    # ---------------------------------------------------------------- comparing

    @property
    def taken(self) -> list[Sent]:
        """Messages of which the broker said that somebody gets them."""
        self.collect()
        return [sent for sent in self.sent if sent.taken]

    def differences(self) -> list[Difference]:
        """Read every device and return what is missing, wrong, or was never published."""
        self.collect()
        devices: dict[str, list[Sent]] = {}
        for sent in self.sent:
            if sent.device:
                devices.setdefault(sent.device, []).append(sent)
        found: list[Difference] = []
        names = list(devices)
        for name, rows in zip(names, self._rows(names), strict=True):
            found += _compare(name, devices[name], rows)
        return found

    def wait_right(self, limit_seconds: float = 30) -> None:
        """Wait until nothing is missing; fail with the differences that stay.

        What is wrong stays wrong, so only what is missing is waited for.
        """
        deadline = time.monotonic() + limit_seconds
        while True:
            found = self.differences()
            if not found:
                return
            if time.monotonic() > deadline or any(one.kind != "missing" for one in found):
                found.sort(key=lambda one: one.kind == "missing")
                shown = "\n".join(map(str, found[:_MAX_SHOWN]))
                raise AssertionError(f"{len(found)} differences:\n{shown}")
            time.sleep(0.2)

    def dead_letters(self, client_id: str) -> list[Any]:
        """Return the dead letters that a service has written, rows with named columns."""
        return list(
            self.session.execute(
                f"SELECT * FROM {self._keyspace}.dead_letter WHERE client_id = %s ALLOW FILTERING",  # noqa: S608
                (client_id,),
            )
        )

    def _rows(self, devices: list[str]) -> Iterator[list[Any]]:
        select = self.session.prepare(select_device(self._keyspace))
        results = execute_concurrent_with_args(
            self.session, select, [(device,) for device in devices], concurrency=32
        )
        for _, rows in results:
            yield list(rows)


def select_device(keyspace: str) -> str:
    """Return the statement that reads a device as `_compare` needs it."""
    return (
        "SELECT shadow, section, path, value, WRITETIME(value) AS time_us, "  # noqa: S608
        "toUnixTimestamp(updated_at) AS heard_ms, WRITETIME(updated_at) AS heard_us "
        f"FROM {keyspace}.shadow WHERE device = ?"
    )


def _compare(device: str, messages: list[Sent], rows: list[Any]) -> Iterator[Difference]:
    taken = [sent for sent in messages if sent.taken]
    certain = _partition(taken)
    expected = {(row.shadow, row.section, row.path): row for row in certain.rows()}
    possible = {
        (sent.shadow, section, path, sent.time_us, value)
        for sent in messages
        for section, path, value in sent.writes
    }
    for row in rows:
        if row.value is None:  # the static column alone
            continue
        key = (row.shadow, row.section, row.path)
        value = _canonical(row.value)
        wanted = expected.pop(key, None)
        if (*key, row.time_us, value) not in possible:
            yield Difference("never published", device, key, f"{row.value} of {row.time_us}")
        elif wanted is not None and (wanted.time_us, wanted.value.encode()) > (row.time_us, value):
            detail = f"{wanted.value} of {wanted.time_us}, there is {row.value} of {row.time_us}"
            yield Difference("missing", device, key, detail)
        elif _deleted_us(certain, key) >= row.time_us:
            yield Difference("missing", device, key, f"the delete of {row.value} {row.time_us}")
    # What the broker never confirmed it may have passed on all the same, deletes too.
    doubtful = _partition([sent for sent in messages if not sent.taken])
    for key, wanted in expected.items():
        if _deleted_us(doubtful, key) < wanted.time_us:
            detail = f"{wanted.value} of {wanted.time_us}, there is no row"
            yield Difference("missing", device, key, detail)
    last_us = max((sent.time_us for sent in taken), default=0)
    heard = (rows[0].heard_us, rows[0].heard_ms) if rows else (None, None)
    yield from _compare_heard(device, last_us, {sent.time_us for sent in messages}, heard)


def _compare_heard(
    device: str, last_us: int, possible: set[int], heard: tuple[int | None, int | None]
) -> Iterator[Difference]:
    heard_us, heard_ms = heard
    where = ("updated_at",)
    if (heard_us or 0) < last_us:
        yield Difference("missing", device, where, f"{last_us}, there is {heard_us}")
    elif heard_us and heard_us not in possible:
        yield Difference("never published", device, where, f"{heard_us}")
    elif heard_us and heard_ms != heard_us // 1000:
        yield Difference("wrong", device, where, f"{heard_ms} ms of {heard_us}")


def _partition(messages: Iterable[Sent]) -> Partition:
    partition = Partition()
    for sent in messages:
        for section, path, value in sent.writes:
            partition.set_value(sent.time_us, sent.shadow, section, path, value)
        for section, path in sent.deletes:
            if path:
                partition.delete_row(sent.time_us, sent.shadow, section, path)
                # Everything below: "0" follows "/" in the order of bytes.
                partition.delete_range(sent.time_us, sent.shadow, section, f"{path}/", f"{path}0")
            else:
                partition.delete_section(sent.time_us, sent.shadow, section)
    return partition


def _deleted_us(partition: Partition, key: tuple[str, str, str]) -> int:
    """Return the time of the latest delete that covers a row, -1 without one."""
    times = (stone.time_us for stone in partition._tombstones if stone.covers(*key))
    return max(times, default=-1)


def _flatten(state: Any, sent: Sent) -> None:
    """Fill in what a document's state says, by the words of the README and nothing else."""
    sections = dict.fromkeys(("reported", "desired")) if state is None else state
    for section, content in sections.items():
        if content is None:
            sent.deletes.append((section, ""))
            continue
        nodes: deque[tuple[str, Any]] = deque([("", content)])
        while nodes:
            path, node = nodes.popleft()
            if isinstance(node, dict):
                nodes.extend(
                    (f"{path}/{key.replace('~', '~0').replace('/', '~1')}", child)
                    for key, child in node.items()
                )
            elif node is None:
                sent.deletes.append((section, path))
            else:
                sent.writes.append((section, path, _dump(node)))


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _canonical(text: str) -> bytes:
    return _dump(json.loads(text))


class Load(threading.Thread):
    """Publishes updates, and some bad documents, until the context is left; owns the oracle.

    Every update leaves a row that no other update writes.

    Args:
        oracle: connected; nobody else may use it meanwhile.
        name: what its devices' names begin with.
        count: of devices.
        burst: updates before each pause of `pause_seconds`.
        pause_seconds: between bursts.
    """

    def __init__(
        self,
        oracle: Oracle,
        name: str,
        *,
        count: int = 50,
        burst: int = 25,
        pause_seconds: float = 0.02,
    ) -> None:
        super().__init__(name="load")
        self.oracle = oracle
        self.bad: list[Sent] = []
        self._devices = [f"{name}-{number}" for number in range(count)]
        self._burst = burst
        self._pause_seconds = pause_seconds
        self._over = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Publish; called by the thread."""
        try:
            for number in itertools.count():
                if self._over.is_set():
                    return
                device = self._devices[number % len(self._devices)]
                # A leaf of its own, so that no later update hides the loss of this one; and
                # leaves that many updates write and delete.
                state: dict[str, Any] = {f"only-{number}": number, "last": {"is": number}}
                if number % 4 == 0:
                    state["last" if number % 8 else "gone"] = None
                self.oracle.update(device, {"reported": state})
                if number % 50 == 0:
                    topic = self.oracle.topic(device)
                    self.bad.append(self.oracle.raw(topic, b"bad %d" % number))
                if number % self._burst == 0:
                    self._over.wait(self._pause_seconds)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop, and raise what went wrong."""
        self._over.set()
        self.join(_ACK_SECONDS + 5)
        assert not self.is_alive(), "the load does not end"
        if self._error is not None and kind is None:
            raise self._error
