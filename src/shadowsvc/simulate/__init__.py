"""Simulated devices: `shadowsvc simulate`, and the load of the demo and the tests.

Lives here: families of devices whose state changes as a real one's would (`families`), the messages
they publish (`fleet`), what Cassandra must hold afterwards (`expected`), the publishing itself
(`runner`) and what a person sees of it (`command`).

Rules: all but `runner` and `command` is pure and, under one seed, always the same. `expected`
applies the merge rules by itself, without the service's code: it is there to find that code's
mistakes.
Nothing of the service's pipeline or store may come in.
"""

from shadowsvc.simulate.expected import Difference, Expected, Row
from shadowsvc.simulate.families import FAMILIES
from shadowsvc.simulate.fleet import Fleet, Message, Shape
from shadowsvc.simulate.runner import Options, Progress, Simulation, Summary

__all__ = [
    "FAMILIES",
    "Difference",
    "Expected",
    "Fleet",
    "Message",
    "Options",
    "Progress",
    "Row",
    "Shape",
    "Simulation",
    "Summary",
]
