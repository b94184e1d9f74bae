"""Broker, Cassandra, services and publishers of one run, with a proxy on every way between them.

    publishers ─▶ mosquitto ─▶ proxy ─▶ service ─▶ proxy ─▶ Cassandra
                                 └ wire ─▶ witness ◀───────────┘

Lives here: `Stage`, which puts them together, lets the broker fail with the right excuse, and at
the end waits for rest and asks the witness. Rules: every wait has a limit; `settle` takes no fault
back that is not a proxy's; memory and held deliveries are watched all the time. Must not come in:
single faults (the tests and `tests.faults.schedule`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from tests.bad_documents import LIMITS
from tests.faults.memory import MemoryPublisher, MemoryServer
from tests.faults.pod import Pod
from tests.faults.publisher import Publisher, Traffic
from tests.faults.wire import Wire
from tests.faults.witness import Witness
from tests.proxied import Proxied
from tests.service import ServiceProcess, variables
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet
    from pathlib import Path
    from typing import Self

    import backing
    from tests.faults.wire import Key
    from tests.faults.witness import Verdict
    from tests.service import Figures

__all__ = ["KEEP_ALIVE_SECONDS", "RECEIVE_MAXIMUM", "SLOTS", "Stage"]

KEEP_ALIVE_SECONDS = 2
RECEIVE_MAXIMUM = 50
MAX_RSS_BYTES = 200 * 1024 * 1024
"""Twice what an idle service takes; a window of 50 updates is nothing beside it."""

MAX_BEYOND = 256 * 1024 // 100
"""Messages in a read buffer; the smallest have about so many bytes."""

SCALED: dict[str, object] = {
    "MQTT__KEEP_ALIVE_SECONDS": KEEP_ALIVE_SECONDS,
    "MQTT__CONNECT_TIMEOUT_SECONDS": 3,
    "MQTT__RECEIVE_MAXIMUM": RECEIVE_MAXIMUM,
    "CASSANDRA__REQUEST_TIMEOUT_SECONDS": 1,
    "CASSANDRA__CONNECT_TIMEOUT_SECONDS": 2,
    "DEAD_LETTERS__MAX_PER_DEVICE_PER_MINUTE": 1_000_000,
    **LIMITS,
}

SLOTS: dict[str, object] = {
    "MQTT__CLIENT_ID": "",
    "SLOTS__LEASE_SECONDS": 3,
    "SLOTS__RENEW_SECONDS": 1,
    "SLOTS__ORPHAN_AFTER_SECONDS": 4,
    "SLOTS__ADOPT_QUIET_SECONDS": 1,
}
"""For services that lease their client ids and adopt what others left."""

_WATCH_SECONDS = 0.5
_ENDS = (
    "qos0_dropped_total",
    "messages_discarded_draining_total",
    "messages_acknowledged_total",
    "acks_stale_total",
    "deliveries_abandoned_total",
    "deliveries_done_without_ack_total",
    "deliveries_held",
)


class Stage:
    """One run; a context manager. The services are not started yet.

    Args:
        broker: runs already.
        database: likewise.
        keyspace: with the schema.
        name: of the share group and the topic prefix; client ids begin with it.
        folder: for logs.
        settings: more of the services', without their prefix.
        pods: services.
        seed: of the witness's samples.
    """

    def __init__(
        self,
        broker: backing.Broker | MemoryServer,
        database: backing.Database,
        keyspace: str,
        name: str,
        folder: Path,
        *,
        settings: Mapping[str, object],
        pods: int = 1,
        seed: int = 0,
    ) -> None:
        self.broker = broker
        self.database = database
        self.name = name
        self.pods: list[Pod] = []
        self.witness = Witness(database, keyspace, name, seed=seed)
        self.publishers = self.witness.publishers
        self._keyspace = keyspace
        self._folder = folder
        self._settings = {**SCALED, **settings}
        self._count = pods
        self._stack = ExitStack()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stage watch", daemon=True)

    def __enter__(self) -> Self:
        """Make the proxies, begin to watch."""
        with ExitStack() as stack:
            stack.enter_context(self.witness)
            self._stack = stack
            for _ in range(self._count):
                self.add_pod()
            stack.callback(self._end_watch)
            self._watcher.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """End everything; a service's own defects count unless something failed already."""
        self._stack.__exit__(*error)  # type: ignore[arg-type]  # as handed in

    @property
    def pod(self) -> Pod:
        """The first service."""
        return self.pods[0]

    def add_pod(
        self,
        *,
        make: type[ServiceProcess] = ServiceProcess,
        log: Path | None = None,
        broker_host: str = "127.0.0.1",
        environment: Mapping[str, str] | None = None,
        **settings: object,
    ) -> Pod:
        """Make one more service, not started yet; it is ended with the stage.

        Args:
            make: of what class.
            log: where it writes; a file in the stage's folder when None.
            broker_host: what it calls its broker's address.
            environment: further variables.
            settings: of it alone, without their prefix.
        """
        name = f"{self.name}-{len(self.pods)}"
        wire = Wire(name, self.witness.on_ack)
        to_broker = Proxied(self.broker.host, self.broker.port, watch=wire.watch)
        to_cassandra = Proxied(self.database.contact_points[0], self.database.port)
        self._stack.enter_context(to_broker)
        self._stack.enter_context(to_cassandra)
        own = {
            "MQTT__URL": f"mqtt://{broker_host}:{to_broker.port}",
            "MQTT__CLIENT_ID": self._settings.get("MQTT__CLIENT_ID", name),
            "CASSANDRA__CONTACT_POINTS": "127.0.0.1",
            "CASSANDRA__PORT": to_cassandra.port,
        }
        known = variables(
            self.broker,  # type: ignore[arg-type]  # asked for its address alone
            self.database,
            self._keyspace,
            self.name,
            **(self._settings | own | settings),
        )
        service = make(known | dict(environment or {}), log or self._folder / f"{name}.log")
        pod = Pod(service, wire, to_broker, to_cassandra)
        self._stack.push(service.__exit__)
        self.pods.append(pod)
        self.witness.wires.append(wire)
        return pod

    def start(self) -> Self:
        """Start every service that does not run, and wait until all are ready."""
        self.start_some(*self.pods)
        return self

    def start_some(self, *pods: Pod) -> None:
        """Start those that do not run, and wait until they are ready."""
        for pod in pods:
            if not pod.service.running:
                pod.start()
        for pod in pods:
            pod.service.wait_ready()

    def publisher(self) -> Publisher:
        """Connect one more publisher; it is disconnected with the stage."""
        publisher: Publisher
        if isinstance(self.broker, MemoryServer):
            publisher = MemoryPublisher(self.broker, self.name)
        else:
            publisher = Publisher(self.broker, self.name)
        self.publishers.append(publisher)
        return self._stack.enter_context(publisher)

    @contextlib.contextmanager
    def traffic(self, **options: Any) -> Iterator[Traffic]:
        """Let a publisher of its own publish until the context is left."""
        name = f"{self.name}-{len(self.publishers)}"
        with Traffic(self.publisher(), name, **options) as traffic:
            yield traffic

    # ---------------------------------------------------------------- faults of the broker itself

    def kill_broker(self) -> None:
        """SIGKILL; what it had not saved may be lost. Not started again."""
        broker = self._mosquitto()
        broker.kill()
        # What it had handed out and saved, it sends again.
        self._excuse("broker killed", saved_at=self._saved_at())

    def lose_broker(self, *, kill: bool = True) -> None:
        """SIGKILL or SIGTERM, and its file is gone: sessions, queues and what is in flight."""
        broker = self._mosquitto()
        if kill:
            broker.kill()
        else:
            broker.stop()
        (broker.folder / "mosquitto.db").unlink(missing_ok=True)
        self._excuse("broker lost", saved_at=None)

    def stop_broker(self) -> None:
        """SIGTERM: it saves all, nothing may be lost. Not started again."""
        self._mosquitto().stop()

    def restart_memory_broker(self) -> None:
        """As VerneMQ: what is in flight to present sessions is lost, queues survive."""
        assert isinstance(self.broker, MemoryServer)
        links = [(pod.wire, pod.wire.counts["connections"]) for pod in self.pods]
        self.broker.do(lambda broker: broker.restart())
        handed_out: set[Key] = set()
        for wire, link in links:
            # What it had sent is on its way still.
            wait_until(
                lambda wire=wire, link=link: wire.counts["ended"] >= link,  # type: ignore[misc]
                "its connections have ended",
            )
            handed_out |= wire.unacked(link)
        for earlier in self.witness.excuses:
            handed_out -= earlier.handed_out
        self._excuse("broker restarted", saved_at=time.time(), handed_out=handed_out)

    def forget_session(self, pod: Pod) -> None:
        """Let the broker in memory drop a connection and forget its session, queue and all."""
        assert isinstance(self.broker, MemoryServer)
        link = pod.wire.counts["connections"]
        self.broker.do(lambda broker: broker.forget(pod.name))
        wait_until(lambda: pod.wire.counts["ended"] >= link, "its connection has ended")
        self._excuse("session forgotten", saved_at=None)

    def _excuse(
        self, fault: str, *, saved_at: float | None, handed_out: AbstractSet[Key] = frozenset()
    ) -> None:
        for publisher in self.publishers:
            publisher.wait_gone()
        self.witness.excuse(fault, saved_at=saved_at, at=time.time(), handed_out=handed_out)

    def _mosquitto(self) -> backing.Mosquitto:
        return self.broker  # type: ignore[return-value]  # a test that kills it made it

    def _saved_at(self) -> float | None:
        try:
            return (self._mosquitto().folder / "mosquitto.db").stat().st_mtime
        except FileNotFoundError:
            return None

    # ---------------------------------------------------------------- the end

    def settle(self, limit_seconds: float = 60) -> Verdict:
        """Heal the proxies, wait for rest, and fail unless every promise was kept."""
        for pod in self.pods:
            pod.heal()
        verdict = self.wait_verdict(limit_seconds)
        if verdict.forbidden:
            raise AssertionError("\n".join(["promises were broken:", *verdict.lines()]))
        return verdict

    def wait_verdict(self, limit_seconds: float) -> Verdict:
        """Wait for rest, or until for so long nobody acknowledged anything; compare everything."""
        for publisher in self.publishers:
            try:
                publisher.wait_answered(limit_seconds)
            except AssertionError as error:
                self.witness.violations.append(str(error))
        acked, moved = -1, time.monotonic()
        while not self._at_rest() or self.witness.missing():
            before, acked = acked, sum(pod.wire.counts["PUBACK"] for pod in self.pods)
            if acked > before:
                moved = time.monotonic()
            elif time.monotonic() - moved > limit_seconds:
                break
            time.sleep(0.2)
        return self.verdict()

    def verdict(self) -> Verdict:
        """Compare everything now, and add what the services' own figures say against them."""
        verdict = self.witness.verdict()
        for pod in self.pods:
            verdict.forbidden += self._against(pod)
        return verdict

    def seen_total(self, name: str) -> float:
        """Return a figure of all lives of all services, as far as it was looked at."""
        return sum(pod.seen_total(name) for pod in self.pods)

    def _at_rest(self) -> bool:
        for pod in self.pods:
            if pod.service.running:
                figures = pod.service.metrics()
                if figures.total("deliveries_held") or figures.total("unacknowledged_deliveries"):
                    return False
        return True

    def _against(self, pod: Pod) -> Iterator[str]:
        if pod.most_rss_bytes > MAX_RSS_BYTES:
            yield f"{pod.name}: took {pod.most_rss_bytes:,} bytes of memory"
        window = float(str(self._settings["MQTT__RECEIVE_MAXIMUM"]))
        # mosquitto sends more when it resumes a session; then a read buffer comes on top.
        seen = pod.wire.counts["connections"] > 0  # not over TLS
        most = pod.wire.most_outstanding if seen else window + MAX_BEYOND
        window = max(window, min(most, window + MAX_BEYOND))
        if pod.most_held > 2 * window:
            yield f"{pod.name}: held {pod.most_held:g} deliveries, the window is {window:g}"
        for line in pod.service.defects():
            yield f"{pod.name} logged a defect: {line[:500]}"
        if not pod.service.running:
            return
        figures = pod.service.metrics()
        left = unaccounted(figures)
        if not 0 <= left <= figures.total("unacknowledged_deliveries"):
            yield f"{pod.name}: {left:g} deliveries are not accounted for"
        if pod.lives == 1 and seen:
            counts = pod.wire.counts
            if counts["PUBACK"] > figures.total("messages_acknowledged_total"):
                yield f"{pod.name}: more PUBACKs on the wire than it counted"
            if figures.total("messages_received_total") > counts["PUBLISH"]:
                yield f"{pod.name}: counted more messages than were on the wire"

    def _watch(self) -> None:
        while not self._over.wait(_WATCH_SECONDS):
            for pod in list(self.pods):
                pod.look()

    def _end_watch(self) -> None:
        self._over.set()
        self._watcher.join()


def unaccounted(figures: Figures) -> float:
    """Return the deliveries received that are in no account.

    At rest 0; else those that are durable and wait for their turn to be acknowledged.
    """
    return figures.total("messages_received_total") - sum(map(figures.total, _ENDS))
