"""What a fuzz target is: inputs made of a number, a check, the search for the smallest.

Lives here: `Target`, `Finding`, and `minimize`. Rules: an input is made of seed, target and number
alone, so that each can be made again; a check raises `Finding` for a broken promise and returns a
short word for what happened else, from a small set; what differs from input to input belongs into
the detail of a finding, never into its kind. Must not come in: processes, progress, output.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Case", "Finding", "Target", "draw_for", "finding_of", "minimize"]

_MAX_CHECKS = 2000


class Finding(AssertionError):
    """A promise that an input broke; `kind` stays the same while the input is made smaller."""

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind = kind
        self.detail = detail
        super().__init__(f"{kind}: {detail}" if detail else kind)


class Case(Protocol):
    """An input; `data` is the part that mutation and minimizing work on."""

    @property
    def data(self) -> bytes:
        """The bytes in question."""

    def with_data(self, data: bytes) -> Self:
        """Return the same input with other bytes."""

    def as_json(self) -> dict[str, Any]:
        """Return what `Target.from_json` takes."""


class Target(Protocol):
    """Makes inputs and checks them; holds no state that an input could spoil for the next."""

    name: str

    def make(self, draw: random.Random) -> Any:
        """Make an input."""

    def check(self, case: Any) -> str:
        """Return what happened in a word; raises `Finding`."""

    def from_json(self, members: dict[str, Any]) -> Any:
        """Make the input that `Case.as_json` told."""


def draw_for(seed: int, target: str, number: int) -> random.Random:
    """Return the source of chance of one input."""
    return random.Random(f"{seed} {target} {number}")


def finding_of(target: Target, case: Any) -> Finding | None:
    """Check an input; whatever leaves the check, but a wish to stop, is a finding."""
    try:
        target.check(case)
    except Finding as finding:
        return finding
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of an extension is no Exception
        return Finding(f"{type(error).__name__} came out", str(error)[:300])
    return None


def minimize(target: Target, case: Any, kind: str) -> Any:
    """Leave out bytes, in ever smaller pieces, while the finding stays of the same kind."""
    checks = 0

    def still(data: bytes) -> bool:
        nonlocal checks
        checks += 1
        found = finding_of(target, case.with_data(data))
        return found is not None and found.kind == kind

    data: bytes = case.data
    data = _without_pieces(data, still, lambda: checks < _MAX_CHECKS)
    return case.with_data(data)


def _without_pieces(
    data: bytes, still: Callable[[bytes], bool], may_go_on: Callable[[], bool]
) -> bytes:
    size = max(1, len(data) // 2)
    while True:
        at = 0
        before = len(data)
        while at < len(data) and may_go_on():
            shorter = data[:at] + data[at + size :]
            if still(shorter):
                data = shorter
            else:
                at += size
        if size == 1 and (len(data) == before or not may_go_on()):
            return data
        size = max(1, size // 2)
