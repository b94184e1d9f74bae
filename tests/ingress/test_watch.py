"""Lists and watches, against answers that a real API server does not give on demand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from shadowsvc.errors import ConfigError, KubernetesUnavailable
from shadowsvc.ingress import api
from shadowsvc.ingress.api import Slices, connect
from shadowsvc.ingress.metrics import IngressMetrics
from shadowsvc.settings import Ingress
from tests.ingress.api_server import ApiServer, endpoint_slice, event, expired
from tests.ingress.stage import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from shadowsvc.ingress.model import Broker


class Watching:
    """`Slices` at work, and what it told."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.settings = Ingress(
            service="broker", mqtt_ports=("mqtt",), kubeconfig=server.kubeconfig(folder)
        )
        self.metrics = IngressMetrics()
        self.told: list[tuple[Broker, ...]] = []
        self.client = connect(self.settings)
        self.slices = Slices(
            self.settings, self.client, self.metrics, self.told.append, now=time.monotonic
        )

    @property
    def names(self) -> list[str] | None:
        return [broker.name for broker in self.told[-1]] if self.told else None

    async def see(self, *names: str) -> None:
        await until(f"{names} are told", lambda: self.names == list(names))


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server:
        server.slices = [endpoint_slice("broker-x", {"a": "10.0.0.1"})]
        yield server


@pytest.fixture
async def watching(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Watching]:
    # Short waits; that they are jittered and grow is the promise of `shadowsvc.backoff`.
    monkeypatch.setattr(api, "_RETRY_MIN_SECONDS", 0.02)
    monkeypatch.setattr(api, "_RETRY_MAX_SECONDS", 0.1)
    watching = Watching(server, tmp_path)
    task = asyncio.create_task(watching.slices.run())
    yield watching
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await watching.client.aclose()


async def test_changes_are_told_as_they_come(server: ApiServer, watching: Watching) -> None:
    await watching.see("a")
    await until("it watches", lambda: server.open_watches == 1)
    assert server.watches[-1]["resourceVersion"] == "100"
    assert server.watches[-1]["allowWatchBookmarks"] == "true"
    assert server.watches[-1]["labelSelector"] == "kubernetes.io/service-name=broker"
    two = {"a": "10.0.0.1", "b": "10.0.0.2"}
    await server.tell(event("MODIFIED", endpoint_slice("broker-x", two, version="101")))
    await watching.see("a", "b")
    await server.tell(event("ADDED", endpoint_slice("broker-y", {"c": "10.0.0.3"}, version="102")))
    await watching.see("a", "b", "c")
    await server.tell(
        event("MODIFIED", endpoint_slice("broker-x", two, ready={"a": False}, version="103"))
    )
    await watching.see("b", "c")
    await server.tell(event("DELETED", endpoint_slice("broker-x", two, version="104")))
    await watching.see("c")
    await server.tell(event("DELETED", endpoint_slice("broker-y", {}, version="105")))
    await watching.see()
    assert watching.metrics.events == {"added": 1, "modified": 2, "deleted": 2}
    assert watching.metrics.lists == 1


async def test_a_watch_that_ends_is_resumed_where_a_bookmark_left_it(
    server: ApiServer, watching: Watching
) -> None:
    await watching.see("a")
    await until("it watches", lambda: server.open_watches == 1)
    bookmark = {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"resourceVersion": "177", "creationTimestamp": None},
        "endpoints": None,
        "ports": None,
        "addressType": "",
    }
    await server.tell(event("BOOKMARK", bookmark))
    await until("it is seen", lambda: watching.metrics.events["bookmark"] == 1)
    await server.end()
    await until("it watches again", lambda: len(server.watches) == 2)
    assert server.watches[-1]["resourceVersion"] == "177"
    assert watching.metrics.lists == 1
    assert watching.names == ["a"]


async def test_an_expired_watch_lists_anew(server: ApiServer, watching: Watching) -> None:
    await watching.see("a")
    await until("it watches", lambda: server.open_watches == 1)
    server.slices = [endpoint_slice("broker-x", {"b": "10.0.0.2"}, version="200")]
    server.version = "200"
    await server.tell(event("ERROR", expired()))
    await watching.see("b")
    assert watching.metrics.watches_expired == 1
    await until("it watches again", lambda: server.watches[-1]["resourceVersion"] == "200")


async def test_a_watch_that_is_always_expired_does_not_become_a_busy_loop(
    server: ApiServer, watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []

    def wait_seconds(failures: int, _least: float, _most: float) -> float:
        waits.append(failures)
        return 0.01

    monkeypatch.setattr(api, "wait_seconds", wait_seconds)

    async def gone(_query: dict[str, str]) -> bytes:
        return event("ERROR", expired())

    server.on_watch = gone
    await until("it is expired many times", lambda: watching.metrics.watches_expired >= 6)
    # The first list anew is at once, each further one later than the one before.
    assert len(waits) >= 4
    assert waits[:4] == sorted(set(waits[:4]))
    server.on_watch = None
    await until("it watches", lambda: server.open_watches == 1)
    await server.tell(event("ADDED", endpoint_slice("broker-y", {"c": "10.0.0.3"}, version="9")))
    await watching.see("a", "c")


async def test_a_watch_cut_in_its_middle_goes_on_where_it_was(
    server: ApiServer, watching: Watching
) -> None:
    await watching.see("a")
    await until("it watches", lambda: server.open_watches == 1)
    two = {"a": "10.0.0.1", "b": "10.0.0.2"}
    await server.tell(event("MODIFIED", endpoint_slice("broker-x", two, version="150")))
    await watching.see("a", "b")
    await server.cut()
    await until("it watches again", lambda: len(server.watches) == 2)
    assert server.watches[-1]["resourceVersion"] == "150"
    assert watching.metrics.api_errors["network"] == 1
    assert watching.names == ["a", "b"]


async def test_what_is_known_stays_while_the_api_is_away(
    server: ApiServer, watching: Watching
) -> None:
    await watching.see("a")
    await until("it watches", lambda: server.open_watches == 1)
    told = len(watching.told)
    await server.stop()
    await until("it is refused", lambda: watching.metrics.api_errors["connect"] >= 2)
    assert watching.metrics.api_error is not None
    assert len(watching.told) == told  # nothing was told: what was known stays
    await server.start()
    await until("it watches again", lambda: server.open_watches == 1)
    await until("it is well", lambda: watching.metrics.api_error is None)
    two = {"a": "10.0.0.1", "b": "10.0.0.2"}
    await server.tell(event("MODIFIED", endpoint_slice("broker-x", two, version="160")))
    await watching.see("a", "b")


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "unauthorized"), (403, "forbidden"), (429, "too_many_requests"), (500, "refused")],
)
async def test_a_list_that_is_refused_has_a_reason(
    server: ApiServer, watching: Watching, status: int, reason: str
) -> None:
    await watching.see("a")
    server.status = status
    with pytest.raises(KubernetesUnavailable, match="as the test wants it") as caught:
        await watching.slices.list()
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b'{"metadata": {}}',
        b'{"items": [1], "metadata": {"resourceVersion": "1"}}',
        b'{"items": [{"endpoints": 7}], "metadata": {"resourceVersion": "1"}}',
        b'{"items": [], "metadata": null}',
    ],
)
async def test_a_list_without_sense_changes_nothing(
    server: ApiServer, watching: Watching, body: bytes
) -> None:
    await watching.see("a")
    server.body = body
    with pytest.raises(KubernetesUnavailable) as caught:
        await watching.slices.list()
    assert caught.value.reason == "nonsense"
    assert watching.names == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[]\n",
        b'{"type": "ADDED"}\n',
        event("ADDED", {"metadata": {"name": 7}}),
    ],
)
async def test_an_event_without_sense_begins_the_watch_again(
    server: ApiServer, watching: Watching, line: bytes
) -> None:
    await watching.see("a")
    await until("it watches", lambda: server.open_watches == 1)
    await server.tell(line)
    await until("it watches again", lambda: len(server.watches) == 2)
    assert watching.metrics.api_errors["nonsense"] == 1
    assert watching.names == ["a"]


async def test_a_long_list_comes_in_pages(server: ApiServer, watching: Watching) -> None:
    await watching.see("a")
    server.page = 2
    server.slices = [
        endpoint_slice(f"broker-{number}", {f"p{number}": f"10.0.0.{number}"})
        for number in range(1, 6)
    ]
    found = await watching.slices.list()
    assert [broker.name for broker in found] == ["p1", "p2", "p3", "p4", "p5"]
    assert [query.get("continue") for query in server.lists[-3:]] == [None, "2", "4"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "not found"),
        ("nonsense", "not written as"),
        ("apiVersion: v1\nkind: Config\n", "not written as"),
    ],
)
def test_a_kubeconfig_that_does_not_do_is_a_mistake(
    tmp_path: Path, text: str | None, why: str
) -> None:
    file = tmp_path / "kubeconfig"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        connect(Ingress(kubeconfig=file))
    assert caught.value.mistakes[0].startswith("SHADOWSVC_INGRESS__KUBECONFIG: ")
    assert why in caught.value.mistakes[0]


def test_without_kubeconfig_and_service_account_it_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match="SHADOWSVC_INGRESS__KUBECONFIG"):
        connect(Ingress())
