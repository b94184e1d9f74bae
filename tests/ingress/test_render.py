"""Configurations as golden files, each of which HAProxy takes; and brokers out of slices.

`SHADOWSVC_INGRESS` has no part in it: rendering is pure. To write the files anew, delete them and
run the test twice: the first run writes and fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightkube.models.discovery_v1 import EndpointSlice

from shadowsvc.errors import Refused
from shadowsvc.ingress import haproxy
from shadowsvc.ingress.model import Broker, brokers_of
from shadowsvc.ingress.render import max_connections, render
from shadowsvc.ingress.supervise import read_template
from shadowsvc.settings import Ingress
from tests.ingress.api_server import endpoint_slice
from tests.ingress.stage import HAPROXY

GOLDEN = Path(__file__).parent / "golden"
TEMPLATE = read_template(None)
PORTS = {f"mqtt-{number}": 11883 + number for number in range(4)} | {
    f"ws-{number}": 18080 + number for number in range(4)
}
TWO = (Broker("vernemq-0", "10.1.0.7", PORTS), Broker("vernemq-1", "10.1.1.7", PORTS))

CASES: dict[str, tuple[tuple[Broker, ...], dict[str, Any]]] = {
    "defaults": (TWO, {}),
    "sources": (
        TWO[:1],
        {"source_addresses": ("10.9.0.2", "10.9.0.3"), "source_ports": "1024-65535"},
    ),
    "proxy-protocol": (TWO[:1], {"proxy_protocol": "v2", "health_check": "mqtt"}),
    "mosquitto": (
        (Broker("mosquitto-0", "10.1.0.8", {"mqtt": 1883}),),
        {"mqtt_ports": ("mqtt",), "listen_websocket": 0, "balance": "roundrobin"},
    ),
    "ipv6": (
        (Broker("vernemq-0", "fd00::7", {"mqtt-0": 11883, "ws-0": 18080}),),
        {"source_addresses": ("fd00::2",), "address_type": "IPv6"},
    ),
    "limits": (
        TWO[:1],
        {
            "max_connection_rate": 0,
            "max_connection_rate_per_source": 20,
            "health_check": "off",
            "listen_statistics": 0,
            "tunnel_timeout_seconds": 5400.0,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_configuration_is_as_the_golden_file_and_haproxy_takes_it(
    name: str, tmp_path: Path
) -> None:
    brokers, fields = CASES[name]
    made = render(Ingress(**fields), brokers, TEMPLATE, connections=9000).text
    file = GOLDEN / f"{name}.cfg"
    if not file.exists():
        file.write_text(made)
        pytest.fail(f"{file.name} was missing and has been written: look at it, run this again")
    assert made == file.read_text()
    copy = tmp_path / "haproxy.cfg"
    copy.write_text(made)
    await haproxy.check(HAPROXY, copy)


def test_tls_is_there_with_certificates_alone() -> None:
    fields: dict[str, Any] = {"connections": 10, "certificate_directory": Path("/certs")}
    without = render(Ingress(), TWO, TEMPLATE, **fields)
    with_one = render(Ingress(), TWO, TEMPLATE, certificates=("a.pem",), **fields)
    with_two = render(Ingress(), TWO, TEMPLATE, certificates=("a.pem", "b.pem"), **fields)
    assert "ssl" not in without.text
    assert "bind *:8883 ssl crt /certs" in with_one.text
    assert "bind *:443 ssl crt /certs alpn http/1.1" in with_one.text
    # Another file in the directory is another frame: HAProxy reads the directory at a reload.
    assert len({without.digest, with_one.digest, with_two.digest}) == 3


def test_brokers_do_not_change_the_digest_and_all_else_does() -> None:
    digest = render(Ingress(), TWO, TEMPLATE, connections=10).digest
    assert render(Ingress(), TWO[:1], TEMPLATE, connections=10).digest == digest
    assert render(Ingress(), TWO, TEMPLATE, connections=11).digest != digest
    assert render(Ingress(), TWO, TEMPLATE + "# more\n", connections=10).digest != digest
    for change in (
        {"source_addresses": ("10.0.0.1",)},
        {"health_check_seconds": 9.0},
        {"proxy_protocol": "v1"},
        {"balance": "roundrobin"},
    ):
        changed = Ingress.model_validate(change)
        assert render(changed, TWO, TEMPLATE, connections=10).digest != digest, change


def test_every_listener_of_a_pod_and_every_source_is_a_server() -> None:
    settings = Ingress(source_addresses=("10.9.0.2", "10.9.0.3", "10.9.0.4"))
    servers = render(settings, TWO, TEMPLATE, connections=10).servers
    assert len(servers) == 2 * 2 * 4 * 3  # backends, pods, listeners, sources
    assert len({(each.where, each.options) for each in servers.values()}) == len(servers)


def test_a_template_that_divides_by_zero_names_its_line() -> None:
    with pytest.raises(Refused, match="line 3: ") as caught:
        render(Ingress(), TWO, "a\nb\n{{ 1 / 0 }}\n", connections=10)
    assert caught.value.by == "template"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [(1024, 461), (20_000, 9000), (1_048_576, 500_000), (2**31, 500_000), (3, 1)],
)
def test_connections_follow_from_file_descriptors(files: int, wanted: int) -> None:
    assert max_connections(Ingress(), files) == wanted
    assert max_connections(Ingress(max_connections=77), files) == 77


# ------------------------------------------------------------------------------- brokers


def slices_of(*raw: dict[str, Any]) -> list[EndpointSlice]:
    return [msgspec.convert(each, EndpointSlice) for each in raw]


def test_ready_pods_of_all_slices_are_brokers_in_order() -> None:
    found = brokers_of(
        slices_of(
            endpoint_slice("z", {"b": "10.0.0.2", "gone": "10.0.0.9"}, ready={"gone": False}),
            endpoint_slice("y", {"a": "10.0.0.1"}, ports={"ws": 8080}),
            endpoint_slice("x", {"a": "10.0.0.1"}),
            endpoint_slice("w", {"a": "fd00::1"}, address_type="IPv6"),
        ),
        "IPv4",
    )
    assert found == (
        Broker("a", "10.0.0.1", {"mqtt": 1883, "ws": 8080}),
        Broker("b", "10.0.0.2", {"mqtt": 1883}),
    )
    # A port's name, or its number.
    assert found[0].port("ws") == found[0].port("8080") == 8080
    assert found[0].port("9") is None


def test_an_endpoint_without_a_pod_has_its_address_for_a_name() -> None:
    raw = endpoint_slice("x", {"a": "fd00::1"}, address_type="IPv6")
    del raw["endpoints"][0]["targetRef"]
    del raw["endpoints"][0]["conditions"]
    assert [broker.name for broker in brokers_of(slices_of(raw), "IPv6")] == ["fd00--1"]


@given(
    name=st.text(max_size=30),
    address=st.text(max_size=30),
    port_name=st.text(max_size=20),
    port=st.integers(-5, 70_000),
)
def test_no_text_of_the_api_gets_into_a_configuration_but_names_and_addresses(
    name: str, address: str, port_name: str, port: int
) -> None:
    raw = endpoint_slice("x", {"a": "10.0.0.1"}, ports={port_name: port})
    raw["endpoints"][0]["targetRef"]["name"] = name
    raw["endpoints"].append({**raw["endpoints"][0], "addresses": [address]})
    settings = Ingress(mqtt_ports=("mqtt", "1883"), websocket_ports=())
    usable = brokers_of(slices_of(raw), "IPv4")
    for line in render(settings, usable, TEMPLATE, connections=10).text.splitlines():
        if line.lstrip().startswith("server "):
            _, server, where, *rest = line.split()
            assert set(server) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
            assert where.rpartition(":")[2].isdecimal()
            assert rest[0] == "check"
