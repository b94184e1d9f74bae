"""The overlay `dev` in a cluster that runs pods: bringing it up, looking at it, taking it down.

Lives here: what a test changes of the overlay, its rollout by the commands of deploy/k8s/README.md,
devices with logins, pods, their logs and figures, the load rig beside it. Rules:

- The cluster is one of the tests' own. A namespace of ours that is there already is never touched:
  whoever has it would lose it at the end.
- The images are in the cluster, or it can pull them: `shadowsvc` and `shadowsvc-load` under the
  version that the manifests name. Grafana is not started, so that machines without its image serve
  as well.
- Every wait has a limit, and a rollout that fails shows what the pods say.

Must not come in: what is published, and what has to come of it (`tests.oracle`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Self

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from backing.addresses import GivenBroker, GivenCassandra
from backing.cql import accepts
from backing.ports import free_port
from backing.process import ServerProcess
from tests.containers.updates import wait_for
from tests.kubernetes.kubectl import attempt, kubectl
from tests.kubernetes.manifests import K8S, WORKLOADS, overlay
from tests.service import Figures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["BROKER", "INGRESS", "LISTENER", "NAMESPACE", "Pod", "System"]

NAMESPACE = "shadowsvc"
LISTENER = "app.kubernetes.io/name=shadowsvc"
BROKER = "app.kubernetes.io/component=broker"
INGRESS = "app.kubernetes.io/name=haproxy"
_LOAD = "shadowsvc-load"
_ROLLOUT_SECONDS = 300
_DELETE_SECONDS = 180
_NAMES = tuple(each["metadata"]["name"] for each in overlay("dev").of("Namespace"))
_OVERRIDES = {
    # A slot that nobody leases again is adopted within half a minute, not within six.
    "SHADOWSVC_SLOTS__LEASE_SECONDS": "15",
    "SHADOWSVC_SLOTS__RENEW_SECONDS": "5",
    "SHADOWSVC_SLOTS__ORPHAN_AFTER_SECONDS": "20",
}
_NO_REPLICAS = {"op": "replace", "path": "/spec/replicas", "value": 0}

Pod = dict[str, Any]


class System:
    """The overlay `dev`, rolled out; a context manager.

    Args:
        folder: for its kustomization and logs.
        devices: names of those that get a login.
    """

    def __init__(self, folder: Path, devices: Sequence[str]) -> None:
        self._folder = folder
        self._devices = list(devices)
        self._free = list(devices)
        self._passwords: dict[str, str] = {}
        self._logs: list[subprocess.Popen[bytes]] = []

    # ---------------------------------------------------------------- life

    def __enter__(self) -> Self:
        """Apply it and wait until all of it is rolled out."""
        names = (*_NAMES, _LOAD)
        found = kubectl("get", "namespaces", "--ignore-not-found", "-o", "name", *names)
        if found:
            pytest.fail(f"{found.split()} are in this cluster: these tests need one without")
        try:
            self._roll_out()
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Delete all of it, volumes too."""
        self._delete()

    def _roll_out(self) -> None:
        secrets = [str(K8S / "dev-secrets"), *self._devices]
        subprocess.run(secrets, check=True, capture_output=True, timeout=60)
        kubectl("apply", "--server-side", "-k", str(self._kustomization()), limit_seconds=120)
        for workload in overlay("dev").of(*WORKLOADS):
            self.wait_rolled_out(workload)
        self._passwords = self._read_passwords()

    def _delete(self) -> None:
        for process in self._logs:
            process.kill()
            process.wait()
        limit = f"--timeout={_DELETE_SECONDS}s"
        names = ("delete", "namespace", "--ignore-not-found", limit, *_NAMES)
        kubectl(*names, limit_seconds=_DELETE_SECONDS + 20)

    def wait_rolled_out(self, workload: dict[str, Any]) -> None:
        """Wait until a workload has what it asks for; fail with what its pods say."""
        kind, metadata = workload["kind"].lower(), workload["metadata"]
        name, limit = f"{kind}/{metadata['name']}", f"--timeout={_ROLLOUT_SECONDS}s"
        how = ("wait", "--for=condition=complete") if kind == "job" else ("rollout", "status")
        done = attempt(
            "-n", metadata["namespace"], *how, name, limit, limit_seconds=_ROLLOUT_SECONDS + 20
        )
        if done.returncode:
            pytest.fail(f"{name}: {done.stdout[-500:]}{done.stderr[-500:]}\n{self._state()}")

    def _kustomization(self) -> Path:
        """Write what a test changes, as a user's own overlay would."""
        relative = os.path.relpath(K8S, self._folder)
        (self._folder / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "resources": [f"{relative}/overlays/dev"],
                    "configMapGenerator": [
                        {
                            "name": "shadowsvc",
                            "namespace": NAMESPACE,
                            "behavior": "merge",
                            "literals": [f"{key}={value}" for key, value in _OVERRIDES.items()],
                        }
                    ],
                    "patches": [
                        {
                            "target": {"kind": "Deployment", "name": "grafana"},
                            "patch": json.dumps([_NO_REPLICAS]),
                        }
                    ],
                }
            )
        )
        return self._folder

    def _state(self) -> str:
        """Return pods, the last events, and the end of each listener's log."""
        log = ("logs", "--prefix", "--tail=15", "--all-containers", "--ignore-errors")
        said = [attempt("get", "pods", "-A", "-o", "wide").stdout]
        for namespace, label in (
            (NAMESPACE, LISTENER),
            (NAMESPACE, "app.kubernetes.io/component=migration"),
            (NAMESPACE, BROKER),
            (f"{NAMESPACE}-ingress", INGRESS),
            (_LOAD, "app.kubernetes.io/component=load"),
        ):
            said.append(attempt("-n", namespace, *log, "-l", label).stdout[-4000:])
        events = attempt("get", "events", "-A", "--sort-by=.lastTimestamp").stdout
        return "\n".join([*said, *events.splitlines()[-30:]])

    # ---------------------------------------------------------------- devices

    def take_devices(self, count: int) -> list[str]:
        """Return devices that no other test publishes for."""
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count, "more logins are needed"
        return taken

    def password(self, device: str) -> str:
        """Return the password of a device."""
        return self._passwords[device]

    @property
    def host(self) -> str:
        """Address of a node with an ingress: where devices connect."""
        (pod,) = self.pods(INGRESS, f"{NAMESPACE}-ingress")
        return str(pod["status"]["hostIP"])

    def broker(self, device: str) -> GivenBroker:
        """Return what this device sees of the broker: HAProxy on a node, and its own login."""
        return GivenBroker(f"mqtt://{device}:{self.password(device)}@{self.host}:1883")

    def _read_passwords(self) -> dict[str, str]:
        encoded = kubectl(
            "-n", NAMESPACE, "get", "secret", "mosquitto-users", "-o", "jsonpath={.data.devices}"
        )
        lines = base64.b64decode(encoded).decode().splitlines()
        return dict(line.split(":", 1) for line in lines)

    # ---------------------------------------------------------------- what is stored

    @contextlib.contextmanager
    def database(self) -> Iterator[GivenCassandra]:
        """Cassandra, by way of the Kubernetes API."""
        with self.forward(NAMESPACE, "pod/cassandra-0", 9042) as port:
            yield GivenCassandra(f"127.0.0.1:{port}")

    @contextlib.contextmanager
    def forward(self, namespace: str, target: str, target_port: int) -> Iterator[int]:
        """Yield a port of the loopback that leads to one of a pod or a Service."""
        port = free_port()
        program = shutil.which("kubectl")
        assert program is not None
        arguments = ["-n", namespace, "port-forward", target, f"{port}:{target_port}"]
        log = self._folder / f"port-forward-{port}.log"
        process = ServerProcess("port-forward", [program, *arguments], log_path=log)
        process.start()
        try:
            process.wait_ready(lambda: accepts("127.0.0.1", port), 20)
            yield port
        finally:
            process.stop(5)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `shadowsvc` command in a listener's container, as the README has it."""
        return attempt("-n", NAMESPACE, "exec", "deployment/shadowsvc", "--", *arguments)

    def get(self, device: str) -> Any:
        """Return the state that `shadowsvc get` shows, None if there is no such device."""
        done = self.command("shadowsvc", "get", device, "--json")
        if done.returncode == 1 and "nothing is known" in done.stderr:
            return None
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["state"]

    # ---------------------------------------------------------------- listeners

    def pods(self, label: str = LISTENER, namespace: str = NAMESPACE) -> list[Pod]:
        """Return the pods that are not about to end."""
        found = json.loads(kubectl("-n", namespace, "get", "pods", "-l", label, "-o", "json"))
        return [each for each in found["items"] if "deletionTimestamp" not in each["metadata"]]

    def listeners(self) -> dict[str, str]:
        """Return the names of the listeners, by the pods' ids."""
        return {each["metadata"]["uid"]: each["metadata"]["name"] for each in self.pods()}

    def figures(self, pod: str) -> Figures:
        """Return what a listener's /metrics say."""
        return _figures(NAMESPACE, f"{pod}:8080")

    def ingress_figures(self) -> Figures:
        """Return what the /metrics of `shadowsvc ingress` say."""
        (pod,) = self.pods(INGRESS, f"{NAMESPACE}-ingress")
        return _figures(f"{NAMESPACE}-ingress", f"{pod['metadata']['name']}:8405")

    def wait_no_slot_is_free(self, count: int, limit_seconds: float = 180) -> None:
        """Wait until there are as many slots as listeners, and each is held by one."""

        def held() -> bool:
            done = self.command("shadowsvc", "slots", "--json")
            assert done.returncode == 0, done.stderr
            states = [slot["state"] for slot in json.loads(done.stdout)["slots"]]
            assert states == ["held"] * count, states
            return True

        wait_for(held, f"{count} slots, all of them held", limit_seconds)

    def follow(self, pod: str) -> Path:
        """Write a pod's log to a file from now on, over the pod's end; returns the file."""
        file = self._folder / f"{pod}.log"
        with file.open("wb") as log:
            self._logs.append(
                subprocess.Popen(
                    ["kubectl", "-n", NAMESPACE, "logs", "--follow", pod],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return file

    # ---------------------------------------------------------------- load rig

    @contextlib.contextmanager
    def load_rig(self, folder: Path, devices: Sequence[str]) -> Iterator[int]:
        """Run the component `load` with one worker; yields a port that leads to its page."""
        relative = os.path.relpath(K8S, folder)
        settings = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "load", "namespace": _LOAD},
            "data": {
                "LOAD_USERNAME": "{client_id}",
                "LOAD_PASSWORDS": "/etc/load/devices/devices",
            },
        }
        (folder / "devices").write_text("".join(f"{n}:{self._passwords[n]}\n" for n in devices))
        (folder / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "components": [f"{relative}/components/load"],
                    "patches": [{"patch": yaml.safe_dump(settings)}],
                    "replicas": [{"name": "load-worker", "count": 1}],
                }
            )
        )
        try:
            kubectl("apply", "-f", str(K8S / "components" / "load" / "namespace.yaml"))
            secret = ("secret", "generic", "load-devices", f"--from-file={folder}/devices")
            kubectl("-n", _LOAD, "create", *secret)
            kubectl("apply", "--server-side", "-k", str(folder), limit_seconds=120)
            for name in ("load", "load-worker"):
                metadata = {"name": name, "namespace": _LOAD}
                self.wait_rolled_out({"kind": "Deployment", "metadata": metadata})
            with self.forward(_LOAD, "service/load", 8089) as port:
                yield port
        finally:
            limit = f"--timeout={_DELETE_SECONDS}s"
            names = ("delete", "namespace", "--ignore-not-found", limit, _LOAD)
            kubectl(*names, limit_seconds=_DELETE_SECONDS + 20)

    # ---------------------------------------------------------------- Prometheus

    def prometheus(self, path: str) -> Any:
        """Ask the API of the overlay's Prometheus."""
        where = "namespaces/shadowsvc-monitoring/services/prometheus:http/proxy"
        return json.loads(kubectl("get", "--raw", f"/api/v1/{where}/api/v1/{path}"))["data"]


def _figures(namespace: str, where: str) -> Figures:
    text = kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/pods/{where}/proxy/metrics")
    families = text_string_to_metric_families(text)
    return Figures(sample for family in families for sample in family.samples)
