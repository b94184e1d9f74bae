"""How large a batch may be by the nodes' own thresholds.

Lives here: the question that a node is asked for its thresholds, and what follows from the answer.
Rules: pure; what a node does not tell stands at Cassandra's own default; nothing here makes a batch
larger than is of use, whatever a cluster allows. Must not come in: connections, and what the
configuration says (`shadowsvc.settings`).

The node that takes a batch judges it: it warns above
`unlogged_batch_across_partitions_warn_threshold` and `batch_size_warn_threshold`, and refuses above
`batch_size_fail_threshold`. Since 4.0 it tells them in `system_views.settings`; 4.0 has the sizes
in KiB, with names of their own. ScyllaDB has no such table.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["DEFAULT", "MOST", "QUESTION", "BatchLimits", "limits_of"]


class BatchLimits(NamedTuple):
    """What one batch may have at most: partitions, and their size in bytes."""

    partitions: int
    size_bytes: int

    def within(self, other: BatchLimits) -> BatchLimits:
        """Return the smaller of each."""
        return BatchLimits(*map(min, self, other))


DEFAULT: Final = BatchLimits(10, 5 * 1024)
"""Cassandra's own thresholds, where nobody changed them: 10 partitions, 5 KiB."""
MOST: Final = BatchLimits(32, 64 * 1024)
"""More partitions than these save nothing that could be measured (docs/adr/0029)."""

_PARTITIONS: Final = "unlogged_batch_across_partitions_warn_threshold"
_SIZES: Final = ("batch_size_warn_threshold", "batch_size_fail_threshold")
_OLD: Final = "_in_kb"
_NAMES: Final = (_PARTITIONS, *_SIZES, *(name + _OLD for name in _SIZES))
_UNITS: Final = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_LEAST: Final = BatchLimits(1, 512)

_QUOTED: Final = ", ".join(f"'{name}'" for name in _NAMES)
QUESTION: Final = f"SELECT name, value FROM system_views.settings WHERE name IN ({_QUOTED})"  # noqa: S608 - our own names
"""The node's thresholds, as rows of a name and a text; for the node itself, not for its peers."""


def limits_of(rows: Iterable[Sequence[bytes | None]]) -> BatchLimits:
    """Return what a node allows, of its answer to `QUESTION`; never more than `MOST`."""
    told = {name: value for name, value in rows if name and value}
    partitions = _number(told.get(_PARTITIONS.encode()))
    sizes = [
        size
        for name in _SIZES
        for size in (
            _bytes(told.get(name.encode())),
            _bytes(told.get((name + _OLD).encode()), unit="KiB"),
        )
        if size is not None
    ]
    found = BatchLimits(
        DEFAULT.partitions if partitions is None else partitions,
        min(sizes, default=DEFAULT.size_bytes),
    ).within(MOST)
    return BatchLimits(*map(max, found, _LEAST))


def _number(value: bytes | None) -> int | None:
    return int(value) if value and re.fullmatch(rb"[0-9]{1,9}", value) else None


def _bytes(value: bytes | None, *, unit: str = "") -> int | None:
    """Return the bytes of `5KiB`, or of `5` and the unit that goes without saying."""
    match = re.fullmatch(rb"([0-9]{1,9})(B|KiB|MiB|GiB)?", value or b"")
    if match is None:
        return None
    said = match[2].decode() if match[2] else unit
    return int(match[1]) * _UNITS[said] if said else None
