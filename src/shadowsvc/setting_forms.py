"""The forms of settings: what the value of one setting alone must look like.

Lives here: functions for pydantic, one a form; each returns the value, or raises `ValueError` with
the problem in words, which never quote what may be a secret. Pure. Must not come in: which setting
has which form, its default and its meaning (`shadowsvc.settings`), rules between settings
(`shadowsvc.config_rules`).
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

__all__ = [
    "DEFAULT_PORTS",
    "MAX_CLIENT_ID",
    "PREFIX",
    "addresses",
    "client_id",
    "comma_separated",
    "device",
    "dns_label",
    "hosts",
    "keyspace",
    "listen_host",
    "lower",
    "marker_topic",
    "name",
    "names",
    "replication",
    "share_group",
    "source_ports",
    "topic_prefix",
    "upper",
    "url",
]

PREFIX = "SHADOWSVC_"
"""What every environment variable begins with."""
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
"""By the scheme of a broker's address."""
MAX_CLIENT_ID = 128
"""Characters."""


def url(text: str) -> str:
    """Return the address of a broker as it is, without a login in it."""
    if "@" in text:  # before anything that might quote it
        raise ValueError(
            "a user name or password has no place in the URL: "
            f"give {PREFIX}MQTT__USERNAME and {PREFIX}MQTT__PASSWORD (or …_FILE)"
        )
    parts = urlsplit(text)
    if parts.scheme not in DEFAULT_PORTS:
        raise ValueError("the scheme is neither mqtt nor mqtts")
    if not parts.hostname:
        raise ValueError("the host is missing")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or _has_control(text):
        raise ValueError("nothing may follow the port")
    if parts.port == 0:  # reading `port` raises ValueError if it is no port
        raise ValueError("port 0 is no port of a broker")
    return text


def client_id(text: str) -> str:
    """Return a client id as it is: not too long, no control characters."""
    if len(text) > MAX_CLIENT_ID:
        raise ValueError(f"it has {len(text)} characters")
    if _has_control(text):
        raise ValueError("it has a control character")
    return text


def name(text: str) -> str:
    """Return a name as it is: a client id that is not empty."""
    if not text:
        raise ValueError("it is empty")
    return client_id(text)


def share_group(text: str) -> str:
    """Return the name of a shared subscription as it is (MQTT 5 §4.8.2)."""
    # A ShareName has at least one character and none of "/", "+", "#".
    if not text or any(char in text for char in "/+#") or _has_control(text):
        raise ValueError("it is no share name (MQTT 5 §4.8.2)")
    return text


def marker_topic(text: str) -> str:
    """Return what leads the topics of markers as it is."""
    _leads_topics(text)
    if text.startswith("$") or text.endswith("/"):
        raise ValueError('a "$" in front or a "/" at the end')
    return text


def topic_prefix(text: str) -> str:
    """Return what leads the devices' topics as it is."""
    _leads_topics(text)
    if text.startswith("$"):
        raise ValueError('brokers fail on shared subscriptions to topics that start with "$"')
    if text.startswith("/") or text.endswith("/") or "//" in text:
        raise ValueError('an empty level: "/" belongs between levels only')
    return text


def device(text: str) -> str:
    """Return a device's name as it is."""
    if not re.fullmatch(r"[A-Za-z0-9_.:@=-]{1,128}", text):  # as `shadowsvc.shadow.topic` has it
        raise ValueError("no device can have this name")
    return text


def comma_separated(value: object) -> object:
    """Return the parts between the commas of a text; anything else as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def hosts(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return host names or addresses as they are: one at least, no login and no port."""
    if not given:
        raise ValueError("the list is empty")
    for host in given:
        if "@" in host:
            raise ValueError(
                "a user name or password has no place here: "
                f"give {PREFIX}CASSANDRA__USERNAME and {PREFIX}CASSANDRA__PASSWORD (or …_FILE)"
            )
        if not host or "/" in host or _has_control(host) or " " in host:
            raise ValueError(f"{host!r} is no host name or address")
        if host.count(":") == 1:
            raise ValueError(f"{host!r} names a port: give {PREFIX}CASSANDRA__PORT")
    return given


def names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return names or numbers of ports as they are."""
    for one in given:
        # RFC 6335 §5.1, as Kubernetes has it; or the number of a port.
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?", one):
            raise ValueError(f"{one!r} is no name of a port")
    if len(set(given)) != len(given):
        raise ValueError("a name is given twice")
    return given


def addresses(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return IP addresses as they are, each once."""
    for address in given:
        ipaddress.ip_address(address)  # raises ValueError with words of its own
    if len(set(given)) != len(given):
        raise ValueError("an address is given twice")
    return given


def source_ports(text: str) -> str:
    """Return a range of ports as it is, or nothing."""
    if text:
        match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= 65_535:  # noqa: PLR2004 - TCP
            raise ValueError("it is no range of ports")
    return text


def dns_label(text: str) -> str:
    """Return a name in Kubernetes as it is (RFC 1123 §2.1)."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text):
        raise ValueError("it is no name that Kubernetes allows")
    return text


def listen_host(text: str) -> str:
    """Return an address, or `*`, as it is."""
    if text != "*":
        ipaddress.ip_address(text)
    return text


def keyspace(text: str) -> str:
    """Return the name of a keyspace as it is."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,47}", text):
        raise ValueError("it is no plain keyspace name")
    return text


def replication(text: str) -> str:
    """Return `auto`, a number, or numbers by data centre, as it is."""
    if text == "auto" or re.fullmatch(r"[1-9][0-9]?", text):
        return text
    centres = []
    for part in text.split(","):
        match = re.fullmatch(r"([^\s:,'\"]+):([1-9][0-9]?)", part)
        if match is None:
            raise ValueError(f"{part!r} is not written as name:number")
        centres.append(match[1])
    if len(set(centres)) != len(centres):
        raise ValueError("a data centre is named twice")
    return text


def upper(value: object) -> object:
    """Return a text in capital letters; anything else as it is."""
    return value.upper() if isinstance(value, str) else value


def lower(value: object) -> object:
    """Return a text in small letters; anything else as it is."""
    return value.lower() if isinstance(value, str) else value


def _has_control(text: str) -> bool:
    return any(ord(char) < 32 or 127 <= ord(char) < 160 for char in text)  # noqa: PLR2004 - C0, C1


def _leads_topics(text: str) -> None:
    if not text or any(char in text for char in "+#") or _has_control(text):
        raise ValueError("a wildcard, a control character or nothing at all cannot lead a topic")
