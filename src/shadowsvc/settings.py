"""The settings tree: every setting, its type, range, default and meaning.

Lives here: the frozen models. Rules: every field has a description with its unit, from which
`docs/configuration.md` is generated (`scripts/configuration-table`); durations end in `_seconds`,
sizes in `_bytes`. Must not come in: the form of one value (`shadowsvc.setting_forms`), where values
come from and rules between settings (`shadowsvc.config`), and any I/O.
"""

from __future__ import annotations

import types
import typing
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from shadowsvc import setting_forms as forms
from shadowsvc.setting_forms import MAX_CLIENT_ID, PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo

__all__ = [
    "LAYERS",
    "MAX_CLIENT_ID",
    "PREFIX",
    "Canary",
    "Cassandra",
    "DeadLetters",
    "Http",
    "Ingress",
    "Limits",
    "Log",
    "Mqtt",
    "Setting",
    "Settings",
    "Shadow",
    "Slots",
    "all_settings",
    "variable",
]

_DELIMITER = "__"
_MAX_UINT32 = 4_294_967_295
_MAX_PACKET_BYTES = 268_435_460  # MQTT 5 §2.1.4: 268,435,455 after a header of at most 5 bytes
_MAX_TTL_SECONDS = 630_720_000  # Cassandra's `Attributes.MAX_TTL`: 20 years
_MAX_KEY_BYTES = 65_535  # Cassandra's longest clustering key
_MIB = 1024 * 1024

LAYERS: ContextVar[tuple[Mapping[str, Any], ...]] = ContextVar("LAYERS", default=())
"""What `Settings()` is made of beside its arguments, the strongest first; set by `config`."""


@dataclass(frozen=True, slots=True)
class _Allowed:
    """What a setting may be, in words, where its type and range do not say it."""

    text: str


@dataclass(frozen=True, slots=True)
class _FromFile:
    """The setting may come from a `…_FILE` variable and from the secrets directory."""


Port = Annotated[int, Field(ge=1, le=65_535)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
File = Annotated["Path | None", _Allowed("path of a readable PEM file")]
Username = Annotated["str | None", _Allowed("text"), _FromFile()]
Password = Annotated["SecretStr | None", _Allowed("text"), _FromFile()]
TimePolicy = Annotated[Literal["reject", "server_time"], BeforeValidator(forms.lower)]
Consistency = Annotated[
    Literal[
        "ONE",
        "TWO",
        "THREE",
        "QUORUM",
        "ALL",
        "LOCAL_QUORUM",
        "EACH_QUORUM",
        "LOCAL_ONE",
    ],
    BeforeValidator(forms.upper),
]


class _Section(BaseModel):
    """A branch of the tree: immutable, and deaf to names that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Mqtt(_Section):
    """The connection to the broker and the session on it."""

    url: Annotated[
        str,
        AfterValidator(forms.url),
        _Allowed("mqtt://HOST[:PORT] (port 1883) or mqtts://HOST[:PORT] (TLS, port 8883)"),
    ] = Field(default="mqtt://127.0.0.1:1883", description="Address of the MQTT 5 broker.")
    client_id: Annotated[
        str,
        AfterValidator(forms.client_id),
        _Allowed(f"up to {MAX_CLIENT_ID} characters, no control characters"),
    ] = Field(
        default="",
        description="Client id, the name of the persistent session: the same after a restart, and "
        "another for each process. Without one the process leases a slot.",
    )
    share_group: Annotated[
        str,
        AfterValidator(forms.share_group),
        _Allowed('one or more characters, no "/", "+" or "#"'),
    ] = Field(
        default="shadowsvc",
        description="Name of the shared subscription; processes of one group share the devices.",
    )
    topic_prefix: Annotated[
        str,
        AfterValidator(forms.topic_prefix),
        _Allowed('topic levels without "+" and "#"; no "$" or "/" in front, no "/" at the end'),
    ] = Field(default="things", description="What leads every topic: PREFIX/DEVICE/shadow/update.")
    receive_maximum: int = Field(
        default=1000,
        ge=1,
        le=65_535,
        description="QoS 1 messages held at most before they are acknowledged (MQTT 5 Receive "
        "Maximum). Bounds memory, and what a broker restart can lose.",
    )
    session_expiry_seconds: int = Field(
        default=86_400,
        ge=1,
        le=_MAX_UINT32,
        description="How long the broker keeps the session while nobody is connected; well above "
        "any restart.",
    )
    keep_alive_seconds: int = Field(
        default=30,
        ge=1,
        le=65_535,
        description="Longest silence before a ping (MQTT 5 Keep Alive).",
    )
    username: Username = Field(default=None, description="User name for the broker.")
    password: Password = Field(default=None, description="Password for the broker.")
    ca_file: File = Field(
        default=None,
        description="Certificates that may sign the broker's; without it the system's. mqtts only.",
    )
    certificate_file: File = Field(
        default=None, description="Own certificate, with its chain. mqtts only; needs the key too."
    )
    key_file: File = Field(
        default=None, description="Private key of the own certificate. mqtts only."
    )
    connect_timeout_seconds: Seconds = Field(
        default=10.0, description="Time limit for name look-up, TCP, TLS and CONNACK together."
    )
    reconnect_min_seconds: Seconds = Field(
        default=0.2,
        description="Upper end of the first wait before a reconnect; waits are jittered.",
    )
    reconnect_max_seconds: Seconds = Field(
        default=30.0, description="Upper end of the longest wait before a reconnect."
    )
    maximum_packet_size_bytes: int = Field(
        default=_MIB + 65_536,
        ge=1024,
        le=_MAX_PACKET_BYTES,
        description="Largest packet that the broker may send. Keep it above the broker's own limit "
        "(`max_message_size`): a broker discards larger packets without a word.",
    )
    topic_alias_maximum: int = Field(
        default=16, ge=0, le=65_535, description="Topic aliases that the broker may use; 0: none."
    )
    resubscribe_seconds: float = Field(
        default=60.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="How often to subscribe again, give or take a fifth, since a cluster with a "
        "node down may have granted what it did not do; 0: never.",
    )

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted (mqtts)."""
        return urlsplit(self.url).scheme == "mqtts"

    @property
    def host(self) -> str:
        """Host name or address of the broker, without brackets."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """TCP port of the broker: from the URL, else 1883, or 8883 for mqtts."""
        parts = urlsplit(self.url)
        return parts.port or forms.DEFAULT_PORTS[parts.scheme]


class Cassandra(_Section):
    """The connection to Cassandra and how it is written to."""

    contact_points: Annotated[
        tuple[str, ...],
        BeforeValidator(forms.comma_separated),
        AfterValidator(forms.hosts),
        _Allowed("host names or addresses, separated by commas"),
    ] = Field(
        default=("127.0.0.1",),
        description="Where to look for the cluster; the driver finds the rest.",
    )
    port: Port = Field(default=9042, description="CQL port, the same on every node.")
    keyspace: Annotated[
        str,
        AfterValidator(forms.keyspace),
        _Allowed("1 to 48 of a-z, 0-9 and _, starting with a letter"),
    ] = Field(default="shadowsvc", description="Keyspace of all tables.")
    local_dc: Annotated[str, _Allowed("name of a data centre")] = Field(
        default="",
        description="Data centre whose nodes are written to and read from, as `nodetool status` "
        "names it. Needed by `run`.",
    )
    consistency: Consistency = Field(
        default="LOCAL_QUORUM",
        description="How many replicas confirm a write before it is acknowledged. Below a quorum "
        "an acknowledged update can be lost with one node.",
    )
    replication: Annotated[
        str,
        AfterValidator(forms.replication),
        _Allowed("auto, a number such as 3, or dc1:3,dc2:3"),
    ] = Field(
        default="auto",
        description="Replicas in a keyspace that `migrate` creates. auto: the smaller of 3 and the "
        "nodes of the local data centre; a number: that many in the local data centre.",
    )
    username: Username = Field(
        default=None, description="User name for Cassandra; needs the password too."
    )
    password: Password = Field(
        default=None, description="Password for Cassandra; needs the name too."
    )
    tls: bool = Field(default=False, description="Encrypt the connections to Cassandra.")
    ca_file: File = Field(
        default=None,
        description="Certificates that may sign the nodes'; without it the system's. tls only.",
    )
    certificate_file: File = Field(
        default=None, description="Own certificate, with its chain. tls only; needs the key too."
    )
    key_file: File = Field(
        default=None, description="Private key of the own certificate. tls only."
    )
    connect_timeout_seconds: Seconds = Field(
        default=5.0, description="Time limit for one connection."
    )
    request_timeout_seconds: Seconds = Field(
        default=2.0, description="Time limit for one request; what times out is sent again."
    )
    batch_max_partitions: Annotated[
        Annotated[int, Field(ge=1, le=1000)] | Literal["auto"],
        BeforeValidator(forms.lower),
        _Allowed("auto, or a whole number from 1 to 1000"),
    ] = Field(
        default="auto",
        description="Devices in one batch at most. auto: what every node's "
        "`unlogged_batch_across_partitions_warn_threshold` allows, up to 32; 10 where a node does "
        "not tell.",
    )
    batch_max_bytes: Annotated[
        Annotated[int, Field(ge=512, le=16 * _MIB)] | Literal["auto"],
        BeforeValidator(forms.lower),
        _Allowed("auto, or a whole number from 512 to 16777216"),
    ] = Field(
        default="auto",
        description="Size of one batch at most, in bytes. auto: what every node's "
        "`batch_size_warn_threshold` and `batch_size_fail_threshold` allow, up to 64 KiB; 5 KiB "
        "where a node does not tell.",
    )
    direct: bool = Field(
        default=True,
        description="Send batches of shadows over connections of the service's own, which costs "
        "less; false: by the driver, as all else.",
    )
    linger_seconds: float = Field(
        default=0.005,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Longest wait of an update for company in its batch; 0: none.",
    )
    concurrency: int = Field(
        default=32,
        ge=1,
        le=256,
        description="Batches in flight at most, all nodes together. How many there are below that "
        "follows Cassandra's latency and overload.",
    )
    min_concurrency: int = Field(
        default=2,
        ge=1,
        le=256,
        description="Batches in flight that are allowed whatever Cassandra's latency; the same as "
        "the most: a fixed limit.",
    )
    retry_min_seconds: Seconds = Field(
        default=0.05, description="Upper end of the first wait before a retry; waits are jittered."
    )
    retry_max_seconds: Seconds = Field(
        default=5.0, description="Upper end of the longest wait before a retry."
    )
    migrate_on_start: bool = Field(
        default=False, description="Let `run` apply the schema first, as `migrate` does."
    )


class Shadow(_Section):
    """What a device may send. What breaks a limit becomes a dead letter."""

    max_payload_bytes: int = Field(
        default=65_536, ge=1, le=16 * _MIB, description="Largest payload of an update, in bytes."
    )
    max_depth: int = Field(
        default=16, ge=1, le=128, description="Levels of nested objects and arrays."
    )
    max_leaves: int = Field(default=500, ge=1, le=100_000, description="Leaves in one update.")
    max_path_bytes: int = Field(
        default=1024,
        ge=1,
        le=_MAX_KEY_BYTES - 1024,
        description="Longest path of a leaf, in bytes.",
    )
    max_user_properties: int = Field(
        default=64, ge=0, le=10_000, description="User properties of one message."
    )
    max_user_properties_bytes: int = Field(
        default=8192,
        ge=0,
        le=_MIB,
        description="Names and values of the user properties of one message together, in bytes.",
    )
    timestamp_unit: Annotated[
        Literal["auto", "seconds", "milliseconds", "microseconds"], BeforeValidator(forms.lower)
    ] = Field(default="auto", description="Unit of the devices' times; auto: by magnitude.")
    max_ahead_seconds: float = Field(
        default=300.0,
        ge=0,
        le=31_536_000,
        allow_inf_nan=False,
        description="How far a device's time may be ahead of ours.",
    )
    on_future: TimePolicy = Field(
        default="reject",
        description="A time further ahead: a dead letter, or replaced by the time of receipt.",
    )
    on_ancient: TimePolicy = Field(
        default="reject",
        description="A time so old that it could bring back what was deleted: likewise.",
    )


class Limits(_Section):
    """What bounds memory and time."""

    max_held_bytes: int = Field(
        default=64 * _MIB,
        ge=65_536,
        le=1024 * 1024 * _MIB,
        description="Payload bytes held at most, from receipt to acknowledgement. QoS 0 above it "
        "is dropped and counted.",
    )
    login_retry_min_seconds: Seconds = Field(
        default=10.0,
        description="Shortest wait after the broker or Cassandra refused the login, so that no "
        "account gets locked; a changed password file is tried at once.",
    )
    login_retry_max_seconds: Seconds = Field(
        default=300.0, description="Longest wait after a refused login."
    )
    isolate_after_seconds: Seconds = Field(
        default=60.0,
        description="Without one successful write for this long, although writes are attempted, "
        "the service leaves the broker, keeping its session, until a write succeeds.",
    )
    drain_timeout_seconds: Seconds = Field(
        default=20.0,
        description="Time limit of an orderly stop; below the grace period of what stops it.",
    )


class DeadLetters(_Section):
    """What becomes of messages that can never be an update."""

    ttl_seconds: int = Field(
        default=2_592_000, ge=1, le=_MAX_TTL_SECONDS, description="How long a dead letter is kept."
    )
    max_per_device_per_minute: int = Field(
        default=60,
        ge=1,
        le=1_000_000,
        description="Dead letters stored of one device; more are acknowledged and counted only.",
    )


class Slots(_Section):
    """Client ids that processes lease from one another; only without a client id of one's own."""

    broker: Annotated[
        str,
        AfterValidator(forms.name),
        _Allowed(f"1 to {MAX_CLIENT_ID} characters, no control characters"),
    ] = Field(
        default="default",
        description="Name of the broker cluster: services at different clusters that share a "
        "keyspace need different names.",
    )
    max_slots: int = Field(
        default=64,
        ge=1,
        le=1000,
        description="Slots of a group at most, and so its processes; a process more waits.",
    )
    lease_seconds: int = Field(
        default=30,
        ge=2,
        le=3600,
        description="How long a slot stays taken without being renewed: after a crash it is free "
        "after this time.",
    )
    renew_seconds: Seconds = Field(default=10.0, description="How often a lease is renewed.")
    orphan_after_seconds: Seconds = Field(
        default=300.0,
        description="A slot that was free for this long, as one process saw it, is an orphan: what "
        "the broker still holds for it is fetched, then it is deleted. A process that was killed "
        "and started again waits for the end of its former lease alone.",
    )
    marker_topic: Annotated[
        str,
        AfterValidator(forms.marker_topic),
        _Allowed('topic levels without "+" and "#"; no "$" in front, no "/" at the end'),
    ] = Field(
        default="shadowsvc/marker",
        description="An orphan's queue is at its end when a marker comes, published to this topic "
        "and the slot's name behind it; not below `mqtt.topic_prefix`.",
    )
    adopt_quiet_seconds: Seconds = Field(
        default=10.0,
        description="How long nothing may come after the marker before an orphan's session is "
        "ended.",
    )


class Canary(_Section):
    """Updates of a reserved device that the service publishes itself and reads back."""

    enabled: bool = Field(default=False, description="Whether to publish them.")
    device: Annotated[
        str,
        AfterValidator(forms.device),
        _Allowed("1 to 128 characters of A-Z a-z 0-9 _ . : @ = -"),
    ] = Field(
        default="shadowsvc-canary",
        description="Name of the reserved device. Each process has a named shadow of it.",
    )
    interval_seconds: float = Field(
        default=5.0, ge=0.1, le=3600, allow_inf_nan=False, description="From one to the next."
    )
    timeout_seconds: Seconds = Field(
        default=30.0,
        description="After how long without one that became durable the service is not ready; "
        "twice the interval at least, a hundred times at most.",
    )


class Http(_Section):
    """The server for probes and metrics."""

    host: str = Field(default="0.0.0.0", description="Address to listen on.")  # noqa: S104 - probes come from outside the pod
    port: int = Field(
        default=8080, ge=0, le=65_535, description="Port to listen on; 0: any free one."
    )


class Log(_Section):
    """What is logged, to standard error."""

    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(forms.upper)] = (
        Field(default="INFO", description="The least important events that are logged.")
    )
    format: Annotated[Literal["auto", "json", "console"], BeforeValidator(forms.lower)] = Field(
        default="auto", description="auto: console on a terminal, else json (one object a line)."
    )


ListenPort = Annotated[int, Field(ge=0, le=65_535)]
PortNames = Annotated[
    "tuple[str, ...]",
    BeforeValidator(forms.comma_separated),
    AfterValidator(forms.names),
    _Allowed("names or numbers of ports, separated by commas"),
]


class Ingress(_Section):
    """HAProxy in front of the brokers; of `shadowsvc ingress` alone."""

    kubeconfig: Annotated[Path | None, _Allowed("path of a kubeconfig file")] = Field(
        default=None,
        description="How to reach the Kubernetes API; without it by the pod's service account.",
    )
    namespace: Annotated[
        str, AfterValidator(forms.dns_label), _Allowed("1 to 63 of a-z, 0-9 and -")
    ] = Field(default="shadowsvc", description="Namespace of the brokers' Service.")
    service: Annotated[
        str, AfterValidator(forms.dns_label), _Allowed("1 to 63 of a-z, 0-9 and -")
    ] = Field(
        default="vernemq-headless",
        description="Service whose EndpointSlices name the brokers' pods.",
    )
    address_type: Literal["IPv4", "IPv6"] = Field(
        default="IPv4", description="Which addresses of a pod are used."
    )
    mqtt_ports: PortNames = Field(
        default=("mqtt-0", "mqtt-1", "mqtt-2", "mqtt-3"),
        description="Ports of a pod that take MQTT, by their names in the EndpointSlice or by "
        "number. Each multiplies the connections that one ingress node can have to a pod; those "
        "that a pod lacks are left out.",
    )
    websocket_ports: PortNames = Field(
        default=("ws-0", "ws-1", "ws-2", "ws-3"),
        description="Likewise, MQTT over WebSocket.",
    )
    listen_host: Annotated[
        str, AfterValidator(forms.listen_host), _Allowed("an address, or * for all")
    ] = Field(default="*", description="Address that HAProxy listens on.")
    listen_mqtt: ListenPort = Field(default=1883, description="Port for MQTT; 0: none.")
    listen_mqtts: ListenPort = Field(
        default=8883, description="Port for MQTT by TLS; 0, or without certificates: none."
    )
    listen_websocket: ListenPort = Field(default=80, description="Port for WebSocket; 0: none.")
    listen_websocket_tls: ListenPort = Field(
        default=443, description="Port for WebSocket by TLS; 0, or without certificates: none."
    )
    statistics_host: Annotated[
        str, AfterValidator(forms.listen_host), _Allowed("an address, or * for all")
    ] = Field(
        default="*",
        description="Address for HAProxy's statistics, which have no login: one that devices do "
        "not reach.",
    )
    listen_statistics: ListenPort = Field(
        default=8404, description="Port of HAProxy's `/stats` and `/metrics`; 0: none."
    )
    balance: Literal["roundrobin", "leastconn"] = Field(
        default="leastconn",
        description="Which broker gets a new connection: the next, or the one with the fewest.",
    )
    proxy_protocol: Literal["off", "v1", "v2"] = Field(
        default="off",
        description="Whether HAProxy tells brokers the device's address by the PROXY protocol; the "
        "brokers' listeners have to expect it (VerneMQ: `proxy_protocol = on`).",
    )
    max_connection_rate: int = Field(
        default=1000,
        ge=0,
        le=1_000_000,
        description="New connections a second of MQTT, and as many of WebSocket, on one ingress "
        "node. What comes faster waits in the kernel's queue; 0: no limit.",
    )
    max_connection_rate_per_source: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="New connections a second of one address of a device; what comes faster is "
        "closed. Many devices may share an address. 0: no limit.",
    )
    max_connections: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="Connections of devices at once; 0: as many as file descriptors allow, which "
        "are two for each.",
    )
    source_addresses: Annotated[
        tuple[str, ...],
        BeforeValidator(forms.comma_separated),
        AfterValidator(forms.addresses),
        _Allowed("addresses, separated by commas"),
    ] = Field(
        default=(),
        description="Addresses of the ingress node to connect to brokers from. An address has "
        "about 28,000 ports towards each port of a pod (net.ipv4.ip_local_port_range), or 64,000 "
        "with `source_ports`; each address in this list adds as many.",
    )
    source_ports: Annotated[
        str, AfterValidator(forms.source_ports), _Allowed("LOWEST-HIGHEST, or nothing")
    ] = Field(
        default="",
        description="Ports to connect from, such as 1024-65535; without it as the kernel chooses. "
        "Needs `source_addresses`.",
    )
    connect_timeout_seconds: Seconds = Field(
        default=5.0, description="Time limit for HAProxy's connection to a broker."
    )
    tunnel_timeout_seconds: float = Field(
        default=86_400.0,
        ge=1,
        le=2_000_000,
        allow_inf_nan=False,
        description="A connection without a byte in either direction for this long is closed; "
        "above one and a half times the longest keep-alive of a device. Peers that are gone are "
        "found by TCP's keep-alive after four minutes.",
    )
    health_check: Literal["off", "tcp", "mqtt"] = Field(
        default="tcp",
        description="How HAProxy checks a broker: whether it takes a connection, or whether it "
        "answers CONNECT, or a WebSocket's handshake, too.",
    )
    health_check_seconds: Seconds = Field(default=5.0, description="How often.")
    slow_start_seconds: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="How long a broker that came back takes to get its full share of new "
        "connections; 0: at once.",
    )
    hard_stop_after_seconds: float = Field(
        default=604_800.0,
        ge=1,
        le=2_000_000,
        allow_inf_nan=False,
        description="After a reload the old process keeps its connections until they end, at most "
        "for this long.",
    )
    certificate_directory: Annotated[Path | None, _Allowed("path of a directory")] = Field(
        default=None,
        description="Certificates for TLS: NAME.crt and NAME.key, as a Secret has them, or "
        "NAME.pem with both. Changed files are taken into use without a restart.",
    )
    template_file: Annotated[Path | None, _Allowed("path of a jinja2 template")] = Field(
        default=None, description="Template of HAProxy's configuration in place of the own one."
    )
    directory: Annotated[Path, _Allowed("path of a directory")] = Field(
        default=Path("/run/haproxy"),
        description="Where configuration, certificates and sockets lie: shared with HAProxy, "
        "writable for both.",
    )
    haproxy: Annotated[str, _Allowed("a program")] = Field(
        default="haproxy", description="HAProxy's program, which checks each configuration."
    )
    start_haproxy: bool = Field(
        default=False,
        description="Whether to start HAProxy. Else somebody else does, with "
        "`haproxy -W -db -S DIRECTORY/master.sock -f DIRECTORY/haproxy.cfg`.",
    )


class Settings(BaseSettings):
    """All settings. Made by `shadowsvc.config.load`; `Settings()` alone has the defaults only."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=_DELIMITER,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    mqtt: Mqtt = Mqtt()
    cassandra: Cassandra = Cassandra()
    shadow: Shadow = Shadow()
    limits: Limits = Limits()
    dead_letters: DeadLetters = DeadLetters()
    slots: Slots = Slots()
    canary: Canary = Canary()
    ingress: Ingress = Ingress()
    http: Http = Http()
    log: Log = Log()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - `config.load` reads it itself
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take arguments, then the layers that `config.load` has read; see `LAYERS`."""
        layers = (InitSettingsSource(settings_cls, dict(layer)) for layer in LAYERS.get())
        return (init_settings, *layers)


class Setting(NamedTuple):
    """One setting, for the generated table and for messages."""

    section: str
    name: str
    default: object
    allowed: str
    description: str
    secret: bool
    """Its value is never shown."""
    from_file: bool
    """It may come from a `…_FILE` variable and from the secrets directory."""

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return variable(self.section, self.name)


def variable(section: str, name: str) -> str:
    """Return the name of the environment variable of a setting."""
    return f"{PREFIX}{section}{_DELIMITER}{name}".upper()


def all_settings() -> Iterator[Setting]:
    """Yield every setting in the order of the tree."""
    for section, branch in Settings.model_fields.items():
        model = branch.annotation
        assert isinstance(model, type)  # noqa: S101 - for the type checker
        assert issubclass(model, BaseModel)  # noqa: S101 - likewise
        for name, field in model.model_fields.items():
            members = _members(field.annotation)
            yield Setting(
                section=section,
                name=name,
                default=field.default,
                allowed=_allowed(field),
                description=field.description or "",
                secret=SecretStr in members,
                from_file=any(isinstance(item, _FromFile) for item in field.metadata),
            )


def _members(annotation: object) -> tuple[object, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _allowed(field: FieldInfo) -> str:
    for item in field.metadata:
        if isinstance(item, _Allowed):
            return item.text
    annotation = field.annotation
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        kind = "a whole number" if annotation is int else "a number"
        bounds = {
            bound: getattr(item, bound)
            for item in field.metadata
            for bound in ("ge", "gt", "le")
            if getattr(item, bound, None) is not None
        }
        if "gt" in bounds:
            return f"{kind} above {bounds['gt']}, at most {bounds['le']}"
        return f"{kind} from {bounds['ge']} to {bounds['le']}"
    return "text"
