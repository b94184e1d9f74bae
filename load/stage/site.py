"""Brokers on addresses of their own, and HAProxies in front of all of them.

Lives here: `Site`, which starts and ends them, kills one broker, and knows their process ids by
kind. Rules: brokers are real mosquittos that know nothing of each other, each with a WebSocket
listener; the limit of descriptors is lifted as far as it may be before anything starts, as children
inherit it; everything lies in one short temporary folder and is gone at the end. Must not come in:
devices, measuring.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from backing import Mosquitto
from load.stage.ingress import IngressNode, address_of

if TYPE_CHECKING:
    from load.stage.plan import Plan

__all__ = ["Site", "lift_descriptors"]

_BROKERS = 31
_INGRESSES = 32
_MAX_DESCRIPTORS = 1_000_000


def lift_descriptors() -> int:
    """Raise this process's limit of descriptors to the hard one, a million at most; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Site:
    """Brokers and ingress nodes of a plan; a context manager.

    Args:
        plan: how many.
        ingress: further settings of each ingress node.
    """

    def __init__(self, plan: Plan, **ingress: Any) -> None:
        self.plan = plan
        self.folder = Path(tempfile.mkdtemp(prefix="stage-"))
        self.brokers = tuple(
            Mosquitto(
                folder=self.folder / f"b{number}",
                host=address_of(_BROKERS, number),
                websockets=True,
            )
            for number in range(1, plan.brokers + 1)
        )
        self._ingress = ingress
        self.ingresses: tuple[IngressNode, ...] = ()
        self._stack = contextlib.ExitStack()

    @property
    def targets(self) -> tuple[str, ...]:
        """Where devices connect to, as URLs: the WebSocket listeners of all ingress nodes."""
        return tuple(f"ws://{node.host}:{node.port}/mqtt" for node in self.ingresses)

    @property
    def mqtt_targets(self) -> tuple[str, ...]:
        """Likewise, their listeners for plain MQTT."""
        return tuple(f"mqtt://{node.host}:{node.mqtt_port}" for node in self.ingresses)

    @property
    def pids(self) -> dict[str, tuple[int, ...]]:
        """Process ids by kind; a broker that was killed is left out."""
        return {
            "broker": tuple(broker.pid for broker in self.brokers if broker.running),
            "HAProxy": tuple(node.pid for node in self.ingresses),
        }

    def __enter__(self) -> Self:
        """Start all; raises BackingError."""
        try:
            for broker in self.brokers:
                self._stack.enter_context(broker)
            named = [(f"broker-{at}", broker) for at, broker in enumerate(self.brokers, start=1)]
            self.ingresses = tuple(
                self._stack.enter_context(
                    IngressNode(
                        self.folder / f"h{number}",
                        address_of(_INGRESSES, number),
                        named,
                        descriptors=self.plan.descriptors,
                        **self._ingress,
                    )
                )
                for number in range(1, self.plan.ingresses + 1)
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all. A broker with thousands of clients is killed: they would all come back."""
        for broker in self.brokers:
            broker.kill()
        self._stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)
