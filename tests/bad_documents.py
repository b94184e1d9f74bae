"""Documents that are no update, each with the reason that it is to be rejected for.

Rules: every reason that a document can have is among them (`test_bad_documents` sees to that); the
limits are lower than the defaults, so that a service needs `LIMITS` to reject them all. Must not
come in: what a rejection does.
"""

from __future__ import annotations

import json
import time
from typing import NamedTuple

__all__ = ["BAD", "LIMITS", "Bad"]

MAX_PAYLOAD_BYTES = 70_000  # above the 65,536 bytes that a dead letter keeps
MAX_DEPTH = 16
MAX_LEAVES = 100
MAX_PATH_BYTES = 1024

LIMITS: dict[str, object] = {
    "SHADOW__MAX_PAYLOAD_BYTES": MAX_PAYLOAD_BYTES,
    "SHADOW__MAX_DEPTH": MAX_DEPTH,
    "SHADOW__MAX_LEAVES": MAX_LEAVES,
    "SHADOW__MAX_PATH_BYTES": MAX_PATH_BYTES,
}
"""Settings of a service, without their prefix."""


class Bad(NamedTuple):
    """A bad message."""

    reason: str
    payload: bytes
    topic: str = "{prefix}/{device}/shadow/update"
    properties: tuple[tuple[str, str], ...] = ()


def reported(text: str, more: str = "") -> bytes:
    return f'{{"state":{{"reported":{text}}}{more}}}'.encode()


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def number(text: str) -> Bad:
    return Bad("number_precision", reported(f'{{"n":{text}}}'))


def at(stamp: str) -> bytes:
    return reported('{"a":1}', f',"timestamp":{stamp}')


NOW = int(time.time())
GOOD = reported('{"a":1}')

BAD = {
    "nothing": Bad("empty_payload", b""),
    "not UTF-8": Bad("not_utf8", b'{"state":{"reported":{"a":"\xff\xfe"}}}'),
    "half a character": Bad("not_utf8", b'{"state":{"reported":{"a":"\xc3'),
    "not JSON": Bad("not_json", b"on=true"),
    "cut off": Bad("not_json", GOOD[:-2]),
    "two documents": Bad("not_json", GOOD + GOOD),
    "NaN": Bad("not_json", reported('{"a":NaN}')),
    "infinity": Bad("not_json", reported('{"a":Infinity}')),
    "a lone surrogate": Bad("not_json", reported(r'{"a":"\ud800"}')),
    "a byte order mark": Bad("not_json", b"\xef\xbb\xbf" + GOOD),
    "a raw NUL": Bad("not_json", reported('{"a":"\0"}')),
    "an array": Bad("wrong_type", b"[1]"),
    "a number": Bad("wrong_type", b"42"),
    "no state": Bad("wrong_type", b'{"timestamp":1}'),
    "a state that is text": Bad("wrong_type", b'{"state":"on"}'),
    "a section that is an array": Bad("wrong_type", reported("[1]")),
    "an unknown section": Bad("wrong_type", b'{"state":{"wanted":{"a":1}}}'),
    "NUL in a key": Bad("bad_key", reported(r'{"a\u0000b":1}')),
    "NUL in a key that is deleted": Bad("bad_key", reported(r'{"a":{"\u0000":null}}')),
    "too deep": Bad("too_deep", reported(nested(MAX_DEPTH + 1))),
    "an array too deep": Bad("too_deep", reported('{"a":' + "[" * 16 + "]" * 16 + "}")),
    "absurdly deep": Bad("too_deep", reported('{"a":' + "[" * 20_000 + "]" * 20_000 + "}")),
    "too many leaves": Bad(
        "too_many_leaves", reported(json.dumps({f"k{key}": key for key in range(MAX_LEAVES + 1)}))
    ),
    "too many deletes": Bad(
        "too_many_leaves", reported(json.dumps({f"k{key}": None for key in range(MAX_LEAVES + 1)}))
    ),
    "too large": Bad("payload_too_large", reported(f'{{"a":"{"x" * MAX_PAYLOAD_BYTES}"}}')),
    "much too large": Bad("payload_too_large", b"x" * 1_000_000),
    "a path too long": Bad("path_too_long", reported(f'{{"{"k" * MAX_PATH_BYTES}":1}}')),
    "a path too long when escaped": Bad(
        "path_too_long", reported(f'{{"{"/" * (MAX_PATH_BYTES // 2)}":1}}')
    ),
    "a path too long in UTF-8": Bad(
        "path_too_long", reported(f'{{"{"😀" * (MAX_PATH_BYTES // 4)}":1}}')
    ),
    "a time that is text": Bad("bad_time", at('"now"')),
    "a time that is null": Bad("bad_time", at("null")),
    "a time that is true": Bad("bad_time", at("true")),
    "a time before 1970": Bad("bad_time", at("-1")),
    "time 0": Bad("bad_time", at("0")),
    "a time beyond all": Bad("bad_time", at("9" * 19)),
    "a version that is text": Bad(
        "bad_time", reported('{"a":1}', f',"timestamp":{NOW},"version":"7"')
    ),
    "a negative version": Bad("bad_time", reported('{"a":1}', f',"timestamp":{NOW},"version":-1')),
    "a bad time property": Bad("bad_time", GOOD, properties=(("timestamp", "soon"),)),
    "a bad sequence property": Bad(
        "bad_time", GOOD, properties=(("timestamp", str(NOW)), ("seq", "x"))
    ),
    "the future": Bad("time_in_future", at(str(NOW + 86_400))),
    "the future in milliseconds": Bad("time_in_future", at(f"{NOW + 86_400}000")),
    "the future by a property": Bad(
        "time_in_future", GOOD, properties=(("timestamp", str(NOW + 86_400)),)
    ),
    "ancient": Bad("time_too_old", at("1500000000")),
    "ancient in microseconds": Bad("time_too_old", at("1500000000000000")),
    "above 64 bits": number("18446744073709551616"),
    "below 64 bits": number("-9223372036854775809"),
    "more digits than a double has": number("0.1234567890123456789"),
    "a fraction of a large number": number("9007199254740993.5"),
    "above a double": number("1e400"),
    "below a double": number("1e-400"),
    "a precise number in an array": number("[[0.30000000000000000001]]"),
    "a space in the device's name": Bad("device_name", GOOD, "{prefix}/{device} x/shadow/update"),
    "a device's name too long": Bad(
        "device_name", GOOD, "{prefix}/{device}" + "x" * 128 + "/shadow/update"
    ),
    "a device's name that is ours": Bad("device_name", GOOD, "{prefix}/${device}/shadow/update"),
    "a device's name not ASCII": Bad("device_name", GOOD, "{prefix}/{device}ü/shadow/update"),
    "a bad shadow's name": Bad("topic", GOOD, "{prefix}/{device}/shadow/name/a b/update"),
    "a shadow's name that is empty": Bad("topic", GOOD, "{prefix}/{device}/shadow/name//update"),
}  # fmt: skip
