"""A reconnect storm, simulated: every device loses its connection, and all want it back.

Lives here: the simulation and its policies. Pure.

The model. Load balancing by round robin makes nodes alike, so one node's share of the devices is
simulated, each device by itself. A node takes `connects_per_second`, in the order of arrival, from
a line of `places`. A device that finds no place in the line gets no answer; one whose turn has not
come after `timeout_seconds` has gone. Either way it waits as its policy says and tries again. **The
turn of one that has gone is spent all the same**: that it has gone shows when its CONNECT has been
read, or the answer is written. This is what makes a storm last: a line that is longer than the
devices' patience is served to nobody.

Rules: nothing but the seed decides chance; the policies are those of `load.backoff`, which the rig
uses, and one more, `Decorrelated`. Service times are even, and a connection that stands stays. Must
not come in: what a real broker did (`load.stage` has that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from load.errors import BadOption

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    from load.backoff import Backoff

    Floats = NDArray[np.float64]

__all__ = [
    "Decorrelated",
    "Jittered",
    "Outcome",
    "Policy",
    "Storm",
    "simulate",
]

_MOST_STEP_SECONDS: Final = 1.0
_MOST_FAILURES: Final = 64
"""From here on no policy's bounds change: ceilings are reached."""


class Policy(Protocol):
    """How long devices wait."""

    @property
    def name(self) -> str:
        """As tables call it."""
        ...

    def waits(self, failures: NDArray[np.int64], last: Floats, chance: Generator) -> Floats:
        """Draw a wait in seconds for each device.

        `failures` in a row, 1 for the loss of a connection that stood; `last` is the wait before.
        """
        ...


class Jittered:
    """A policy of `load.backoff`, for many devices at once."""

    def __init__(self, backoff: Backoff, name: str = "") -> None:
        self.name = name or backoff.name
        bounds = [backoff.bounds(failures) for failures in range(1, _MOST_FAILURES + 1)]
        self._low = np.array([low for low, _ in bounds])
        self._high = np.array([high for _, high in bounds])

    def waits(self, failures: NDArray[np.int64], last: Floats, chance: Generator) -> Floats:
        """Draw evenly between the bounds of each one's failures."""
        del last
        at = np.minimum(failures, _MOST_FAILURES) - 1
        low, high = self._low[at], self._high[at]
        return np.asarray(low + (high - low) * chance.random(len(failures)))


@dataclass(frozen=True, slots=True)
class Decorrelated:
    """Between the least and three times the last wait, at most `most_seconds`."""

    least_seconds: float = 1.0
    most_seconds: float = 60.0
    name: str = "decorrelated"

    def waits(self, failures: NDArray[np.int64], last: Floats, chance: Generator) -> Floats:
        """Draw; a first failure counts as after the least wait."""
        before = np.where(failures <= 1, self.least_seconds, last)
        high = np.maximum(self.least_seconds, 3 * before)
        drawn = self.least_seconds + (high - self.least_seconds) * chance.random(len(failures))
        return np.asarray(np.minimum(drawn, self.most_seconds))


@dataclass(frozen=True, slots=True)
class Storm:
    """What happens, and to how many.

    Raises:
        BadOption: a figure that makes no sense.
    """

    devices: int = 5_000_000
    nodes: int = 20
    connects_per_second: float = 1000.0
    """That a node takes."""
    places: float = math.inf
    """Of a node's line."""
    timeout_seconds: float = 10.0
    """After which a device gives up an attempt."""
    notice_seconds: float = 0.0
    """Within which devices notice the loss, evenly spread; 0: a closed connection, at once."""
    horizon_seconds: float = 3600.0
    """At which the simulation ends."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("devices", self.devices, 1),
            ("nodes", self.nodes, 1),
            ("places", self.places, 1),
            ("notice-seconds", self.notice_seconds, 0),
        ):
            if not value >= least:
                raise BadOption(f"--{name} {value:g}: has to be {least} or more")
        for name, value in (
            ("connects-per-second", self.connects_per_second),
            ("timeout-seconds", self.timeout_seconds),
            ("horizon-seconds", self.horizon_seconds),
        ):
            if not 0 < value < math.inf:
                raise BadOption(f"--{name} {value:g}: has to be above 0")

    @property
    def least_seconds(self) -> float:
        """In which all could be back if no turn were lost."""
        return self.devices / (self.nodes * self.connects_per_second)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it, for the whole fleet."""

    storm: Storm
    policy: str
    attempts_each_second: Floats
    """Of all devices, in each second since the loss."""
    connected_each_second: Floats
    """Share of the devices that are connected at the end of each second."""

    @property
    def attempts(self) -> float:
        """Of all devices together."""
        return float(self.attempts_each_second.sum())

    @property
    def attempts_per_device(self) -> float:
        """On average; 1 would be none in vain."""
        return self.attempts / self.storm.devices

    @property
    def wasted_share(self) -> float:
        """Of the attempts, those that brought no connection."""
        made = self.connected * self.storm.devices
        return 1.0 - made / self.attempts if self.attempts else 0.0

    @property
    def connected(self) -> float:
        """Share of the devices that are connected at the end."""
        return float(self.connected_each_second[-1])

    @property
    def peak_per_node(self) -> float:
        """Most attempts that came to one node within a second."""
        return float(self.attempts_each_second.max()) / self.storm.nodes

    def seconds_until(self, share: float) -> float | None:
        """Return when `share` of the devices were connected, or None: not within the horizon."""
        reached = np.flatnonzero(self.connected_each_second >= share - 1e-12)
        return float(reached[0] + 1) if len(reached) else None


def simulate(storm: Storm, policy: Policy) -> Outcome:
    """Return what comes of a storm in which all devices follow one policy."""
    node = _Node(storm, policy)
    # No device comes twice in a step: an attempt that fails takes at least the time-out.
    step_seconds = min(_MOST_STEP_SECONDS, storm.timeout_seconds)
    for step in range(math.ceil(storm.horizon_seconds / step_seconds)):
        if not node.step(step * step_seconds, (step + 1) * step_seconds):
            break
    return node.outcome()


class _Node:
    """One node, and the devices that it has to take."""

    def __init__(self, storm: Storm, policy: Policy) -> None:
        self._storm = storm
        self._policy = policy
        self._chance = np.random.default_rng(storm.seed)
        self._devices = max(1, round(storm.devices / storm.nodes))
        seconds = math.ceil(storm.horizon_seconds) + 1
        self._attempts = np.zeros(seconds)
        self._connected = np.zeros(seconds)
        self._free_at = 0.0
        """When the line will have been served as it is."""
        self._failures = np.ones(self._devices, dtype=np.int64)
        self._waits = policy.waits(self._failures, np.zeros(self._devices), self._chance)
        noticed = self._chance.random(self._devices) * storm.notice_seconds
        self._next = noticed + self._waits

    def step(self, since: float, until: float) -> bool:
        """Let the devices come whose time is before `until`; whether any is left."""
        due = np.flatnonzero(self._next < until)
        if len(due) == 0:
            return len(self._next) > 0
        due = due[np.argsort(self._next[due], kind="stable")]
        came = self._next[due]
        self._count(self._attempts, came)
        served = self._serve(came, since)
        taken = served <= came + self._storm.timeout_seconds
        self._count(self._connected, served[taken])
        self._fail(due[~taken], came[~taken])
        if taken.any():
            keep = np.ones(len(self._next), dtype=bool)
            keep[due[taken]] = False
            self._next, self._failures, self._waits = (
                self._next[keep],
                self._failures[keep],
                self._waits[keep],
            )
        return len(self._next) > 0

    def _serve(self, came: Floats, since: float) -> Floats:
        """Return when each one's turn is over; never, for those who found no place."""
        rate = self._storm.connects_per_second
        order = np.arange(1, len(came) + 1)
        done = np.full(len(came), math.inf)
        admitted = np.ones(len(came), dtype=bool)
        if self._storm.places < math.inf:
            # Places that have become free up to each arrival; nobody enters beyond them.
            waiting = max(0.0, (self._free_at - since) * rate)
            room = np.floor(self._storm.places - waiting + (came - since) * rate)
            entered = np.minimum.accumulate(np.minimum(room - order, 0)) + order
            admitted = np.diff(np.maximum(entered, 0), prepend=0) > 0
        if not admitted.any():
            return done
        inside = came[admitted]
        place = np.arange(len(inside))
        # First come, first served at an even pace: a turn begins when the one before it is over.
        begins = np.maximum.accumulate(np.maximum(inside, self._free_at) - place / rate)
        done[admitted] = begins + (place + 1) / rate
        self._free_at = float(done[admitted][-1])
        return done

    def _fail(self, devices: NDArray[np.int64], came: Floats) -> None:
        if len(devices) == 0:
            return
        self._failures[devices] += 1
        waits = self._policy.waits(self._failures[devices], self._waits[devices], self._chance)
        self._waits[devices] = waits
        self._next[devices] = came + self._storm.timeout_seconds + waits

    def _count(self, seconds: Floats, times: Floats) -> None:
        whole = times[times < len(seconds)].astype(np.int64)
        seconds += np.bincount(whole, minlength=len(seconds))

    def outcome(self) -> Outcome:
        """Return what was counted, for all nodes."""
        scale = self._storm.devices / self._devices
        end = math.ceil(self._storm.horizon_seconds)
        return Outcome(
            storm=self._storm,
            policy=self._policy.name,
            attempts_each_second=self._attempts[:end] * scale,
            connected_each_second=np.cumsum(self._connected[:end]) / self._devices,
        )
