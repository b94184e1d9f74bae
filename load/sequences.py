"""Which sequence numbers of a device were seen, in little space.

Lives here: `Sequences`. Rules: numbers count from 0 and mostly come in order, so what is seen is a
limit below which all are, and the few above it. Pure. Must not come in: where numbers come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Sequences"]


class Sequences:
    """A set of whole numbers from 0 up."""

    __slots__ = ("_above", "_below")

    def __init__(self) -> None:
        self._below = 0
        self._above: set[int] = set()

    def add(self, number: int) -> bool:
        """Take a number (0 or more); return whether it is new."""
        if number in self:
            return False
        if number != self._below:
            self._above.add(number)
            return True
        self._below += 1
        while self._below in self._above:
            self._above.remove(self._below)
            self._below += 1
        return True

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and (0 <= number < self._below or number in self._above)

    def __iter__(self) -> Iterator[int]:
        yield from range(self._below)
        yield from sorted(self._above)

    def __len__(self) -> int:
        return self._below + len(self._above)

    def without(self, other: Sequences) -> list[int]:
        """Return those that `other` has not, ascending."""
        start = min(self._below, other._below)
        rest = [*range(start, self._below), *sorted(self._above)]
        return [number for number in rest if number not in other]
