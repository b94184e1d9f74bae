"""What Cassandra must hold after the acknowledged messages, and how what it holds differs.

Lives here: the merge rules in their plainest form, one message after another, and the comparison
with rows read back. Rules: a leaf's later write wins; a delete takes the leaf and everything below
it that is not later than itself; whatever the order in which messages are applied, the rows are the
same. Written without the service's own merge, on purpose. Two messages of a device never share a
time, so Cassandra's tie rules stay out of it. Must not come in: I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shadowsvc.simulate.fleet import Message

__all__ = ["Difference", "Expected", "Leaf", "Row"]


class Leaf(NamedTuple):
    """Where a value stands; the key of a row below its device."""

    shadow: str
    section: str
    path: str


class Row(NamedTuple):
    """A row as read back; a deleted or absent value is no row."""

    shadow: str
    section: str
    path: str
    value: str
    """JSON text."""
    time_us: int
    """`WRITETIME(value)`."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not in Cassandra as it must be."""

    kind: str
    """`missing`: an acknowledged message has no effect; `wrong`: a row that must not be so."""
    device: str
    leaf: Leaf | None
    """None: the device's `updated_at`."""
    time_us: int
    """Of the message that is missing, or of the wrong row."""
    detail: str


class _Device:
    __slots__ = ("deleted", "heard_us", "values")

    def __init__(self) -> None:
        self.heard_us = 0
        self.values: dict[Leaf, tuple[int, bytes]] = {}
        self.deleted: dict[Leaf, int] = {}

    def rows(self) -> Iterator[tuple[Leaf, int, bytes]]:
        for leaf, (time_us, value) in self.values.items():
            if time_us > self._deleted_us(leaf):
                yield leaf, time_us, value

    def _deleted_us(self, leaf: Leaf) -> int:
        """Latest delete of the leaf, of anything above it, or of its section."""
        shadow, section, path = leaf
        latest = self.deleted.get(leaf, -1)
        while path:
            path = path[: path.rindex("/")]
            latest = max(latest, self.deleted.get(Leaf(shadow, section, path), -1))
        return latest


class Expected:
    """The shadows that must be there. Holds about a kilobyte for every three leaves."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        self._uncertain: set[str] = set()
        self.dead_letters: set[bytes] = set()
        """SHA-256 of every payload that must be a dead letter."""

    @property
    def devices(self) -> list[str]:
        """Devices with at least one acknowledged update."""
        return list(self._devices)

    @property
    def uncertain(self) -> frozenset[str]:
        """Devices of which a message may or may not have arrived; they are not compared."""
        return frozenset(self._uncertain)

    def apply(self, message: Message) -> None:
        """Take an acknowledged message; once or more often, in any order."""
        if message.bad:
            self.dead_letters.add(message.sha256())
            return
        known = self._devices.get(message.device)
        if known is None:
            known = self._devices[message.device] = _Device()
        time_us = message.time_us
        known.heard_us = max(known.heard_us, time_us)
        for section, content in message.state.items():
            for path, value in _leaves(content):
                leaf = Leaf(message.shadow, section, path)
                if value is None:
                    known.deleted[leaf] = max(known.deleted.get(leaf, -1), time_us)
                elif time_us > known.values.get(leaf, (-1, b""))[0]:
                    known.values[leaf] = (time_us, _canonical(value))

    def doubt(self, message: Message) -> None:
        """Take a message of which nobody knows whether the broker has it."""
        if not message.bad:
            self._uncertain.add(message.device)

    def leaves(self) -> int:
        """Rows that must be there."""
        return sum(1 for device in self._devices.values() for _ in device.rows())

    def compare(self, device: str, rows: Iterable[Row], heard_us: int | None) -> list[Difference]:
        """Return how what was read differs from what must be there.

        Args:
            device: the partition.
            rows: its rows.
            heard_us: `WRITETIME(updated_at)`, None when it is not set.
        """
        known = self._devices.get(device) or _Device()
        found = {Leaf(row.shadow, row.section, row.path): row for row in rows}
        differences: list[Difference] = []
        for leaf, time_us, value in known.rows():
            row = found.pop(leaf, None)
            if row is None or row.time_us < time_us:
                what = "no row" if row is None else f"the row is of {row.time_us}"
                differences.append(Difference("missing", device, leaf, time_us, what))
            elif row.time_us > time_us:
                detail = f"expected time {time_us}"
                differences.append(Difference("wrong", device, leaf, row.time_us, detail))
            elif _canonical(orjson.loads(row.value)) != value:
                detail = f"{row.value}, expected {value.decode()}"
                differences.append(Difference("wrong", device, leaf, time_us, detail))
        for leaf, row in found.items():
            detail = "no such row expected"
            differences.append(Difference("wrong", device, leaf, row.time_us, detail))
        if (heard_us or 0) < known.heard_us:
            detail = f"updated_at is of {heard_us}"
            differences.append(Difference("missing", device, None, known.heard_us, detail))
        elif (heard_us or 0) > known.heard_us:
            detail = f"updated_at is later than {known.heard_us}"
            differences.append(Difference("wrong", device, None, heard_us or 0, detail))
        return differences


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (JSON Pointer, value) of what a patch says; an empty object says nothing."""
    if not isinstance(content, dict):
        yield path, content
        return
    for key, value in content.items():
        # RFC 6901 §3: ~ first, so that the ~ of ~1 is not escaped again.
        yield from _leaves(value, f"{path}/{key.replace('~', '~0').replace('/', '~1')}")


def _canonical(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
