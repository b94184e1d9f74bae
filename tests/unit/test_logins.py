"""Who is refused waits long, whoever has another login does not wait, and no session is stuck."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import structlog.testing
from cassandra import AuthenticationFailed
from pydantic import SecretStr

from shadowsvc.credentials import Credentials
from shadowsvc.errors import StoreUnavailable
from shadowsvc.login_pace import LoginPace
from shadowsvc.logins import LOST_SECONDS, StoreLogin
from shadowsvc.metrics import Metrics
from shadowsvc.mqtt.connection import Connection
from shadowsvc.settings import Cassandra
from shadowsvc.store import driver
from tests.memory_broker import MemoryBroker, serve
from tests.unit.test_connection import Taker, endpoint, options, running
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from shadowsvc.errors import StoreError

REFUSED = "connack_not_authorized"
BAD_LOGIN = StoreUnavailable("server_bad_credentials", "Cassandra does not know us")
NO_HOSTS = StoreUnavailable("lib_no_hosts_available", "no hosts")
LONG = 3600.0

# ---------------------------------------------------------------- the broker


class Waits:
    """A jitter that remembers between what it was asked to draw."""

    def __init__(self, seconds: float | None = None) -> None:
        self.asked: list[tuple[float, float]] = []
        self._seconds = seconds

    def __call__(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return low if self._seconds is None else self._seconds


async def test_waits_after_a_refused_login_begin_long_and_double_up_to_the_limit() -> None:
    waits = Waits(0.01)
    broker = MemoryBroker()
    broker.passwords = {b"right"}
    async with serve(broker) as server:
        taker = Taker()
        target = endpoint(server.port, login_retry_min_seconds=10, login_retry_max_seconds=60)
        connection = Connection(target, options(password=b"wrong"), taker, jitter=waits)
        with structlog.testing.capture_logs():
            async with running(connection):
                await until(lambda: len(waits.asked) >= 4)
    assert waits.asked[:4] == [(10, 20), (10, 40), (10, 60), (10, 60)]
    assert set(taker.reasons) <= {REFUSED, "stopping"}


async def test_another_login_is_tried_at_once_however_long_the_wait() -> None:
    broker = MemoryBroker()
    broker.passwords = {b"right"}
    async with serve(broker) as server:
        taker = Taker()
        target = endpoint(server.port, login_retry_min_seconds=LONG, login_retry_max_seconds=LONG)
        connection = Connection(target, options(password=b"wrong"), taker)
        with structlog.testing.capture_logs() as events:
            async with running(connection):
                await until(lambda: taker.reasons)
                connection.renew_login("service", b"right")
                await until(lambda: taker.subscribed)
                assert connection.options.username == "service"
        (event,) = events
        assert event["retry_seconds"] >= LONG
        assert broker.tried == [b"wrong", b"right"]


async def test_a_new_login_is_used_on_a_new_connection_of_the_same_session() -> None:
    broker = MemoryBroker()
    async with serve(broker) as server:
        taker = Taker()
        connection = Connection(endpoint(server.port), options(password=b"one"), taker)
        async with running(connection):
            await until(lambda: taker.subscribed == 1)
            connection.renew_login(None, b"two")
            await until(lambda: taker.subscribed == 2)
        assert broker.tried == [b"one", b"two"]
        assert broker.links[0].farewell == 0
        assert taker.sessions == [False, True]
        assert taker.reasons[0] == "credentials"


async def test_until_the_broker_knows_the_new_login_the_former_one_does() -> None:
    broker = MemoryBroker()
    broker.passwords = {b"one"}
    async with serve(broker) as server:
        taker = Taker()
        target = endpoint(server.port, login_retry_min_seconds=LONG, login_retry_max_seconds=LONG)
        connection = Connection(target, options(password=b"one"), taker)
        with structlog.testing.capture_logs():
            async with running(connection):
                await until(lambda: taker.subscribed == 1)
                connection.renew_login(None, b"two")
                await until(lambda: taker.subscribed == 2)
                assert broker.tried == [b"one", b"two", b"one"]
                # The broker learns it, and throws us out.
                broker.passwords = {b"two"}
                broker.links[-1].drop()
                await until(lambda: taker.subscribed == 3)
                assert broker.tried[3:] == [b"one", b"two"]
                broker.links[-1].drop()  # from now on the new one alone
                await until(lambda: taker.subscribed == 4)
                assert broker.tried[5:] == [b"two"]


async def test_two_logins_that_are_both_refused_wait_long() -> None:
    broker = MemoryBroker()
    broker.passwords = {b"one"}
    waits = Waits(0.01)
    async with serve(broker) as server:
        taker = Taker()
        target = endpoint(server.port, login_retry_min_seconds=10, login_retry_max_seconds=60)
        connection = Connection(target, options(password=b"one"), taker, jitter=waits)
        with structlog.testing.capture_logs():
            async with running(connection):
                await until(lambda: taker.subscribed == 1)
                broker.passwords = set()
                connection.renew_login(None, b"two")
                await until(lambda: len(broker.tried) >= 6)
    assert broker.tried[:6] == [b"one", b"two", b"one", b"two", b"one", b"two"]
    # After leaving, after the first refusal, and then the long ones.
    assert waits.asked[2:5] == [(10, 40), (10, 60), (10, 60)]


async def test_other_certificates_with_the_same_login_have_no_former_login() -> None:
    broker = MemoryBroker()
    broker.passwords = {b"one"}
    waits = Waits(0.01)
    async with serve(broker) as server:
        taker = Taker()
        target = endpoint(server.port, login_retry_min_seconds=10, login_retry_max_seconds=60)
        connection = Connection(target, options(password=b"one"), taker, jitter=waits)
        with structlog.testing.capture_logs():
            async with running(connection):
                await until(lambda: taker.subscribed == 1)
                broker.passwords = set()
                connection.renew_login(None, b"one")
                await until(lambda: len(broker.tried) >= 3)
    assert waits.asked[1] == (10, 20)


# ---------------------------------------------------------------- Cassandra's session


class FakeStore:
    """Says what it is told to; a real Cassandra shows these faults in tests/integration."""

    def __init__(self) -> None:
        self.renewed: list[Credentials | None] = []
        self.refusal: StoreError | None = None
        self.fault: StoreError | None = None

    async def renew(self, credentials: Credentials | None = None) -> None:
        self.renewed.append(credentials)
        if self.refusal is not None:
            raise self.refusal

    async def check_schema(self) -> None:
        if self.fault is not None:
            raise self.fault


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: LoginPace) -> None:
        monkeypatch.setattr("shadowsvc.logins._CHECK_SECONDS", 0.01)
        self.store = FakeStore()
        self.metrics = Metrics()
        self.now = 0.0
        self.login = StoreLogin(
            self.store, pace, self.metrics, in_doubt=lambda: True, now=lambda: self.now
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.login.run())
        with structlog.testing.capture_logs():
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def test_changed_credentials_make_a_new_session(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, LoginPace(LONG, LONG))
    new = Credentials("service", SecretStr("new"))
    async with bench.running():
        bench.login.change(new)
        await until(lambda: bench.store.renewed == [new])
        await until(lambda: bench.metrics.store_renewals == {"changed": 1})
        assert bench.login.error is None


async def test_a_session_that_could_not_be_made_is_told_and_tried_again_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = Waits(0.01)
    bench = Bench(monkeypatch, LoginPace(10, 60, waits))
    bench.store.refusal = BAD_LOGIN
    async with bench.running():
        bench.login.change(Credentials("service", SecretStr("new")))
        await until(lambda: bench.metrics.store_renewals["failed"] >= 4)
        assert bench.login.error == "Cassandra does not know us"
        assert waits.asked[:4] == [(10, 20), (10, 40), (10, 60), (10, 60)]
        bench.store.refusal = None
        await until(lambda: bench.metrics.store_renewals["retried"] == 1)
        assert bench.login.error is None


async def test_a_changed_password_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, LoginPace(LONG, LONG))
    bench.store.refusal = BAD_LOGIN
    async with bench.running():
        bench.login.change(Credentials("service", SecretStr("wrong")))
        await until(lambda: bench.metrics.store_renewals["failed"] == 1)
        bench.store.refusal = None
        bench.login.change(Credentials("service", SecretStr("right")))
        await until(lambda: bench.metrics.store_renewals["changed"] == 1)


async def test_a_session_without_hosts_is_replaced_when_that_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, LoginPace(LONG, LONG))
    bench.store.fault = NO_HOSTS
    async with bench.running():
        await until(lambda: bench.login._lost_since is not None)
        bench.now = LOST_SECONDS - 1
        await asyncio.sleep(0.1)
        assert bench.store.renewed == []
        bench.now = LOST_SECONDS + 1
        await until(lambda: bench.store.renewed == [None])
        assert bench.metrics.store_renewals == {"lost": 1}


@pytest.mark.parametrize("kind", ["server_write_timeout", "server_bad_credentials"])
async def test_another_outage_replaces_no_session(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bench = Bench(monkeypatch, LoginPace(LONG, LONG))
    bench.store.fault = StoreUnavailable(kind, "an outage")
    async with bench.running():
        bench.now = 10 * LOST_SECONDS
        await asyncio.sleep(0.1)
    assert bench.store.renewed == []


async def test_before_there_is_a_session_a_refused_login_waits_long_and_a_change_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = Waits()
    bench = Bench(monkeypatch, LoginPace(LONG, LONG, waits))
    new = Credentials("service", SecretStr("right"))
    pause = asyncio.create_task(bench.login.pause(BAD_LOGIN, 0.001))
    await until(lambda: waits.asked)
    assert not pause.done()
    bench.login.change(new)
    await asyncio.wait_for(pause, 5)
    assert bench.store.renewed == [new]
    await asyncio.wait_for(bench.login.pause(NO_HOSTS, 0.001), 5)  # no login: a short one


# ---------------------------------------------------------------- cassandra-driver


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A Cassandra that refuses every login; holds who tried."""
    tried: list[Any] = []

    class Cluster:
        def __init__(self, *_: object, auth_provider: Any, **__: object) -> None:
            self.auth_provider = auth_provider
            self.metadata = None

        def connect(self, **_: object) -> None:
            tried.append(self.auth_provider.password)
            raise driver.NoHostAvailable("no", {"127.0.0.1": AuthenticationFailed("who?")})

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(driver, "Cluster", Cluster)
    monkeypatch.setattr(driver, "_wrong_local_dc", lambda *_: None)
    yield tried
    driver.pace_logins(10, 300)


def test_cassandra_is_not_asked_again_too_soon_after_a_refused_login(refusing: list[Any]) -> None:
    settings = Cassandra(username="service", password=SecretStr("wrong"), local_dc="pace")
    for _ in range(3):
        with (
            pytest.raises(StoreUnavailable, match="did not accept") as caught,
            driver.connected(settings),
        ):
            pass
        assert caught.value.kind == "authentication"
        assert "wrong" not in str(caught.value)
    assert "not tried again for" in str(caught.value)
    assert refusing == ["wrong"]
    driver.renew(settings, Credentials("service", SecretStr("right")))
    with pytest.raises(StoreUnavailable), driver.connected(settings):
        pass
    assert refusing == ["wrong", "right"]


def test_the_wait_has_an_end(refusing: list[Any]) -> None:
    driver.pace_logins(0.001, 0.002)
    settings = Cassandra(username="service", password=SecretStr("wrong"), local_dc="end")
    while len(refusing) < 3:
        with pytest.raises(StoreUnavailable), driver.connected(settings):
            pass
