"""Jobs: what the writers work on.

Lives here: a batch or a dead letter on its way to Cassandra, and how far it came. Pure. Rules: the
older job is the lesser, so that it goes first; what the broker will send again is no longer part of
a job. Must not come in: what is done with a job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from shadowsvc.shadow.update import Update
    from shadowsvc.store.batch import Batch
    from shadowsvc.store.deadletter import DeadLetter

__all__ = ["Job"]


class _Timer(Protocol):
    def cancel(self) -> None: ...


class Job:
    """A batch, or a dead letter with its delivery.

    A delivery is what a job is done for, the token of an update; its `done` is set too when it was
    left to the broker.
    """

    __slots__ = (
        "attempts", "batch", "delivery", "in_doubt", "lane", "letter", "number", "probing",
        "proven", "running", "timer",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        lane: int,
        batch: Batch | None,
        letter: DeadLetter | None = None,
        delivery: Any = None,
    ) -> None:
        self.number = number
        """The order in which jobs came."""
        self.lane = lane
        self.batch = batch
        self.letter = letter
        self.delivery = delivery
        self.attempts = 0
        """How many failed."""
        self.in_doubt = False
        """Whether its lane was, when it was sent."""
        self.probing = False
        """Refused alone: next comes a write that can't be refused."""
        self.proven = False
        """That succeeded: refused once more, the update is guilty."""
        self.running = False
        """Whether a writer has it."""
        self.timer: _Timer | None = None
        """Until its next attempt."""

    def __lt__(self, other: Job) -> bool:
        return self.number < other.number

    def deliveries(self) -> list[Any]:
        """What is completed when it is durable."""
        if self.batch is None:
            return [self.delivery]
        return [update.token for update in self.batch.updates()]

    def is_wanted(self) -> bool:
        """Take out what was left to the broker; False when nothing is left."""
        batch = self.batch
        if batch is None:
            return not self.delivery.done
        batch.drop(_is_done)
        return bool(batch.devices)


def _is_done(update: Update) -> bool:
    return update.token.done  # type: ignore[attr-defined,no-any-return]  # set by the pipeline
