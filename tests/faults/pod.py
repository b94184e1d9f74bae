"""One service of a run, with a proxy on each of its two ways.

Lives here: `Pod`, its faults and its figures, over all of its lives. Rules: a figure is of the
present life unless its name says otherwise; whoever freezes a service does it here, so that nobody
waits for its HTTP meanwhile. Must not come in: broker, Cassandra and publishers
(`tests.faults.stage`).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from backing import FaultProxy
    from tests.faults.wire import Wire
    from tests.proxied import Proxied
    from tests.service import Figures, ServiceProcess

__all__ = ["Pod"]


class Pod:
    """One service, its proxies, and what was seen of it."""

    def __init__(
        self, service: ServiceProcess, wire: Wire, to_broker: Proxied, to_cassandra: Proxied
    ) -> None:
        self.service = service
        self.wire = wire
        self.to_broker = to_broker
        self.to_cassandra = to_cassandra
        self.lives = 0
        self.frozen = False
        self.most_rss_bytes = 0
        self.most_held = 0.0
        self._seen: dict[int, Figures] = {}

    @property
    def name(self) -> str:
        """Its client id."""
        return self.wire.name

    def start(self) -> None:
        """Start it; wait for nothing."""
        self.lives += 1
        self.service.start()

    def seen_total(self, name: str) -> float:
        """Return a figure of all its lives, each as it was last looked at."""
        return sum(figures.total(name) for figures in self._seen.values())

    def pause(self) -> None:
        """SIGSTOP."""
        self.frozen = True
        self.service.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self.service.resume()
        self.frozen = False

    def total(self, name: str, **labels: str) -> float:
        """Return a figure of its present life.

        Read by hand: this is asked twenty times a second, and the whole parser takes 20 ms.
        """
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        found = 0.0
        for line in self.service.get("/metrics").body.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == f"shadowsvc_{name}" and all(
                label in sample for label in wanted
            ):
                found += float(value)
        return found

    def wait_total(self, count: float, name: str, limit_seconds: float = 30, **labels: str) -> None:
        """Wait until a figure is at least `count`."""
        self.service.wait_until(
            lambda: self.total(name, **labels) >= count,
            f"{name} {labels} is {count}",
            limit_seconds,
        )

    def wait_more(self, more: float, name: str, limit_seconds: float = 30, **labels: str) -> None:
        """Wait until a figure has grown by `more`."""
        self.wait_total(self.total(name, **labels) + more, name, limit_seconds, **labels)

    def broker(self, call: Callable[[FaultProxy], Any]) -> Any:
        """Return what `call` says of the proxy before the broker."""
        return self.to_broker.do(call)

    def cassandra(self, call: Callable[[FaultProxy], Any]) -> Any:
        """Return what `call` says of the proxy before Cassandra."""
        return self.to_cassandra.do(call)

    def heal(self) -> None:
        """End the faults of both proxies."""
        self.broker(lambda proxy: proxy.heal())
        self.cassandra(lambda proxy: proxy.heal())

    def look(self) -> None:
        """Note its memory and what it holds, if it answers now."""
        if self.frozen or not self.service.running or not self.service.port:
            return
        with contextlib.suppress(Exception):  # it may end or freeze while it is asked
            self.most_rss_bytes = max(self.most_rss_bytes, self.service._server.rss_bytes())
            figures = self.service.metrics()
            self._seen[self.lives] = figures
            self.most_held = max(self.most_held, figures.total("deliveries_held"))
