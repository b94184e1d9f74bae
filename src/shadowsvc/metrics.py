"""Metrics: plain counters on the hot path, Prometheus families at scrape time.

Lives here: every figure the service exports, its name, help and labels. Rules: names begin with
`shadowsvc_` and end in their unit; label values come from sets known beforehand, never from a
device; counting costs an addition, and building families costs only the scraper. Must not come
in: alerts, health.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from shadowsvc.families import Families, Page
from shadowsvc.slots import SlotState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric

    from shadowsvc.ledger import Ledger
    from shadowsvc.totals import Ledgers

__all__ = ["Exposition", "Histogram", "Metrics"]

_FAMILIES = Families("shadowsvc_")
_counter, _counters = _FAMILIES.counter, _FAMILIES.counters
_gauge, _gauges = _FAMILIES.gauge, _FAMILIES.gauges

_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.069, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
_PARTITIONS = (1, 2, 4, 6, 8, 10, 16, 24, 32, 48, 64, 100, 250, 1000)


class Histogram:
    """Counts by upper bound; not cumulative until scraped."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Make it with ascending upper bounds; values above the last have a bucket of their own."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total: float = 0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def observe_each(self, values: Sequence[float]) -> None:
        """Count every one of `values`; what is below nothing adds nothing to the sum."""
        bounds = self.bounds
        counts = self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(value for value in values if value > 0)

    def buckets(self, scale: float = 1.0) -> list[tuple[str, float]]:
        """Cumulative buckets as Prometheus wants them, bounds divided by `scale`."""
        total = 0
        buckets = []
        for bound, count in zip(self.bounds, self.counts, strict=False):
            total += count
            # OpenMetrics wants bounds in their canonical form: "1.0", not "1".
            text: str = floatToGoString(bound / scale)  # type: ignore[no-untyped-call]
            buckets.append((text, float(total)))
        buckets.append(("+Inf", float(total + self.counts[-1])))
        return buckets


class CanaryFigures:
    """What the canary counts."""

    def __init__(self) -> None:
        self.published = 0
        self.unpublished: Counter[str] = Counter()
        self.durable = 0
        self.lost = 0
        self.excused = 0
        self.seconds = Histogram(_SECONDS)


class Metrics:
    """What the rooms count. Fields are public and plain; everything starts at nothing."""

    def __init__(self) -> None:
        self.messages = [0, 0, 0, 0]
        """By 2 x QoS + DUP."""
        self.received_bytes = 0
        self.qos0_dropped = 0
        self.discarded_draining = 0
        self.decoded = 0
        self.empty = 0
        self.rejected: Counter[str] = Counter()
        self.dead_letters: Counter[str] = Counter()
        self.dead_letters_suppressed = 0
        self.updates_durable = 0
        self.updates_merged = 0
        self.leaves_merged_away = 0
        self.batch_partitions = Histogram(_PARTITIONS)
        self.write_seconds = Histogram(_SECONDS)
        self.write_errors: Counter[str] = Counter()
        self.write_retries: Counter[str] = Counter()
        self.batches_split = 0
        self.window_changes: Counter[str] = Counter()
        self.retries_waiting = 0
        self.replica_sets_in_doubt = 0
        self.receive_to_ack = Histogram(_SECONDS)
        self.device_to_durable_us = Histogram([bound * 1e6 for bound in _SECONDS])
        self.disconnects: Counter[str] = Counter()
        self.sessions: Counter[str] = Counter()
        self.slot_takes: Counter[str] = Counter()
        self.slot_losses: Counter[str] = Counter()
        self.adoptions: Counter[str] = Counter()
        self.adopted_messages = 0
        self.markers = 0
        self.orphaned_slots = 0
        self.adopting = False
        self.slot: _Slot | None = None
        """Asked when scraped; None while the client id is configured."""
        self.isolations = 0
        self.isolated = False
        self.resubscriptions = 0
        self.pauses = 0
        self.canary = CanaryFigures()
        self.loop_lag_seconds = 0.0
        self.clock_offset_seconds = 0.0
        self.certificate_expiry: dict[str, float] = {}
        """By file; seconds since 1970."""
        self.credentials_changed: Counter[str] = Counter()
        self.credentials_unusable: Counter[str] = Counter()
        self.credentials_faulty: dict[str, int] = {}
        self.store_renewals: Counter[str] = Counter()


class _Slot(Protocol):
    """The figures of the slot that are read, not counted."""

    @property
    def state(self) -> SlotState:
        """What it is now."""

    @property
    def lease_age(self) -> float | None:
        """Seconds since the last confirmed renewal."""


class _Flights(Protocol):
    """The figures of the pipeline that are read, not counted."""

    @property
    def in_flight(self) -> int:
        """Requests at the driver."""

    @property
    def concurrency(self) -> int:
        """How many requests may be at the driver."""


class Exposition(Page):
    """Renders everything for a scraper; made once with what it reads."""

    def __init__(  # the sources of every figure
        self,
        metrics: Metrics,
        ledger: Ledger | Ledgers,
        flights: _Flights,
        *,
        now: Callable[[], float],
        is_ready: Callable[[], bool],
        without_device_time: Callable[[], int],
        log_lines_dropped: Callable[[], int],
        not_ready: Callable[[], Mapping[str, bool]] = dict,
        pause_left_seconds: Callable[[], float] = float,
        direct_connections: Callable[[], int] = int,
        batch_limits: Callable[[], tuple[int, int]] = lambda: (0, 0),
        batches: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        super().__init__()
        self._metrics = metrics
        self._ledger = ledger
        self._flights = flights
        self._now = now
        self._is_ready = is_ready
        self._without_device_time = without_device_time
        self._log_lines_dropped = log_lines_dropped
        self._not_ready = not_ready
        self._pause_left_seconds = pause_left_seconds
        self._direct_connections = direct_connections
        self._batch_limits = batch_limits
        self._batches = batches

    def collect(self) -> Iterator[Metric]:
        """Yield every family; called by the registry."""
        yield from self._way_in()
        yield from self._writes()
        yield from self._acks()
        yield from self._process()

    def _way_in(self) -> Iterator[Metric]:
        metrics = self._metrics
        received = CounterMetricFamily(
            "shadowsvc_messages_received", "PUBLISH packets received.", labels=["qos", "dup"]
        )
        for index, count in enumerate(metrics.messages):
            received.add_metric([str(index >> 1), str(index & 1)], count)
        yield received
        yield _counter(
            "received_bytes", "Payload and topic bytes received.", metrics.received_bytes
        )
        yield _counter(
            "qos0_dropped", "QoS 0 messages dropped: the budget was held.", metrics.qos0_dropped
        )
        yield _counter(
            "messages_discarded_draining",
            "Messages left to the broker because the service was stopping.",
            metrics.discarded_draining,
        )
        yield _counter("updates_decoded", "Messages that became an update.", metrics.decoded)
        yield _counter("updates_empty", "Updates that change nothing.", metrics.empty)
        yield _counters(
            "updates_rejected", "Messages that are no update.", "reason", metrics.rejected
        )
        yield _counter(
            "updates_without_device_time",
            "Updates that got the receive time.",
            self._without_device_time(),
        )

    def _writes(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter(
            "updates_durable", "Updates confirmed by Cassandra.", metrics.updates_durable
        )
        yield _counter(
            "updates_merged", "Updates written together with a neighbour.", metrics.updates_merged
        )
        yield _counter(
            "leaves_merged_away",
            "Leaves that a later update of the same batch made needless.",
            metrics.leaves_merged_away,
        )
        yield _counters("dead_letters", "Dead letters written.", "reason", metrics.dead_letters)
        yield _counter(
            "dead_letters_suppressed",
            "Rejected messages acknowledged without a row: too many of one device.",
            metrics.dead_letters_suppressed,
        )
        yield _counters(
            "batches_sent", "Batches of shadows, by the way that they took.", "way", self._batches()
        )
        yield _gauge(
            "direct_connections",
            "Own connections to replicas that batches can take; without one they go by the driver.",
            self._direct_connections(),
        )
        partitions, size_bytes = self._batch_limits()
        yield _gauge("batch_max_partitions", "Devices allowed in a batch.", partitions)
        yield _gauge("batch_max_bytes", "Bytes allowed in a batch.", size_bytes)
        yield _histogram("batch_partitions", "Devices in a batch.", metrics.batch_partitions)
        yield _histogram(
            "write_seconds", "One request, from the call to its answer.",
            metrics.write_seconds,
        )  # fmt: skip
        yield _counters("write_errors", "Requests that failed.", "kind", metrics.write_errors)
        yield _counters("write_retries", "Requests sent again.", "kind", metrics.write_retries)
        yield _counter("batches_split", "Refused batches planned again.", metrics.batches_split)
        yield _gauge("writes_in_flight", "Requests at Cassandra.", self._flights.in_flight)
        yield _gauge("writes_limit", "Requests allowed at Cassandra.", self._flights.concurrency)
        yield _counters(
            "writes_limit_changes", "Changes of that limit.", "reason", metrics.window_changes
        )
        yield _gauge(
            "retries_waiting",
            "Batches and dead letters that wait for their next attempt.",
            metrics.retries_waiting,
        )
        yield _gauge(
            "replica_sets_in_doubt",
            "Groups of devices whose last answer was an outage; dead letters are one.",
            metrics.replica_sets_in_doubt,
        )
        yield _histogram(
            "device_to_durable_seconds",
            "From the device's time to the confirmed write.",
            metrics.device_to_durable_us,
            scale=1e6,
        )

    def _acks(self) -> Iterator[Metric]:
        ledger = self._ledger
        metrics = self._metrics
        yield _counter("messages_acknowledged", "PUBACKs sent.", ledger.acknowledged)
        yield _counter("acks_stale", "Acks dropped: their connection was gone.", ledger.stale)
        yield _counter(
            "deliveries_abandoned",
            "Deliveries of an older connection left to the broker's repetition.",
            ledger.abandoned,
        )
        yield _counter(
            "deliveries_done_without_ack",
            "QoS 0 messages and last copies of a lost session that became durable.",
            ledger.done_without_ack,
        )
        yield _gauge("deliveries_held", "Deliveries in memory.", ledger.held)
        yield _gauge("deliveries_held_bytes", "Their payload and topic bytes.", ledger.held_bytes)
        yield _gauge(
            "unacknowledged_deliveries",
            "Deliveries of this connection whose ack has not left.",
            ledger.unacknowledged,
        )
        oldest = ledger.oldest
        yield _gauge(
            "oldest_unacknowledged_seconds",
            "Age of the oldest of them.",
            0 if oldest is None else max(0, self._now() - oldest),
        )
        yield _histogram(
            "receive_to_ack_seconds", "From PUBLISH received to PUBACK.", metrics.receive_to_ack
        )

    def _process(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counters(
            "disconnects", "Connections to the broker lost or not made.", "reason",
            metrics.disconnects,
        )  # fmt: skip
        yield _counters("sessions", "CONNACKs, resumed or new.", "state", metrics.sessions)
        yield from _slot(metrics)
        yield _counter(
            "resubscriptions",
            "SUBSCRIBEs sent again on a live connection that the broker granted.",
            metrics.resubscriptions,
        )
        yield _counter("pauses", "Pauses begun.", metrics.pauses)
        yield _gauge(
            "pause_left_seconds",
            "How long the service will still stay away from the broker.",
            self._pause_left_seconds(),
        )
        yield from _canary(metrics.canary)
        yield _gauge("ready", "1 when /readyz says yes.", int(self._is_ready()))
        yield _gauges(
            "not_ready", "1 while this is a reason not to be ready.", "reason", self._not_ready()
        )
        yield _gauge(
            "loop_lag_seconds", "How late the event loop ran its last timer.",
            metrics.loop_lag_seconds,
        )  # fmt: skip
        yield _gauge(
            "clock_offset_seconds",
            "This machine's clock less Cassandra's.",
            metrics.clock_offset_seconds,
        )
        yield from _credentials(metrics)
        yield _counter("log_lines_dropped", "Log lines nobody took.", self._log_lines_dropped())
        yield _FAMILIES.build("Versions of the service and of Python; whether it is compiled.")


def _credentials(metrics: Metrics) -> Iterator[Metric]:
    yield _gauges(
        "certificate_expiry_timestamp_seconds",
        "When a certificate in use ends, in seconds since 1970.",
        "file",
        metrics.certificate_expiry,
    )
    yield _counters(
        "credentials_changed",
        "Changed certificates or passwords taken into use.",
        "of",
        metrics.credentials_changed,
    )
    yield _counters(
        "credentials_unusable",
        "Changed files that could not be used; the old ones stay.",
        "of",
        metrics.credentials_unusable,
    )
    yield _gauges(
        "credentials_faulty",
        "1 while the files as they are cannot be used.",
        "of",
        metrics.credentials_faulty,
    )
    yield _counters(
        "store_renewals",
        "Sessions with Cassandra made anew, or not: credentials changed, or no host was left.",
        "result",
        metrics.store_renewals,
    )


def _canary(figures: CanaryFigures) -> Iterator[Metric]:
    yield _counter(
        "canary_published", "Updates of the canary that the broker took.", figures.published
    )
    yield _counters(
        "canary_unpublished",
        "Updates of the canary that the broker did not take.",
        "reason",
        figures.unpublished,
    )
    yield _counter(
        "canary_durable",
        "Updates of the canary that were read back within the time limit.",
        figures.durable,
    )
    yield _counter(
        "canary_lost",
        "Updates of the canary that were not, although nothing else was wrong.",
        figures.lost,
    )
    yield _counter(
        "canary_excused",
        "Updates of the canary on which nothing was found out: something else was wrong.",
        figures.excused,
    )
    yield _histogram(
        "canary_seconds",
        "From publishing an update of the canary to reading it back from Cassandra.",
        figures.seconds,
    )


def _slot(metrics: Metrics) -> Iterator[Metric]:
    slot = metrics.slot
    states = {}
    if slot is not None:
        now = slot.state
        states = {state.value: state is now for state in SlotState}
    yield _gauges(
        "slot_state",
        "1 for the present state of the slot; no series with a configured client id.",
        "state",
        states,
    )
    yield _gauge(
        "slot_lease_age_seconds",
        "Time since the lease of the slot was confirmed.",
        0 if slot is None else slot.lease_age or 0,
    )
    yield _counters("slot_takes", "Slots taken.", "how", metrics.slot_takes)
    yield _counters("slot_losses", "Slots lost or given up.", "reason", metrics.slot_losses)
    yield _gauge(
        "orphaned_slots",
        "Slots that this process has seen free for long enough to be adopted.",
        metrics.orphaned_slots,
    )
    yield _gauge(
        "adopting", "1 while this process empties the session of an orphaned slot.",
        int(metrics.adopting),
    )  # fmt: skip
    yield _counters("adoptions", "Adoptions that ended.", "outcome", metrics.adoptions)
    yield _counter(
        "adopted_messages",
        "Messages that sessions of orphaned slots delivered, repetitions and markers included.",
        metrics.adopted_messages,
    )
    yield _counter(
        "markers",
        "Markers of adoptions among the messages, acknowledged and nothing else.",
        metrics.markers,
    )
    yield _gauge("isolated", "1 while the broker is left, since no write succeeds.",
        int(metrics.isolated),
    )  # fmt: skip
    yield _counter(
        "isolations", "How often the broker was left, since no write succeeded.",
        metrics.isolations,
    )  # fmt: skip


def _histogram(name: str, text: str, histogram: Histogram, scale: float = 1.0) -> Metric:
    family = HistogramMetricFamily(f"shadowsvc_{name}", text)
    family.add_metric([], histogram.buckets(scale), sum_value=histogram.total / scale)
    return family
