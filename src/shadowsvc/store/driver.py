"""The connection by cassandra-driver, for what is not hot: migrations, the token map, reading.

Lives here: making a `Cluster` out of the settings, and the one place where cassandra-driver's
exceptions become ours. Rules: everything here blocks, so it belongs in a thread or a command; a
`Connection` is closed by leaving its `with`; no exception of the driver leaves `errors`; what goes
wrong is told once, by our error, and not a second time by the driver's own log. Must not come in:
statements of any table, and acsylla.

The event loop is libev on every Python: asyncore left the standard library with 3.12, and the
driver's asyncio loop is called experimental by its own documentation.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cassandra import (
    AuthenticationFailed,
    ConsistencyLevel,
    CoordinationFailure,
    InvalidRequest,
    OperationTimedOut,
    ProtocolVersion,
    RequestValidationException,
    Timeout,
    Unauthorized,
    Unavailable,
    UnresolvableContactPoints,
)
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import (
    EXEC_PROFILE_DEFAULT,
    Cluster,
    ExecutionProfile,
    NoHostAvailable,
)
from cassandra.connection import ConnectionException
from cassandra.io.libevreactor import LibevConnection
from cassandra.policies import (
    DCAwareRoundRobinPolicy,
    ExponentialReconnectionPolicy,
    TokenAwarePolicy,
)
from cassandra.protocol import SyntaxException
from cassandra.query import tuple_factory

from shadowsvc.backoff import login_wait_seconds
from shadowsvc.credentials import load
from shadowsvc.errors import (
    CredentialsUnusable,
    SchemaBehind,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)
from shadowsvc.store.endpoints import NamedEndPointFactory, by_name, named

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

    from shadowsvc.credentials import Credentials
    from shadowsvc.settings import Cassandra

__all__ = ["Connection", "connected", "errors", "is_missing", "pace_logins", "renew", "translate"]

_PREFIX = "SHADOWSVC_CASSANDRA__"
_RECONNECT_MIN_SECONDS = 1.0
_RECONNECT_MAX_SECONDS = 30.0
_EVENT_WINDOW_SECONDS = 2.0

# What took the place of the settings' credentials, and the clusters that live; by the settings.
_renewed: MutableMapping[Cassandra, Credentials] = weakref.WeakKeyDictionary()
_living: MutableMapping[Any, Cassandra] = weakref.WeakKeyDictionary()
_refused: MutableMapping[Cassandra, _Refused] = weakref.WeakKeyDictionary()
_login_retry_seconds = [10.0, 300.0]
_lock = threading.Lock()  # clusters are made in several threads
_SHOWN_HOSTS = 5
_SERVER_MESSAGE = re.compile(r'message="(.*)"')
_MISSING = re.compile(r"does not exist|unconfigured table|undefined column", re.IGNORECASE)


class _Refused(NamedTuple):
    """Logins that were refused one after another."""

    times: int
    until: float
    """when the next may be tried, by the monotonic clock"""
    why: str


class Connection(NamedTuple):
    """A connected cluster and session, and what is known of the nodes."""

    cluster: Any
    """`cassandra.cluster.Cluster`"""
    session: Any
    """`cassandra.cluster.Session`; rows are tuples"""
    local_dc: str
    """the data centre in use: the one configured, else the contact point's"""
    warnings: tuple[str, ...]
    """what the caller should tell people, each a sentence that names its setting"""

    def nodes(self, data_centre: str) -> list[Any]:
        """Return the `Host`s of a data centre, those that are down included, by address."""
        return sorted(
            (host for host in self.cluster.metadata.all_hosts() if host.datacenter == data_centre),
            key=lambda host: str(host.endpoint),
        )

    def data_centres(self) -> list[str]:
        """Return the names of the data centres that exist, sorted."""
        return _data_centres(self.cluster)


@contextmanager
def connected(
    settings: Cassandra,
    *,
    keyspace: str | None = None,
    metadata: bool = False,
    request_timeout_seconds: float | None = None,
    schema_agreement_seconds: float = 10.0,
    all_nodes: bool = False,
) -> Iterator[Connection]:
    """Connect, and disconnect at the end.

    `keyspace` is set on the session; `metadata` reads schema and token map and keeps them up to
    date; `request_timeout_seconds` replaces the setting; `schema_agreement_seconds` bounds the
    driver's own wait after a schema change; `all_nodes` waits for a connection to each local node
    instead of to one. Every request has consistency LOCAL_QUORUM and serial consistency
    LOCAL_SERIAL.

    Raises `StoreUnavailable` when there is no way in (kinds `unreachable`, `authentication`, `tls`,
    `local_dc`, …) and `SchemaBehind` when the keyspace does not exist. What happens inside the
    `with` is mapped too. After a refused login it raises at once for a while (`pace_logins`), until
    `renew` brings another one.
    """
    _quieten()
    _wait_for_login(settings)
    cluster = None
    try:
        cluster = _cluster(settings, metadata, request_timeout_seconds, schema_agreement_seconds)
        session = cluster.connect(wait_for_all_pools=all_nodes)
        _refused.pop(settings, None)
        local_dc, warnings = _local_dc(settings, cluster)
        if keyspace is not None:
            session.set_keyspace(keyspace)
        yield Connection(cluster, session, local_dc, warnings)
    except StoreError:
        raise
    except Exception as error:
        mapped = _wrong_local_dc(error, settings, cluster) or translate(error, settings)
        if mapped is None:
            raise
        if mapped.kind == "authentication":
            _count_refusal(settings, str(mapped))
        raise mapped from error
    finally:
        if cluster is not None:
            cluster.shutdown()


def renew(settings: Cassandra, credentials: Credentials) -> None:
    """Let every later connection by `settings` use `credentials`; those that exist stay.

    That goes for connections which a living cluster object makes by itself, too.
    """
    _renewed[settings] = credentials
    _refused.pop(settings, None)
    with _lock:
        living = list(_living.items())
    for cluster, its_settings in living:
        if its_settings == settings:
            cluster.ssl_context = credentials.context
            cluster.auth_provider = _login_of(settings)


def pace_logins(minimum_seconds: float, maximum_seconds: float) -> None:
    """Set the shortest and the longest wait after a refused login, for the whole process."""
    _login_retry_seconds[:] = minimum_seconds, maximum_seconds


def _wait_for_login(settings: Cassandra) -> None:
    """Raise while it is too early for another login: whoever asks too often gets locked out."""
    refused = _refused.get(settings)
    if refused is not None and (seconds := refused.until - time.monotonic()) > 0:
        raise StoreUnavailable(
            "authentication", f"{refused.why}; not tried again for {seconds:.0f} s"
        )


def _count_refusal(settings: Cassandra, why: str) -> None:
    before = _refused.get(settings)
    count = 1 if before is None else before.times + 1
    least, most = _login_retry_seconds
    wait = login_wait_seconds(count, least, most)
    _refused[settings] = _Refused(count, time.monotonic() + wait, why)


@contextmanager
def errors(settings: Cassandra) -> Iterator[None]:
    """Map what cassandra-driver raises inside the `with` to our errors."""
    try:
        yield
    except Exception as error:
        mapped = translate(error, settings)
        if mapped is None:
            raise
        raise mapped from error


def translate(error: Exception, settings: Cassandra) -> StoreError | None:  # noqa: C901, PLR0911 - a table
    """Return our error for one of cassandra-driver's, None for one that is not its own.

    Messages name the setting to change. Outages, grants and logins are `StoreUnavailable`, a
    missing keyspace or table is `SchemaBehind`, what the server calls invalid is `StoreRefused`.
    """
    text = _text(error)
    if isinstance(error, StoreError):
        return error
    if isinstance(error, (NoHostAvailable, UnresolvableContactPoints)):
        return _no_way_in(error, settings)
    if isinstance(error, AuthenticationFailed):
        return _login(settings, text)
    if isinstance(error, Unauthorized):
        return StoreUnavailable(
            "unauthorized",
            f"{_user(settings)} lacks a right: {text} (grant it, or change {_PREFIX}USERNAME)",
        )
    if isinstance(error, (Timeout, OperationTimedOut)):
        return StoreUnavailable("timeout", f"Cassandra did not answer in time: {text}")
    if isinstance(error, Unavailable):
        return StoreUnavailable(
            "unavailable",
            f"too few replicas are alive: {error.alive_replicas} of the "
            f"{error.required_replicas} that {_level(error.consistency)} needs",
        )
    if isinstance(error, CoordinationFailure):
        return StoreUnavailable("failure", f"a replica failed: {text}")
    if is_missing(error):
        return SchemaBehind(f"{text}: run `shadowsvc migrate` ({_PREFIX}KEYSPACE)")
    if isinstance(error, (RequestValidationException, SyntaxException)):
        return StoreRefused("invalid", f"Cassandra refused the statement: {text}")
    if type(error).__module__.partition(".")[0] == "cassandra":
        return StoreUnavailable("server", f"Cassandra reports: {text}")
    return None


def _cluster(
    settings: Cassandra,
    metadata: bool,  # noqa: FBT001 - private
    request_timeout_seconds: float | None,
    schema_agreement_seconds: float,
) -> Any:
    profile = ExecutionProfile(
        load_balancing_policy=TokenAwarePolicy(DCAwareRoundRobinPolicy(settings.local_dc)),
        consistency_level=ConsistencyLevel.LOCAL_QUORUM,
        serial_consistency_level=ConsistencyLevel.LOCAL_SERIAL,
        request_timeout=request_timeout_seconds or settings.request_timeout_seconds,
        row_factory=tuple_factory,
    )
    names = settings.tls and by_name(settings.contact_points)
    points = named(settings.contact_points, settings.port) if names else settings.contact_points
    cluster = Cluster(
        points,
        endpoint_factory=NamedEndPointFactory(settings.port) if names else None,
        port=settings.port,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        auth_provider=_login_of(settings),
        ssl_context=_ssl_context(settings),
        connect_timeout=settings.connect_timeout_seconds,
        control_connection_timeout=settings.connect_timeout_seconds,
        max_schema_agreement_wait=schema_agreement_seconds,
        reconnection_policy=ExponentialReconnectionPolicy(
            _RECONNECT_MIN_SECONDS, _RECONNECT_MAX_SECONDS
        ),
        connection_class=LibevConnection,
        schema_metadata_enabled=metadata,
        token_metadata_enabled=metadata,
        schema_event_refresh_window=_EVENT_WINDOW_SECONDS,
        topology_event_refresh_window=_EVENT_WINDOW_SECONDS,
        monitor_reporting_enabled=False,
        application_name="shadowsvc",
    )
    # The driver would begin with two versions that only DSE speaks. As an argument it could not
    # fall back to version 4.
    cluster.protocol_version = ProtocolVersion.V5
    with _lock:
        _living[cluster] = settings
    return cluster


def _login_of(settings: Cassandra) -> PlainTextAuthProvider | None:
    login = _renewed.get(settings, settings)
    if login.username is None:
        return None
    password = login.password.get_secret_value() if login.password else ""
    return PlainTextAuthProvider(login.username, password)


def _ssl_context(settings: Cassandra) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    renewed = _renewed.get(settings)
    if renewed is not None:
        return renewed.context
    try:
        # It checks chain and name, which is the node's address, or that of its end point.
        return load("cassandra", settings).context
    except CredentialsUnusable as error:
        raise StoreUnavailable("tls", f"cannot load the certificates: {error}") from None


def _local_dc(settings: Cassandra, cluster: Any) -> tuple[str, tuple[str, ...]]:
    if settings.local_dc:
        return settings.local_dc, ()
    host = cluster.get_control_connection_host()
    name = str(host.datacenter) if host is not None else ""
    return name, (
        f"{_PREFIX}LOCAL_DC is not set; using {name!r}, the data centre of the contact point",
    )


def _wrong_local_dc(error: Exception, settings: Cassandra, cluster: Any) -> StoreError | None:
    """Return the error when the cluster was reached but the data centre does not exist.

    The driver only says that it found no host: it ignores nodes of other data centres.
    """
    if not isinstance(error, NoHostAvailable) or cluster is None or not settings.local_dc:
        return None
    names = _data_centres(cluster)
    if not names or settings.local_dc in names:
        return None
    return StoreUnavailable(
        "local_dc",
        f"there is no data centre {settings.local_dc!r}; this cluster has "
        f"{', '.join(map(repr, names))}: change {_PREFIX}LOCAL_DC",
    )


def _data_centres(cluster: Any) -> list[str]:
    return sorted({host.datacenter for host in cluster.metadata.all_hosts() if host.datacenter})


def _no_way_in(error: Exception, settings: Cassandra) -> StoreError:
    causes = getattr(error, "errors", None)
    by_host: dict[Any, Exception] = causes if isinstance(causes, dict) else {}
    for cause in by_host.values():
        if isinstance(cause, AuthenticationFailed):
            return _login(settings, _text(cause))
        # The driver makes a plain OSError of a failed handshake, so its text has to tell.
        if isinstance(cause, ssl.SSLError) or "[SSL: " in str(cause):
            return StoreUnavailable(
                "tls",
                f"no secure connection: {_text(cause)} (look at {_PREFIX}TLS, "
                f"{_PREFIX}CA_FILE, {_PREFIX}CERTIFICATE_FILE and the names in the nodes' own "
                "certificates)",
            )
    shown = [f"{host}: {_text(cause)}" for host, cause in list(by_host.items())[:_SHOWN_HOSTS]]
    if isinstance(error, UnresolvableContactPoints):
        shown = ["no address is known for that name"]
    where = ", ".join(settings.contact_points)
    return StoreUnavailable(
        "unreachable",
        f"cannot connect to Cassandra at {where}, port {settings.port}: "
        f"{'; '.join(shown) or _text(error)} "
        f"(look at {_PREFIX}CONTACT_POINTS and {_PREFIX}PORT)",
    )


def _login(settings: Cassandra, text: str) -> StoreError:
    return StoreUnavailable(
        "authentication",
        f"Cassandra did not accept {_user(settings)}: {text} "
        f"(look at {_PREFIX}USERNAME and {_PREFIX}PASSWORD)",
    )


def _user(settings: Cassandra) -> str:
    return "a login without a user" if settings.username is None else f"user {settings.username!r}"


def _text(error: Exception) -> str:
    """Return what the error says, on one line, in the server's own words where there are any."""
    text = " ".join(str(error).replace("\\'", "'").split())
    quoted = _SERVER_MESSAGE.search(text)
    return (quoted[1] if quoted else text) or type(error).__name__


def is_missing(error: Exception) -> bool:
    """Tell whether the server means that a keyspace, table or column is not there (yet)."""
    # Setting a keyspace wraps the server's answer once the session has several connections.
    kinds = (InvalidRequest, ConnectionException)
    return isinstance(error, kinds) and _MISSING.search(str(error)) is not None


def _level(consistency: Any) -> str:
    name: str = ConsistencyLevel.value_to_name.get(consistency, str(consistency))
    return name


def _quieten() -> None:
    """Keep the driver's log off the terminal, unless somebody gave its logger a level."""
    logger = logging.getLogger("cassandra")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
