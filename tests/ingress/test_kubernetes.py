"""The ingress and a real Kubernetes API: `KUBECONFIG` leads to it, as an admin of it.

An API server alone suffices: nothing here needs a pod. EndpointSlices may not name loopback
addresses, so the brokers listen on this machine's own, each with ports of its own and in a slice
of its own, as a Service whose pods' ports differ has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from lightkube import Client
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ApiError
from lightkube.models.authentication_v1 import TokenRequestSpec
from lightkube.models.core_v1 import ObjectReference
from lightkube.models.discovery_v1 import Endpoint, EndpointConditions, EndpointPort
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.models.rbac_v1 import PolicyRule, RoleRef, Subject
from lightkube.resources.core_v1 import Namespace, ServiceAccount, ServiceAccountToken
from lightkube.resources.discovery_v1 import EndpointSlice
from lightkube.resources.rbac_authorization_v1 import Role, RoleBinding

from backing import Mosquitto
from shadowsvc.ingress.api import Slices, connect
from shadowsvc.ingress.metrics import IngressMetrics
from shadowsvc.settings import Ingress
from tests.ingress.devices import Device, Fleet
from tests.ingress.stage import LISTEN, until
from tests.ingress.test_command import Command, run, settings
from tests.proxied import Proxied

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shadowsvc.ingress.model import Broker

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(180)]

SERVICE = "broker"


def own_address() -> str:
    """An address of this machine that is not a loopback's; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            pytest.fail(f"this machine has no address but loopback's: {error}")
        return str(probe.getsockname()[0])


class Cluster:
    """A namespace of its own, and what is in it."""

    def __init__(self, kubeconfig: str) -> None:
        found = KubeConfig.from_file(kubeconfig).get()
        assert found is not None
        self.config = found
        self.client = Client(config=found)
        self.namespace = f"ingress-{uuid.uuid4().hex[:8]}"
        self.client.create(Namespace(metadata=ObjectMeta(name=self.namespace)))

    def close(self) -> None:
        self.client.delete(Namespace, self.namespace)
        self.client.close()

    def put(self, pod: str, broker: Mosquitto, *, ready: bool = True) -> None:
        """Create or change the slice of one broker."""
        slice_ = EndpointSlice(
            metadata=ObjectMeta(
                name=f"{SERVICE}-{pod}",
                namespace=self.namespace,
                labels={"kubernetes.io/service-name": SERVICE},
            ),
            addressType="IPv4",
            endpoints=[
                Endpoint(
                    addresses=[broker.host],
                    conditions=EndpointConditions(ready=ready, serving=True, terminating=not ready),
                    targetRef=ObjectReference(kind="Pod", name=pod, namespace=self.namespace),
                )
            ],
            ports=[
                EndpointPort(name="mqtt", port=broker.port, protocol="TCP"),
                EndpointPort(name="ws", port=broker.websockets_port, protocol="TCP"),
            ],
        )
        try:
            self.client.create(slice_)
        except ApiError as error:
            if error.status.code != 409:
                raise
            self.client.replace(slice_)

    def remove(self, pod: str) -> None:
        self.client.delete(EndpointSlice, f"{SERVICE}-{pod}", namespace=self.namespace)

    def account(self, name: str, *, may_watch: bool) -> str:
        """A service account's token, with the rights that docs/ingress.md names or with none."""
        meta = ObjectMeta(name=name, namespace=self.namespace)
        self.client.create(ServiceAccount(metadata=meta))
        if may_watch:
            rule = PolicyRule(
                apiGroups=["discovery.k8s.io"],
                resources=["endpointslices"],
                verbs=["get", "list", "watch"],
            )
            self.client.create(Role(metadata=meta, rules=[rule]))
            self.client.create(
                RoleBinding(
                    metadata=meta,
                    roleRef=RoleRef(apiGroup="rbac.authorization.k8s.io", kind="Role", name=name),
                    subjects=[Subject(kind="ServiceAccount", name=name, namespace=self.namespace)],
                )
            )
        made = self.client.create(
            ServiceAccountToken(metadata=meta, spec=TokenRequestSpec(audiences=[])),
            name,
            namespace=self.namespace,
        )
        return str(made.status.token)

    def kubeconfig(self, folder: Path, token: str, server: str | None = None) -> Path:
        """A file for that token; through `server`, whose name no certificate has, if given."""
        file = folder / f"kubeconfig-{uuid.uuid4().hex[:6]}"
        cluster = self.config.cluster
        if server is not None:
            trust = "insecure-skip-tls-verify: true"
        elif cluster.certificate_auth_data:
            trust = f"certificate-authority-data: {cluster.certificate_auth_data}"
        else:
            trust = f'certificate-authority: "{cluster.certificate_auth}"'
        file.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
            "contexts: [{name: c, context: {cluster: c, user: u}}]\n"
            f'clusters: [{{name: c, cluster: {{server: "{server or cluster.server}", {trust}}}}}]\n'
            f"users: [{{name: u, user: {{token: {token}}}}}]\n"
        )
        return file


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    kubeconfig = os.environ.get("KUBECONFIG")
    if not kubeconfig:
        pytest.fail("KUBECONFIG is not set: these tests need a Kubernetes API")
    cluster = Cluster(kubeconfig)
    yield cluster
    cluster.close()


@pytest.fixture
def brokers() -> Iterator[list[Mosquitto]]:
    address = own_address()
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Mosquitto(host=address, websockets=True)) for _ in range(3)]


async def has(command: Command, text: str) -> bool:
    return text in (await command.page("/metrics"))[1]


async def test_endpoints_are_added_removed_and_all_gone(
    cluster: Cluster, brokers: list[Mosquitto], folder: Path, tmp_path: Path
) -> None:
    token = cluster.account("ingress", may_watch=True)
    given = settings(
        folder,
        cluster.kubeconfig(tmp_path, token),
        INGRESS__NAMESPACE=cluster.namespace,
        INGRESS__START_HAPROXY=True,
    )
    port = int(str(given["INGRESS__LISTEN_WEBSOCKET"]))
    command = Command(given, tmp_path / "log")
    cluster.put("broker-0", brokers[0])
    command.process.start()
    fleet = Fleet()
    try:
        await until("it is ready", command.ready)
        cluster.put("broker-1", brokers[1])
        await until("it is added", lambda: has(command, 'changes_total{kind="added"} 2.0'))
        await fleet.grow(200, LISTEN, port)

        cluster.put("broker-2", brokers[2])
        await until("it is added", lambda: has(command, 'changes_total{kind="added"} 4.0'))
        cluster.put("broker-0", brokers[0], ready=False)  # it ends, as a pod does
        await until("it leaves", lambda: has(command, "servers_leaving 1.0"))
        cluster.remove("broker-0")
        assert await fleet.alive() == 200

        cluster.remove("broker-1")
        cluster.remove("broker-2")
        await until("it is noted", lambda: has(command, "brokers_absent 1.0"))
        assert await fleet.alive() == 200
        late = await Device.connect(LISTEN, port, name="late", websocket=True)
        assert await late.ping()
        late.close()

        cluster.put("broker-0", brokers[0])
        await until("it is noted", lambda: has(command, "brokers_absent 0.0"))
        assert await fleet.alive() == 200
        assert fleet.lost == 0
        assert not await has(command, "reloads_total{")  # none at all
        assert await command.ready()
    finally:
        fleet.close()
        await command.stop()


async def test_the_api_goes_away_in_the_middle_of_a_watch(
    cluster: Cluster, brokers: list[Mosquitto], folder: Path, tmp_path: Path
) -> None:
    token = cluster.account("ingress", may_watch=True)
    cluster.put("broker-0", brokers[0])
    server = urlsplit(cluster.config.cluster.server)
    with Proxied(str(server.hostname), server.port or 443) as proxied:
        given = settings(
            folder,
            cluster.kubeconfig(tmp_path, token, f"https://127.0.0.1:{proxied.port}"),
            INGRESS__NAMESPACE=cluster.namespace,
            INGRESS__START_HAPROXY=True,
        )
        port = int(str(given["INGRESS__LISTEN_MQTT"]))
        command = Command(given, tmp_path / "log")
        command.process.start()
        try:
            await until("it is ready", command.ready)
            device = await Device.connect(LISTEN, port, name="d")

            await asyncio.to_thread(proxied.do, lambda proxy: proxy.refuse())
            assert await asyncio.to_thread(proxied.do, lambda proxy: proxy.reset()) > 0
            await until("it is noted", lambda: has(command, "api_up 0.0"))
            cluster.put("broker-1", brokers[1])  # nobody hears of it
            cluster.remove("broker-0")
            assert await command.ready()
            other = await Device.connect(LISTEN, port, name="e")
            assert await other.ping()

            await asyncio.to_thread(proxied.do, lambda proxy: proxy.heal())
            await until(
                "it has caught up",
                lambda: has(command, 'changes_total{kind="added"} 2.0'),
                limit_seconds=60,
            )
            await until("it is noted", lambda: has(command, "api_up 1.0"))
            assert await device.ping()
            assert await other.ping()
            device.close()
            other.close()
        finally:
            await command.stop()


async def test_without_the_right_to_watch_it_says_so(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    token = cluster.account("nobody", may_watch=False)
    given = settings(
        folder, cluster.kubeconfig(tmp_path, token), INGRESS__NAMESPACE=cluster.namespace
    )
    command = Command(given, tmp_path / "log")
    command.process.start()
    try:
        await until("it is noted", lambda: has(command, 'api_errors_total{reason="forbidden"}'))
        _, text = await command.page("/readyz")
        assert "needs get, list and watch of endpointslices" in text
    finally:
        await command.stop()


async def test_print_asks_the_real_api(
    cluster: Cluster, brokers: list[Mosquitto], folder: Path, tmp_path: Path
) -> None:
    token = cluster.account("ingress", may_watch=True)
    cluster.put("broker-0", brokers[0])
    given = settings(
        folder, cluster.kubeconfig(tmp_path, token), INGRESS__NAMESPACE=cluster.namespace
    )
    done = await asyncio.to_thread(run, "--print", **given)
    assert done.returncode == 0, done.stderr
    assert f"server broker-0.mqtt {brokers[0].host}:{brokers[0].port} check" in done.stdout


async def test_a_version_that_is_too_old_is_listed_anew(
    cluster: Cluster, brokers: list[Mosquitto], tmp_path: Path
) -> None:
    token = cluster.account("ingress", may_watch=True)
    cluster.put("broker-0", brokers[0])
    ingress = Ingress(
        kubeconfig=cluster.kubeconfig(tmp_path, token),
        namespace=cluster.namespace,
        service=SERVICE,
    )
    metrics = IngressMetrics()
    told: list[tuple[Broker, ...]] = []
    client = connect(ingress)
    slices = Slices(ingress, client, metrics, told.append, now=time.monotonic)
    slices._version = "1"  # as if it had slept since the cluster was new
    task = asyncio.create_task(slices.run())
    try:
        await until("it is listed", lambda: bool(told))
        assert metrics.watches_expired == 1
        assert [broker.name for broker in told[-1]] == ["broker-0"]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.aclose()
