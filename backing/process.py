"""One server process that we own: start, stop, kill, freeze, thaw, and what it cost.

Rules:
- A server never outlives us, not even when we are killed with SIGKILL: the kernel sends it SIGKILL
  when its parent dies. The kernel counts the *thread* that started it as the parent, so every start
  goes through one thread that lives as long as the process does.
- A server has its own session and process group: Ctrl-C on the terminal reaches us alone, and we
  decide about the server. Signals go to that group by its id, never to a name.
- Its output goes to a log file, and a failed start quotes the end of that file.

What a broker or a database is must not come in here.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from backing.errors import BackingError

_POLL_SECONDS = 0.05
_QUOTED_LINES = 30
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_Spawn = Callable[[], subprocess.Popen[bytes]]


class ServerProcess:
    """A server's process, which may be started many times, one after another.

    Args:
        name: what it is, for messages.
        argv: the command line.
        log_path: file that gets standard output and error; appended to at every start.
        cwd: working folder.
        env: the whole environment; ours when None.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.argv = tuple(argv)
        self.log_path = log_path
        self._cwd = cwd
        self._env = None if env is None else dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process exists (a frozen one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id, which is also its process group.

        Raises:
            BackingError: it does not run.
        """
        return self._live().pid

    def start(self) -> None:
        """Start the process.

        Raises:
            BackingError: it runs already, or the program cannot be executed.
        """
        if self.running:
            raise BackingError(f"{self.name} runs already (pid {self.pid})")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        argv = (*die_with_parent(), *self.argv)

        def spawn() -> subprocess.Popen[bytes]:
            with self.log_path.open("ab") as log:
                return subprocess.Popen(
                    argv,
                    cwd=self._cwd,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

        try:
            self._process = _spawn(spawn)
        except OSError as error:
            raise BackingError(f"cannot execute {self.name} ({self.argv[0]}): {error}") from error

    def stop(self, limit_seconds: float = 30.0) -> None:
        """Ask with SIGTERM, wait up to `limit_seconds`, then kill. No effect when not running."""
        process = self._process
        if process is None:
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # a frozen process would not see it
        try:
            process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """Kill with SIGKILL and wait until it is gone. No effect when not running."""
        process = self._process
        if process is not None:
            self.signal(signal.SIGKILL)
            process.wait()
        self._process = None

    def pause(self) -> None:
        """Freeze with SIGSTOP: connections stay open, nothing is read or answered.

        Raises:
            BackingError: it does not run.
        """
        self._live()
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Thaw with SIGCONT what `pause` froze.

        Raises:
            BackingError: it does not run.
        """
        self._live()
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group. No effect when not running."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def wait_ready(self, is_ready: Callable[[], bool], limit_seconds: float) -> None:
        """Return as soon as `is_ready()` is true.

        Raises:
            BackingError: the process ended, or was not ready within `limit_seconds`.
        """
        deadline = time.monotonic() + limit_seconds
        while not is_ready():
            if not self.running:
                code = None if self._process is None else self._process.returncode
                raise BackingError(f"{self.name} ended with {code} at start{self.log_tail()}")
            if time.monotonic() > deadline:
                limit = f"{limit_seconds:g} s"
                raise BackingError(f"{self.name} is not ready after {limit}{self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def log_tail(self) -> str:
        """Return the last lines of the log with a heading, for the end of an error message."""
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()[-_QUOTED_LINES:]
        except OSError:
            lines = []
        return "\n".join([f"; the end of {self.log_path}:", *(lines or ["(empty)"])])

    def cpu_seconds(self) -> float:
        """Return the CPU time, user and system, that all its threads have used since its start.

        Raises:
            BackingError: it does not run.
        """
        # proc(5): the command in parentheses may hold anything, so count from the last ')'.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND

    def rss_bytes(self) -> int:
        """Return its resident memory.

        Raises:
            BackingError: it does not run.
        """
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE_BYTES

    def _live(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise BackingError(f"{self.name} does not run")
        return self._process


def find_program(name: str, *, package: str, folders: Sequence[str] = ()) -> str:
    """Return the path of a program in PATH or `folders`.

    Raises:
        BackingError: it is in none of them; the message names the Debian `package`.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    found = shutil.which(name, path=path)
    if found is None:
        raise BackingError(f"{name} is not installed: install the Debian package {package}")
    return found


def die_with_parent() -> tuple[str, ...]:
    """Return what to put before a command line, so that it ends when its parent thread does."""
    # setpriv (util-linux) sets the parent death signal and then becomes the server: same pid. A
    # preexec_fn would do as well, but warns in a process with threads.
    setpriv = shutil.which("setpriv")
    return () if setpriv is None else (setpriv, "--pdeathsig", "KILL", "--")


class _Spawner:
    """Starts processes in one thread that lives as long as we do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: SimpleQueue[tuple[_Spawn, Future[subprocess.Popen[bytes]]]] = SimpleQueue()
        self._owner_pid = 0

    def __call__(self, spawn: _Spawn) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._owner_pid != os.getpid():  # first use, or first use after a fork
                self._requests = SimpleQueue()
                self._owner_pid = os.getpid()
                threading.Thread(target=self._serve, name="backing-spawner", daemon=True).start()
        future: Future[subprocess.Popen[bytes]] = Future()
        self._requests.put((spawn, future))
        return future.result()

    def _serve(self) -> None:
        while True:
            spawn, future = self._requests.get()
            try:
                future.set_result(spawn())
            except BaseException as error:  # noqa: BLE001 - belongs to the thread that asked
                future.set_exception(error)


_spawn = _Spawner()
