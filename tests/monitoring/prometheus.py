"""A real Prometheus as a local process, and pages for it to scrape.

Lives here: starting it on free ports in a folder of its own, asking it, and serving a page of
metrics from this process. Rules: every wait has a limit; it scrapes and evaluates each second; the
process ends with the test. Must not come in: what is asked.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from backing.ports import free_port
from backing.process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["MetricsPage", "Prometheus"]

START_SECONDS = 30.0
_REQUEST_SECONDS = 10.0
_POLL_SECONDS = 0.1


class MetricsPage:
    """Serves what a function returns, for a scraper; a context manager."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        """Open a free port; `render` is asked at each scrape."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = render()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        """Serve."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._server.shutdown()
        self._thread.join(_REQUEST_SECONDS)
        self._server.server_close()


class Prometheus:
    """One Prometheus; a context manager.

    Args:
        folder: for its configuration, data and log.
        rules: rule files.
        targets: by job, the ports on this machine.
    """

    def __init__(
        self, folder: Path, rules: Sequence[Path], targets: Mapping[str, Sequence[int]]
    ) -> None:
        """Write its configuration."""
        program = shutil.which("prometheus")
        assert program, "prometheus is absent: `setup_prometheus` in scripts/lib/setup.sh has it"
        self.port = free_port()
        configuration = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                {
                    "job_name": job,
                    "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}],
                }
                for job, ports in targets.items()
            ],
        }
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        self._server = ServerProcess(
            "prometheus",
            [
                program,
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--log.level=warn",
            ],
            log_path=folder / "prometheus.log",
        )

    def __enter__(self) -> Self:
        """Start it and wait until it answers."""
        self._server.start()
        self.wait_until(self._ready, "it is ready", START_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._server.stop(10)

    def wait_until(self, condition: Callable[[], bool], what: str, limit_seconds: float) -> None:
        """Wait until `condition` is true; else fail with `what`."""
        deadline = time.monotonic() + limit_seconds
        while not condition():
            log = self._server.log_tail()
            assert self._server.running, f"Prometheus ended, waiting until {what}{log}"
            assert time.monotonic() < deadline, f"not within {limit_seconds:g} s: {what}{log}"
            time.sleep(_POLL_SECONDS)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an instant query; fail with Prometheus's words on an error."""
        answer = self._get("/api/v1/query", query=expression)
        assert answer["status"] == "success", f"{expression}: {answer}"
        result = answer["data"]["result"]
        assert answer["data"]["resultType"] == "vector", expression
        return list(result)

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their health."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _ready(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=_REQUEST_SECONDS):
                return True
        except (URLError, ConnectionError):
            return False

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}?{urlencode(parameters)}"
        try:
            with urlopen(url, timeout=_REQUEST_SECONDS) as answer:
                return json.load(answer)
        except URLError as error:
            body = getattr(error, "read", lambda: b"")().decode()
            raise AssertionError(f"{parameters}: {error} {body}") from None
