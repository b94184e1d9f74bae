"""Plan batches: which updates are written together.

Lives here: the window in which updates of one device meet and updates of one replica set share a
batch. Pure. Rules: a batch holds devices of one replica set, at most `max_partitions` of them and
about `max_bytes`; all updates of one device in a batch are written as one; arrival order is kept
between batches. A batch that the store refused is planned again by `halves`, from the original
updates, until the culprit stands alone. Must not come in: drivers, timers, acks.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shadowsvc.shadow.update import Update

__all__ = ["Batch", "Batcher", "halves"]


class Batch:
    """Updates of one replica set, for one request: device → its updates, in arrival order."""

    __slots__ = ("devices", "group", "size_bytes")

    def __init__(self, group: int = 0) -> None:
        self.group = group
        self.devices: dict[str, list[Update]] = {}
        self.size_bytes = 0

    def updates(self) -> list[Update]:
        """Every update of the batch."""
        return [update for updates in self.devices.values() for update in updates]

    def drop(self, doomed: Callable[[Update], bool]) -> list[Update]:
        """Take out the updates for which `doomed` says so; return them."""
        dropped: list[Update] = []
        for device, updates in list(self.devices.items()):
            kept: list[Update] = []
            for update in updates:
                (dropped if doomed(update) else kept).append(update)
            if not kept:
                del self.devices[device]
            elif len(kept) < len(updates):
                self.devices[device] = kept
        self.size_bytes -= sum(update.size_bytes for update in dropped)
        return dropped

    def __len__(self) -> int:
        return sum(map(len, self.devices.values()))


class Batcher:
    """Collects updates into open batches, one a replica set, and seals them when full."""

    def __init__(
        self, group: Callable[[str], int] | None, max_partitions: int = 10, max_bytes: int = 5120
    ) -> None:
        """Make it; `group` maps a device to the number of its replica set.

        None stands for a ring where every device has the same one, and spares the look-up.
        """
        self.group = group
        self.max_partitions = max_partitions
        self.max_bytes = max_bytes
        self.ready: deque[Batch] = deque()
        """Sealed batches, oldest first."""
        self._open: dict[int, Batch] = {}

    def limit(self, max_partitions: int, max_bytes: int) -> None:
        """Have other bounds from now on; what was sealed before stays as it is."""
        self.max_partitions = max_partitions
        self.max_bytes = max_bytes

    @property
    def is_open(self) -> bool:
        """Whether an update waits in a batch that is not sealed."""
        return bool(self._open)

    def add(self, update: Update) -> None:
        """Put an update into the open batch of its replica set."""
        group = 0 if self.group is None else self.group(update.device)
        batch = self._open.get(group)
        size = update.size_bytes
        if batch is None:
            batch = self._open[group] = Batch(group)
        elif batch.size_bytes + size > self.max_bytes:
            self.ready.append(batch)
            batch = self._open[group] = Batch(group)
        batch.size_bytes += size
        devices = batch.devices
        same = devices.get(update.device)
        if same is not None:
            same.append(update)
        else:
            devices[update.device] = [update]
            if len(devices) >= self.max_partitions:
                self.ready.append(batch)
                del self._open[group]

    def seal(self, keep: Callable[[int], bool] | None = None) -> None:
        """Close every open batch: what is in it waits no longer. Groups that `keep` says stay."""
        if keep is None:
            self.ready.extend(self._open.values())
            self._open.clear()
            return
        for group in [group for group in self._open if not keep(group)]:
            self.ready.append(self._open.pop(group))

    def batches(self) -> Iterator[Batch]:
        """Every batch that waits, sealed or open."""
        yield from self.ready
        yield from self._open.values()

    def drop(self, doomed: Callable[[Update], bool]) -> list[Update]:
        """Take out the updates for which `doomed` says so, wherever they wait; return them."""
        dropped: list[Update] = []
        for batch in self.batches():
            dropped += batch.drop(doomed)
        self.ready = deque(batch for batch in self.ready if batch.devices)
        self._open = {group: batch for group, batch in self._open.items() if batch.devices}
        return dropped


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """Split a refused batch in two, by devices and then by updates; None when one is left."""
    updates = batch.updates()
    if len(updates) <= 1:
        return None
    if len(batch.devices) > 1:
        devices = list(batch.devices)
        first_devices = set(devices[: len(devices) // 2])
        cut = [update for update in updates if update.device in first_devices]
        rest = [update for update in updates if update.device not in first_devices]
    else:
        cut, rest = updates[: len(updates) // 2], updates[len(updates) // 2 :]
    return _batch_of(cut, batch.group), _batch_of(rest, batch.group)


def _batch_of(updates: list[Update], group: int) -> Batch:
    batch = Batch(group)
    for update in updates:
        batch.devices.setdefault(update.device, []).append(update)
        batch.size_bytes += update.size_bytes
    return batch
