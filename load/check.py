"""Is everything that was acknowledged in Cassandra? Reads it back, and names what is missing.

Lives here: `compare`, which makes the documents of journals anew, lets `simulate.Expected` say what
rows they must have left, and reads every device back with `scripts/lib/readback.py`, as the demo
and the soak do; and the command. Rules:

- An update is missing when a row that it must have left is absent or older. What later updates of
  the device wrote over in whole cannot be told; with a trail every update left a row of its own.
- A device with a publish that has no answer may have more than expected: it is counted apart and
  not compared.
- Devices are compared in parts, so that memory does not grow with the run.

Must not come in: any code of the service's own way to Cassandra.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson

import backing
from load.arguments import password_of
from load.console import save
from load.endpoints import Endpoint
from load.errors import BadOption, LoadError
from load.families import sequence_of
from load.journal import read
from scripts.lib.readback import settle
from shadowsvc.simulate import Expected, Message

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from load.families import Source
    from load.journal import Entry, Header
    from shadowsvc.simulate import Difference

__all__ = ["Verdict", "check", "compare"]

_ENTRIES_A_PART: Final = 200_000
_SHOWN: Final = 10


@dataclass(slots=True)
class Verdict:
    """What came of a comparison."""

    acknowledged: int = 0
    """Publishes with PUBACK."""
    unanswered: int = 0
    devices: int = 0
    not_compared: int = 0
    """Devices of which a publish has no answer."""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """Sequence numbers of updates that have no effect, by device."""
    wrong: list[str] = field(default_factory=list)
    """Rows that must not be as they are."""

    @property
    def good(self) -> bool:
        """Whether everything is there, and nothing else."""
        return not self.missing and not self.wrong

    def as_json(self) -> dict[str, Any]:
        """Return all of it for programs."""
        return {
            "good": self.good,
            "acknowledged": self.acknowledged,
            "unanswered": self.unanswered,
            "devices": self.devices,
            "not_compared": self.not_compared,
            "missing_updates": sum(map(len, self.missing.values())),
            "missing": self.missing,
            "wrong": self.wrong,
        }


def compare(session: Any, journals: Sequence[Path], *, wait_seconds: float = 0.0) -> Verdict:
    """Compare what journals say with what Cassandra holds.

    Args:
        session: of cassandra-driver, in the keyspace.
        journals: written by lean runs; of several runs with the same devices, all.
        wait_seconds: 0 or more; what is missing is looked at again until then.

    Raises:
        BadOption: a file that is no journal, or a recording that is gone.
    """
    verdict = Verdict()
    sources = [_Read(path) for path in journals]
    for one in sources:
        for entry in one.entries():
            verdict.acknowledged += entry.acknowledged
            verdict.unanswered += not entry.acknowledged
    parts = 1 + (verdict.acknowledged + verdict.unanswered) // _ENTRIES_A_PART
    deadline = time.monotonic() + wait_seconds
    for part in range(parts):
        _compare_part(session, sources, (part, parts), verdict, deadline)
    return verdict


class _Read:
    """One journal, and what makes its documents anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.header: Header
        self.header, _ = read(path)
        self.source: Source = self.header.source()

    def entries(self, part: tuple[int, int] = (0, 1)) -> Iterator[Entry]:
        which, of = part
        return (one for one in read(self._path)[1] if one.number % of == which)

    def message(self, entry: Entry) -> Message | None:
        """Return what was published; None if it was no document of ours."""
        payload = self.source.document(entry.number, entry.sequence, entry.time_us)
        if sequence_of(payload) is None:
            return None
        try:
            state = orjson.loads(payload)["state"]
        except (ValueError, TypeError, KeyError):
            return None
        device = self.header.device(entry.number)
        topic = self.header.topic.format(client_id=device)
        return Message(device, "", topic, payload, entry.time_us, state)


def _compare_part(
    session: Any,
    sources: Sequence[_Read],
    part: tuple[int, int],
    verdict: Verdict,
    deadline: float,
) -> None:
    expected = Expected()
    for one in sources:
        for entry in one.entries(part):
            message = one.message(entry)
            if message is None:
                continue
            if entry.acknowledged:
                expected.apply(message)
            else:
                expected.doubt(message)
    verdict.devices += len(expected.devices)
    verdict.not_compared += len(expected.uncertain)
    left_seconds = max(0.0, deadline - time.monotonic())
    found, _ = settle(session, expected, lambda: None, left_seconds)
    verdict.wrong += [
        f"{one.device} {one.leaf}: {one.detail}" for one in found if one.kind != "missing"
    ]
    verdict.missing |= _by_sequence(found, sources, part)


def _by_sequence(
    found: Iterable[Difference], sources: Sequence[_Read], part: tuple[int, int]
) -> dict[str, list[int]]:
    """Return the sequence numbers of the updates that are missing, by device."""
    times: defaultdict[str, set[int]] = defaultdict(set)
    for one in found:
        if one.kind == "missing":
            times[one.device].add(one.time_us)
    missing: defaultdict[str, list[int]] = defaultdict(list)
    if times:
        for source in sources:
            for entry in source.entries(part):
                device = source.header.device(entry.number)
                if entry.time_us in times.get(device, ()):
                    missing[device].append(entry.sequence)
    return dict(missing)


def check(given: argparse.Namespace) -> int:
    """Compare and tell; return the exit code: 0, or 1 if anything is missing or wrong.

    Raises:
        LoadError: Cassandra does not answer.
    """
    where = Endpoint.parse(f"mqtt://{given.cassandra}")
    user = _user(given)
    for path in given.journals:
        read(path)  # what is wrong here is told before Cassandra is asked
    try:
        with backing.connect([where.host], where.port, user=user) as session:
            session.set_keyspace(given.keyspace)
            verdict = compare(session, given.journals, wait_seconds=given.wait)
    except LoadError:
        raise
    except Exception as error:  # the driver has no one class for what can go wrong
        place = f"--cassandra {given.cassandra}, --keyspace {given.keyspace}"
        raise LoadError(f"{place}: {error}") from error
    if given.json is not None:
        save("--json", given.json, verdict.as_json())
    missing = sum(map(len, verdict.missing.values()))
    sys.stdout.write(
        f"{verdict.acknowledged:,} acknowledged publishes of {verdict.devices:,} devices: "
        f"{missing:,} missing, {len(verdict.wrong):,} rows wrong; {verdict.unanswered:,} without "
        f"an answer, {verdict.not_compared:,} devices not compared for that\n"
    )
    for device, sequences in list(verdict.missing.items())[:_SHOWN]:
        sys.stdout.write(f"  {device}: {', '.join(map(str, sequences[:_SHOWN]))}\n")
    for text in verdict.wrong[:_SHOWN]:
        sys.stdout.write(f"  {text}\n")
    return 0 if verdict.good else 1


def _user(given: argparse.Namespace) -> tuple[str, str] | None:
    if given.username is None:
        return None
    password = password_of(given.password_file)
    if password is None:
        raise BadOption("--username needs --password-file")
    return given.username, password.decode()
