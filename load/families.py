"""What devices publish: families of devices, each document a pure function of four numbers.

Lives here: `Family`, which turns (seed, device number, sequence number, time) into a document, and
`Mix`, several families by device number. Rules:

- The same four numbers always give the same bytes, in any process: a check makes the documents anew
  instead of keeping them.
- Content comes from the families of `shadowsvc simulate`, which change as real devices do; they are
  played once, in advance, and devices begin at different places of that play. Sequence 0 reports
  everything, as a device does that was switched on.
- Each document has the leaf `/reported/seq`, its sequence number. With a trail it has
  `/reported/trail/SEQUENCE` too, which no other document of the device writes, so that none hides
  the loss of another; it costs a row a document.
- `timestamp` (microseconds) is the last member, where `sent_at_us` finds it without a parser.

`leaves:20` is a family for measurements: exactly 20 leaves beside `seq`; `leaves:20:1000` makes the
document about 1000 bytes long. `sensor` has four leaves.

Must not come in: clocks, connections, topics.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final, Protocol

import orjson

from load.errors import BadOption
from shadowsvc.simulate.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["NAMES", "Family", "Mix", "Source", "document", "sent_at_us", "sequence_of"]

NAMES: Final = tuple(FAMILIES)
"""`speaker`, `lamp`, `thermostat` and `meter` make the usual mix; `sensor` is for plain load."""
_PLAYED: Final = 2_048
_FULLS: Final = 64
_STRIDE: Final = 7_919  # a prime: neighbours among the devices begin far from each other
_MARK: Final = b',"timestamp":'
_SEQUENCE_MARK: Final = b'{"state":{"reported":{"seq":'
_TIME_DIGITS: Final = 16  # microseconds since 1970, until the year 2286
_MAX_LEAVES: Final = 499


class Source(Protocol):
    """Where documents come from."""

    def document(self, number: int, sequence: int, now_us: int) -> bytes:
        """Return what device `number` publishes as its `sequence`-th (from 0) document.

        Args:
            number: of the device, 0 or more.
            sequence: 0 or more.
            now_us: time of the change, microseconds since 1970.
        """


class Family:
    """The documents of one kind of device.

    Args:
        name: one of `NAMES`, or `leaves:COUNT[:BYTES]`.
        seed: of all chance.
        trail: whether each document has a leaf that only it writes.

    Raises:
        BadOption: no such family.
    """

    def __init__(self, name: str, *, seed: int = 1, trail: bool = False) -> None:
        self.name = name
        self.seed = seed
        self.trail = trail
        if name.startswith("leaves:"):
            self._fulls = self._changes = _plain(name, seed)
            return
        if name not in FAMILIES:
            known = ", ".join(NAMES)
            raise BadOption(f"family {name!r}: one of {known}, or leaves:COUNT[:BYTES]")
        random = Random(f"{seed} {name}")  # noqa: S311 - repeatable chance is the purpose
        self._fulls = [_inner(FAMILIES[name](random).full(random)) for _ in range(_FULLS)]
        device = FAMILIES[name](random)
        self._changes = [_inner(device.change(random)) for _ in range(_PLAYED)]

    def document(self, number: int, sequence: int, now_us: int) -> bytes:
        """Return a document; see `Source`."""
        if sequence:
            changes = self._changes
            inner = changes[(number * _STRIDE + sequence) % len(changes)]
        else:
            inner = self._fulls[number * _STRIDE % len(self._fulls)]
        return document(inner, sequence, now_us, trail=self.trail)


class Mix:
    """Several families: device n is of the nth, over and over; a `Source`.

    Args:
        names: at least one; see `Family`.
        seed: of all chance.
        trail: as `Family` has it.

    Raises:
        BadOption: no such family, or none.
    """

    def __init__(
        self, names: Sequence[str] = NAMES[:4], *, seed: int = 1, trail: bool = False
    ) -> None:
        if not names:
            raise BadOption("at least one family of devices")
        self.families = tuple(Family(name, seed=seed, trail=trail) for name in names)

    def document(self, number: int, sequence: int, now_us: int) -> bytes:
        """Return a document; see `Source`."""
        families = self.families
        return families[number % len(families)].document(number, sequence, now_us)


def document(inner: bytes, sequence: int, now_us: int, *, trail: bool) -> bytes:
    """Return the document around `inner`, the members of `reported` (each begins with a comma)."""
    if trail:
        inner = b',"trail":{"%d":true}%b' % (sequence, inner)
    return b'{"state":{"reported":{"seq":%d%b}},"timestamp":%016d}' % (sequence, inner, now_us)


def sent_at_us(payload: bytes) -> int | None:
    """Return the time that ends one of our documents, microseconds since 1970; None: no such."""
    at = len(payload) - _TIME_DIGITS - 1
    if payload[at - len(_MARK) : at] != _MARK:
        return None
    digits = payload[at:-1]
    return int(digits) if digits.isdigit() else None


def sequence_of(payload: bytes) -> int | None:
    """Return the sequence number in one of our documents; None if there is none."""
    if not payload.startswith(_SEQUENCE_MARK):
        return None
    start = len(_SEQUENCE_MARK)
    digits = payload[start : start + 20].partition(b",")[0].partition(b"}")[0]
    return int(digits) if digits.isdigit() else None


def _inner(patch: dict[str, object]) -> bytes:
    text = orjson.dumps(patch)[1:-1]
    return b"," + text if text else b""


def _plain(name: str, seed: int) -> list[bytes]:
    """Play `leaves:COUNT[:BYTES]`."""
    try:
        count, *size = [int(one) for one in name.split(":")[1:]]
        whole_bytes = size.pop(0) if size else 0
    except (ValueError, IndexError):
        count, size, whole_bytes = 0, [0], 0
    if not 1 <= count <= _MAX_LEAVES or size:
        raise BadOption(
            f"family {name!r}: leaves:COUNT or leaves:COUNT:BYTES, COUNT 1 to {_MAX_LEAVES}"
        )
    random = Random(f"{seed} {name}")  # noqa: S311 - repeatable chance is the purpose
    return [_leaves(count, whole_bytes, random) for _ in range(_FULLS)]


def _leaves(count: int, whole_bytes: int, random: Random) -> bytes:
    names = [f"leaf-{number:03d}" for number in range(count)]
    least = len(document(_inner(dict.fromkeys(names, "")), 0, 0, trail=False))
    room, rest = divmod(max(0, whole_bytes - least), count)
    if not whole_bytes:
        return _inner({name: random.randrange(10**6) for name in names})
    sizes: Iterable[int] = (room + (number < rest) for number in range(count))
    return _inner({name: _text(size, random) for name, size in zip(names, sizes, strict=True)})


def _text(size_bytes: int, random: Random) -> str:
    return f"{random.getrandbits(4 * size_bytes):0{size_bytes}x}" if size_bytes else ""
