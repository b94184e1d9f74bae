"""The settings tree: every setting, its type, range, default and meaning.

Lives here: the frozen models and the rules that concern one setting alone. Rules: every field has
a description with its unit, from which `docs/configuration.md` is generated
(`scripts/configuration-table`); durations end in `_seconds`, sizes in `_bytes`. Must not come in:
where values come from and rules between settings (`shadowsvc.config`), and any I/O.
"""

from __future__ import annotations

import re
import types
import typing
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - pydantic resolves the annotations at run time
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

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo

__all__ = [
    "LAYERS",
    "PREFIX",
    "Cassandra",
    "DeadLetters",
    "Http",
    "Limits",
    "Log",
    "Mqtt",
    "Setting",
    "Settings",
    "Shadow",
    "all_settings",
    "variable",
]

PREFIX = "SHADOWSVC_"
_DELIMITER = "__"

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_MAX_CLIENT_ID = 128
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


def _has_control(text: str) -> bool:
    return any(ord(char) < 32 or 127 <= ord(char) < 160 for char in text)  # noqa: PLR2004 - C0, C1


def _url(text: str) -> str:
    if "@" in text:  # before anything that might quote it
        raise ValueError(
            "a user name or password has no place in the URL: "
            f"give {PREFIX}MQTT__USERNAME and {PREFIX}MQTT__PASSWORD (or …_FILE)"
        )
    parts = urlsplit(text)
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("the scheme is neither mqtt nor mqtts")
    if not parts.hostname:
        raise ValueError("the host is missing")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or _has_control(text):
        raise ValueError("nothing may follow the port")
    if parts.port == 0:  # reading `port` raises ValueError if it is no port
        raise ValueError("port 0 is no port of a broker")
    return text


def _client_id(text: str) -> str:
    if len(text) > _MAX_CLIENT_ID:
        raise ValueError(f"it has {len(text)} characters")
    if _has_control(text):
        raise ValueError("it has a control character")
    return text


def _share_group(text: str) -> str:
    # MQTT 5 §4.8.2: a ShareName has at least one character and none of "/", "+", "#".
    if not text or any(char in text for char in "/+#") or _has_control(text):
        raise ValueError("it is no share name (MQTT 5 §4.8.2)")
    return text


def _topic_prefix(text: str) -> str:
    if not text or any(char in text for char in "+#") or _has_control(text):
        raise ValueError("a wildcard, a control character or nothing at all cannot lead a topic")
    if text.startswith("$"):
        raise ValueError('brokers fail on shared subscriptions to topics that start with "$"')
    if text.startswith("/") or text.endswith("/") or "//" in text:
        raise ValueError('an empty level: "/" belongs between levels only')
    return text


def _contact_points(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    if not hosts:
        raise ValueError("the list is empty")
    for host in hosts:
        if "@" in host:
            raise ValueError(
                "a user name or password has no place here: "
                f"give {PREFIX}CASSANDRA__USERNAME and {PREFIX}CASSANDRA__PASSWORD (or …_FILE)"
            )
        if not host or "/" in host or _has_control(host) or " " in host:
            raise ValueError(f"{host!r} is no host name or address")
        if host.count(":") == 1:
            raise ValueError(f"{host!r} names a port: give {PREFIX}CASSANDRA__PORT")
    return hosts


def _keyspace(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,47}", text):
        raise ValueError("it is no plain keyspace name")
    return text


def _replication(text: str) -> str:
    if text == "auto" or re.fullmatch(r"[1-9][0-9]?", text):
        return text
    names = []
    for part in text.split(","):
        match = re.fullmatch(r"([^\s:,'\"]+):([1-9][0-9]?)", part)
        if match is None:
            raise ValueError(f"{part!r} is not written as name:number")
        names.append(match[1])
    if len(set(names)) != len(names):
        raise ValueError("a data centre is named twice")
    return text


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Port = Annotated[int, Field(ge=1, le=65_535)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
File = Annotated["Path | None", _Allowed("path of a readable PEM file")]
Username = Annotated["str | None", _Allowed("text"), _FromFile()]
Password = Annotated["SecretStr | None", _Allowed("text"), _FromFile()]
TimePolicy = Annotated[Literal["reject", "server_time"], BeforeValidator(_lower)]
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
    BeforeValidator(_upper),
]


class _Section(BaseModel):
    """A branch of the tree: immutable, and deaf to names that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Mqtt(_Section):
    """The connection to the broker and the session on it."""

    url: Annotated[
        str,
        AfterValidator(_url),
        _Allowed("mqtt://HOST[:PORT] (port 1883) or mqtts://HOST[:PORT] (TLS, port 8883)"),
    ] = Field(default="mqtt://127.0.0.1:1883", description="Address of the MQTT 5 broker.")
    client_id: Annotated[
        str,
        AfterValidator(_client_id),
        _Allowed(f"1 to {_MAX_CLIENT_ID} characters, no control characters"),
    ] = Field(
        default="",
        description="Client id, the name of the persistent session: the same after a restart, and "
        "another for each process. Needed by `run`.",
    )
    share_group: Annotated[
        str, AfterValidator(_share_group), _Allowed('one or more characters, no "/", "+" or "#"')
    ] = Field(
        default="shadowsvc",
        description="Name of the shared subscription; processes of one group share the devices.",
    )
    topic_prefix: Annotated[
        str,
        AfterValidator(_topic_prefix),
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
        return parts.port or _DEFAULT_PORTS[parts.scheme]


class Cassandra(_Section):
    """The connection to Cassandra and how it is written to."""

    contact_points: Annotated[
        tuple[str, ...],
        BeforeValidator(_contact_points),
        AfterValidator(_hosts),
        _Allowed("host names or addresses, separated by commas"),
    ] = Field(
        default=("127.0.0.1",),
        description="Where to look for the cluster; the driver finds the rest.",
    )
    port: Port = Field(default=9042, description="CQL port, the same on every node.")
    keyspace: Annotated[
        str,
        AfterValidator(_keyspace),
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
        AfterValidator(_replication),
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
    batch_max_partitions: int = Field(
        default=10,
        ge=1,
        le=1000,
        description="Devices in one batch at most. Cassandra warns above its own "
        "`unlogged_batch_across_partitions_warn_threshold` (10).",
    )
    batch_max_bytes: int = Field(
        default=5120,
        ge=512,
        le=16 * _MIB,
        description="Size of one batch at most, in bytes. Cassandra warns above its "
        "`batch_size_warn_threshold` (5 KiB) and refuses above `batch_size_fail_threshold`.",
    )
    linger_seconds: float = Field(
        default=0.005,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Longest wait of an update for company in its batch; 0: none.",
    )
    concurrency: int = Field(
        default=32, ge=1, le=256, description="Batches in flight at most, all nodes together."
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
    timestamp_unit: Annotated[
        Literal["auto", "seconds", "milliseconds", "microseconds"], BeforeValidator(_lower)
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


class Http(_Section):
    """The server for probes and metrics."""

    host: str = Field(default="0.0.0.0", description="Address to listen on.")  # noqa: S104 - probes come from outside the pod
    port: int = Field(
        default=8080, ge=0, le=65_535, description="Port to listen on; 0: any free one."
    )


class Log(_Section):
    """What is logged, to standard error."""

    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        default="INFO", description="The least important events that are logged."
    )
    format: Annotated[Literal["auto", "json", "console"], BeforeValidator(_lower)] = Field(
        default="auto", description="auto: console on a terminal, else json (one object a line)."
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
