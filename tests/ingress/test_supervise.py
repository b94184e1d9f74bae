"""HAProxy kept in step: real HAProxy, real brokers; what the API says is told to the supervisor."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from backing import Mosquitto, free_port
from shadowsvc.ingress.model import Broker
from shadowsvc.ingress.supervise import read_template
from tests.certificates import Authority
from tests.ingress.devices import Device, Fleet
from tests.ingress.stage import LISTEN, Stage, broker_of, settings_of, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)

TEMPLATE = read_template(None)


async def test_a_broker_that_is_added_takes_connections_without_a_reload(
    folder: Path, pods: list[Mosquitto]
) -> None:
    settings = settings_of(folder)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        await stage.have(broker_of("a", pods[0]), broker_of("b", pods[1]))
        fleet = Fleet()
        await fleet.grow(10, LISTEN, settings.listen_mqtt, websocket=False)
        connections = await stage.connections()
        assert connections["a"] == connections["b"] == 5
        assert stage.metrics.changes["added"] == 2  # MQTT and WebSocket
        assert stage.metrics.reloads == {}
        # HAProxy would have it after a restart, too.
        assert "server b.mqtt 127.0.0.22:" in (folder / "haproxy.cfg").read_text()
        fleet.close()


async def test_a_broker_that_is_removed_keeps_its_connections_and_gets_no_more(
    folder: Path, pods: list[Mosquitto]
) -> None:
    settings = settings_of(folder)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]), broker_of("b", pods[1]))
        fleet = Fleet()
        await fleet.grow(10, LISTEN, settings.listen_mqtt, websocket=False)
        await stage.have(broker_of("b", pods[1]))
        await until("it is seen to leave", lambda: stage.metrics.servers_leaving == 1)
        assert await fleet.alive() == 10
        await fleet.grow(6, LISTEN, settings.listen_mqtt, websocket=False)
        assert (await stage.connections()) == {"a": 5, "b": 11}
        # When the last connection has ended, the server goes.
        fleet.close()
        await until("it has left", lambda: stage.metrics.servers_leaving == 0)
        assert stage.metrics.changes["deleted"] == 2
        assert stage.metrics.reloads == {}


async def test_a_broker_that_comes_back_under_its_name_elsewhere_is_moved(
    folder: Path, pods: list[Mosquitto]
) -> None:
    settings = settings_of(folder, listen_websocket=0)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        device = await Device.connect(LISTEN, settings.listen_mqtt, name="kept")
        moved = broker_of("a", pods[1])
        stage.supervisor.brokers_changed((moved,))
        await until("it is moved", lambda: stage.metrics.changes["moved"] == 2)
        assert await device.ping()
        other = await Device.connect(LISTEN, settings.listen_mqtt, name="new")
        assert await other.ping()
        live = await stage.runtime.servers()
        assert live["mqtt", "a.mqtt"].where == f"127.0.0.22:{pods[1].port}"
        assert stage.metrics.reloads == {}
        device.close()
        other.close()


async def test_without_any_broker_the_last_good_configuration_stays(
    folder: Path, pods: list[Mosquitto]
) -> None:
    settings = settings_of(folder)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        before = (folder / "haproxy.cfg").read_text()
        stage.supervisor.brokers_changed(())
        assert stage.metrics.empty_answers == 1
        device = await Device.connect(LISTEN, settings.listen_mqtt, name="still")
        assert await device.ping()
        assert (folder / "haproxy.cfg").read_text() == before
        await stage.have(broker_of("b", pods[1]))
        assert not stage.metrics.empty
        device.close()


async def test_brokers_without_a_port_that_is_wanted_are_none(
    folder: Path, pods: list[Mosquitto]
) -> None:
    async with Stage(settings_of(folder)) as stage:
        await stage.have(broker_of("a", pods[0]))
        odd = broker_of("b", pods[1])
        stage.supervisor.brokers_changed((type(odd)(odd.name, odd.address, {"http": 8888}),))
        assert stage.metrics.empty
        assert await stage.servers() == {"a.mqtt", "a.ws"}


async def test_a_broker_that_dies_is_passed_over(folder: Path, pods: list[Mosquitto]) -> None:
    settings = settings_of(folder)
    with Mosquitto(host="127.0.0.24", websockets=True) as doomed:
        async with Stage(settings) as stage:
            await stage.have(broker_of("a", pods[0]), broker_of("doomed", doomed))
            await asyncio.to_thread(doomed.kill)
            await until("its check fails", lambda: _is_down(stage, "doomed"))
            fleet = Fleet()
            await fleet.grow(6, LISTEN, settings.listen_mqtt, websocket=False)
            assert (await stage.connections())["a"] == 6
            fleet.close()


async def _is_down(stage: Stage, pod: str, backend: str = "mqtt") -> bool:
    lines = (await stage.runtime.ask("show stat -1 4 -1")).splitlines()
    return any(line.startswith(f"{backend},{pod}.") and ",DOWN," in line for line in lines)


@pytest.mark.parametrize("websocket", [False, True])
async def test_the_health_check_speaks_mqtt(
    folder: Path, pods: list[Mosquitto], *, websocket: bool
) -> None:
    # A server that accepts and says nothing passes a check by TCP alone.
    silent = socket.create_server(("127.0.0.25", 0), backlog=1000)
    port = silent.getsockname()[1]
    settings = settings_of(folder, health_check="mqtt", connect_timeout_seconds=0.5)
    mute = broker_of("mute", pods[0])
    mute = type(mute)("mute", "127.0.0.25", dict.fromkeys(mute.ports, port))
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]), mute)
        for backend in ("mqtt", "websocket"):
            await until("it is down", lambda name=backend: _is_down(stage, "mute", name))
            assert not await _is_down(stage, "a", backend)
        listener = settings.listen_websocket if websocket else settings.listen_mqtt
        fleet = Fleet()
        await fleet.grow(4, LISTEN, listener, websocket=websocket)
        assert (await stage.connections())["a"] >= 4
        fleet.close()
    silent.close()


async def test_a_reload_keeps_connections(folder: Path, pods: list[Mosquitto]) -> None:
    template = folder / "own.j2"
    template.write_text(TEMPLATE)
    settings = settings_of(folder, template_file=template)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]), broker_of("b", pods[1]))
        fleet = Fleet()
        await fleet.grow(50, LISTEN, settings.listen_websocket)
        before = await stage.runtime.running()
        template.write_text(TEMPLATE.replace("retries 3", "retries 2"))
        await until("it is reloaded", lambda: stage.metrics.reloads["done"] == 1)
        after = await stage.runtime.running()
        assert after.pid != before.pid
        assert await fleet.alive() == 50
        await fleet.grow(10, LISTEN, settings.listen_websocket)
        assert await fleet.alive() == 60
        fleet.close()


@pytest.mark.parametrize(
    ("change", "by", "why"),
    [
        (("{% if plain %}", "{% if plain"), "template", "line "),
        (("{{ connections }}", "{{ conections }}"), "template", "'conections' is undefined"),
        (("description {{ description }}", ""), "template", "description"),
        (("    {{ server.line }}\n", ""), "template", "left out"),
        (
            ("balance {{ settings.balance }}", "balance fairly"),
            "haproxy",
            "only supports 'roundrobin'",
        ),
    ],
)
async def test_a_bad_template_is_refused_with_the_reason(
    folder: Path, pods: list[Mosquitto], change: tuple[str, str], by: str, why: str
) -> None:
    template = folder / "own.j2"
    template.write_text(TEMPLATE)
    settings = settings_of(folder, template_file=template)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        before = (folder / "haproxy.cfg").read_text()
        assert change[0] in TEMPLATE
        template.write_text(TEMPLATE.replace(*change))
        await until("it is refused", lambda: stage.metrics.refusals[by] == 1)
        assert why in (stage.supervisor.refused or "")
        assert (folder / "haproxy.cfg").read_text() == before
        assert stage.supervisor.fault is None  # HAProxy has the last good one
        device = await Device.connect(LISTEN, settings.listen_mqtt, name="still")
        assert await device.ping()
        template.write_text(TEMPLATE)
        await until("all is well", lambda: stage.supervisor.refused is None)
        assert stage.metrics.reloads == {}
        device.close()


async def test_the_reason_that_is_told_is_that_of_the_present_template(
    folder: Path, pods: list[Mosquitto]
) -> None:
    template = folder / "own.j2"
    template.write_text(TEMPLATE)
    async with Stage(settings_of(folder, template_file=template)) as stage:
        await stage.have(broker_of("a", pods[0]))
        unfit = TEMPLATE.replace("balance {{ settings.balance }}", "balance fairly")
        for text, by in ((unfit, "haproxy"), ("{{ nothing }}", "template"), (unfit, "haproxy")):
            template.write_text(text)
            await until(
                f"it is refused by {by}",
                lambda by=by: (stage.supervisor.refused or "").startswith(by),  # type: ignore[misc]
            )
        assert stage.metrics.refusals == {"haproxy": 2, "template": 1}


async def test_a_template_that_cannot_be_read_is_refused(folder: Path) -> None:
    async with Stage(settings_of(folder, template_file=folder / "none.j2")) as stage:
        ports = {"mqtt": free_port()}
        stage.supervisor.brokers_changed((Broker("a", "127.0.0.26", ports),))
        await until("it is refused", lambda: stage.metrics.refusals["template"] == 1)
        assert "no such file" in (stage.supervisor.refused or "")
        assert "SHADOWSVC_INGRESS__TEMPLATE_FILE" in (stage.supervisor.refused or "")
        assert stage.supervisor.reasons()[0]["reason"] == "no_configuration"


async def test_haproxy_that_dies_is_started_again_with_what_is_right(
    folder: Path, pods: list[Mosquitto]
) -> None:
    settings = settings_of(folder)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        process = stage.supervisor._process._process
        assert process is not None
        process.kill()
        await process.wait()
        await until("it is back", lambda: stage.metrics.haproxy_starts == 2)
        await stage.have(broker_of("a", pods[0]), broker_of("b", pods[1]))
        device = await Device.connect(LISTEN, settings.listen_mqtt, name="again")
        assert await device.ping()
        device.close()


async def test_a_haproxy_that_runs_is_found_and_brought_in_step(
    folder: Path, pods: list[Mosquitto]
) -> None:
    settings = settings_of(folder)
    async with Stage(settings) as first:
        await first.have(broker_of("a", pods[0]))
        device = await Device.connect(LISTEN, settings.listen_mqtt, name="kept")
        assert first._task is not None
        first._task.cancel()  # the first supervisor is gone, its HAProxy is not
        async with Stage(settings) as second:
            await second.have(broker_of("b", pods[1]))
            assert second.metrics.haproxy_starts == 0
            assert second.metrics.reloads == {}
            assert await device.ping()
        device.close()


async def test_beside_a_haproxy_that_is_slow_no_other_is_started(
    folder: Path, pods: list[Mosquitto], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shadowsvc.ingress.runtime._SECONDS", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        await reader.read()
        await done.wait()
        writer.close()

    asked: list[bytes] = []
    done = asyncio.Event()
    socket_file = folder / "runtime.sock"
    server = await asyncio.start_unix_server(silent, socket_file)
    async with Stage(settings_of(folder)) as stage:
        stage.supervisor.brokers_changed((broker_of("a", pods[0]),))
        await until("it was asked several times", lambda: len(asked) > 2)
        assert stage.metrics.haproxy_starts == 0
        assert "no answer in time" in (stage.supervisor.fault or "")
        done.set()
        server.close()
        socket_file.unlink(missing_ok=True)
        await stage.have(broker_of("a", pods[0]))
        assert stage.metrics.haproxy_starts == 1


async def test_other_settings_are_a_reload(folder: Path, pods: list[Mosquitto]) -> None:
    settings = settings_of(folder)
    async with Stage(settings) as first:
        await first.have(broker_of("a", pods[0]))
        device = await Device.connect(LISTEN, settings.listen_mqtt, name="kept")
        assert first._task is not None
        first._task.cancel()
        changed = settings.model_copy(update={"health_check_seconds": 0.7})
        async with Stage(changed) as second:
            await second.have(broker_of("a", pods[0]))
            assert second.metrics.reloads == {"done": 1}
            assert await device.ping()
        device.close()


async def test_a_server_that_the_runtime_api_refuses_is_a_reload(
    folder: Path, pods: list[Mosquitto]
) -> None:
    # `static-rr` takes no servers while HAProxy runs.
    template = folder / "own.j2"
    template.write_text(TEMPLATE.replace("balance {{ settings.balance }}", "balance static-rr"))
    settings = settings_of(folder, template_file=template)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        device = await Device.connect(LISTEN, settings.listen_mqtt, name="kept")
        await stage.have(broker_of("a", pods[0]), broker_of("b", pods[1]))
        # The servers are there a moment before the reload that brought them is counted.
        await until("it is counted", lambda: stage.metrics.reloads == {"done": 1})
        assert await device.ping()
        device.close()


# ------------------------------------------------------------------------------- certificates


def _trust(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.ca))


async def test_a_certificate_is_swapped_without_dropping_a_connection(
    folder: Path, tmp_path: Path, pods: list[Mosquitto]
) -> None:
    authority = Authority(tmp_path / "ca")
    secret = tmp_path / "secret"
    secret.mkdir()

    def install(name: str) -> None:
        certificate, key = authority.issue(name, "DNS:localhost", days=1)
        # The key first: for a moment they are no pair, which changes nothing.
        (secret / "tls.key").write_bytes(key.read_bytes())
        (secret / "tls.crt").write_bytes(certificate.read_bytes())

    await asyncio.to_thread(install, "first")
    settings = settings_of(folder, certificate_directory=secret)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        trust = _trust(authority)
        plain = await Device.connect(LISTEN, settings.listen_mqtts, name="old", tls=trust)
        web = await Device.connect(
            LISTEN, settings.listen_websocket_tls, name="old-web", tls=trust, websocket=True
        )
        await asyncio.to_thread(install, "second")
        await until("it is taken", lambda: stage.metrics.certificates_changed == 1)
        assert stage.metrics.reloads == {}
        assert await plain.ping()
        assert await web.ping()
        new = await Device.connect(LISTEN, settings.listen_mqtts, name="new", tls=trust)
        assert new.certificate != plain.certificate
        assert stage.metrics.certificate_expiry["tls.pem"] > 0
        for device in (plain, web, new):
            device.close()


async def test_words_beside_a_certificate_do_not_matter(
    folder: Path, tmp_path: Path, pods: list[Mosquitto]
) -> None:
    authority = Authority(tmp_path / "ca")
    secret = tmp_path / "secret"
    secret.mkdir()

    def install(name: str) -> None:
        certificate, key = authority.issue(name, "DNS:localhost")
        words = f"# für {name}\n".encode() + f"# für {name}\n".encode("latin-1")
        (secret / "new").write_bytes(words + certificate.read_bytes() + key.read_bytes())
        (secret / "new").replace(secret / "tls.pem")

    await asyncio.to_thread(install, "first")
    settings = settings_of(folder, certificate_directory=secret)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        await asyncio.to_thread(install, "second")
        await until("it is taken", lambda: stage.metrics.certificates_changed == 1)
        assert stage.metrics.reloads == {}
        device = await Device.connect(
            LISTEN, settings.listen_mqtts, name="d", tls=_trust(authority)
        )
        assert await device.ping()
        device.close()


async def test_a_certificate_that_is_no_pair_is_refused_and_the_old_one_stays(
    folder: Path, tmp_path: Path, pods: list[Mosquitto]
) -> None:
    authority = Authority(tmp_path / "ca")
    secret = tmp_path / "secret"
    secret.mkdir()
    first = await asyncio.to_thread(authority.issue, "first", "DNS:localhost")
    second = await asyncio.to_thread(authority.issue, "second", "DNS:localhost")
    (secret / "tls.crt").write_bytes(first[0].read_bytes())
    (secret / "tls.key").write_bytes(first[1].read_bytes())
    settings = settings_of(folder, certificate_directory=secret)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        (secret / "tls.crt").write_bytes(second[0].read_bytes())
        await until("it is refused", lambda: stage.metrics.certificates_unusable == 1)
        assert stage.metrics.certificates_faulty
        device = await Device.connect(
            LISTEN, settings.listen_mqtts, name="d", tls=_trust(authority)
        )
        assert device.certificate == ssl.PEM_cert_to_DER_cert(first[0].read_text())
        device.close()


async def test_a_further_certificate_is_a_reload_that_keeps_connections(
    folder: Path, tmp_path: Path, pods: list[Mosquitto]
) -> None:
    authority = Authority(tmp_path / "ca")
    secret = tmp_path / "secret"
    secret.mkdir()
    certificate, key = await asyncio.to_thread(authority.issue, "first", "DNS:localhost")
    (secret / "a.pem").write_bytes(certificate.read_bytes() + key.read_bytes())
    settings = settings_of(folder, certificate_directory=secret)
    async with Stage(settings) as stage:
        await stage.have(broker_of("a", pods[0]))
        device = await Device.connect(
            LISTEN, settings.listen_mqtts, name="d", tls=_trust(authority)
        )
        certificate, key = await asyncio.to_thread(authority.issue, "more", "DNS:more.example")
        (secret / "more.crt").write_bytes(certificate.read_bytes())
        (secret / "more.key").write_bytes(key.read_bytes())
        await until("it is reloaded", lambda: stage.metrics.reloads["done"] == 1)
        files = {file.rpartition("/")[2] for file in await stage.runtime.certificates()}
        assert files == {"a.pem", "more.pem"}
        assert await device.ping()
        device.close()
