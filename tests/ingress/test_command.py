"""`shadowsvc ingress` as a person or a container runs it: a process, with an API and a HAProxy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backing import Mosquitto, free_port
from backing.process import ServerProcess
from tests.ingress.api_server import ApiServer, endpoint_slice, event
from tests.ingress.devices import Device
from tests.ingress.stage import HAPROXY, LISTEN, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]


def environ(**given: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHADOWSVC_")}
    settings = {f"SHADOWSVC_{name}": str(value) for name, value in given.items()}
    return {**kept, "PYTHONPATH": str(ROOT / "src"), **settings}


def run(*arguments: str, **given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shadowsvc", "ingress", *arguments],
        capture_output=True,
        text=True,
        env=environ(**given),
        timeout=60,
        check=False,
    )


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server:
        yield server


def slice_of(pods: dict[str, Mosquitto], version: str = "1") -> dict[str, object]:
    """One slice; the pods have their ports in common, as pods have."""
    first = next(iter(pods.values()))
    assert first.websockets_port is not None
    return endpoint_slice(
        "broker-x",
        {name: pod.host for name, pod in pods.items()},
        ports={"mqtt": first.port, "ws": first.websockets_port},
        version=version,
    )


def settings(folder: Path, kubeconfig: Path, **more: object) -> dict[str, object]:
    return {
        "INGRESS__KUBECONFIG": kubeconfig,
        "INGRESS__SERVICE": "broker",
        "INGRESS__MQTT_PORTS": "mqtt",
        "INGRESS__WEBSOCKET_PORTS": "ws",
        "INGRESS__DIRECTORY": folder,
        "INGRESS__HAPROXY": HAPROXY,
        "INGRESS__LISTEN_HOST": LISTEN,
        "INGRESS__STATISTICS_HOST": LISTEN,
        "INGRESS__LISTEN_MQTT": free_port(),
        "INGRESS__LISTEN_WEBSOCKET": free_port(),
        "INGRESS__LISTEN_STATISTICS": free_port(),
        "INGRESS__MAX_CONNECTIONS": 500,
        "HTTP__HOST": LISTEN,
        "HTTP__PORT": free_port(),
        "LIMITS__DRAIN_TIMEOUT_SECONDS": 1,
        **more,
    }


class Command:
    """The process, and its pages."""

    def __init__(self, given: dict[str, object], log: Path) -> None:
        self.given = given
        self.process = ServerProcess(
            "shadowsvc ingress",
            [sys.executable, "-m", "shadowsvc", "ingress"],
            log_path=log,
            env=environ(**given),
        )

    async def page(self, path: str) -> tuple[int, str]:
        def get() -> tuple[int, str]:
            url = f"http://{LISTEN}:{self.given['HTTP__PORT']}{path}"
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()
            except OSError as error:
                return 0, str(error)

        return await asyncio.to_thread(get)

    async def ready(self) -> bool:
        return (await self.page("/readyz"))[0] == 200

    async def stop(self) -> None:
        await asyncio.to_thread(self.process.stop)


async def test_print_renders_once(server: ApiServer, tmp_path: Path, folder: Path) -> None:
    server.slices = [endpoint_slice("broker-x", {"a": "10.0.0.1"})]
    given = settings(folder, server.kubeconfig(tmp_path))
    done = await asyncio.to_thread(run, "--print", **given)
    assert done.returncode == 0, done.stderr
    assert "server a.mqtt 10.0.0.1:1883 check" in done.stdout
    assert len(server.lists) == 1
    assert not server.watches
    assert not await asyncio.to_thread(lambda: list(folder.iterdir()))


async def test_print_tells_what_is_wrong(server: ApiServer, tmp_path: Path, folder: Path) -> None:
    given = settings(folder, server.kubeconfig(tmp_path))
    template = tmp_path / "bad.j2"
    template.write_text("global\n{{ nothing }}\n")
    done = await asyncio.to_thread(run, "--print", **{**given, "INGRESS__TEMPLATE_FILE": template})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "shadowsvc: line 2: 'nothing' is undefined\n"
    await server.stop()
    done = await asyncio.to_thread(run, "--print", **given)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    done = await asyncio.to_thread(run, "--print")
    assert (done.returncode, done.stdout) == (2, "")
    assert "SHADOWSVC_INGRESS__KUBECONFIG" in done.stderr


def test_help_teaches() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("--print", "EndpointSlices", "haproxy -W -db", "SHADOWSVC_INGRESS__SERVICE"):
        assert word in done.stdout


async def test_it_starts_haproxy_follows_the_api_and_ends_in_good_order(
    server: ApiServer, tmp_path: Path, folder: Path
) -> None:
    with (
        Mosquitto(host="127.0.0.61", websockets=True) as a,
        Mosquitto(host="127.0.0.62", websockets=True, port=a.port) as b,
    ):
        given = settings(folder, server.kubeconfig(tmp_path), INGRESS__START_HAPROXY=True)
        command = Command(given, tmp_path / "log")
        command.process.start()
        try:
            await until("it lives", lambda: _is(command, "/livez", 200))
            # Nothing is known yet: no configuration, not ready, and it says why.
            status, text = await command.page("/readyz")
            assert status == 503
            assert json.loads(text)["reasons"][0]["reason"] == "no_configuration"
            await until("it watches", lambda: server.open_watches == 1)
            await server.tell(event("ADDED", slice_of({"a": a})))
            await until("it is ready", command.ready)
            device = await Device.connect(LISTEN, int(str(given["INGRESS__LISTEN_MQTT"])), name="d")
            assert await device.ping()

            await server.tell(event("MODIFIED", slice_of({"a": a, "b": b}, "2")))
            await until("b is added", lambda: _has(command, 'changes_total{kind="added"} 2.0'))
            # The API goes away and comes back without endpoints: nothing changes for devices.
            await server.stop()
            await until("it is noted", lambda: _has(command, "api_up 0.0"))
            assert await command.ready()
            await server.start()
            await until("it is noted", lambda: _has(command, "api_up 1.0"))
            await until("it watches", lambda: server.open_watches == 1)
            await server.tell(event("DELETED", slice_of({"a": a, "b": b}, "3")))
            await until("it is noted", lambda: _has(command, "brokers_absent 1.0"))
            assert await command.ready()
            assert await device.ping()
            assert "none is ready" in (await command.page("/readyz"))[1]
            assert "server b.mqtt" in (folder / "haproxy.cfg").read_text()

            device.close()
            command.process.signal(signal.SIGTERM)
            await until("it has ended", lambda: not command.process.running)
            assert command.process._process is not None
            assert command.process._process.returncode == 0
            with pytest.raises(ConnectionRefusedError):
                await Device.connect(LISTEN, int(str(given["INGRESS__LISTEN_MQTT"])), name="x")
        finally:
            await command.stop()


async def test_a_haproxy_of_somebody_else_is_kept_in_step_and_outlives_it(
    server: ApiServer, tmp_path: Path, folder: Path
) -> None:
    # As two containers of one pod: they share a folder.
    cfg = folder / "haproxy.cfg"
    other = ServerProcess(
        "haproxy",
        [HAPROXY, "-W", "-db", "-S", f"{folder}/master.sock", "-f", str(cfg)],
        log_path=tmp_path / "haproxy.log",
    )
    template = tmp_path / "own.j2"
    packaged = ROOT / "src/shadowsvc/ingress/haproxy.cfg.j2"
    template.write_text(packaged.read_text())
    with Mosquitto(host="127.0.0.63", websockets=True) as a:
        server.slices = [slice_of({"a": a})]
        given = settings(folder, server.kubeconfig(tmp_path), INGRESS__TEMPLATE_FILE=template)
        command = Command(given, tmp_path / "log")
        command.process.start()
        try:
            await until("there is a configuration", cfg.exists)
            assert not await command.ready()
            other.start()
            await until("it is ready", command.ready)
            port = int(str(given["INGRESS__LISTEN_MQTT"]))
            device = await Device.connect(LISTEN, port, name="d")
            template.write_text(packaged.read_text().replace("retries 3", "retries 2"))
            await until("reloaded", lambda: _has(command, 'reloads_total{result="done"} 1.0'))
            assert await device.ping()
            await command.stop()
            assert other.running
            assert await device.ping()
            device.close()
        finally:
            await command.stop()
            other.stop(1)


async def _is(command: Command, path: str, status: int) -> bool:
    return (await command.page(path))[0] == status


async def _has(command: Command, text: str) -> bool:
    return text in (await command.page("/metrics"))[1]
