"""What the rig's own subscriber hears, of some of the devices: publish-to-subscriber latency.

Lives here: `Watching`. Rules: the devices that are watched are spread evenly over the fleet; a
document carries the time at which it was due, and this process's clock made it, so the difference
is exact; a repeated message counts once. Must not come in: connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from load.families import sent_at_us, sequence_of
from load.sequences import Sequences

if TYPE_CHECKING:
    from load.device import Message
    from load.options import Options
    from load.statistics import Statistics

__all__ = ["Watching"]


class Watching:
    """Of one run.

    Args:
        options: of the run.
        statistics: told of what is heard.
        epoch: seconds since 1970 less monotonic seconds.
    """

    def __init__(self, options: Options, statistics: Statistics, epoch: float) -> None:
        self._seen = statistics
        self._epoch = epoch
        self._numbers: dict[str, int] = {}
        self._acknowledged: dict[int, Sequences] = {}
        self._heard: dict[int, Sequences] = {}
        self._from_us: int | None = None
        count = min(options.watch, options.connections)
        for index in range(count):
            number = options.first_number + index * options.connections // count
            client_id = options.client_id.format(number=number)
            self._numbers[options.topic.format(client_id=client_id)] = number
            self._acknowledged[number], self._heard[number] = Sequences(), Sequences()

    @property
    def topics(self) -> list[str]:
        """Topics of the watched devices."""
        return list(self._numbers)

    @property
    def unheard(self) -> int:
        """Acknowledged publishes of watched devices that were not heard."""
        return sum(
            len(acknowledged.without(self._heard[number]))
            for number, acknowledged in self._acknowledged.items()
        )

    def begin(self, now: float) -> None:
        """Expect what is published from `now` (monotonic seconds) on; the first call counts.

        What came before the subscription was granted cannot be heard.
        """
        if self._from_us is None:
            self._from_us = int((now + self._epoch) * 1e6)

    def acknowledged(self, number: int, sequence: int, time_us: int) -> None:
        """Note an acknowledged publish, of any device."""
        watched = self._acknowledged.get(number)
        if watched is not None and self._from_us is not None and time_us >= self._from_us:
            watched.add(sequence)

    def heard(self, message: Message, now: float) -> None:
        """Take a message that came at `now`, monotonic seconds."""
        number = self._numbers.get(message.topic)
        sent_us, sequence = sent_at_us(message.payload), sequence_of(message.payload)
        if number is None or sent_us is None or sequence is None:
            return
        self._seen.phase.heard += 1
        if self._heard[number].add(sequence):
            self._seen.heard(now + self._epoch - sent_us * 1e-6)
