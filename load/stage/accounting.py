"""What processes and the kernel use, out of `/proc`.

Lives here: readings of one process, of a kind (several processes), of the machine, and the
difference of two. Rules: memory of a process is PSS, so that pages that processes share count once;
CPU is user and system time of all threads, dead children not counted; the kernel's own memory for
sockets is in no process and is read for the whole machine: the buffers' pages (`sockstat`) and the
slab. A process that has ended is left out, never zero in a mean. Must not come in: which kinds
there are, what is done with the figures.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["KindUse", "MachineUse", "Reading", "machine_use", "process_use", "reading"]

_PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_KIB = 1024


@dataclass(frozen=True, slots=True)
class KindUse:
    """What one or more processes of a kind use at a moment."""

    processes: int
    pss_bytes: int
    cpu_seconds: float
    """Since each was started."""
    descriptors: int
    most_descriptors: int
    """Of the process that has the most."""


@dataclass(frozen=True, slots=True)
class MachineUse:
    """What the whole machine uses at a moment."""

    available_bytes: int
    """What programs could still have (`MemAvailable`)."""
    slab_bytes: int
    """The kernel's objects: sockets, files, poll entries, connection tracking."""
    socket_buffer_bytes: int
    """Pages of TCP's buffers, of all sockets."""
    tcp_sockets: int
    """In use or waiting to be closed, `TIME_WAIT` not counted."""
    time_wait: int
    busy_seconds: float
    """CPU of all processors since the start of the machine, waiting not counted."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything at one moment."""

    at: float
    """`time.monotonic`, seconds."""
    kinds: Mapping[str, KindUse]
    machine: MachineUse

    def cpu_share(self, earlier: Reading) -> dict[str, float]:
        """Return the CPU of each kind since `earlier`, in processors (1 is one whole core).

        A process that came or went in between spoils its kind: the share is then 0 at least.
        """
        seconds = self.at - earlier.at
        return {
            kind: max(0.0, use.cpu_seconds - earlier.kinds[kind].cpu_seconds) / seconds
            for kind, use in self.kinds.items()
            if kind in earlier.kinds
        }

    def busy_share(self, earlier: Reading) -> float:
        """Return how many processors were busy since `earlier`, whoever used them."""
        return (self.machine.busy_seconds - earlier.machine.busy_seconds) / (self.at - earlier.at)


def reading(kinds: Mapping[str, Iterable[int]]) -> Reading:
    """Read everything: `kinds` are process ids by kind."""
    return Reading(
        at=time.monotonic(),
        kinds={kind: process_use(pids) for kind, pids in kinds.items()},
        machine=machine_use(),
    )


def process_use(pids: Iterable[int]) -> KindUse:
    """Add up what these processes use; those that have ended are left out."""
    count = pss = descriptors = most = 0
    cpu = 0.0
    for pid in pids:
        folder = _PROC / str(pid)
        try:
            own_pss = _pss_bytes(folder)
            own_cpu = _cpu_seconds((folder / "stat").read_text())
            own_descriptors = _descriptors(folder / "fd")
        except (FileNotFoundError, ProcessLookupError):
            continue
        count += 1
        pss += own_pss
        cpu += own_cpu
        descriptors += own_descriptors
        most = max(most, own_descriptors)
    return KindUse(count, pss, cpu, descriptors, most)


def machine_use() -> MachineUse:
    """Read the whole machine."""
    memory = _fields((_PROC / "meminfo").read_text())
    sockets = _sockstat((_PROC / "net" / "sockstat").read_text())
    return MachineUse(
        available_bytes=memory["MemAvailable"] * _KIB,
        slab_bytes=memory["Slab"] * _KIB,
        socket_buffer_bytes=sockets["mem"] * _PAGE_BYTES,
        tcp_sockets=sockets["alloc"],
        time_wait=sockets["tw"],
        busy_seconds=_busy_seconds((_PROC / "stat").read_text()),
    )


def _pss_bytes(folder: Path) -> int:
    try:
        return _fields((folder / "smaps_rollup").read_text())["Pss"] * _KIB
    except (PermissionError, KeyError):  # another user's, or a process that is ending
        return int((folder / "statm").read_text().split()[1]) * _PAGE_BYTES


def _cpu_seconds(text: str) -> float:
    # proc(5): the command in parentheses may hold anything, so count from the last ')'.
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def _descriptors(folder: Path) -> int:
    # Since Linux 6.2 the size of the folder is the number; a listing of 18,000 names is not cheap.
    return folder.stat().st_size or len(os.listdir(folder))  # noqa: PTH208 - Path is far slower


def _busy_seconds(text: str) -> float:
    # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; of all processors together.
    ticks = [int(field) for field in text.split(maxsplit=9)[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / _TICKS_PER_SECOND


def _fields(text: str) -> dict[str, int]:
    """Read lines such as `Pss:  12 kB`, in kB."""
    found = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        words = value.split()
        if colon and words and words[0].isdecimal():
            found[name] = int(words[0])
    return found


def _sockstat(text: str) -> dict[str, int]:
    """Read the line of TCP: `TCP: inuse 28 orphan 0 tw 1662 alloc 35 mem 1714`."""
    for line in text.splitlines():
        if line.startswith("TCP:"):
            words = line.split()[1:]
            return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    return dict.fromkeys(("inuse", "orphan", "tw", "alloc", "mem"), 0)
