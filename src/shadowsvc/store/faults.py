"""What each error of the data plane's driver means: the one table.

Lives here: the meaning of every exception class of acsylla, by the class's name (only
`store.cassandra` may import the driver), and the making of our errors from the driver's. Rules: a
name stands in exactly one group, and a test compares the table with the library; what is not in the
table is an outage, since an outage never costs data; a metric label comes from the table, so that
their number is bounded. Must not come in: retrying, splitting, acks.

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

__all__ = ["FAULTS", "UNKNOWN_KIND", "Fault", "fault_of", "kind_of", "mapped"]

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
    name = type(error).__name__
    text = f"{name}: {error}" if str(error) else name
    fault = fault_of(error)
    kind = kind_of(error)
    if fault is Fault.REFUSED:
        message = str(error).lower()
        if any(words in message for words in _SCHEMA_WORDS):
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
