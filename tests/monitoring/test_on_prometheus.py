"""Every expression of rules and dashboards, asked of a real Prometheus.

It scrapes the real service, at a real broker and Cassandra, and a real HAProxy. Events that no
healthy service has, such as lost slots, are on a page beside it, made by the service's own
exposition with one event of each kind. VerneMQ and Cassandra are not scraped: of their
expressions only that they are valid is seen here.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest

from backing.ports import free_port
from backing.process import ServerProcess
from shadowsvc.ingress.metrics import IngressExposition, IngressMetrics
from shadowsvc.ledger import Ledger
from shadowsvc.metrics import Exposition, Histogram, Metrics
from shadowsvc.slots import SlotState
from tests.monitoring.deployed import (
    CASSANDRA,
    RULES,
    VERNEMQ,
    asking,
    recorded,
    rules,
    service_metrics,
)
from tests.monitoring.prometheus import MetricsPage, Prometheus
from tests.monitoring.promql import asked
from tests.oracle import Oracle
from tests.service import ServiceProcess, variables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import backing

pytestmark = pytest.mark.timeout(240)

OF_THE_SERVICE = re.compile(r"shadowsvc_(?!ingress_)")
LIMIT_SECONDS = 120.0
FEW = 5
"""Bad messages: fewer than the limit for rows of one device."""
ELSEWHERE = {"vernemq", "cassandra"}
"""Jobs of programs that do not run here."""

NOT_WHEN_WELL = {
    "shadowsvc_adoptions_total",
    "shadowsvc_canary_unpublished_total",
    "shadowsvc_certificate_expiry_timestamp_seconds",
    "shadowsvc_credentials_changed_total",
    "shadowsvc_credentials_faulty",
    "shadowsvc_credentials_unusable_total",
    "shadowsvc_disconnects_total",
    "shadowsvc_slot_losses_total",
    "shadowsvc_store_renewals_total",
    "shadowsvc_write_errors_total",
    "shadowsvc_write_retries_total",
    "shadowsvc_writes_limit_changes_total",
}
"""What a healthy service need not have: a series begins with its first event."""

EVENTS = {
    "dead_letters": ("internal_error", "refused_by_store"),
    "disconnects": ("network", "stopping"),
    "sessions": ("new", "resumed"),
    "slot_losses": ("taken",),
    "slot_takes": ("free", "again"),
    "window_changes": ("overload", "growth"),
}
"""Values that rules ask for, by the field of `Metrics` that counts them."""

HAPROXY = """
defaults
    mode tcp
    timeout connect 2s
    timeout client 30s
    timeout server 30s
frontend mqtt
    bind 127.0.0.1:{mqtt}
    default_backend mqtt
backend mqtt
    server broker 127.0.0.1:{broker} check inter 500ms
    server away 127.0.0.1:1 check inter 500ms
frontend statistics
    mode http
    bind 127.0.0.1:{statistics}
    http-request use-service prometheus-exporter if {{ path /metrics }}
"""


class Seen(NamedTuple):
    """A Prometheus that has looked for long enough."""

    prometheus: Prometheus
    service: ServiceProcess

    def ask(self, expression: str, instance: str = ".*") -> list[dict[str, Any]]:
        """Ask as Grafana would."""
        text = expression.replace("$__rate_interval", "1m").replace("$instance", instance)
        return self.prometheus.query(text)

    @property
    def instance(self) -> str:
        """The real service's label."""
        return f"127.0.0.1:{self.service.port}"


def every_event() -> Exposition:
    """Return the service's own exposition after one event of each kind."""
    metrics = Metrics()
    for field, counted in (*vars(metrics).items(), *vars(metrics.canary).items()):
        if isinstance(counted, Counter):
            counted.update(EVENTS.get(field, ("any",)))
        elif isinstance(counted, Histogram):
            counted.observe(0)
    metrics.slot = SimpleNamespace(state=SlotState.HELD, lease_age=1.0)  # type: ignore[assignment]
    metrics.certificate_expiry["broker_ca"] = 4e9
    metrics.credentials_faulty["broker"] = 0
    return Exposition(
        metrics,
        Ledger(),
        SimpleNamespace(in_flight=0, concurrency=1),  # type: ignore[arg-type]
        now=lambda: 0.0,
        is_ready=lambda: False,
        without_device_time=lambda: 0,
        log_lines_dropped=lambda: 0,
        not_ready=lambda: {"wedged": True},
        batches=lambda: {"direct": 1, "driver": 1},
    )


def every_event_of_the_ingress() -> IngressExposition:
    metrics = IngressMetrics()
    for counted in vars(metrics).values():
        if isinstance(counted, dict):
            counted["any"] = 1
    return IngressExposition(metrics, now=lambda: 0.0, is_ready=lambda: True)


@pytest.fixture(scope="module")
def seen(
    broker: backing.Broker,
    cassandra: backing.Database,
    migrated: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("monitoring")
    name = f"t{uuid.uuid4().hex[:12]}"
    balancer = Balancer(folder, broker.port)
    settings = variables(
        broker, cassandra, migrated, name, MQTT__URL=f"mqtt://127.0.0.1:{balancer.mqtt}",
        MQTT__CLIENT_ID="", CANARY__ENABLED="true", CANARY__INTERVAL_SECONDS=0.5,
    )  # fmt: skip
    with (
        balancer,
        ServiceProcess(settings, folder / "service.log") as service,
        MetricsPage(lambda: every_event().render("text/plain")[1]) as events,
        MetricsPage(lambda: every_event_of_the_ingress().render("text/plain")[1]) as ingress,
    ):
        service.wait_ready()
        targets = {
            "shadowsvc": [service.port, events.port],
            "haproxy": [balancer.statistics],
            "ingress": [ingress.port],
        }
        with (
            cassandra.session() as session,
            Oracle(broker, session, migrated, name) as oracle,
            Prometheus(folder, RULES, targets) as prometheus,
        ):
            found = Seen(prometheus, service)
            numbers = iter(range(10**9))

            def traffic() -> bool:
                number = next(numbers)
                oracle.update(f"d{number % 7}", {"reported": {"n": number}})
                oracle.update(f"q{number % 7}", {"reported": {"n": number}}, qos=0)
                if number < FEW:
                    oracle.raw(f"{name}/bad/shadow/update", b"no JSON")
                assert balancer.server.running
                steady = f'count_over_time(shadowsvc_ready{{instance="{found.instance}"}}[1m]) > 4'
                durable = "headline:durable:rate1m > 0"
                published = f'shadowsvc_canary_durable_total{{instance="{found.instance}"}} > 1'
                cost = "headline:cost_per_device_month:ratio"
                return all(map(prometheus.query, (steady, durable, published, cost)))

            prometheus.wait_until(traffic, "it has seen traffic and the canary", LIMIT_SECONDS)
            yield found


class Balancer:
    """A HAProxy in front of the broker; a context manager."""

    def __init__(self, folder: Path, broker: int) -> None:
        program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
        assert program, "haproxy is absent: `setup_haproxy` in scripts/lib/setup.sh installs it"
        self.mqtt, self.statistics = free_port(), free_port()
        file = folder / "haproxy.cfg"
        text = HAPROXY.format(mqtt=self.mqtt, broker=broker, statistics=self.statistics)
        file.write_text(text, encoding="utf-8")
        self.server = ServerProcess(
            "haproxy", [program, "-db", "-f", str(file)], log_path=folder / "haproxy.log"
        )

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(10)


def is_ours(expression: str) -> bool:
    """Whether an expression asks for nothing but what is scraped here."""
    read = asked(expression)
    jobs = {
        value
        for selector in read.selectors
        for label, operator, value in selector.matchers
        if (label, operator) == ("job", "=")
    }
    return not jobs & ELSEWHERE and not read.metrics & (set(VERNEMQ) | set(CASSANDRA))


def test_prometheus_evaluates_every_rule_without_an_error(seen: Seen) -> None:
    found = {rule["name"]: rule for rule in seen.prometheus.rules()}
    assert set(found) == {rule.name for rule in rules()}
    for name, rule in found.items():
        assert rule["health"] == "ok", f"{name}: {rule.get('lastError')}"


def test_every_expression_of_the_dashboards_is_answered_and_ours_by_series(seen: Seen) -> None:
    empty = []
    for one in asking():
        series = seen.ask(one.expression)  # fails on an error
        if is_ours(one.expression) and not series:
            empty.append(f"{one.who}: {one.expression}")
    assert not empty, "\n".join(empty)


def test_the_real_service_has_all_that_its_dashboard_asks_for(seen: Seen) -> None:
    here = f"{{instance='{seen.instance}'}}"
    absent = {
        name
        for name in service_metrics()
        if OF_THE_SERVICE.match(name) and not seen.prometheus.query(name + here)
    }
    assert absent <= NOT_WHEN_WELL
    looked_at = 0
    for one in asking():
        wanted = asked(one.expression).metrics
        known = wanted <= set(service_metrics()) | recorded()
        if known and "$instance" in one.expression and not wanted & absent:
            looked_at += 1
            series = seen.ask(one.expression, seen.instance)
            # A comparison may be true of nothing, when all is well.
            assert series or one.expression.startswith("shadowsvc_not_ready"), one.who
    assert looked_at > 60


def test_every_selector_of_the_rules_that_is_ours_finds_series(seen: Seen) -> None:
    missing = []
    for rule in rules():
        if not is_ours(rule.expression):
            continue
        for selector in asked(rule.expression).selectors:
            if selector.metric in recorded() and not is_ours(defining(selector.metric)):
                continue
            if not seen.prometheus.query(selector.text):
                missing.append(f"{rule.name}: {selector.text}")
    assert not missing, "\n".join(missing)


def defining(name: str) -> str:
    """Return what a recorded figure is made of."""
    return " + ".join(rule.expression for rule in rules() if rule.name == name)


def test_the_figures_of_the_service_are_recorded(seen: Seen) -> None:
    for name in recorded():
        if is_ours(defining(name)) or name.startswith("headline:"):
            assert seen.prometheus.query(name), name


def test_a_healthy_service_raises_no_alarm(seen: Seen) -> None:
    for state in ("firing", "pending"):
        found = seen.prometheus.query(f'ALERTS{{alertstate="{state}", instance="{seen.instance}"}}')
        # Bad messages are published here on purpose; that alert has no instance.
        assert not found, found


def test_alerts_see_what_is_ill(seen: Seen) -> None:
    """The page of events says that it is wedged, HAProxy that one server is away."""
    found = {
        series["metric"]["alertname"]
        for series in seen.prometheus.query('ALERTS{alertstate="pending"}')
    }
    assert found >= {"ShadowsvcWedged", "ShadowsvcNotReady", "IngressServersDown"}


def test_the_page_of_events_lacks_nothing_that_is_exported(seen: Seen) -> None:
    for name in service_metrics():
        if name.startswith("shadowsvc_"):
            assert seen.prometheus.query(f"{name}{{instance!='{seen.instance}'}}"), name
