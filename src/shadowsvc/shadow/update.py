"""The model of an update: what one message says of one shadow.

Lives here: `Update` and `Mutations`, plain data that decode makes, merge joins and the store
writes. Rules: paths are JSON Pointers (RFC 6901), never `""` for a leaf; values are JSON text as
UTF-8 bytes; times are microseconds since 1970, UTC. Must not come in: behaviour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["SECTIONS", "Mutations", "Update"]

SECTIONS = ("reported", "desired")
"""The sections of a shadow."""


class Update:
    """One decoded message: leaves set and leaves or sections deleted, all at one time.

    Leaves lie in two lists side by side, those of `reported` before those of `desired`: held
    updates are many, and a tuple for each leaf would be most of what they weigh.
    """

    __slots__ = (
        "deletes",
        "desired_from",
        "device",
        "paths",
        "shadow",
        "size_bytes",
        "time_us",
        "token",
        "values",
    )

    def __init__(
        self,
        device: str,
        shadow: str,
        time_us: int,
        paths: list[str],
        values: list[bytes],
        desired_from: int,
        deletes: list[tuple[str, str]],
        size_bytes: int,
    ) -> None:
        """Make an update.

        `values[i]` is the JSON text of the leaf `paths[i]`; those from `desired_from` on belong to
        `desired`. `deletes` holds (section, path) where the path `""` stands for the whole
        section; `size_bytes` is what the update weighs in a batch.
        """
        self.device = device
        self.shadow = shadow
        self.time_us = time_us
        self.paths = paths
        self.values = values
        self.desired_from = desired_from
        self.deletes = deletes
        self.size_bytes = size_bytes
        self.token: object = None
        """Whatever the owner needs back when the update is durable (the delivery)."""

    @classmethod
    def of(
        cls,
        device: str,
        shadow: str,
        time_us: int,
        writes: Iterable[tuple[str, str, bytes]],
        deletes: Iterable[tuple[str, str]],
        size_bytes: int,
    ) -> Self:
        """Make an update of `writes`, (section, path, JSON text) in any order."""
        ordered = sorted(writes, key=lambda write: SECTIONS.index(write[0]))
        return cls(
            device,
            shadow,
            time_us,
            [path for _, path, _ in ordered],
            [value for _, _, value in ordered],
            sum(section == "reported" for section, _, _ in ordered),
            list(deletes),
            size_bytes,
        )

    @property
    def writes(self) -> list[tuple[str, str, bytes]]:
        """Leaves set: (section, path, JSON text)."""
        reported, desired = SECTIONS
        return [
            (reported if index < self.desired_from else desired, path, value)
            for index, (path, value) in enumerate(zip(self.paths, self.values, strict=True))
        ]

    @property
    def is_usual(self) -> bool:
        """Whether it does nothing but set reported leaves of the unnamed shadow, as most do."""
        return (
            not self.shadow
            and not self.deletes
            and self.desired_from == len(self.paths)
            and self.desired_from > 0
        )

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
