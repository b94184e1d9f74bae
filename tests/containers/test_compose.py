"""`docker compose up`: the whole system comes up, carries updates, loses none, and goes again.

What runs here is the variant with mosquitto, and without Grafana: the tests are for engines that
may have neither VerneMQ's image (its licence has to be accepted) nor Grafana's. Of the variant with
VerneMQ, and of Grafana, only the configuration is checked. The tests of the stack build on each
other, in the order of the file; one project of its own name, on free ports of the loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import pytest

from backing import free_port
from tests.containers.updates import QUERY, Publisher, locust, rows, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.containers.conftest import Built

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
MOSQUITTO = ("docker-compose.yml", "deploy/compose/mosquitto.yml")
VARIANTS = {"vernemq": ("docker-compose.yml",), "mosquitto": MOSQUITTO}
PORTS = ("MQTT_PORT", "WEBSOCKET_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT", "LOAD_PORT")
WITHOUT_GRAFANA = "services: {grafana: {profiles: [grafana]}}\n"
UP_SECONDS = 400
WORKERS = 2
"""Of the load rig, as docker-compose.yml has it."""


class Compose:
    """`docker compose` with the files and variables of one project."""

    def __init__(self, *files: Path | str, project: str = "check", **variables: str) -> None:
        self.project = project
        self.ports = {name: free_port() for name in PORTS}
        self._options = [part for file in files for part in ("-f", str(file))]
        ports = {name: str(port) for name, port in self.ports.items()}
        kept = {name: value for name, value in os.environ.items() if "COMPOSE" not in name}
        self._environment = {**kept, **ports, **variables}

    def __call__(self, *arguments: str, limit_seconds: float = 60) -> str:
        """Run it to its end; returns standard output."""
        done = self.attempt(*arguments, limit_seconds=limit_seconds)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def attempt(
        self, *arguments: str, limit_seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", "compose", "-p", self.project, *self._options, *arguments],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )


@pytest.fixture(scope="module")
def compose_command(engine: docker.DockerClient) -> None:
    del engine
    program = shutil.which("docker")
    found = program and subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False, timeout=30
    )
    if not found or found.returncode:
        reason = "there is no `docker compose`: install the Compose plugin, 2.24 or later"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


# -------------------------------------------------------------------- configuration


@pytest.fixture(params=list(VARIANTS))
def configuration(request: pytest.FixtureRequest, compose_command: None) -> dict[str, Any]:
    del compose_command
    made = Compose(*VARIANTS[request.param])
    found: dict[str, Any] = json.loads(made("--profile", "devices", "config", "--format", "json"))
    found["variant"] = request.param
    return found


def test_both_variants_are_valid_and_differ_in_the_broker_alone(
    configuration: dict[str, Any],
) -> None:
    broker = configuration["services"]["broker"]
    if configuration["variant"] == "vernemq":
        assert broker["image"].startswith("vernemq/vernemq:")
        environment = broker["environment"]
        assert environment["DOCKER_VERNEMQ_ACCEPT_EULA"] == "no", "accepting is the user's"
        assert environment["DOCKER_VERNEMQ_MAX_ONLINE_MESSAGES"] == "-1"
        assert environment["DOCKER_VERNEMQ_SHARED_SUBSCRIPTION_POLICY"] != "prefer_local"
    else:
        assert broker["image"].startswith("eclipse-mosquitto:")
        assert not broker.get("environment")
    expected = {"broker", "cassandra", "migrate", "shadowsvc", "haproxy", "prometheus", "grafana"}
    assert set(configuration["services"]) == {*expected, "devices"}
    assert configuration["services"]["shadowsvc"]["deploy"]["replicas"] == 2


def test_every_port_is_on_the_loopback_every_image_has_its_version_and_every_file_exists(
    configuration: dict[str, Any],
) -> None:
    for name, service in configuration["services"].items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
        assert re.search(r":v?[\w.]*\d|:dev$", service["image"]), service["image"]
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), volume
                assert volume["read_only"], volume


def test_our_containers_may_do_nothing_and_are_given_time_to_drain(
    configuration: dict[str, Any],
) -> None:
    for name in ("migrate", "shadowsvc", "devices"):
        service = configuration["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    # Ten seconds more than SHADOWSVC_LIMITS__DRAIN_TIMEOUT_SECONDS.
    assert configuration["services"]["shadowsvc"]["stop_grace_period"] == "30s"


# -------------------------------------------------------------------- the running system


class Stack:
    """The project that runs, and how to look at it."""

    def __init__(self, compose: Compose, engine: docker.DockerClient) -> None:
        self.compose = compose
        self._engine = engine

    def publisher(self, *, websocket: bool = False) -> Publisher:
        port = self.compose.ports["WEBSOCKET_PORT" if websocket else "MQTT_PORT"]
        return Publisher("127.0.0.1", port, websocket=websocket)

    def get(self, device: str) -> dict[str, Any] | None:
        """What `shadowsvc get` prints in a listener's container; None if there is no such."""
        command = ("exec", "-T", "shadowsvc", "shadowsvc", "get", device, "--json")
        try:
            done = self.compose.attempt(*command, limit_seconds=40)
        except subprocess.TimeoutExpired as error:
            running = self.compose("top", "shadowsvc")
            if error.stdout and "shadowsvc get" in running:
                pytest.fail(f"`get` printed, and did not end: {running}")
            raise AssertionError(f"not ended by the engine: {error}") from error  # ask again
        if done.returncode == 1:
            assert "nothing is known" in done.stderr, done.stderr
            return None
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def stored(self) -> dict[str, int]:
        return rows(self.compose("exec", "-T", "cassandra", "cqlsh", "-e", QUERY))

    def listeners(self) -> list[Any]:
        return self.containers("shadowsvc")

    def containers(self, service: str | None = None) -> list[Any]:
        """Return the containers of a service, or all, stopped ones included."""
        labels = [f"com.docker.compose.project={self.compose.project}"]
        if service is not None:
            labels.append(f"com.docker.compose.service={service}")
        return list(self._engine.containers.list(all=True, filters={"label": labels}))

    def prometheus(self, path: str) -> Any:
        port = self.compose.ports["PROMETHEUS_PORT"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as page:
            return json.load(page)["data"]

    def locust(self, path: str, **fields: str) -> Any:
        """What the page of the load rig answers."""
        return locust(self.compose.ports["LOAD_PORT"], path, **fields)

    def down(self) -> None:
        profiles = ("--profile", "devices", "--profile", "load")
        arguments = (*profiles, "down", "--volumes", "--timeout", "40")
        self.compose(*arguments, limit_seconds=180)


@pytest.fixture(scope="module")
def stack(
    engine: docker.DockerClient,
    compose_command: None,
    built: Built,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    del compose_command
    override = tmp_path_factory.mktemp("compose") / "without-grafana.yml"
    override.write_text(WITHOUT_GRAFANA)
    project = f"shadowsvc-test-{uuid.uuid4().hex[:8]}"
    images = {"SHADOWSVC_IMAGE": built.name, "LOAD_IMAGE": f"{project}-load:test"}
    compose = Compose(*MOSQUITTO, override, project=project, **images)
    made = Stack(compose, engine)
    try:
        up = compose.attempt("up", "--detach", "--wait", limit_seconds=UP_SECONDS)
        if up.returncode:
            logs = compose.attempt("logs", "--tail", "30").stdout
            pytest.fail(f"up ended with {up.returncode}: {up.stderr[-3000:]}\n{logs[-6000:]}")
        yield made
    finally:
        made.down()
        with contextlib.suppress(docker.errors.APIError):  # its layers are the next build's cache
            engine.images.remove(images["LOAD_IMAGE"], noprune=True)


def test_it_comes_up_in_order_and_healthy(stack: Stack) -> None:
    (migration,) = stack.containers("migrate")
    state = migration.attrs["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    assert len(stack.listeners()) == 2
    for service in ("broker", "cassandra", "haproxy", "prometheus", "shadowsvc"):
        for container in stack.containers(service):
            container.reload()
            assert container.attrs["State"]["Health"]["Status"] == "healthy", container.name
    for listener in stack.listeners():
        assert listener.attrs["State"]["StartedAt"] > state["FinishedAt"]
    assert stack.containers("devices") == []


@pytest.mark.parametrize("websocket", [True, False], ids=["websocket", "mqtt"])
def test_an_update_published_through_haproxy_is_read_back_in_a_container(
    stack: Stack, unique: str, *, websocket: bool
) -> None:
    stack.publisher(websocket=websocket).send(unique, 7)

    def stored() -> bool:
        found = stack.get(unique)
        return found is not None and found["state"] == {"reported": {"value": 7}}

    wait_for(stored, "the update can be read")


def test_a_listener_that_is_killed_under_load_loses_nothing(stack: Stack, unique: str) -> None:
    victim, survivor = stack.listeners()
    publisher = stack.publisher(websocket=True)
    devices = [f"{unique}-{number}" for number in range(800)]
    killed = threading.Event()

    def kill() -> None:
        victim.kill()
        killed.set()

    publisher.send_while(devices, 200, kill)
    assert killed.is_set()
    assert len(publisher.taken) == len(devices)
    victim.reload()
    assert victim.attrs["State"]["ExitCode"] == 137
    # mosquitto goes on handing the absent member its share, which waits in the session of its slot.
    # Whoever takes the slot gets it: here the victim, once its lease has ended; else an adoption.

    def slot_is_free() -> bool:
        code, output = survivor.exec_run(["shadowsvc", "slots", "--json"])
        assert code == 0, output
        return any(slot["state"] == "free" for slot in json.loads(output)["slots"])

    wait_for(slot_is_free, "the lease of the killed one has ended", 90)
    victim.start()

    def all_there() -> bool:
        kept = stack.stored()
        missing = [name for name, value in publisher.taken.items() if kept.get(name) != value]
        assert not missing, f"{len(missing)} missing, such as {sorted(missing)[:5]}"
        return True

    wait_for(all_there, "what was published is stored", 150)
    survivor.reload()
    assert survivor.attrs["RestartCount"] == 0
    assert survivor.status == "running"


def test_prometheus_scrapes_every_target_and_has_the_rules(stack: Stack) -> None:
    def all_up() -> bool:
        targets = stack.prometheus("targets?state=active")["activeTargets"]
        up = sorted(one["labels"]["job"] for one in targets if one["health"] == "up")
        assert up == ["haproxy", "prometheus", "shadowsvc", "shadowsvc"], targets
        assert len(targets) == len(up), "no target is down"
        return True

    wait_for(all_up, "every target is up", 90)
    groups = stack.prometheus("rules")["groups"]
    files = {Path(group["file"]).name for group in groups}
    assert files == {path.name for path in (ROOT / "deploy/monitoring/rules").glob("*.yml")}
    broken = [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]
    assert not broken
    ready = stack.prometheus("query?query=sum(shadowsvc_ready)")["result"]
    assert ready[0]["value"][1] == "2"

    def as_large_as_allowed() -> bool:
        found = stack.prometheus("query?query=min(shadowsvc_batch_max_partitions)")["result"]
        return bool(found[0]["value"][1] == "32")

    wait_for(as_large_as_allowed, "batches are as large as this Cassandra allows", 60)


def test_the_profile_devices_publishes(stack: Stack) -> None:
    stack.compose(
        "--profile", "devices", "up", "--detach", "--no-recreate", "devices", limit_seconds=120
    )

    def heard() -> bool:
        return stack.get("sim-000000") is not None

    wait_for(heard, "a simulated device has a shadow", 90)
    (devices,) = stack.containers("devices")
    assert devices.status == "running"
    assert devices.attrs["RestartCount"] == 0


def test_the_profile_load_has_devices_by_way_of_its_page(stack: Stack) -> None:
    profile = ("--profile", "load")
    stack.compose(*profile, "build", "load", limit_seconds=400)
    arguments = ("up", "--detach", "--no-recreate", "--wait", "load", "load-worker")
    stack.compose(*profile, *arguments, limit_seconds=120)

    def workers_have_come() -> bool:
        return len(stack.locust("stats/requests")["workers"]) == WORKERS

    wait_for(workers_have_come, "the master answers, and has its workers", 90)
    form = {
        "user_count": "20",
        "spawn_rate": "10",
        "host": "ws://haproxy:8000/mqtt",
        "interval": "1",
    }
    assert stack.locust("swarm", **form)["success"] is True

    def updates_are_answered() -> bool:
        found = stack.locust("stats/requests")
        assert found["errors"] == []
        counted = {one["name"]: one["num_requests"] for one in found["stats"]}
        return counted.get("connect") == 20 and counted.get("publish to PUBACK", 0) > 100

    wait_for(updates_are_answered, "devices of the rig publish", 90)
    wait_for(lambda: stack.get("load-0000000") is not None, "one of them has a shadow", 60)
    stack.locust("stop", now="yes")
    stack.compose(*profile, "stop", "load", "load-worker", limit_seconds=120)
    for container in (*stack.containers("load"), *stack.containers("load-worker")):
        container.reload()
        assert container.attrs["State"]["ExitCode"] == 0, container.logs().decode()[-2000:]


def test_the_listeners_drain_when_they_are_stopped(stack: Stack) -> None:
    stack.compose("stop", "shadowsvc", limit_seconds=120)
    for listener in stack.listeners():
        listener.reload()
        assert listener.attrs["State"]["ExitCode"] == 0
        lines = [json.loads(line) for line in listener.logs().decode().splitlines()]
        stopped = [event for event in lines if event["event"] == "stopped"]
        assert stopped[-1]["drained"] is True


def test_down_leaves_nothing(stack: Stack, engine: docker.DockerClient) -> None:
    assert stack.containers() != []
    stack.down()
    filters = {"label": f"com.docker.compose.project={stack.compose.project}"}
    assert stack.containers() == []
    assert engine.networks.list(filters=filters) == []
    assert engine.volumes.list(filters=filters) == []
