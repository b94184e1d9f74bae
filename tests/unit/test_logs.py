"""What the log promises: one fact a line, whatever devices send, and nobody ever waits for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from shadowsvc import logs
from shadowsvc.logs import Repeated, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

NASTY = 'lamp"\n{"event":"forged"}\r\x1b[31m\x00\x7f\x85\x9b\u2028\u2029é'


ENVIRON = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    yield
    logs.shutdown()


class Log:
    """A configured log that writes to a file."""

    def __init__(self, path: Path, level: str, format: str, clock: Clock) -> None:  # noqa: A002
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        self.writer = logs.configure(level, format, fd=self._fd, clock=clock)

    def text(self) -> str:
        logs.shutdown()
        os.close(self._fd)
        return self.path.read_text(encoding="utf-8")

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().split("\n") if line]


@contextlib.contextmanager
def hanging_pipe() -> Iterator[tuple[int, int]]:
    """Yield the ends of a pipe that is full already."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * 65_536)
        os.set_blocking(writer, True)
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def test_an_event_is_one_json_object_with_level_and_utc_time(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "INFO", "auto", Clock())
    structlog.get_logger("shadowsvc.x").info("connected", broker="b", attempt=3)
    (event,) = log.events()
    assert list(event)[:3] == ["timestamp", "level", "event"]
    assert (event["level"], event["event"]) == ("info", "connected")
    assert (event["broker"], event["attempt"]) == ("b", 3)
    assert event["timestamp"].endswith("Z")
    assert datetime.fromisoformat(event["timestamp"]).tzinfo == UTC


def test_what_a_device_sends_cannot_break_a_json_line(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "INFO", "json", Clock())
    structlog.get_logger().info(NASTY, device=NASTY, nested={NASTY: [NASTY]}, raw=NASTY.encode())
    text = log.text()
    assert len(text.splitlines()) == 1  # splitlines knows U+0085 and U+2028 too
    assert text.rstrip("\n").isprintable()
    event = json.loads(text)
    assert (event["event"], event["device"]) == (NASTY, NASTY)
    assert event["nested"] == {NASTY: [NASTY]}


def test_what_a_device_sends_cannot_steer_a_terminal(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "INFO", "console", Clock())
    structlog.get_logger().info(NASTY, **{NASTY: NASTY}, nested={NASTY: [NASTY]}, half="\ud800")
    text = log.text()
    assert len(text.splitlines()) == 1
    assert text.rstrip("\n").isprintable()
    assert r"lamp\"".replace("\\", "") in text
    assert r"\x1b[31m" in text


@pytest.mark.parametrize(
    "value",
    ["\ud800", 2**70, object(), {1: 2}, {(1, 2): 3}, b"\xff", float("nan"), datetime.now(UTC)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("format", ["json", "console"])
def test_no_value_makes_logging_fail(tmp_path: Path, value: object, format: str) -> None:  # noqa: A002
    log = Log(tmp_path / "log", "INFO", format, Clock())
    structlog.get_logger().info("odd", value=value)
    assert "odd" in log.text()


def test_a_huge_value_is_cut(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "INFO", "json", Clock())
    structlog.get_logger().info("x" * 10**6, a="y" * 10**6, b=["z" * 10**6], c=b"w" * 10**6)
    assert len(log.text()) < 10_000


def test_less_important_events_are_left_out(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "WARNING", "json", Clock())
    structlog.get_logger().info("no")
    structlog.get_logger().warning("yes")
    logging.getLogger("library").info("no")
    logging.getLogger("library").error("yes")
    assert [event["event"] for event in log.events()] == ["yes", "yes"]


def test_libraries_speak_through_the_same_renderer(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "INFO", "json", Clock())
    logging.getLogger("aiomqtt").warning("lost %s", NASTY)
    with warnings.catch_warnings():
        # As at the start of a process: pytest has put its own hand on warnings.
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second = log.events()
    assert (first["logger"], first["level"]) == ("aiomqtt", "warning")
    assert first["event"] == f"lost {NASTY}"
    assert second["logger"] == "py.warnings"


def test_the_cassandra_driver_is_heard_below_warning_only_when_debugging(tmp_path: Path) -> None:
    log = Log(tmp_path / "a", "INFO", "json", Clock())
    logging.getLogger("cassandra.cluster").info("chatter")
    assert log.text() == ""
    log = Log(tmp_path / "b", "DEBUG", "json", Clock())
    logging.getLogger("cassandra.cluster").info("chatter")
    assert len(log.events()) == 1


def test_an_exception_is_part_of_its_line_and_shows_no_local_variables(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", "INFO", "json", Clock())
    password = "hunter2-Zx9"  # noqa: S105 - must not be shown
    try:
        int(NASTY, base=len(password))
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("library").exception("failed")
    text = log.text()
    assert len(text.splitlines()) == 2
    assert text.count("Traceback (most recent call last)") == 2
    assert "hunter2" not in text


def test_a_repeated_event_comes_once_an_interval_with_the_number_left_out(tmp_path: Path) -> None:
    clock = Clock()
    log = Log(tmp_path / "log", "INFO", "json", clock)
    logger = structlog.get_logger()
    for _ in range(5):
        logger.warning("retry", limit_by="timeout")
    logger.warning("retry", limit_by="overloaded")
    logger.warning("retry")
    clock.now = 10.0
    logger.warning("retry", limit_by="timeout")
    clock.now = 20.0
    logger.warning("retry", limit_by="timeout")
    events = log.events()
    assert [event.get("suppressed") for event in events] == [None, None, None, 4, None]
    assert all("limit_by" not in event for event in events)


def test_a_repeated_warning_of_a_library_is_limited_by_its_template(tmp_path: Path) -> None:
    clock = Clock()
    log = Log(tmp_path / "log", "INFO", "json", clock)
    for attempt in range(5):
        logging.getLogger("library.pool").warning("attempt %d failed", attempt)
        logging.getLogger("library").info("attempt %d", attempt)
    clock.now = 10.0
    logging.getLogger("library.pool").warning("attempt %d failed", 5)
    events = [event for event in log.events() if event["level"] == "warning"]
    assert [event["event"] for event in events] == ["attempt 0 failed", "attempt 5 failed"]
    assert events[1]["suppressed"] == 4


def test_what_the_cassandra_driver_says_of_an_outage_is_left_to_our_own_events(
    tmp_path: Path,
) -> None:
    log = Log(tmp_path / "log", "INFO", "json", Clock())
    logging.getLogger("cassandra.cluster").warning("[control connection] Error connecting")
    logging.getLogger("library").warning("said")
    assert [event["event"] for event in log.events()] == ["said"]


def test_the_limit_on_repeated_events_remembers_a_bounded_number() -> None:
    repeated = Repeated(clock=Clock(), max_keys=3)
    for number in range(10):
        repeated(None, "", {"event": "x", "limit_by": number})
    assert len(repeated._seen) == 3
    with pytest.raises(structlog.DropEvent):
        repeated(None, "", {"event": "x", "limit_by": 9})
    repeated(None, "", {"event": "x", "limit_by": 0})  # forgotten, so it passes


def test_a_reader_that_hangs_makes_lines_drop_and_count_and_nobody_wait() -> None:
    with hanging_pipe() as (reader, fd):
        writer = Writer(fd, max_lines=10)
        for number in range(1000):
            writer.write(f"line {number}")
        assert 985 <= writer.dropped <= 990  # ten wait; one or few more are with the thread
        assert not writer.close(timeout_seconds=0.05)
        # The reader comes back: what waited is written.
        received = bytearray()
        while b"line 9\n" not in received:
            received += os.read(reader, 65_536)
        assert writer.close(timeout_seconds=10)
        assert b"line 0\nline 1\n" in received


def test_a_reader_that_has_gone_makes_lines_count_as_dropped() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    try:
        writer = Writer(fd)
        writer.write("a")
        writer.write("b")
        assert writer.close(timeout_seconds=10)
        assert writer.dropped == 2
    finally:
        os.close(fd)


def test_a_descriptor_that_does_not_block_gets_every_line(tmp_path: Path) -> None:
    del tmp_path
    reader, fd = os.pipe()
    os.set_blocking(fd, False)
    try:
        writer = Writer(fd)
        line = "x" * 9_999
        for _ in range(30):  # far more than a pipe holds
            writer.write(line)
        received = 0
        while received < 30 * 10_000:
            received += len(os.read(reader, 65_536))
        assert writer.close(timeout_seconds=10)
        assert writer.dropped == 0
    finally:
        os.close(reader)
        os.close(fd)


def test_configuring_again_replaces_the_earlier_set_up(tmp_path: Path) -> None:
    first = Log(tmp_path / "a", "INFO", "json", Clock())
    second = Log(tmp_path / "b", "INFO", "json", Clock())
    logging.getLogger("library").warning("once")
    assert len(second.events()) == 1
    assert first.text() == ""
    assert logs.dropped_lines() == 0


SCRIPT = """
import structlog
from shadowsvc import logs
logs.configure("INFO", "auto")
for number in range(100):
    structlog.get_logger().info("fact", number=number)
"""


def test_what_was_logged_before_the_end_of_the_process_is_written() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=ENVIRON,
        timeout=30,
        check=True,
    )
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["number"] for event in events] == list(range(100))


def test_a_process_whose_log_nobody_reads_ends_all_the_same() -> None:
    with hanging_pipe() as (_, fd):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], stderr=fd, env=ENVIRON, timeout=30, check=False
        )
    assert done.returncode == 0


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_colours_unless_no_color_is_set(no_color: str, coloured: bool) -> None:  # noqa: FBT001
    leader, follower = pty.openpty()
    try:
        environ = {**ENVIRON, "NO_COLOR": no_color}
        subprocess.run(
            [sys.executable, "-c", SCRIPT.replace("100", "1")],
            stderr=follower,
            env=environ,
            timeout=30,
            check=True,
        )
        text = os.read(leader, 65_536).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert "fact" in text
    assert not text.startswith("{")
    assert ("\x1b[" in text) is coloured
