"""What every error of the driver means to the pipeline: the table, against the library itself."""

from __future__ import annotations

import builtins
import inspect
import re

import pytest
from acsylla import errors as driver_errors
from cassandra.protocol import error_classes

from shadowsvc.errors import SchemaBehind, StoreRefused, StoreUnavailable
from shadowsvc.store.faults import (
    FAULTS,
    SERVER_ERRORS,
    UNKNOWN_KIND,
    Fault,
    answered,
    fault_of,
    kind_of,
    mapped,
)

OF_THE_DRIVER = {
    name: one
    for name, one in inspect.getmembers(driver_errors, inspect.isclass)
    if issubclass(one, Exception)
}

NAMED_OTHERWISE = {
    "ProtocolError": "ProtocolException",
    "SyntaxError": "SyntaxException",
    "InvalidQuery": "InvalidRequest",
    "ConfigError": "ConfigurationException",
    "Unprepared": "PreparedQueryNotFound",
}


def made(name: str, text: str = "") -> Exception:
    error = OF_THE_DRIVER[name](text)
    assert isinstance(error, Exception)
    return error


def test_the_table_has_every_error_of_the_driver_and_none_that_is_gone() -> None:
    assert len(OF_THE_DRIVER) > 60
    of_python = {name for name in FAULTS if hasattr(builtins, name)}
    assert set(FAULTS) - of_python == set(OF_THE_DRIVER)


def test_an_error_that_the_library_adds_is_an_outage_with_a_bounded_label() -> None:
    class CassErrorServerSomethingNew(driver_errors.CassErrorSourceServer):  # type: ignore[misc]
        pass

    class SomethingElse(Exception):
        pass

    for error in (CassErrorServerSomethingNew(), SomethingElse("x")):
        ours = mapped(error)
        assert isinstance(ours, StoreUnavailable)
        assert not ours.overload
    assert kind_of(CassErrorServerSomethingNew()) == "source_server"
    assert kind_of(SomethingElse()) == UNKNOWN_KIND


@pytest.mark.parametrize("name", sorted(OF_THE_DRIVER))
def test_every_error_maps_to_its_group_and_keeps_its_text(name: str) -> None:
    ours = mapped(made(name, "what happened"))
    fault = FAULTS[name]
    if name == "CassErrorLibUnableToSetKeyspace":
        assert isinstance(ours, SchemaBehind)
        return
    assert isinstance(ours, StoreRefused if fault is Fault.REFUSED else StoreUnavailable)
    assert ours.overload is (fault is Fault.OVERLOAD)
    assert ours.doubtful is (fault is Fault.DOUBTFUL)
    assert str(ours) == f"{name}: what happened"
    assert re.fullmatch(r"[a-z][a-z0-9_]*", ours.kind)


def test_labels_tell_errors_apart() -> None:
    kinds = [kind_of(one("")) for one in OF_THE_DRIVER.values()]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize(
    "name",
    [
        "CassErrorServerUnavailable",
        "CassErrorServerIsBootstrapping",
        "CassErrorServerUnauthorized",
        "CassErrorServerBadCredentials",
        "CassErrorLibNoHostsAvailable",
        "CassErrorServerOverloaded",
        "CassErrorServerWriteTimeout",
        "CassErrorLibRequestTimedOut",
        "CassErrorServerWriteFailure",
        "CassErrorServerServerError",
    ],
)
def test_an_outage_is_never_a_refusal(name: str) -> None:
    assert fault_of(made(name)) is not Fault.REFUSED


@pytest.mark.parametrize(
    "text",
    [
        "unconfigured table shadow",
        "Keyspace 'x' does not exist",
        "Undefined column name leaf",
        "Unknown identifier value",
    ],
)
def test_a_refusal_that_speaks_of_the_schema_is_an_outage(text: str) -> None:
    ours = mapped(made("CassErrorServerInvalidQuery", text))
    assert isinstance(ours, SchemaBehind)
    assert "shadowsvc migrate" in str(ours)


def test_a_value_that_the_driver_cannot_bind_is_a_refusal() -> None:
    assert isinstance(mapped(OverflowError("int too big to convert")), StoreRefused)
    assert isinstance(mapped(UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates")), StoreRefused)


def test_ours_stay_as_they_are() -> None:
    ours = StoreUnavailable("a", "b")
    assert mapped(ours) is ours


@pytest.mark.parametrize(("code", "name"), SERVER_ERRORS.items())
def test_an_answer_of_the_server_means_what_the_driver_says_of_it(code: int, name: str) -> None:
    ours, theirs = answered(code, "what happened"), mapped(made(name, "what happened"))
    assert (type(ours), ours.kind, str(ours)) == (type(theirs), theirs.kind, str(theirs))
    assert (ours.overload, ours.doubtful) == (theirs.overload, theirs.doubtful)


def test_codes_are_those_of_the_protocol() -> None:
    of_the_server = {name for name in OF_THE_DRIVER if name.startswith("CassErrorServer")}
    assert set(SERVER_ERRORS.values()) == of_the_server
    # cassandra-driver has the same list under names of its own.
    for code, name in SERVER_ERRORS.items():
        word = name.removeprefix("CassErrorServer")
        assert error_classes[code].__name__.startswith(NAMED_OTHERWISE.get(word, word))


def test_an_answer_that_the_table_does_not_have_is_an_outage() -> None:
    ours = answered(0x4711, "x")
    assert isinstance(ours, StoreUnavailable)
    assert ours.kind == UNKNOWN_KIND


def test_an_invalid_query_about_a_table_that_is_gone_is_about_the_schema() -> None:
    assert isinstance(answered(0x2200, "unconfigured table shadow"), SchemaBehind)
