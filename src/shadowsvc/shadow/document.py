"""Decode: one message's topic and payload become one update, or are rejected with a reason.

Lives here: the JSON document's rules (`{"state": {"reported": {…}, "desired": {…}}, "timestamp": …,
"version": …}`), limits on everything a device controls, and the write time. Rules: every JSON
number keeps its value or the document is rejected; `null` deletes; `{}` changes nothing; arrays
are leaves; of a key given twice the last counts. Must not come in: what happens to a rejected
message, and any state but the last receive time.

Write time: the document's `timestamp`, else the user property `timestamp`, else the receive
time, strictly increasing in this process. Seconds leave six digits free and milliseconds three:
`version` (or the user property `seq`) fills them, modulo 10^6 and 10^3, so that two changes in
one tick keep their order until the sequence wraps.
"""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson

from shadowsvc.errors import Rejected
from shadowsvc.shadow.update import SECTIONS, Update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shadowsvc.shadow.topic import TopicParser

__all__ = ["REASONS", "Decoder", "Limits", "TimeUnit"]

REASONS: Final = (
    "topic",
    "device_name",
    "payload_too_large",
    "properties_too_large",
    "empty_payload",
    "not_utf8",
    "not_json",
    "wrong_type",
    "bad_key",
    "too_deep",
    "too_many_leaves",
    "path_too_long",
    "bad_time",
    "time_in_future",
    "time_too_old",
    "number_precision",
    "refused_by_store",
    "internal_error",
)
"""Every reason a message can be rejected for; the label values of the dead-letter metric."""

TimeUnit = Literal["auto", "seconds", "milliseconds", "microseconds"]
TimePolicy = Literal["reject", "server_time"]

_SECOND_US: Final = 1_000_000
_MILLISECOND_US: Final = 1_000
# Magnitudes that tell the units apart: 10^11 s is the year 5138, 10^11 ms and 10^14 us are 1973.
_AUTO_MILLISECONDS: Final = 10**11
_AUTO_MICROSECONDS: Final = 10**14
_UNITS_US: Final = {"seconds": _SECOND_US, "milliseconds": _MILLISECOND_US, "microseconds": 1}
_MAX_TIME_US: Final = 2**62

# A number of up to 15 significant digits and a small exponent survives a double; a run of 17
# digits and points, or a digit before an exponent, makes a document worth a second, exact look.
_DIGITS_LOOK_ALIKE: Final = bytes(
    0x30 if chr(code) in "0123456789." else 0x65 if chr(code) == "E" else code
    for code in range(256)
)
_LONG_RUN: Final = b"0" * 17
_EXPONENT: Final = b"0e"

# What makes a document worth a closer look, as bits.
_NUMBERS: Final = 1
_ARRAYS: Final = 2
_A_LINE_EACH: Final = orjson.OPT_INDENT_2

_ESCAPED_NUL: Final = b"\\u0000"
_ABSENT: Final = object()
_MAX_LEARNED = 4096
_MAX_LEARNED_CHARS = 128
# What a row weighs in a batch beside its path and value, as Cassandra counts (`Row.dataSize`).
_ROW_OVERHEAD_BYTES: Final = 64
_PLAIN_BYTES: Final = 8192
_MAX_NUMBER_CHARS: Final = 20


class Limits:
    """Limits and policies of `Decoder`; sizes in bytes, times in microseconds."""

    __slots__ = (
        "max_age_us",
        "max_ahead_us",
        "max_depth",
        "max_leaves",
        "max_path_bytes",
        "max_payload_bytes",
        "max_user_properties",
        "max_user_properties_bytes",
        "on_ancient",
        "on_future",
        "unit",
    )

    def __init__(
        self,
        *,
        max_payload_bytes: int = 65536,
        max_depth: int = 16,
        max_leaves: int = 500,
        max_path_bytes: int = 1024,
        max_user_properties: int = 64,
        max_user_properties_bytes: int = 8192,
        unit: TimeUnit = "auto",
        max_ahead_us: int = 300 * _SECOND_US,
        max_age_us: int = 9 * 86400 * _SECOND_US,
        on_future: TimePolicy = "reject",
        on_ancient: TimePolicy = "reject",
    ) -> None:
        """Set them; `max_age_us` belongs below the table's `gc_grace_seconds`."""
        self.max_payload_bytes = max_payload_bytes
        self.max_depth = max_depth
        self.max_leaves = max_leaves
        self.max_path_bytes = max_path_bytes
        self.max_user_properties = max_user_properties
        self.max_user_properties_bytes = max_user_properties_bytes
        self.unit = unit
        self.max_ahead_us = max_ahead_us
        self.max_age_us = max_age_us
        self.on_future = on_future
        self.on_ancient = on_ancient


class Decoder:
    """Turn messages into updates. One a process: it holds the last receive time given out."""

    def __init__(self, topics: TopicParser, limits: Limits, *, unique_times: bool = True) -> None:
        """Make a decoder of `topics` under `limits`.

        `unique_times` makes each receive time that is given out later than the one before. A replay
        must do without: each letter has to get the same time again, whatever came before it.
        """
        self._parse_topic = topics.parse
        self.limits = limits
        self._unique_times = unique_times
        self.clock_trusted = True
        """False: this machine's clock is in doubt, so no time is called future or ancient."""
        self.without_device_time = 0
        """Updates that got the receive time: they had none, or a policy replaced theirs."""
        self._last_receive_us = 0
        # A fleet has few keys: prefix → key → path, learned up to a bound and never forgotten.
        self._paths: dict[str, dict[str, str]] = {}
        self._learned = 0

    def decode(  # noqa: C901, PLR0912, PLR0915 - calls cost more than lines here
        self,
        topic: str,
        payload: bytes,
        user_properties: Sequence[tuple[str, str]],
        now_us: int,
    ) -> Update:
        """Decode one message received at `now_us` (microseconds since 1970).

        Raises `Rejected` with one of `REASONS`.
        """
        device, shadow = self._parse_topic(topic)
        limits = self.limits
        size = len(payload)
        if size > limits.max_payload_bytes:
            raise Rejected(
                "payload_too_large",
                f"{size} bytes, SHADOWSVC_SHADOW__MAX_PAYLOAD_BYTES is {limits.max_payload_bytes}",
            )
        if user_properties:
            _check_properties(user_properties, limits)
        try:
            document = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise _unreadable(payload, error) from None
        if document.__class__ is not dict:
            raise Rejected("wrong_type", "the document is not an object")
        paths: list[str] = []
        leaves: list[Any] = []
        deletes: list[tuple[str, str]] = []
        doubtful = 0
        desired_from = 0
        state = document.get("state", _ABSENT)
        if state.__class__ is dict:
            sections = 0
            content = state.get("reported", _ABSENT)
            if content is not _ABSENT:
                sections = 1
                if content.__class__ is dict:
                    doubtful = self._flatten(content, "reported", "", 1, paths, leaves, deletes)
                    desired_from = len(paths)
                else:
                    _delete_section(content, "reported", deletes)
            if len(state) > sections:
                content = state.get("desired", _ABSENT)
                if content is _ABSENT or len(state) > sections + 1:
                    raise Rejected("wrong_type", "state holds reported and desired only")
                if content.__class__ is dict:
                    doubtful |= self._flatten(content, "desired", "", 1, paths, leaves, deletes)
                else:
                    _delete_section(content, "desired", deletes)
        elif state is None:
            deletes.extend((section, "") for section in SECTIONS)
        else:
            what = "the document has no state" if state is _ABSENT else "state is not an object"
            raise Rejected("wrong_type", what)
        count = len(paths) + len(deletes)
        if count > limits.max_leaves:
            raise Rejected(
                "too_many_leaves",
                f"{count} leaves, SHADOWSVC_SHADOW__MAX_LEAVES is {limits.max_leaves}",
            )
        if size > limits.max_path_bytes or payload.find(_ESCAPED_NUL) >= 0:
            self._check_paths(paths, deletes)
        if doubtful:
            if limits.max_path_bytes >= size > limits.max_path_bytes // 2:
                self._check_paths(paths, deletes)  # an escaped key is up to twice as long
            digits = payload.translate(_DIGITS_LOOK_ALIKE)
            # `find` takes half the time of `in` on bytes.
            if digits.find(_LONG_RUN) >= 0 or digits.find(_EXPONENT) >= 0:
                _check_numbers(payload)
        time_us = self._time(document, user_properties, now_us)
        values = _texts(leaves, doubtful)
        weight = size + count * _ROW_OVERHEAD_BYTES
        if size * count > _PLAIN_BYTES:
            # Leaves may share a long path, which each of them repeats in its row.
            weight = count * _ROW_OVERHEAD_BYTES + sum(map(len, paths)) + sum(map(len, values))
            weight += sum(len(path) for _, path in deletes)
        return Update(device, shadow, time_us, paths, values, desired_from, deletes, weight)

    def device_of(self, topic: str) -> str | None:
        """Return the device that `topic` names, or None when it names none."""
        try:
            return self._parse_topic(topic)[0]
        except Rejected:
            return None

    def receive_time_us(self, now_us: int) -> int:
        """Return the receive time, strictly increasing unless `unique_times` is off."""
        if not self._unique_times:
            return now_us
        self._last_receive_us = last = max(now_us, self._last_receive_us + 1)
        return last

    def _flatten(
        self,
        node: dict[str, Any],
        section: str,
        prefix: str,
        depth: int,
        found: list[str],
        leaves: list[Any],
        deletes: list[tuple[str, str]],
    ) -> int:
        """Append paths and values below `node`; return which closer looks they need (bits)."""
        doubtful = 0
        paths = self._paths.get(prefix)
        if paths is None:
            paths = self._learn_prefix(prefix)
        for key, value in node.items():
            path = paths.get(key)
            if path is None:
                if "~" in key or "/" in key:
                    path = f"{prefix}/{key.replace('~', '~0').replace('/', '~1')}"
                    doubtful |= _NUMBERS
                else:
                    path = self._learn_path(paths, prefix, key)
            kind = value.__class__
            if kind is dict:
                if depth >= self.limits.max_depth:
                    raise _too_deep(self.limits.max_depth)
                doubtful |= self._flatten(value, section, path, depth + 1, found, leaves, deletes)
            elif value is None:
                deletes.append((section, path))
            else:
                if kind is float:
                    doubtful |= _NUMBERS
                elif kind is list:
                    doubtful |= _NUMBERS | _ARRAYS
                    _check_depth(value, depth, self.limits.max_depth)
                found.append(path)
                leaves.append(value)
        return doubtful

    def _learn_prefix(self, prefix: str) -> dict[str, str]:
        paths: dict[str, str] = {}
        if self._learned < _MAX_LEARNED and len(prefix) <= _MAX_LEARNED_CHARS:
            self._learned += 1
            self._paths[prefix] = paths
        return paths

    def _learn_path(self, paths: dict[str, str], prefix: str, key: str) -> str:
        path = f"{prefix}/{key}"
        if self._learned < _MAX_LEARNED and len(path) <= _MAX_LEARNED_CHARS:
            self._learned += 1
            paths[key] = path
        return path

    def _check_paths(self, paths: list[str], deletes: list[tuple[str, str]]) -> None:
        limit = self.limits.max_path_bytes
        for path in (*paths, *(path for _, path in deletes)):
            # The driver takes text as a C string: a NUL would cut the path short.
            if "\0" in path:
                raise Rejected("bad_key", "a key holds U+0000")
            length = len(path.encode())
            if length > limit:
                raise Rejected(
                    "path_too_long",
                    f"a path of {length} bytes, SHADOWSVC_SHADOW__MAX_PATH_BYTES is {limit}",
                )

    def _time(  # noqa: C901, PLR0912 - calls cost more than lines here
        self,
        document: dict[str, Any],
        user_properties: Sequence[tuple[str, str]],
        now_us: int,
    ) -> int:
        stamp = document.get("timestamp")
        if stamp.__class__ is not int:
            if stamp is None and "timestamp" not in document:
                text = _property(user_properties, "timestamp") if user_properties else None
                if text is None:
                    return self._given_time(now_us)
                stamp = _number(text)
            elif stamp.__class__ is not float:
                raise Rejected("bad_time", "timestamp is not a number")
        limits = self.limits
        unit = limits.unit
        if unit == "auto":
            unit_us = (
                _MILLISECOND_US
                if _AUTO_MILLISECONDS <= stamp < _AUTO_MICROSECONDS
                else _SECOND_US
                if stamp < _AUTO_MILLISECONDS
                else 1
            )
        else:
            unit_us = _UNITS_US[unit]
        if stamp.__class__ is int:
            time_us: int = stamp * unit_us
            if unit_us != 1:
                sequence = document.get("version")
                if sequence is None and user_properties:
                    sequence = _sequence(_property(user_properties, "seq"))
                if sequence is not None:
                    if sequence.__class__ is not int or sequence < 0:
                        raise Rejected("bad_time", "version is not a whole number from 0 up")
                    time_us += sequence % unit_us
        elif -_MAX_TIME_US < stamp * unit_us < _MAX_TIME_US:
            time_us = round(stamp * unit_us)
        else:
            time_us = _MAX_TIME_US
        if not 0 < time_us < _MAX_TIME_US:
            raise Rejected("bad_time", "timestamp is out of range")
        if time_us > now_us + limits.max_ahead_us:
            if limits.on_future == "server_time" and self.clock_trusted:
                return self._given_time(now_us)
            if self.clock_trusted:
                ahead = (time_us - now_us) // _SECOND_US
                raise Rejected(
                    "time_in_future",
                    f"{ahead} s ahead, SHADOWSVC_SHADOW__MAX_AHEAD_SECONDS is "
                    f"{limits.max_ahead_us // _SECOND_US}",
                    time_us,
                )
        elif time_us < now_us - limits.max_age_us and self.clock_trusted:
            if limits.on_ancient == "server_time":
                return self._given_time(now_us)
            raise Rejected(
                "time_too_old",
                f"{(now_us - time_us) // _SECOND_US} s old, deletes are remembered for "
                f"{limits.max_age_us // _SECOND_US} s (gc_grace_seconds less a margin)",
                time_us,
            )
        return time_us

    def _given_time(self, now_us: int) -> int:
        self.without_device_time += 1
        return self.receive_time_us(now_us)


def _texts(leaves: list[Any], doubtful: int, dumps: Any = orjson.dumps) -> list[bytes]:
    """Return the JSON text of each leaf.

    All in one call, a line each: a bytes object that a serializer made by itself lies in a kibibyte
    of its own first, which costs ten times as much as what is in it. JSON text has no raw line
    feed within a scalar (RFC 8259 §7); arrays would be broken into lines and go one by one.
    """
    if doubtful & _ARRAYS:
        return [dumps(leaf) for leaf in leaves]
    text: bytes = dumps(leaves, None, _A_LINE_EACH)
    return text[4:-2].split(b",\n  ") if leaves else []


def _delete_section(content: object, section: str, deletes: list[tuple[str, str]]) -> None:
    if content is not None:
        raise Rejected("wrong_type", f"state.{section} is not an object")
    deletes.append((section, ""))


def _unreadable(payload: bytes, error: orjson.JSONDecodeError) -> Rejected:
    if not payload:
        return Rejected("empty_payload", "the payload is empty")
    try:
        payload.decode()
    except UnicodeDecodeError as not_utf8:
        return Rejected("not_utf8", f"byte {not_utf8.start} is not UTF-8")
    if "depth limit" in str(error):
        return Rejected("too_deep", "the document nests more than 1024 levels")
    if "infinity" in str(error):
        return Rejected("number_precision", f"a number does not fit 64 bits: {error.msg}")
    return Rejected("not_json", f"{error.msg} at character {error.pos}")


def _check_properties(user_properties: Sequence[tuple[str, str]], limits: Limits) -> None:
    """Raise `Rejected` when there are too many, or too many bytes of them."""
    count = len(user_properties)
    if count > limits.max_user_properties:
        raise Rejected(
            "properties_too_large",
            f"{count} user properties, SHADOWSVC_SHADOW__MAX_USER_PROPERTIES is "
            f"{limits.max_user_properties}",
        )
    size = sum(len(name.encode()) + len(value.encode()) for name, value in user_properties)
    if size > limits.max_user_properties_bytes:
        raise Rejected(
            "properties_too_large",
            f"user properties of {size} bytes, SHADOWSVC_SHADOW__MAX_USER_PROPERTIES_BYTES is "
            f"{limits.max_user_properties_bytes}",
        )


def _too_deep(limit: int) -> Rejected:
    return Rejected("too_deep", f"SHADOWSVC_SHADOW__MAX_DEPTH is {limit}")


def _check_depth(value: list[Any], depth: int, limit: int) -> None:
    """Raise `Rejected` when an array nests deeper than `limit`; its own level is `depth` + 1."""
    level: list[Any] = [value]
    while level:
        depth += 1
        if depth > limit:
            raise _too_deep(limit)
        below: list[Any] = []
        for node in level:
            for child in node.values() if node.__class__ is dict else node:
                if child.__class__ is dict or child.__class__ is list:
                    below.append(child)  # noqa: PERF401 - a comprehension of three levels hides it
        level = below


def _check_numbers(payload: bytes) -> None:
    """Raise `Rejected` when a number of `payload` does not survive 64 bits.

    The numbers compared are the text's own (`Decimal`) and what was decoded: integers from
    -2^63 to 2^64-1, the rest doubles.
    """

    def whole(text: str) -> None:
        if len(text) > _MAX_NUMBER_CHARS or not -(2**63) <= int(text) < 2**64:
            _check_double(text)

    try:
        json.loads(payload, parse_int=whole, parse_float=_check_double)
    except RecursionError:
        # Python's own limit is lower on some versions; what `state` holds is bounded before.
        raise Rejected("too_deep", "the document nests too deep beside its state") from None


def _check_double(text: str) -> None:
    try:
        exact = Decimal(text) == Decimal(repr(float(text)))
    except (InvalidOperation, OverflowError, ValueError):
        exact = False
    if not exact:
        raise Rejected(
            "number_precision",
            f"the number {text[:40]} does not fit 64 bits without changing its value",
        )


def _property(user_properties: Sequence[tuple[str, str]], name: str) -> str | None:
    """Return the last value of the MQTT user property `name`."""
    for key, value in reversed(user_properties):
        if key == name:
            return value
    return None


def _number(text: str) -> int | float:
    if len(text) <= _MAX_NUMBER_CHARS:
        try:
            return int(text) if text.isdecimal() else float(Decimal(text))
        except (InvalidOperation, ValueError, OverflowError):
            pass
    raise Rejected("bad_time", "the user property timestamp is not a number")


def _sequence(text: str | None) -> int | None:
    if text is None:
        return None
    if text.isdecimal() and len(text) <= _MAX_NUMBER_CHARS:
        return int(text)
    raise Rejected("bad_time", "the user property seq is not a whole number from 0 up")
