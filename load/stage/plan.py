"""How many processes of each kind hold so many connections. Pure.

Rules: every process stays below its limit of descriptors with a tenth to spare; a device's
connection takes one at the driver, two at HAProxy (`render.max_connections` says how many it
allows), one at the broker; when one broker is killed, the others hold all; towards one port of a
broker no source address needs more than its ports. What does not fit is refused, with the limit
that is in the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shadowsvc.ingress.render import max_connections
from shadowsvc.settings import Ingress

__all__ = ["DoesNotFit", "Plan", "fitting", "plan"]

_SPARE = 0.9
PORTS_OF_AN_ADDRESS = 28_232
"""Outgoing ports of one address towards one address and port, as Linux comes: 32768 to 60999."""
BYTES_A_CONNECTION = 60_000
"""What a connection may take on this machine, all kinds and the kernel together: twice of what
2,000 were seen to take."""


class DoesNotFit(Exception):
    """The wish is beyond a limit; the message names it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Numbers of processes, and how many connections one of each kind has when all are spread."""

    connections: int
    brokers: int
    ingresses: int
    drivers: int
    descriptors: int
    """A process's limit that was planned with."""

    @property
    def a_broker(self) -> int:
        """Connections of one broker."""
        return math.ceil(self.connections / self.brokers)

    @property
    def a_broker_after_a_kill(self) -> int:
        """Connections of one broker when another is gone."""
        return math.ceil(self.connections / max(1, self.brokers - 1))

    @property
    def an_ingress(self) -> int:
        """Connections of one HAProxy."""
        return math.ceil(self.connections / self.ingresses)

    @property
    def a_driver(self) -> int:
        """Connections of one driver."""
        return math.ceil(self.connections / self.drivers)


def plan(
    connections: int,
    descriptors: int,
    *,
    brokers: int = 0,
    ingresses: int = 0,
    drivers: int = 0,
    spare_brokers: int = 1,
) -> Plan:
    """Return how many processes it takes; a number that is given is kept if it suffices.

    Args:
        connections: of devices, 1 or more.
        descriptors: what one process may open.
        brokers: 0: as many as it takes.
        ingresses: 0: as many as it takes.
        drivers: 0: as many as it takes, at least two from 5,000 connections on.
        spare_brokers: so many may be killed, and the others hold all.

    Raises:
        DoesNotFit: a number that was given is too small.
    """
    of_a_process = int(descriptors * _SPARE)
    of_an_ingress = max_connections(Ingress(), descriptors)
    least_brokers = math.ceil(connections / of_a_process) + spare_brokers
    # Towards each broker an ingress has one source address: no more of its connections than ports.
    least_ingresses = max(1, math.ceil(connections / min(of_an_ingress, PORTS_OF_AN_ADDRESS)))
    least_drivers = max(1, math.ceil(connections / of_a_process))
    usual_drivers = max(least_drivers, 2 if connections >= _TWO_DRIVERS_FROM else 1)
    return Plan(
        connections=connections,
        brokers=_number("brokers", brokers, least_brokers, least_brokers),
        ingresses=_number("ingresses", ingresses, least_ingresses, least_ingresses),
        drivers=_number("drivers", drivers, least_drivers, usual_drivers),
        descriptors=descriptors,
    )


def fitting(aim: int, available_bytes: int) -> int:
    """Return how many connections memory allows, at most `aim`, in whole thousands above 1,000."""
    allowed = min(aim, int(available_bytes * _SPARE) // BYTES_A_CONNECTION)
    return allowed if allowed < _THOUSAND else allowed // _THOUSAND * _THOUSAND


def _number(name: str, given: int, least: int, usual: int) -> int:
    if given and given < least:
        raise DoesNotFit(
            f"--{name} {given} is too few: {least} are needed, each below its descriptors (ulimit "
            "-n), or fewer --connections"
        )
    return given or usual


_TWO_DRIVERS_FROM = 5_000
_THOUSAND = 1_000
