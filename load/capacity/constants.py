"""The measured figures of the capacity model, and where each comes from.

Lives here: reading `constants.toml`, and what happens when a figure is asked for that nobody has
measured. Rules: a figure has a value with source, date and command, or no value and the command
that will give one; a measured one names its machine, too. An assumed value is for trying things,
and is told apart for ever. Must not come in: what is done with a figure.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from load.errors import BadOption, LoadError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CONSTANTS_FILE", "Constant", "Constants", "NotMeasured", "read_constants"]

CONSTANTS_FILE: Final = Path(__file__).with_name("constants.toml")
_KEYS: Final = {
    "value",
    "unit",
    "kind",
    "source",
    "date",
    "command",
    "machine",
    "of",
    "note",
}


class NotMeasured(LoadError):
    """A figure has no value yet; `constant` says which, and what measures it."""

    def __init__(self, constant: Constant) -> None:
        super().__init__(f"{constant.name} is not measured yet: {constant.command}")
        self.constant = constant


@dataclass(frozen=True, slots=True)
class Constant:
    """One figure; the fields are those of `constants.toml`."""

    name: str
    unit: str
    kind: Literal["measured", "fact"]
    command: str
    value: float | None = None
    source: str = ""
    date: dt.date | None = None
    machine: str = ""
    of: str = ""
    """The program that was measured in another's place; empty if it is the one that is meant."""
    note: str = ""
    assumed: bool = False
    """Given by whoever runs the model, to see what would be: no claim can rest on it."""


class Constants:
    """All figures by name; remembers which assumed ones were used."""

    def __init__(self, constants: Mapping[str, Constant]) -> None:
        self._all = dict(constants)
        self._assumed_used: set[str] = set()

    def __getitem__(self, name: str) -> float:
        """Return the value of `name`.

        Raises:
            NotMeasured: nobody has measured it yet, and no value was assumed.
        """
        constant = self._all[name]
        if constant.value is None:
            raise NotMeasured(constant)
        if constant.assumed:
            self._assumed_used.add(name)
        return constant.value

    @property
    def all(self) -> tuple[Constant, ...]:
        """Every figure, in the order of the file."""
        return tuple(self._all.values())

    @property
    def assumed_used(self) -> tuple[str, ...]:
        """Names of the assumed figures that were asked for so far."""
        return tuple(sorted(self._assumed_used))

    def get(self, name: str) -> Constant:
        """Return the figure with all that is known of it."""
        return self._all[name]

    def assuming(self, values: Mapping[str, float]) -> Constants:
        """Return the same with some values assumed.

        Raises:
            BadOption: a name that is not in the file, or a value that is not above 0.
        """
        changed = dict(self._all)
        for name, value in values.items():
            if name not in changed:
                raise BadOption(
                    f"--assume {name}: there is no such figure; `scripts/capacity constants` lists "
                    "them"
                )
            if not value > 0:
                raise BadOption(f"--assume {name}={value:g}: has to be above 0")
            changed[name] = dataclasses.replace(changed[name], value=value, assumed=True)
        return Constants(changed)


def read_constants(path: Path = CONSTANTS_FILE) -> Constants:
    """Read the figures.

    Raises:
        BadOption: the file cannot be read, or a figure lacks what it must have.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadOption(f"--constants {path}: {error}") from error
    found: dict[str, Constant] = {}
    for part, figures in tables.items():
        if not isinstance(figures, dict):
            raise BadOption(f"--constants {path}: {part} has to be a table")
        for key, fields in figures.items():
            name = f"{part}.{key}"
            found[name] = _constant(path, name, fields)
    return Constants(found)


def _constant(path: Path, name: str, fields: object) -> Constant:
    where = f"--constants {path}: {name}"
    if not isinstance(fields, dict):
        raise BadOption(f"{where} has to be a table")
    fields = cast("dict[str, Any]", fields)
    if unknown := sorted(set(fields) - _KEYS):
        raise BadOption(f"{where} has unknown keys: {', '.join(unknown)}")
    constant = Constant(
        name=name,
        unit=fields.get("unit", ""),
        kind=fields.get("kind", ""),
        command=fields.get("command", ""),
        value=fields.get("value"),
        source=fields.get("source", ""),
        date=fields.get("date"),
        machine=fields.get("machine", ""),
        of=fields.get("of", ""),
        note=fields.get("note", ""),
    )
    needed = {"unit": constant.unit, "command": constant.command}
    if constant.kind not in {"measured", "fact"}:
        raise BadOption(f"{where}: kind has to be measured or fact")
    if constant.value is not None:
        if isinstance(constant.value, bool) or not isinstance(constant.value, (int, float)):
            raise BadOption(f"{where}: value has to be a number")
        if not constant.value > 0:
            raise BadOption(f"{where}: value has to be above 0")
        if not isinstance(constant.date, dt.date):
            raise BadOption(f"{where}: a value needs the date when it was measured or read")
        needed["source"] = constant.source
        if constant.kind == "measured":
            needed["machine"] = constant.machine
    if lacking := sorted(key for key, text in needed.items() if not text):
        raise BadOption(f"{where} lacks {', '.join(lacking)}")
    return constant
