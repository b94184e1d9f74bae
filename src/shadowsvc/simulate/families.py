"""Families of devices: what their state looks like and how it changes.

Lives here: one small class a family, which holds one device's state and says what changed. Rules:
a change is a patch, a document of what is new (`None` deletes); randomness comes from the caller
alone; between them the families use every kind of JSON value, nesting, arrays, deletes, keys that a
JSON Pointer escapes, and values that turn from scalar to object and back. Must not come in: topics,
times and how a patch is published.
"""

# ruff: noqa: PLR2004 - the figures are shares of what happens and ranges of what is measured

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random

__all__ = ["FAMILIES", "Family", "Patch"]

Patch = dict[str, Any]
"""The content of a section: nested objects of JSON values; None deletes."""


class Family(Protocol):
    """One device's state."""

    def full(self, random: Random) -> Patch:
        """Return everything, as a device reports after it was switched on."""

    def change(self, random: Random) -> Patch:
        """Change something and return what."""

    def wish(self, random: Random) -> Patch:
        """Return what an app would desire of it."""


_TITLES: Final = (
    "So What",
    "Für Elise",
    "Clair de lune",
    "Águas de Março",
    "上を向いて歩こう",
    "😀",
)
_ROOMS: Final = ("kitchen/bar", "living room", "attic~1", "Büro")


class Speaker:
    """Plays, in groups; its track is deleted when it stops."""

    def __init__(self, random: Random) -> None:
        self._volume = random.randrange(101)
        self._playing = False

    def full(self, random: Random) -> Patch:
        """Everything."""
        return {
            "power": True,
            "volume": self._volume,
            "muted": False,
            "wifi": {"ssid": "home", "rssi_dbm": -random.randrange(30, 90)},
            "group": {random.choice(_ROOMS): {"leader": True, "delay_ms": 0}},
            "queue": [random.choice(_TITLES) for _ in range(3)],
        }

    def change(self, random: Random) -> Patch:
        """Volume, track, group or signal."""
        chance = random.random()
        if chance < 0.4:
            self._volume = min(100, max(0, self._volume + random.randrange(-10, 11)))
            return {"volume": self._volume, "muted": self._volume == 0}
        if chance < 0.7:
            self._playing = not self._playing
            if not self._playing:
                return {"track": None}
            title = random.choice(_TITLES)
            return {"track": {"title": title, "seconds": random.randrange(30, 600), "live": None}}
        if chance < 0.85:
            room = random.choice(_ROOMS)
            leaves = random.random() < 0.5
            return {"group": {room: None if leaves else {"leader": False, "delay_ms": 20}}}
        return {
            "wifi": {"rssi_dbm": -random.randrange(30, 90)},
            "queue": [random.choice(_TITLES) for _ in range(random.randrange(4))],
        }

    def wish(self, random: Random) -> Patch:
        """Another volume."""
        return {"volume": random.randrange(101), "queue": [{"id": random.randrange(9), "at": None}]}


class Lamp:
    """Its colour is a name or an object, which takes the hide rule to read."""

    def __init__(self, random: Random) -> None:
        self._on = random.random() < 0.5

    def full(self, random: Random) -> Patch:
        """Everything."""
        return {
            "on": self._on,
            "brightness": random.randrange(1, 255),
            "color": "warm white",
            "scene": {"name": "evening", "steps": [1, 2.5, "end"]},
        }

    def change(self, random: Random) -> Patch:
        """Switch, dim, colour or scene."""
        chance = random.random()
        if chance < 0.4:
            self._on = not self._on
            return {"on": self._on}
        if chance < 0.6:
            return {"brightness": random.randrange(1, 255), "on": self._on}
        if chance < 0.7:
            return {"color": random.choice(("warm white", "daylight"))}
        if chance < 0.85:
            hue = {"hue": random.randrange(360), "saturation": round(random.random(), 2)}
            return {"color": hue}
        if chance < 0.95:
            return {"scene": {"name": f"scene {random.randrange(5)}", "steps": []}}
        return {"scene": None}

    def wish(self, random: Random) -> Patch:
        """Light or not."""
        return {"on": random.random() < 0.5, "brightness": random.randrange(1, 255)}


class Thermostat:
    """Temperatures drift towards a target that apps desire."""

    def __init__(self, random: Random) -> None:
        self._celsius = random.uniform(15, 25)
        self._target = 21.0

    def full(self, random: Random) -> Patch:
        """Everything."""
        return {
            "celsius": round(self._celsius, 2),
            "humidity_percent": random.randrange(20, 80),
            "target_celsius": self._target,
            "mode": "heat",
            "valve": {"open_percent": random.randrange(101), "fault": None},
            "schedule": [{"at": "06:30", "celsius": 21.0}, {"at": "22:00", "celsius": 17.0}],
        }

    def change(self, random: Random) -> Patch:
        """Mostly the temperature, sometimes the rest."""
        self._celsius += (self._target - self._celsius) * 0.1 + random.uniform(-0.3, 0.3)
        patch: Patch = {"celsius": round(self._celsius, 2)}
        chance = random.random()
        if chance < 0.2:
            patch["valve"] = {"open_percent": random.randrange(101)}
        elif chance < 0.3:
            fault = random.choice((None, {"code": random.randrange(10), "since": "boot"}))
            patch["valve"] = {"fault": fault}
        elif chance < 0.4:
            patch["humidity_percent"] = random.randrange(20, 80)
        elif chance < 0.45:
            patch["mode"] = random.choice(("heat", "cool", "off"))
        return patch

    def wish(self, random: Random) -> Patch:
        """Another target."""
        self._target = random.randrange(34, 50) / 2
        return {"target_celsius": self._target, "boost": random.choice((None, {"minutes": 10}))}


class Meter:
    """Counts: integers beyond a double's 53 bits, and three phases."""

    def __init__(self, random: Random) -> None:
        self._pulses = 2**53 + random.randrange(10**6)

    def full(self, random: Random) -> Patch:
        """Everything."""
        phases = {f"L{number}": self._phase(random) for number in (1, 2, 3)}
        return {"obis": {"1-0:1.8.0": self._pulses}, "phase": phases, "tariff": 1}

    def change(self, random: Random) -> Patch:
        """Count, and change a phase or the tariff."""
        self._pulses += random.randrange(1, 50)
        patch: Patch = {"obis": {"1-0:1.8.0": self._pulses}}
        if random.random() < 0.5:
            patch["phase"] = {f"L{random.randrange(1, 4)}": self._phase(random)}
        elif random.random() < 0.1:
            patch["tariff"] = random.randrange(1, 4)
        return patch

    def wish(self, random: Random) -> Patch:
        """Another interval."""
        return {"interval_seconds": random.choice((1, 15, 900))}

    def _phase(self, random: Random) -> Patch:
        return {
            "volt": round(random.gauss(230, 2), 1),
            "ampere": round(random.expovariate(0.3), 3),
            "lagging": random.random() < 0.7,
        }


class Sensor:
    """Four leaves, about 100 bytes a message, all of them every time: for plain load."""

    def __init__(self, random: Random) -> None:
        self._battery = random.randrange(20, 101)

    def full(self, random: Random) -> Patch:
        """All four."""
        return {
            "t": round(random.uniform(-20, 40), 1),
            "h": random.randrange(101),
            "bat": self._battery,
            "on": random.random() < 0.5,
        }

    def change(self, random: Random) -> Patch:
        """All four."""
        return self.full(random)

    def wish(self, random: Random) -> Patch:
        """Another state."""
        return {"on": random.random() < 0.5}


FAMILIES: Final[Mapping[str, Callable[[Random], Family]]] = {
    "speaker": Speaker,
    "lamp": Lamp,
    "thermostat": Thermostat,
    "meter": Meter,
    "sensor": Sensor,
}
"""By name; the first four make the default fleet, `sensor` is for plain load."""
