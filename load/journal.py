"""What was published and acknowledged, in a file small enough for millions: for `check`.

Lives here: the file's form. Rules: a journal keeps no documents, since a source makes them anew of
(device number, sequence, time): a line of JSON with what the source was, then a record of 16 bytes
for each publish with an answer, and for each without one at the end. Must not come in: Cassandra.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import orjson

from load.errors import BadOption
from load.families import Mix, Source
from load.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from load.options import Options

__all__ = ["Entry", "Header", "Journal", "read"]

_RECORD: Final = struct.Struct("<IIq")
_FORM: Final = 1
_BUFFER_BYTES: Final = 1 << 18
_AT_ONCE: Final = 4_096


class Entry(NamedTuple):
    """One publish."""

    number: int
    """Of the device."""
    sequence: int
    time_us: int
    """Of its leaves, microseconds since 1970."""
    acknowledged: bool
    """False: no answer, so it may be there or not."""


@dataclass(frozen=True, slots=True)
class Header:
    """What made the documents, and what the devices were called."""

    client_id: str
    """Template with `{number}`; the device's name."""
    topic: str
    families: tuple[str, ...]
    seed: int
    trail: bool
    replay: str | None

    def source(self) -> Source:
        """Return what makes the documents anew; raises BadOption."""
        if self.replay is not None:
            return Replay.load(Path(self.replay), trail=self.trail)
        return Mix(self.families, seed=self.seed, trail=self.trail)

    def device(self, number: int) -> str:
        """Return a device's name."""
        return self.client_id.format(number=number)


class Journal:
    """A journal being written; a context manager. Raises BadOption if the file can't be made."""

    def __init__(self, options: Options) -> None:
        path = options.journal
        if path is None:
            raise BadOption("--journal: no file")
        replay = None if options.replay is None else str(options.replay.resolve())
        header = {
            "form": _FORM,
            "client_id": options.client_id,
            "topic": options.topic,
            "families": options.families,
            "seed": options.seed,
            "trail": options.trail,
            "replay": replay,
        }
        try:
            self._file = path.open("wb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise BadOption(f"--journal {path}: {error.strerror}") from None
        self._file.write(orjson.dumps(header) + b"\n")

    def acknowledged(self, number: int, sequence: int, time_us: int) -> None:
        """Note a publish with PUBACK."""
        self._file.write(_RECORD.pack(number, sequence, time_us))

    def unanswered(self, number: int, sequence: int, time_us: int) -> None:
        """Note a publish without an answer at the end."""
        self._file.write(_RECORD.pack(number, sequence, -time_us))

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> tuple[Header, Iterator[Entry]]:
    """Return a journal's header and its entries, in the order of their answers.

    A record that was cut short by a killed process is left out.

    Raises:
        BadOption: it is no journal.
    """
    try:
        with path.open("rb") as file:
            head = file.readline()
        fields: dict[str, Any] = orjson.loads(head)
        form = fields.pop("form")
        if form != _FORM:  # its fields may be others
            raise BadOption(f"{path} is a journal of form {form}; this release reads form {_FORM}")
        fields["families"] = tuple(fields["families"])
        header = Header(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadOption(f"{path} is no journal of a lean run: {error}") from None
    return header, _entries(path, len(head))


def _entries(path: Path, start: int) -> Iterator[Entry]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_RECORD.size * _AT_ONCE):
            whole = len(chunk) - len(chunk) % _RECORD.size
            for number, sequence, time_us in _RECORD.iter_unpack(chunk[:whole]):
                yield Entry(number, sequence, abs(time_us), time_us > 0)
