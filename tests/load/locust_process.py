"""Locust with the rig's users as a process of its own, and what it leaves behind.

Lives here: starting `python -m load.locust`, ending it as a person does, its statistics, report and
journals. Rules: it is never imported here, since gevent would change the tests' own process; free
ports; ended by its process group's id; every wait has a limit. Must not come in: assertions of a
test.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any, Self

from backing import free_port
from load.journal import read

__all__ = ["LIMIT_SECONDS", "ROOT", "Locust"]

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 60.0


class Locust:
    """One process, or a master with `--processes` workers; a context manager.

    Args:
        folder: gets log, statistics, report and journals.
        arguments: of the command; where its files go is added.
        headless: without the page.
        variables: of the environment, beside ours.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        headless: bool = True,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.report_path = folder / "report.html"
        self._statistics = folder / "statistics.json"
        self._log = folder / "locust.log"
        self._journal = folder / "journal"
        self.web_port = free_port()
        port = str(free_port())
        given = [
            *arguments,
            *("--html", str(self.report_path)),
            *("--json-file", str(folder / "statistics")),
            *("--journal", str(self._journal)),
            *("--master-port", port, "--master-bind-port", port, "--master-bind-host", "127.0.0.1"),
        ]
        if headless:
            given += ["--headless", "--only-summary"]
        else:
            given += ["--web-host", "127.0.0.1", "--web-port", str(self.web_port)]
        self._arguments = [sys.executable, "-m", "load.locust", *given]
        path = f"{ROOT}:{ROOT / 'src'}"
        self._environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._arguments,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def interrupt(self, how: signal.Signals = signal.SIGINT) -> None:
        """Send a signal as a terminal does, to all of its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, how)

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> int:
        """Wait for the end; return the exit code."""
        assert self._process is not None
        try:
            return self._process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {limit_seconds:g} s: {self.log()}") from None

    def finish(self, limit_seconds: float = LIMIT_SECONDS) -> int:
        """`interrupt`, then `wait`."""
        self.interrupt()
        return self.wait(limit_seconds)

    def log(self) -> str:
        """Return what it has printed."""
        return self._log.read_text(errors="replace")

    def statistics(self, name: str, kind: str | None = None) -> dict[str, Any]:
        """Return Locust's entry of this name (and request type); its counts summed over types."""
        entries = json.loads(self._statistics.read_text())
        chosen = [one for one in entries if one["name"] == name and kind in {None, one["method"]}]
        found: dict[str, Any] = {"num_requests": 0, "num_failures": 0}
        for one in chosen:
            for key in found:
                found[key] += one[key]
        found["methods"] = {one["method"] for one in chosen}
        return found

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return what the report has of each of the rig's processes."""
        page = self.report_path.read_text()
        found = re.search(r'<script type="application/json" id="load-figures">(.*?)</script>', page)
        assert found, "the report has no figures of the rig"
        figures: dict[str, dict[str, Any]] = json.loads(found[1])
        return figures

    def heading(self) -> str:
        """Return what the report says first of the rig."""
        found = re.search(r"<h2>(.*?)</h2>", self.report_path.read_text())
        assert found
        return unescape(found[1])

    def acknowledged(self) -> dict[str, set[int]]:
        """Return the sequence numbers with PUBACK, by device, out of the journals."""
        made: dict[str, set[int]] = {}
        for path in self.folder.glob("journal.*"):
            header, entries = read(path)
            for entry in entries:
                if entry.acknowledged:
                    made.setdefault(header.device(entry.number), set()).add(entry.sequence)
        return made
