"""What each error of the data plane means: the one table.

Lives here: the meaning of every exception class of acsylla, by the class's name (only
`store.cassandra` may import the driver), of every error code of CQL's protocol, by the class that
acsylla has for it, and the making of our errors from both. Rules: a name stands in exactly one
group, and a test compares the table with the library; what is not in the table is an outage, since
an outage never costs data; a metric label comes from the table, so that their number is bounded.
Must not come in: retrying, splitting, acks.

| Group | Meaning | What `writers` does |
|---|---|---|
| outage | Cassandra, the way to it, schema, grants or login | the same again, for ever |
| overload | an outage that says: too much | that, and the window shrinks |
| doubtful | an outage, or this request's doing | that; halved after some attempts |
| refused | this request, as it is, will not be taken | halved until one update stands alone |

No group makes a dead letter by itself: only an update that is refused alone while a known-good
write succeeds becomes one.
"""

from __future__ import annotations

from enum import Enum

from shadowsvc.errors import SchemaBehind, StoreError, StoreRefused, StoreUnavailable

__all__ = [
    "FAULTS",
    "SERVER_ERRORS",
    "UNKNOWN_KIND",
    "UNPREPARED",
    "Fault",
    "answered",
    "failed",
    "fault_of",
    "kind_of",
    "mapped",
]

UNKNOWN_KIND = "unknown"
"""The label of an error that the table does not have."""


class Fault(Enum):
    """The groups of the table."""

    OUTAGE = "outage"
    OVERLOAD = "overload"
    DOUBTFUL = "doubtful"
    REFUSED = "refused"


_GROUPS: dict[Fault, tuple[str, ...]] = {
    Fault.OUTAGE: (
        # The way to Cassandra.
        "CassExceptionConnectionError",
        "CassErrorLibHostResolution",
        "CassErrorLibNoHostsAvailable",
        "CassErrorLibUnableToConnect",
        "CassErrorLibUnableToDetermineProtocol",
        "CassErrorLibUnexpectedResponse",
        "CassErrorLibWriteError",
        "CassErrorSslClosed",
        "CassErrorSslIdentityMismatch",
        "CassErrorSslInvalidCert",
        "CassErrorSslInvalidPeerCert",
        "CassErrorSslInvalidPrivateKey",
        "CassErrorSslNoPeerCert",
        "CassErrorSslProtocolError",
        # Replicas that are away.
        "CassErrorServerIsBootstrapping",
        "CassErrorServerUnavailable",
        # Login and grants: someone mends them, and the update is as good as before.
        "CassErrorServerBadCredentials",
        "CassErrorServerUnauthorized",
        # Schema and the server's configuration.
        "AggregateNotFound",
        "CassErrorLibUnableToSetKeyspace",
        "CassErrorServerAlreadyExists",
        "CassErrorServerConfigError",
        "CassErrorServerFunctionFailure",
        "CassErrorServerUnprepared",
        "ColumnNotFound",
        "FunctionNotFound",
        "IndexNotFound",
        "KeyspaceNotFound",
        "MaterializedViewNotFound",
        "SchemaNotAvailable",
        "TableNotFound",
        "UserTypeNotFound",
        # The driver's own state; reading an answer.
        "CassErrorLibCallbackAlreadySet",
        "CassErrorLibExecutionProfileInvalid",
        "CassErrorLibInternalError",
        "CassErrorLibInvalidData",
        "CassErrorLibInvalidErrorResultType",
        "CassErrorLibInvalidFutureType",
        "CassErrorLibInvalidState",
        "CassErrorLibNoAvailableIoThread",
        "CassErrorLibNoCustomPayload",
        "CassErrorLibNoPagingState",
        "CassErrorLibNoTracingId",
        "CassErrorLibNotEnoughData",
        "CassErrorLibNotImplemented",
        "CassErrorLibNullValue",
        "CassErrorLibUnableToClose",
        "CassErrorLibUnableToInit",
        # Not of writes, or the roots of the tree: nothing is known about the request.
        "CassErrorServerReadFailure",
        "CassErrorServerReadTimeout",
        "CassErrorServerTruncateError",
        "CassErrorSourceLib",
        "CassErrorSourceServer",
        "CassErrorSourceSsl",
        "CassException",
    ),
    Fault.OVERLOAD: (
        "CassErrorLibNoStreams",
        "CassErrorLibRequestQueueFull",
        "CassErrorLibRequestTimedOut",
        "CassErrorServerOverloaded",
        "CassErrorServerWriteTimeout",
        "TimeoutError",
    ),
    Fault.DOUBTFUL: (
        # A replica failed with an exception: its disk, or a mutation that it can't apply.
        "CassErrorServerServerError",
        "CassErrorServerWriteFailure",
    ),
    Fault.REFUSED: (
        # By the server.
        "CassErrorServerInvalidQuery",
        "CassErrorServerProtocolError",
        "CassErrorServerSyntaxError",
        "CassExceptionInvalidQuery",
        "CassExceptionSyntaxError",
        # By the driver, which can't bind or encode it.
        "CassErrorLibBadParams",
        "CassErrorLibIndexOutOfBounds",
        "CassErrorLibInvalidCustomType",
        "CassErrorLibInvalidItemCount",
        "CassErrorLibInvalidStatementType",
        "CassErrorLibInvalidValueType",
        "CassErrorLibMessageEncode",
        "CassErrorLibNameDoesNotExist",
        "CassErrorLibParameterUnset",
        # Python's own, of a value that does not fit the column's type.
        "OverflowError",
        "TypeError",
        "ValueError",
    ),
}

FAULTS: dict[str, Fault] = {name: fault for fault, names in _GROUPS.items() for name in names}
"""The group of each class, by its name."""

UNPREPARED = 0x2500
"""The server does not know the id of a prepared statement (any more)."""

SERVER_ERRORS: dict[int, str] = {
    0x0000: "CassErrorServerServerError",
    0x000A: "CassErrorServerProtocolError",
    0x0100: "CassErrorServerBadCredentials",
    0x1000: "CassErrorServerUnavailable",
    0x1001: "CassErrorServerOverloaded",
    0x1002: "CassErrorServerIsBootstrapping",
    0x1003: "CassErrorServerTruncateError",
    0x1100: "CassErrorServerWriteTimeout",
    0x1200: "CassErrorServerReadTimeout",
    0x1300: "CassErrorServerReadFailure",
    0x1400: "CassErrorServerFunctionFailure",
    0x1500: "CassErrorServerWriteFailure",
    0x2000: "CassErrorServerSyntaxError",
    0x2100: "CassErrorServerUnauthorized",
    0x2200: "CassErrorServerInvalidQuery",
    0x2300: "CassErrorServerConfigError",
    0x2400: "CassErrorServerAlreadyExists",
    UNPREPARED: "CassErrorServerUnprepared",
}
"""The class of each error code (`native_protocol_v4.spec` §9)."""

# An InvalidQuery that says so is about the schema: an outage until someone migrates.
_SCHEMA_WORDS = ("unconfigured table", "does not exist", "unknown identifier", "undefined column")


def _snake(name: str) -> str:
    short = name.removeprefix("CassError").removeprefix("CassException") or name
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in short).lstrip(
        "_"
    )


_KINDS = {name: _snake(name) for name in FAULTS}


def _known(error: BaseException) -> str | None:
    """Return the first name in the error's ancestry that the table has."""
    return next((one.__name__ for one in type(error).__mro__ if one.__name__ in FAULTS), None)


def fault_of(error: BaseException) -> Fault:
    """Return the group of a driver's error; an outage when the table does not have it."""
    name = _known(error)
    return Fault.OUTAGE if name is None else FAULTS[name]


def kind_of(error: BaseException) -> str:
    """Return the metric label of a driver's error, one of a bounded set."""
    name = _known(error)
    return UNKNOWN_KIND if name is None else _KINDS[name]


def mapped(error: Exception) -> StoreError:
    """Return ours for a driver's error; ours stay as they are."""
    if isinstance(error, StoreError):
        return error
    return _made(type(error).__name__, str(error), fault_of(error), kind_of(error))


def answered(code: int, message: str) -> StoreError:
    """Return ours for an ERROR of the server; one that the table does not have is an outage."""
    name = SERVER_ERRORS.get(code)
    if name is None:
        return StoreUnavailable(UNKNOWN_KIND, f"error {code:#06x}: {message}")
    return failed(name, message)


def failed(name: str, message: str) -> StoreError:
    """Return ours for what the table has under `name`."""
    return _made(name, message, FAULTS[name], _KINDS[name])


def _made(name: str, message: str, fault: Fault, kind: str) -> StoreError:
    text = f"{name}: {message}" if message else name
    if fault is Fault.REFUSED:
        if any(words in message.lower() for words in _SCHEMA_WORDS):
            return SchemaBehind(f"{text}: run `shadowsvc migrate`")
        return StoreRefused(kind, text)
    if name == "CassErrorLibUnableToSetKeyspace":
        return SchemaBehind(
            "the keyspace does not exist: run `shadowsvc migrate`, or see "
            "SHADOWSVC_CASSANDRA__KEYSPACE"
        )
    return StoreUnavailable(
        kind, text, overload=fault is Fault.OVERLOAD, doubtful=fault is Fault.DOUBTFUL
    )
