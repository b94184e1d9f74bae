"""Which faults there are for a random run, and the schedule that a seed makes of them.

Lives here: `FAULTS` and `plan`. Rules:

- A schedule depends on seed and length alone; when exactly a fault meets which message depends on
  the machine, so a seed repeats the faults and not the microseconds.
- A fault has a target, and a target has one fault at a time; two targets may fail at once.

Must not come in: running it (`tests.faults.chaos`).
"""

from __future__ import annotations

import random
import signal
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import backing
from backing import Direction
from tests.proxied import away

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backing import FaultProxy
    from tests.faults.pod import Pod
    from tests.faults.stage import Stage

__all__ = ["FAULTS", "Fault", "Plan", "Step", "plan"]

_MAX_PODS = 3


class Fault(NamedTuple):
    """One kind of fault: begun, left alone for a while, ended."""

    name: str
    place: str
    """`broker`, `cassandra`, `pod`, `way to the broker` or `way to Cassandra`"""
    weight: int
    seconds: tuple[float, float]
    begin: Callable[[Stage, Pod], None]
    end: Callable[[Stage, Pod], None]


def _way(place: str, name: str, weight: int, call: Callable[[FaultProxy], object]) -> Fault:
    def proxied(pod: Pod) -> Any:
        return pod.to_broker if place == "way to the broker" else pod.to_cassandra

    return Fault(
        name,
        place,
        weight,
        (0.3, 5),
        lambda _stage, pod: proxied(pod).do(call),
        lambda _stage, pod: proxied(pod).do(_heal),
    )


def _heal(proxy: FaultProxy) -> None:
    proxy.heal()
    proxy.reset()  # a silent connection would stay silent


def _ways(place: str) -> Iterator[Fault]:
    yield _way(place, "reset", 3, lambda proxy: proxy.reset())
    yield _way(place, "away", 2, away)
    yield _way(place, "half-open", 2, lambda proxy: proxy.half_open())
    yield _way(place, "stands still", 2, lambda proxy: proxy.hold())
    yield _way(place, "to the server stands still", 2, lambda p: p.hold(Direction.TO_SERVER))
    yield _way(place, "from the server stands still", 2, lambda p: p.hold(Direction.TO_CLIENT))
    yield _way(place, "slow", 2, lambda proxy: proxy.delay(0.2))
    yield _way(place, "thin", 2, lambda proxy: proxy.limit_bandwidth(20_000))
    yield _way(place, "byte by byte", 1, lambda proxy: proxy.one_byte_at_a_time())
    for direction in Direction:
        for after in (1, 333, 5000):
            cut = partial(_cut, after=after, direction=direction)
            yield _way(place, f"cut {direction} after {after} bytes", 1, cut)


def _cut(proxy: FaultProxy, after: int, direction: Direction) -> None:
    proxy.cut_after(after, direction)


def _pod(
    name: str,
    weight: int,
    seconds: tuple[float, float],
    begin: Callable[[Pod], None],
    end: Callable[[Pod], None],
) -> Fault:
    return Fault(name, "pod", weight, seconds, lambda _, pod: begin(pod), lambda _, pod: end(pod))


def _terminate(pod: Pod) -> None:
    code = pod.service.terminate()
    assert code in (0, -signal.SIGTERM), f"SIGTERM ended {pod.name} with {code}"


def _broker(
    name: str, weight: int, seconds: tuple[float, float], end_it: Callable[[Stage], None]
) -> Fault:
    return Fault(
        name,
        "broker",
        weight,
        seconds,
        lambda stage, _: end_it(stage),
        lambda stage, _: _mosquitto(stage).start(),
    )


def _mosquitto(stage: Stage) -> backing.Mosquitto:
    return stage.broker  # type: ignore[return-value]  # `run` made it


def _cassandra(
    name: str,
    weight: int,
    seconds: tuple[float, float],
    begin: Callable[[backing.Cassandra], None],
    end: Callable[[backing.Cassandra], None],
) -> Fault:
    return Fault(
        name,
        "cassandra",
        weight,
        seconds,
        lambda stage, _: begin(stage.database),  # type: ignore[arg-type]  # `run` was given it
        lambda stage, _: end(stage.database),  # type: ignore[arg-type]
    )


FAULTS: tuple[Fault, ...] = (
    *_ways("way to the broker"),
    *_ways("way to Cassandra"),
    _pod("killed", 8, (0, 3), lambda pod: pod.service.kill(), lambda pod: pod.start()),
    _pod("SIGTERM", 6, (0, 3), _terminate, lambda pod: pod.start()),
    _pod("frozen", 4, (0.3, 6), lambda pod: pod.pause(), lambda pod: pod.resume()),
    _broker("killed", 4, (0, 4), lambda stage: stage.kill_broker()),
    _broker("restarted", 3, (0, 4), lambda stage: stage.stop_broker()),
    _broker("lost with all its sessions", 2, (0, 2), lambda stage: stage.lose_broker()),
    Fault(
        "frozen",
        "broker",
        2,
        (0.3, 5),
        lambda stage, _: _mosquitto(stage).pause(),
        lambda stage, _: _mosquitto(stage).resume(),
    ),
    _cassandra("killed", 1, (0, 1), lambda node: node.kill(), lambda node: node.start()),
    _cassandra("frozen", 4, (0.3, 5), lambda node: node.pause(), lambda node: node.resume()),
)


class Step(NamedTuple):
    """One fault of a schedule; times in seconds since its start."""

    at: float
    until: float
    fault: Fault
    pod: int

    @property
    def target(self) -> str:
        """What fails."""
        place = self.fault.place
        if place == "pod":
            return f"pod {self.pod}"
        return place if place in ("broker", "cassandra") else f"{place} of pod {self.pod}"

    def __str__(self) -> str:
        return f"{self.target}: {self.fault.name} for {self.until - self.at:.1f} s"


class Plan(NamedTuple):
    """What a seed makes."""

    pods: int
    slots: bool
    """Whether services lease their client ids, and adopt what others left, or have their own."""
    steps: list[Step]
    """By their beginning."""


def plan(seed: int, seconds: float) -> Plan:
    """Return the services of a run and what happens to them."""
    draw = random.Random(seed)
    pods = draw.randint(1, _MAX_PODS)
    slots = draw.random() < 0.5
    steps: list[Step] = []
    at = 1.0
    while at < seconds:
        fault = draw.choices(FAULTS, [fault.weight for fault in FAULTS])[0]
        step = Step(at, at + draw.uniform(*fault.seconds), fault, draw.randrange(pods))
        busy = [other for other in steps if other.until > at - 0.5]
        if step.target not in {other.target for other in busy} and len(busy) < 2:
            steps.append(step)
        at += draw.uniform(0.2, 2.5)
    return Plan(pods, slots, steps)
