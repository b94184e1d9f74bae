"""How a figure becomes a Prometheus family, and all of them a page; for service and ingress alike.

Lives here: the shapes of families, the registry, the two text formats. Rules: a family is built
only when a scraper asks; label values are sorted. Must not come in: which figures there are
(`shadowsvc.metrics`, `shadowsvc.ingress.metrics`).
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from shadowsvc import __version__, ledger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.metrics_core import Metric

__all__ = ["COMPILED", "Families", "Page"]

COMPILED = not ledger.__file__.endswith(".py")
"""Whether the pure rooms are machine code (docs/adr/0027)."""


class Families:
    """Makes families whose names begin with a prefix."""

    def __init__(self, prefix: str) -> None:
        """Make it; `prefix` ends in an underscore."""
        self._prefix = prefix

    def counter(self, name: str, text: str, value: float) -> Metric:
        """Return what only grows; a query sees its name with `_total`."""
        return CounterMetricFamily(f"{self._prefix}{name}", text, value=value)

    def counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """Return counters, one for each value of a label."""
        family = CounterMetricFamily(f"{self._prefix}{name}", text, labels=[label])
        for value, count in sorted(values.items()):
            family.add_metric([value], count)
        return family

    def gauge(self, name: str, text: str, value: float) -> Metric:
        """Return what goes up and down."""
        return GaugeMetricFamily(f"{self._prefix}{name}", text, value=value)

    def gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """Return gauges, one for each value of a label."""
        family = GaugeMetricFamily(f"{self._prefix}{name}", text, labels=[label])
        for value, size in sorted(values.items()):
            family.add_metric([value], size)
        return family

    def build(self, text: str) -> Metric:
        """Return the versions of this release and of Python, and whether it is compiled."""
        family = InfoMetricFamily(f"{self._prefix}build", text)
        labels = {"version": __version__, "python": platform.python_version()}
        family.add_metric([], labels | {"compiled": str(COMPILED).lower()})
        return family


class Page(ABC):
    """All figures of a process, those of Python and of the operating system among them."""

    def __init__(self) -> None:
        """Register everything; `collect` is not called before `render`."""
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(self)

    @abstractmethod
    def collect(self) -> Iterator[Metric]:
        """Yield every family of our own; called by the registry."""

    def render(self, accept: str) -> tuple[str, bytes]:
        """Return content type and body for an Accept header (Prometheus text or OpenMetrics)."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self.registry)
