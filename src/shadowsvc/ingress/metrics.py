"""What `shadowsvc ingress` counts, and its families for a scraper.

Lives here: every figure of the ingress, its name, help and labels. Rules: as in
`shadowsvc.metrics`; names begin with `shadowsvc_ingress_`. HAProxy exports its own figures itself.
Must not come in: health.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from shadowsvc.families import Families, Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

__all__ = ["IngressExposition", "IngressMetrics"]

_FAMILIES = Families("shadowsvc_ingress_")
_counter, _counters = _FAMILIES.counter, _FAMILIES.counters
_gauge, _gauges = _FAMILIES.gauge, _FAMILIES.gauges


class IngressMetrics:
    """What the rooms count. Fields are public and plain; everything starts at nothing."""

    def __init__(self) -> None:
        """Make it; nothing has happened yet."""
        self.api_error: str | None = None
        """Why the API does not answer, while it does not."""
        self.answered: float | None = None
        """When it last answered, by the clock that is handed in."""
        self.api_errors: Counter[str] = Counter()
        self.lists = 0
        self.events: Counter[str] = Counter()
        self.watches_expired = 0
        self.brokers = 0
        self.empty_answers = 0
        self.empty = False
        self.servers: dict[str, int] = {}
        self.servers_leaving = 0
        self.changes: Counter[str] = Counter()
        self.reloads: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.refused = False
        self.haproxy_up = False
        self.haproxy_starts = 0
        self.certificates_changed = 0
        self.certificates_unusable = 0
        self.certificates_faulty = False
        self.certificate_expiry: dict[str, float] = {}
        """By file; seconds since 1970."""

    def api_answered(self, now: float) -> None:
        """Note that the API gave an answer that makes sense."""
        self.answered = now
        self.api_error = None

    def api_failed(self, error: str) -> None:
        """Note that it did not."""
        self.api_error = error


class IngressExposition(Page):
    """Renders everything for a scraper."""

    def __init__(
        self,
        metrics: IngressMetrics,
        *,
        now: Callable[[], float],
        is_ready: Callable[[], bool],
    ) -> None:
        """Make it, once, with what it reads."""
        super().__init__()
        self._metrics = metrics
        self._now = now
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        """Yield every family; called by the registry."""
        yield from self._api()
        yield from self._haproxy()
        yield from self._certificates()
        yield _FAMILIES.build("Version of the ingress and of Python.")

    def _api(self) -> Iterator[Metric]:
        metrics = self._metrics
        up = metrics.answered is not None and metrics.api_error is None
        age = 0.0 if metrics.answered is None else max(0.0, self._now() - metrics.answered)
        yield _gauge("api_up", "1 while the Kubernetes API answers.", int(up))
        yield _gauge(
            "api_answer_age_seconds",
            "Time since its last answer; a watch without changes answers about every minute.",
            age,
        )
        yield _counters("api_errors", "Requests that failed.", "reason", metrics.api_errors)
        yield _counter("api_lists", "Complete lists of EndpointSlices.", metrics.lists)
        yield _counters("api_events", "Events of watches.", "kind", metrics.events)
        yield _counter(
            "api_watches_expired",
            "Watches whose version had expired (410), so that all was listed anew.",
            metrics.watches_expired,
        )
        yield _gauge("brokers", "Brokers that the API names as ready.", metrics.brokers)
        yield _gauge(
            "brokers_absent",
            "1 while the API names none, and the last good configuration stays.",
            int(metrics.empty),
        )
        yield _counter("empty_answers", "How often it came to that.", metrics.empty_answers)

    def _haproxy(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _gauges("servers", "Servers of the configuration in use.", "backend", metrics.servers)
        yield _gauge(
            "servers_leaving",
            "Servers that take no new connections and still have some.",
            metrics.servers_leaving,
        )
        yield _counters(
            "server_changes", "Changes through the runtime API.", "kind", metrics.changes
        )
        yield _counters("reloads", "Reloads of HAProxy.", "result", metrics.reloads)
        yield _counters(
            "configurations_refused", "Configurations that can't be used.", "by", metrics.refusals
        )
        yield _gauge(
            "configuration_refused",
            "1 while the wanted configuration can't be used, and the last good one stays.",
            int(metrics.refused),
        )
        yield _gauge("haproxy_up", "1 while HAProxy answers.", int(metrics.haproxy_up))
        yield _counter("haproxy_starts", "Starts of HAProxy by us.", metrics.haproxy_starts)
        yield _gauge("ready", "1 when /readyz says yes.", int(self._is_ready()))

    def _certificates(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter(
            "certificates_changed",
            "Certificates that HAProxy took into use while it ran.",
            metrics.certificates_changed,
        )
        yield _counter(
            "certificates_unusable",
            "Changed certificates that could not be used; the old ones stay.",
            metrics.certificates_unusable,
        )
        yield _gauge(
            "certificates_faulty",
            "1 while the files as they are cannot be used.",
            int(metrics.certificates_faulty),
        )
        yield _gauges(
            "certificate_expiry_timestamp_seconds",
            "When a certificate for devices ends, in seconds since 1970.",
            "file",
            metrics.certificate_expiry,
        )
