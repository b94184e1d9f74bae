"""Targets and sources: what is read, and how devices are divided among them."""

from __future__ import annotations

import socket
from collections import Counter

import pytest

from load.endpoints import Endpoint, bound_socket, parse_sources, route
from load.errors import BadOption


@pytest.mark.parametrize(
    ("url", "endpoint", "authority"),
    [
        ("mqtt://there", Endpoint("there", 1883, None, tls=False), "there:1883"),
        ("mqtts://10.0.0.1:99/", Endpoint("10.0.0.1", 99, None, tls=True), "10.0.0.1:99"),
        ("ws://there", Endpoint("there", 80, "/mqtt", tls=False), "there:80"),
        ("wss://[::1]:8443/x/y", Endpoint("::1", 8443, "/x/y", tls=True), "[::1]:8443"),
    ],
)
def test_a_target_is_read(url: str, endpoint: Endpoint, authority: str) -> None:
    assert Endpoint.parse(url) == endpoint
    assert endpoint.authority == authority


@pytest.mark.parametrize(
    "url", ["there:1883", "http://there", "mqtt://", "mqtt://a:b", "mqtt://a/x"]
)
def test_what_is_no_target_is_refused_by_name(url: str) -> None:
    with pytest.raises(BadOption, match=r"target .*mqtt://HOST:PORT"):
        Endpoint.parse(url)


def test_sources_are_addresses_and_ranges() -> None:
    assert parse_sources("127.0.0.9-127.0.0.11, 10.0.0.1,") == (
        "127.0.0.9",
        "127.0.0.10",
        "127.0.0.11",
        "10.0.0.1",
    )
    assert parse_sources("::1") == ("::1",)
    assert parse_sources("") == ()


@pytest.mark.parametrize("text", ["x", "127.0.0.9-127.0.0.1", "127.0.0.1-::1", "10.0.0.0-11.0.0.0"])
def test_what_is_no_source_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadOption, match=f"source '{text}'"):
        parse_sources(text)


@pytest.mark.parametrize(("targets", "sources"), [(3, 8), (4, 4), (4, 2), (1, 5), (2, 0)])
def test_every_target_is_reached_from_every_source_alike(targets: int, sources: int) -> None:
    used = Counter(route(number, 0, targets, sources) for number in range(240))
    assert len(used) == targets * max(1, sources)
    assert max(used.values()) - min(used.values()) <= targets


def test_a_device_goes_to_another_target_with_each_attempt() -> None:
    assert [route(5, attempt, 3, 8)[0] for attempt in range(4)] == [2, 0, 1, 2]
    assert len({route(5, attempt, 3, 8)[1] for attempt in range(4)}) == 1


def test_a_source_s_port_is_chosen_at_connect_so_that_targets_share_it() -> None:
    with bound_socket("127.0.0.77") as made:
        assert made.getsockname() == ("127.0.0.77", 0)
        assert made.getsockopt(socket.IPPROTO_IP, 24) == 1


def test_a_source_that_is_not_ours_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="annot assign"):
        bound_socket("192.0.2.1")
