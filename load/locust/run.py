"""One of Locust's processes: what it does when a run starts and ends, and what it tells the master.

Lives here: `Run`, which listens to Locust's events. Rules: alone, as a worker and as a master it is
the same code; only who has devices has a `Rig`. Options are checked before anything starts, and
what makes no sense ends the command with 2. A run that ends in whatever way, by its time, Ctrl-C,
SIGTERM or the page, leaves its figures behind. Must not come in: what they look like (`summary`).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import gevent
from locust import stats
from locust.runners import MasterRunner, WorkerRunner

from load.endpoints import Endpoint
from load.errors import BadOption, LoadError
from load.locust.arguments import Plan, targets_of
from load.locust.rig import WEBSOCKET, Rig
from load.locust.summary import html_section, lines, progress, with_section
from load.locust.watch import Verdict, Watch

if TYPE_CHECKING:
    from locust.env import Environment
    from locust.event import Events

    from load.locust.durable import Durable

__all__ = ["Run"]

_TIMER_SECONDS: Final = 0.05
_PROGRESS_SECONDS: Final = 10.0
_LAST_REPORTS_SECONDS: Final = 1.0
_LEAVE_SECONDS: Final = 15.0
_LEAVE: Final = "load-leave"
_log = logging.getLogger("load")
_plain = logging.getLogger("locust.stats_logger")
"""Locust's own, for what is printed as it is."""


class Run:
    """What a process knows of the present or the last run."""

    _current: ClassVar[Run | None] = None

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._rig: Rig | None = None
        self._watch: Watch | None = None
        self._workers: dict[str, dict[str, Any]] = {}
        """What each worker said last, by its id."""
        self.leaving = False
        """The run is over: who comes now goes at once."""
        self._running = False
        self._said = True
        self._durable: Durable | None = None
        self._greenlets: list[Any] = []

    # ------------------------------------------------------------------ for users

    @classmethod
    def current(cls) -> Run:
        """Return this process's; raises LoadError outside of Locust."""
        if cls._current is None:
            raise LoadError("these users run under `python -m load.locust` alone")
        return cls._current

    @property
    def rig(self) -> Rig:
        """What the devices of this process share; raises LoadError before the start."""
        if self._rig is None:
            raise LoadError("the run has not started")
        return self._rig

    # ------------------------------------------------------------------ Locust's events

    @classmethod
    def attach(cls, events: Events) -> None:
        """Listen from `init` on."""

        def begin(environment: Environment, **_: Any) -> None:
            cls._current = run = cls(environment)
            run._prepare()
            events.test_start.add_listener(run._start)
            events.test_stopping.add_listener(run._stopping)
            events.test_stop.add_listener(run._stop)
            events.report_to_master.add_listener(run._report)
            events.worker_report.add_listener(run._hear)
            events.quit.add_listener(run._quit)

        events.init.add_listener(begin)

    def _prepare(self) -> None:
        """Check what was given on the command line, and leave out classes without a target."""
        environment = self._environment
        # Documented as what may be replaced; its type is that of the whole milliseconds it makes.
        stats.bucket_response_time = _bucket  # type: ignore[assignment]
        given = vars(environment.parsed_options)
        if not given["shape"]:
            environment.shape_class = None
        if isinstance(environment.runner, WorkerRunner):
            environment.runner.register_message(_LEAVE, self._leave, concurrent=True)
            if given["processes"]:
                # Ctrl-C reaches all processes of a terminal; the master tells its own to end.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return  # the master says what to do
        try:
            if environment.host:
                Plan.of(environment.host, given)
                wanted = {one.path is not None for one in targets_of(environment.host)}
                environment.user_classes = [
                    one
                    for one in environment.user_classes
                    if (getattr(one, "transport", WEBSOCKET) == WEBSOCKET) in wanted
                ]
            elif given["headless"]:
                targets_of(None)
            if given["observe"]:
                self._observe(Endpoint.parse(f"mqtt://{given['observe']}"), given["observe_port"])
        except BadOption as error:
            _plain.info("%s", error)
            sys.exit(2)

    def _observe(self, broker: Endpoint, port: int) -> None:
        from load.locust.durable import DURABLE, Durable  # noqa: PLC0415 - drivers of Cassandra

        def record(seconds: float | None, why: str) -> None:
            if self._running:
                self._environment.events.request.fire(
                    request_type="MQTT",
                    name=DURABLE,
                    response_time=None if seconds is None else seconds * 1000,
                    response_length=0,
                    exception=LoadError(why) if why else None,
                    context={},
                )

        self._durable = Durable(broker, port, record)
        try:
            self._durable.start()
        except OSError as error:
            raise BadOption(f"--observe-port {port}: {error.strerror}") from None

    def _start(self, **_: Any) -> None:
        runner = self._environment.runner
        now = time.monotonic()
        self._workers = {}
        self._said = self.leaving = False
        self._running = True
        self._watch = watch = Watch(now, time.process_time())
        self._greenlets = [gevent.spawn(self._timer, watch)]
        try:
            plan = Plan.of(self._environment.host, vars(self._environment.parsed_options))
            if not isinstance(runner, MasterRunner):
                worker = max(0, int(getattr(runner, "worker_index", 0)))
                self._rig = Rig(plan, worker, watch, self._environment.events.request.fire)
                self._rig.begin()
        except BadOption as error:  # as the page, or the worker's machine, has it
            _log.error("%s", error)
            self._rig = None
            self._environment.process_exit_code = 2
            if runner is not None:
                page = self._environment.web_ui is not None
                gevent.spawn_later(0, runner.stop if page else runner.quit)
            return
        if not isinstance(runner, WorkerRunner):
            self._greenlets.append(gevent.spawn(self._tell))

    def _stopping(self, **_: Any) -> None:
        """Let all devices leave and report, before Locust ends the workers half a second later."""
        runner = self._environment.runner
        if not isinstance(runner, MasterRunner) or not runner.user_count:
            return
        runner.send_message(_LEAVE, {})
        with gevent.Timeout(_LEAVE_SECONDS, False):
            while runner.user_count:
                gevent.sleep(_TIMER_SECONDS)

    def _leave(self, **_: Any) -> None:
        """Do so, in a worker."""
        runner = self._environment.runner
        if not isinstance(runner, WorkerRunner):
            return
        self.leaving = True
        if runner.spawning_greenlet:
            runner.spawning_greenlet.kill()
        runner.stop_users(runner.user_classes_count)
        data: dict[str, Any] = {}
        self._environment.events.report_to_master.fire(client_id=runner.client_id, data=data)
        runner.send_message("stats", data)

    def _stop(self, **_: Any) -> None:
        self._running = False
        gevent.killall(self._greenlets)
        self._greenlets = []
        if self._rig is not None:
            self._rig.end()
        if self._environment.web_ui is not None:
            # The process goes on; the last reports of workers come after this.
            gevent.spawn_later(_LAST_REPORTS_SECONDS, self._say)

    def _report(self, data: dict[str, Any], **_: Any) -> None:
        if self._rig is not None:
            data["load"] = self._figures()

    def _hear(self, client_id: str, data: dict[str, Any], **_: Any) -> None:
        if "load" in data:
            self._workers[client_id] = data["load"]

    def _quit(self, **_: Any) -> None:
        if isinstance(self._environment.runner, WorkerRunner):
            return
        if self._durable is not None:
            self._durable.close()
        self._say()
        path = getattr(self._environment.parsed_options, "html_file", None)
        if path:
            self._write(Path(path))

    # ------------------------------------------------------------------ figures

    def processes(self) -> dict[str, dict[str, Any]]:
        """Return what each process of the rig says of itself, by its name."""
        found = {
            f"worker {figures['worker']}": figures
            for figures in sorted(self._workers.values(), key=lambda one: int(one["worker"]))
        }
        if self._watch is not None:
            master = isinstance(self._environment.runner, MasterRunner)
            found["the master" if master else "the rig"] = self._figures()
        return found

    def _figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {} if self._rig is None else self._rig.figures()
        verdict = Verdict()
        if self._watch is not None:
            verdict = self._watch.verdict(time.monotonic(), time.process_time())
        return {**figures, "verdict": verdict.as_json()}

    def _say(self) -> None:
        if self._said:
            return
        self._said = True
        for line in lines(self.processes()):
            _plain.info("%s", line)

    def _write(self, path: Path) -> None:
        """Write Locust's report with what the rig says of itself above it.

        Locust writes its own on Ctrl-C and at the end of the time, and none on SIGTERM.
        """
        from locust.html import get_html_report  # noqa: PLC0415 - a web page's worth of imports

        try:
            report = get_html_report(self._environment, show_download_link=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(with_section(report, html_section(self.processes())), "utf-8")
        except OSError as error:
            _log.error("--html %s: %s", path, error.strerror)
            return
        _plain.info("report: %s", path)

    # ------------------------------------------------------------------ greenlets

    def _timer(self, watch: Watch) -> None:
        while True:
            due = time.monotonic() + _TIMER_SECONDS
            gevent.sleep(_TIMER_SECONDS)
            now = time.monotonic()
            watch.late(now - due)
            watch.look(now, time.process_time())

    def _tell(self) -> None:
        while True:
            gevent.sleep(_PROGRESS_SECONDS)
            with contextlib.suppress(Exception):  # a line for people must not end a run
                _log.info("%s", progress(self.processes()))


def _bucket(milliseconds: float) -> float:
    """Return the bucket of a response time: as Locust's, but with tenths below 10 ms."""
    if milliseconds < 10:  # noqa: PLR2004
        return round(milliseconds, 1)
    return _coarse(milliseconds)


_coarse = stats.bucket_response_time
