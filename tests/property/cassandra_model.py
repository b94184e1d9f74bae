"""A model of Cassandra that is too small to be wrong: one partition of the table `shadow`.

It keeps every write and every tombstone ever made and asks, at each read, what is left of them:

- of the writes to one cell the latest counts, of those at one time the one whose bytes are larger,
  compared without sign (`Cells.resolveRegular`);
- a tombstone takes what is not later than itself (`DeletionTime.deletes`: `<=`), so at one time a
  delete wins;
- a row tombstone is of one (shadow, section, path), a range tombstone of a section, whole or
  from `first` up to but without `end` in the order of bytes; neither touches the static column;
- a row whose cells are all gone is no row: `UPDATE` leaves no row marker.

Nothing is ever forgotten or replaced, so the order in which things are done cannot show. Shared by
the tests that compare it with `merge` and with a real Cassandra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shadowsvc.shadow.pointer import below
from shadowsvc.shadow.view import RawRow, document

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from shadowsvc.shadow.update import Mutations, Update

__all__ = ["Partition", "Row"]


class Row(NamedTuple):
    """A row as `SELECT shadow, section, path, value, WRITETIME(value)` gives it."""

    shadow: str
    section: str
    path: str
    value: str
    time_us: int


class _Write(NamedTuple):
    time_us: int
    value: bytes


class _Tombstone(NamedTuple):
    """Takes the rows of a section from `first` to `last`, both included; None is no bound."""

    time_us: int
    shadow: str
    section: str
    first: bytes | None
    last: bytes | None
    end: bytes | None
    """Like `last`, but not included."""

    def covers(self, shadow: str, section: str, path: str) -> bool:
        text = path.encode()
        return (
            (self.shadow, self.section) == (shadow, section)
            and (self.first is None or self.first <= text)
            and (self.last is None or text <= self.last)
            and (self.end is None or text < self.end)
        )


class Partition:
    """The rows of one device."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str, str], list[_Write]] = {}
        self._static: list[_Write] = []
        self._tombstones: list[_Tombstone] = []

    # ---------------------------------------------------------------- statements

    def set_value(self, time_us: int, shadow: str, section: str, path: str, value: bytes) -> None:
        self._cells.setdefault((shadow, section, path), []).append(_Write(time_us, value))

    def set_updated_at(self, time_us: int) -> None:
        self._static.append(_Write(time_us, (time_us // 1000).to_bytes(8, "big", signed=True)))

    def delete_row(self, time_us: int, shadow: str, section: str, path: str) -> None:
        text = path.encode()
        self._tombstones.append(_Tombstone(time_us, shadow, section, text, text, None))

    def delete_range(self, time_us: int, shadow: str, section: str, first: str, end: str) -> None:
        self._tombstones.append(
            _Tombstone(time_us, shadow, section, first.encode(), None, end.encode())
        )

    def delete_section(self, time_us: int, shadow: str, section: str) -> None:
        self._tombstones.append(_Tombstone(time_us, shadow, section, None, None, None))

    # ---------------------------------------------------------------- reading

    def rows(self) -> list[Row]:
        """Every row that is left, in the order of the table."""
        found = []
        for key, writes in self._cells.items():
            deleted_us = max(
                (stone.time_us for stone in self._tombstones if stone.covers(*key)), default=-1
            )
            time_us, value = max(writes)
            if time_us > deleted_us:
                found.append(Row(*key, value.decode(), time_us))
        return sorted(found, key=lambda row: tuple(text.encode() for text in row[:3]))

    def updated_at(self) -> tuple[int, int] | None:
        """`updated_at` in milliseconds and its write time in microseconds; None: never set."""
        if not self._static:
            return None
        time_us, value = max(self._static)
        return int.from_bytes(value, "big", signed=True), time_us

    def document(self, shadow: str) -> dict[str, Any]:
        """The document of one shadow, as the reader makes it."""
        milliseconds, time_us = self.updated_at() or (0, 0)
        rows = [RawRow(*row[1:]) for row in self.rows() if row.shadow == shadow]
        return document(rows, version_us=time_us, updated_at_ms=milliseconds)

    # ---------------------------------------------------------------- what is written

    def write_update(self, update: Update) -> None:
        """Write one update by itself, as if nobody ever merged."""
        for section, path, value in update.writes:
            self.set_value(update.time_us, update.shadow, section, path, value)
        self._delete(
            (update.time_us, update.shadow, section, path) for section, path in update.deletes
        )
        self.set_updated_at(update.time_us)

    def write_mutations(self, mutations: Mutations) -> None:
        """Write what a merge says is to be written."""
        for time_us, value, shadow, section, path in mutations.writes:
            self.set_value(time_us, shadow, section, path, value)
        self._delete(mutations.deletes)
        self.set_updated_at(mutations.heard_us)

    def _delete(self, deletes: Iterable[tuple[int, str, str, str]]) -> None:
        for time_us, shadow, section, path in deletes:
            if path:
                self.delete_row(time_us, shadow, section, path)
                self.delete_range(time_us, shadow, section, *below(path))
            else:
                self.delete_section(time_us, shadow, section)
