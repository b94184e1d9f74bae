"""Who publishes what, when, and what came of it: the part of the lean driver that publishes.

Lives here: `Publishing`. Rules:

- What is due in a tick is due at the tick's nominal time; devices that are up take turns. When none
  has room for one more, what is due is skipped and counted: a real device would not have it twice.
- Write times rise with every publish, so no two of a device are the same.
- What has no PUBACK when a connection ends is published again on the next one: with the same packet
  id and DUP if the broker kept the session, else anew. It is made again from its three numbers.

Must not come in: connecting, how a publish travels (`device`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from load.connection import Open, State
from load.journal import Journal
from load.replay import Replay

if TYPE_CHECKING:
    from load.connection import Connection
    from load.device import Acknowledged
    from load.fleet import Fleet
    from load.options import Options
    from load.statistics import Statistics
    from load.watching import Watching

__all__ = ["Publishing"]

_TRIES: Final = 64
_SUCCESS: Final = 0
_REFUSED: Final = 128


class Publishing:
    """Of one run.

    Args:
        options: of the run.
        statistics: told of what happens.
        fleet: who may publish.
        watching: told of acknowledged publishes of watched devices.
        epoch: seconds since 1970 less monotonic seconds.

    Raises:
        BadOption: no such family, or a file that can't be read or written.
    """

    def __init__(
        self,
        options: Options,
        statistics: Statistics,
        fleet: Fleet,
        watching: Watching,
        epoch: float,
    ) -> None:
        self.in_flight = 0
        """Publishes without an answer."""
        self._options = options
        self._seen = statistics
        self._fleet = fleet
        self._watching = watching
        self._epoch = epoch
        self._source = options.source()
        self._journal = None if options.journal is None else Journal(options)
        self._topic_head, _, self._topic_tail = options.topic.partition("{client_id}")
        self._cursor = 0
        self._credit = 0.0
        self._last_us = 0
        self._recorded_from: float | None = None

    def due(self, due: float, rate: float, seconds: float) -> None:
        """Publish what is due at `due` (monotonic): `rate` a second, in a tick of `seconds`."""
        if self._options.as_recorded:
            self._publish_recorded(due)
            return
        if not self._fleet.up and not self._seen.total("connected"):
            return  # nobody was there yet
        self._credit += rate * seconds
        count = int(self._credit)
        self._credit -= count
        for left in range(count, 0, -1):
            connection = self._next_free()
            if connection is None:
                self._seen.phase.skipped += left
                return
            self._publish(connection, due)

    def acknowledged(self, connection: Connection, event: Acknowledged) -> None:
        """Take a PUBACK."""
        packet_id, reason = event
        sent = None if connection.open is None else connection.open.pop(packet_id, None)
        if sent is None:
            return
        if not connection.open:
            connection.open = None
        self.in_flight -= 1
        if reason == _SUCCESS or (self._options.alone and reason < _REFUSED):
            self._seen.acknowledged(time.monotonic() - sent.due)
            if self._journal is not None:
                self._journal.acknowledged(connection.number, sent.sequence, sent.time_us)
            self._watching.acknowledged(connection.number, sent.sequence, sent.time_us)
        elif reason >= _REFUSED:
            self._seen.phase.refused += 1
        else:
            self._seen.phase.unrouted += 1

    def send_again(self, connection: Connection, *, resumed: bool) -> None:
        """Publish what a device that is up again has no answer to."""
        held, connection.open = connection.open or {}, {}
        for packet_id, sent in held.items():
            payload = self._source.document(connection.number, sent.sequence, sent.time_us)
            used, data = connection.device.publish(
                self._topic(connection), payload, again=packet_id if resumed else None
            )
            connection.open[used] = sent
            connection.send(data)
        self._seen.phase.sent_again += len(held)

    def close(self) -> int:
        """Note in the journal what has no answer, and return how many that are."""
        count = 0
        for connection in self._fleet.devices:
            for sent in (connection.open or {}).values():
                count += 1
                if self._journal is not None:
                    self._journal.unanswered(connection.number, sent.sequence, sent.time_us)
        if self._journal is not None:
            self._journal.close()
        return count

    def _publish_recorded(self, due: float) -> None:
        source = self._source
        if self._recorded_from is None:
            if len(self._fleet.up) < self._options.connections:
                return  # a recording begins when everybody is there
            self._recorded_from = due
        if not isinstance(source, Replay):
            return
        for device in source.due(due - self._recorded_from):
            for number in range(device, self._fleet.members, source.devices):
                connection = self._fleet.devices[number]
                if connection.state is State.UP and self._has_room(connection):
                    self._publish(connection, due)
                else:
                    self._seen.phase.skipped += 1

    def _next_free(self) -> Connection | None:
        up = self._fleet.up
        for _ in range(min(len(up), _TRIES)):
            self._cursor = (self._cursor + 1) % len(up)
            connection = up[self._cursor]
            if self._has_room(connection):
                return connection
        return None

    def _has_room(self, connection: Connection) -> bool:
        held = connection.open
        return not connection.paused and (held is None or len(held) < self._options.max_in_flight)

    def _publish(self, connection: Connection, due: float) -> None:
        sequence = connection.sequence
        connection.sequence = sequence + 1
        time_us = max(self._last_us + 1, int((due + self._epoch) * 1e6))
        self._last_us = time_us
        payload = self._source.document(connection.number, sequence, time_us)
        device = connection.device
        packet_id, data = device.publish(self._topic(connection), payload, self._options.qos)
        connection.send(data)
        self._seen.phase.published += 1
        if packet_id:
            self.in_flight += 1
            if connection.open is None:
                connection.open = {}
            connection.open[packet_id] = Open(sequence, time_us, due)

    def _topic(self, connection: Connection) -> str:
        return f"{self._topic_head}{connection.device.client_id}{self._topic_tail}"
