"""What is logged, and how it reaches standard error.

Lives here: `configure`, which sets up structlog and routes the libraries' logging through the same
renderer; the limit on repeated errors; the thread that writes. Rules: one event is one fact and, as
JSON, one line, whatever a device sends; times are ISO-8601 in UTC; a caller never waits for the
reader of standard error: what does not fit into the queue is dropped and counted. Must not come in:
what is worth logging, and secrets.

To limit a repeated event, give it `limit_by`: of the same event and key one in `interval_seconds`
is logged, with the number `suppressed` since the last one:

    log.warning("store_write_retried", error=kind, limit_by=kind)
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import re
import select
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import orjson
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from structlog.typing import Processor

__all__ = ["Repeated", "Writer", "configure", "dropped_lines", "shutdown"]

_MAX_LINES = 4096
_MAX_CHARS = 2048  # of one value, so that the queue is bounded in bytes too
_MAX_TRACEBACK_CHARS = 16_384
_CLOSE_TIMEOUT_SECONDS = 2.0
_INTERVAL_SECONDS = 10.0
_MAX_KEYS = 1024

_STANDARD_ERROR = 2
_LIMIT_BY = "limit_by"
# What may end a line or speak to a terminal: C0, DEL, C1, and Unicode's own separators.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# The same without what orjson escapes or refuses.
_NOT_ESCAPED_BY_JSON = re.compile("[\x7f-\x9f\u2028\u2029]")
_CONTROL_IN_TRACEBACK = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Writer:
    """Writes lines to a file descriptor from a thread of its own.

    `write` never blocks: when `max_lines` wait already, the line is dropped and counted.
    """

    def __init__(self, fd: int, max_lines: int = _MAX_LINES) -> None:
        """Start the thread."""
        self._fd = fd
        self._max_lines = max_lines
        # SimpleQueue: its `put` is safe in signal handlers and destructors, which may log too.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._closed = False
        # A daemon, so that a reader that hangs cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that were never written, since the start."""
        return self._dropped

    def write(self, line: str) -> None:
        """Hand over one line, without its line break."""
        if self._closed or self._lines.qsize() >= self._max_lines:
            self._dropped += 1
        else:
            self._lines.put(line)

    def close(self, timeout_seconds: float = _CLOSE_TIMEOUT_SECONDS) -> bool:
        """Write what waits, for at most `timeout_seconds`; return whether all was written."""
        if not self._closed:
            self._closed = True
            self._lines.put(None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write_all(f"{line}\n".encode(errors="backslashreplace"))
            except OSError:  # nobody reads any more; the service goes on all the same
                self._dropped += 1

    def _write_all(self, data: bytes) -> None:
        # Not through `sys.stderr`: a thread that hangs in there holds the stream's lock, on which
        # the interpreter would abort at its end.
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                select.select([], [self._fd], [], 1.0)


class Repeated:
    """A processor that lets one of many equal events through in `interval_seconds`.

    Events are equal when event and `limit_by` are; an event without `limit_by` always passes. The
    one that passes says how many were `suppressed` since the one before. At most `max_keys` kinds
    are remembered; beyond, the one that passed longest ago is forgotten.
    """

    def __init__(
        self,
        interval_seconds: float = _INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        max_keys: int = _MAX_KEYS,
    ) -> None:
        """Remember nothing yet."""
        self._interval = interval_seconds
        self._clock = clock
        self._max_keys = max_keys
        self._seen: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()  # drivers log from threads of their own

    def __call__(
        self,
        _logger: object,
        _method: str,
        event_dict: MutableMapping[str, Any],
    ) -> MutableMapping[str, Any]:
        """Pass the event on, or raise `structlog.DropEvent`."""
        key = event_dict.pop(_LIMIT_BY, None)
        if key is not None:
            self.admit(event_dict, (str(event_dict.get("event")), str(key)))
        return event_dict

    def admit(self, event_dict: MutableMapping[str, Any], kind: tuple[str, str]) -> None:
        """Note in the event how many of its kind were suppressed, or raise `DropEvent`."""
        now = self._clock()
        with self._lock:
            since, suppressed = self._seen.get(kind, (float("-inf"), 0))
            if now - since < self._interval:
                self._seen[kind] = (since, suppressed + 1)
                raise structlog.DropEvent
            self._seen[kind] = (now, 0)
            self._seen.move_to_end(kind)
            if len(self._seen) > self._max_keys:
                self._seen.popitem(last=False)
        if suppressed:
            event_dict["suppressed"] = suppressed


class _Library(logging.Handler):
    """Sends what libraries log the way of our own events; warnings and errors are limited."""

    def __init__(self, repeated: Repeated, processors: list[Processor], writer: Writer) -> None:
        super().__init__()
        self._repeated = repeated
        self._processors = processors
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Render the record and hand it to the writer."""
        event: Any = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if record.exc_info:
            event["exc_info"] = record.exc_info
        try:
            if record.levelno >= logging.WARNING:
                # By template, not by message: its addresses and numbers make each another one.
                self._repeated.admit(event, (record.name, str(record.msg)))
            for processor in self._processors:
                event = processor(None, event["level"], event)
        except structlog.DropEvent:
            return
        self._writer.write(event)


class _Out:
    """What structlog calls with a rendered line, whatever its level."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def msg(self, line: str) -> None:
        self._writer.write(line)

    debug = info = warning = warn = error = critical = fatal = exception = log = msg


class _State:
    """What `configure` set up last."""

    writer: Writer | None = None
    handler: _Library | None = None


def configure(
    level: str = "INFO",
    format: str = "auto",  # noqa: A002 - the name of the setting
    *,
    fd: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Writer:
    """Set up logging for the process; the last call counts.

    Args:
        level: the least important level that is logged.
        format: json, console, or auto: console if `fd` is a terminal, else json.
        fd: where to write; standard error by default.
        clock: seconds, for the limit on repeated events.
    """
    shutdown()
    fd = _STANDARD_ERROR if fd is None else fd
    terminal = os.isatty(fd)
    writer = Writer(fd)
    render: list[Processor]
    if format == "json" or (format == "auto" and not terminal):
        render = [_json]
    else:
        render = [_escape, _console(colours=terminal and not os.environ.get("NO_COLOR"))]
    repeated = Repeated(clock=clock)
    common: list[Processor] = [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # As plain text: the frames' local variables, which prettier ones show, may hold secrets.
        structlog.processors.format_exc_info,
        _shorten,
        *render,
    ]
    number = logging.getLevelNamesMapping()[level]
    structlog.configure(
        processors=[
            repeated,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            *common,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: _Out(writer),
        cache_logger_on_first_use=False,
    )
    handler = _Library(repeated, common, writer)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(number)
    # What the driver tells, with a traceback every ten seconds of an outage, our own events tell.
    quiet = number if number <= logging.DEBUG else logging.CRITICAL
    logging.getLogger("cassandra").setLevel(quiet)
    logging.captureWarnings(capture=True)
    _State.writer, _State.handler = writer, handler
    return writer


def shutdown(timeout_seconds: float = _CLOSE_TIMEOUT_SECONDS) -> None:
    """Write what waits and undo `configure`; runs by itself at the end of the process."""
    if _State.handler is not None:
        logging.captureWarnings(capture=False)
        logging.getLogger().removeHandler(_State.handler)
        logging.getLogger().setLevel(logging.WARNING)
        structlog.reset_defaults()
        _State.handler = None
    if _State.writer is not None:
        _State.writer.close(timeout_seconds)
        _State.writer = None


atexit.register(shutdown)


def dropped_lines() -> int:
    """Return how many lines the present writer has dropped; 0 before `configure`."""
    return 0 if _State.writer is None else _State.writer.dropped


def _shorten(
    _logger: object, _method: str, event_dict: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for key, value in event_dict.items():
        text = value if isinstance(value, str) else None
        if isinstance(value, (bytes, bytearray, memoryview)):
            text = repr(bytes(value[:_MAX_CHARS]))
        elif not isinstance(value, (str, int, float, bool, type(None))):
            text = None if len(repr(value)) <= _MAX_CHARS else repr(value)
        if text is not None:
            limit = _MAX_TRACEBACK_CHARS if key == "exception" else _MAX_CHARS
            # The end of a traceback says what happened, the start of all else what it is.
            if len(text) > limit:
                text = f"…{text[-limit:]}" if key == "exception" else f"{text[:limit]}…"
            event_dict[key] = text
    return event_dict


def _json(_logger: object, _method: str, event_dict: MutableMapping[str, Any]) -> str:
    first = {key: event_dict.pop(key, None) for key in ("timestamp", "level", "event")}
    event = {**first, **event_dict}
    try:
        line = orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # lone surrogates, integers of more than 64 bits, odd keys, cycles
        plain = (str, int, float, type(None))
        return json.dumps(
            {
                key: value if isinstance(value, plain) else repr(value)
                for key, value in event.items()
            }
        )
    return _NOT_ESCAPED_BY_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def _escape(
    _logger: object, _method: str, event_dict: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Let nothing that a device sends speak to the terminal."""
    return {
        _escaped(str(key)): (
            _CONTROL_IN_TRACEBACK.sub(_in_python, value)
            if key == "exception"
            else _escaped(value)
            if isinstance(value, str)
            else value  # shown by `repr`, which escapes
        )
        for key, value in event_dict.items()
    }


def _escaped(text: str) -> str:
    return _CONTROL.sub(_in_python, text)


def _in_python(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _console(*, colours: bool) -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=colours,
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )
