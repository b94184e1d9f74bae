"""The model of an update: what one message says of one shadow.

Lives here: `Update` and `Mutations`, plain data that decode makes, merge joins and the store
writes. Rules: paths are JSON Pointers (RFC 6901), never `""` for a leaf; values are JSON text as
UTF-8 bytes; times are microseconds since 1970, UTC. Must not come in: behaviour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SECTIONS", "Mutations", "Update"]

SECTIONS = ("reported", "desired")
"""The sections of a shadow."""


class Update:
    """One decoded message: leaves set and leaves or sections deleted, all at one time."""

    __slots__ = (
        "deletes",
        "device",
        "is_usual",
        "shadow",
        "size_bytes",
        "time_us",
        "token",
        "writes",
    )

    def __init__(
        self,
        device: str,
        shadow: str,
        time_us: int,
        writes: list[tuple[str, str, bytes]],
        deletes: list[tuple[str, str]],
        size_bytes: int,
    ) -> None:
        """Make an update.

        `writes` holds (section, path, JSON text), `deletes` (section, path) where the path `""`
        stands for the whole section; `size_bytes` is what the update weighs in a batch.
        """
        self.device = device
        self.shadow = shadow
        self.time_us = time_us
        self.writes = writes
        self.deletes = deletes
        self.size_bytes = size_bytes
        self.is_usual = False
        """Whether it does nothing but set reported leaves of the unnamed shadow, as most do."""
        self.token: object = None
        """Whatever the owner needs back when the update is durable (the delivery)."""

    def __repr__(self) -> str:
        return (
            f"Update({self.device!r}, {self.shadow!r}, {self.time_us}, "
            f"{self.writes!r}, {self.deletes!r})"
        )


class Mutations:
    """What is to be written for one device, each part with its own time: a merge's result."""

    __slots__ = ("deletes", "device", "heard_us", "merged_away", "writes")

    def __init__(
        self,
        device: str,
        heard_us: int,
        writes: Sequence[tuple[int, bytes, str, str, str]],
        deletes: Sequence[tuple[int, str, str, str]],
        merged_away: int,
    ) -> None:
        """Make them.

        `writes` holds (time, JSON text, shadow, section, path), `deletes` (time, shadow, section,
        path), `heard_us` the latest time of all, `merged_away` the leaves that need no write.
        """
        self.device = device
        self.heard_us = heard_us
        self.writes = writes
        self.deletes = deletes
        self.merged_away = merged_away
