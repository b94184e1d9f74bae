"""A random schedule of faults on real processes, and what the witness says of it.

Lives here: the run, its ledger, and the command (`scripts/chaos`). Rule: at the end everything is
there again, and every promise must have been kept. Must not come in: which faults there are
(`tests.faults.schedule`), what the promises are (`tests.faults.witness`).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import backing
from backing import BackingError
from tests.conftest import _migrate
from tests.faults.schedule import plan
from tests.faults.stage import SLOTS, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.faults.pod import Pod
    from tests.faults.schedule import Step
    from tests.faults.witness import Verdict

__all__ = ["Outcome", "run"]

_COUNTED = {
    "reconnects": "disconnects_total",
    "retries": "write_retries_total",
    "abandoned": "deliveries_abandoned_total",
    "last copies": "deliveries_done_without_ack_total",
    "batches split": "batches_split_total",
}


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    minutes: float
    pods: int
    slots: bool
    faults: dict[str, int] = field(default_factory=dict)
    """How often each happened."""
    seen: dict[str, int] = field(default_factory=dict)
    """What the services and the wire counted of them."""
    verdict: Verdict | None = None
    interrupted: bool = False

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return self.verdict is not None and not self.verdict.forbidden

    def lines(self) -> Iterator[str]:
        """Yield the ledger for people."""
        ids = "leased client ids" if self.slots else "client ids of their own"
        yield f"seed {self.seed}, {self.minutes:g} minutes, {self.pods} services with {ids}"
        yield from (f"  {count:>3} x {name}" for name, count in sorted(self.faults.items()))
        yield "counted: " + ", ".join(f"{name} {count:,}" for name, count in self.seen.items())
        if self.verdict is not None:
            yield from self.verdict.lines()
        if not self.kept:
            yield f"repeat with: scripts/chaos --minutes {self.minutes:g} --seed {self.seed}"


def run(
    seed: int,
    seconds: float,
    broker: backing.Mosquitto,
    database: backing.Cassandra,
    keyspace: str,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda _line: None,
    rate: float = 300,
) -> Outcome:
    """Run a schedule to its end, or until KeyboardInterrupt, and look at everything.

    Args:
        seed: of schedule and traffic.
        seconds: in which faults begin; starting, ending and the last look come on top.
        broker: runs, keeps sessions in a file.
        database: runs, keeps what it confirmed over a kill.
        keyspace: with the schema.
        folder: for logs.
        say: takes one line for each fault.
        rate: messages a second of all publishers together.
    """
    planned = plan(seed, seconds)
    outcome = Outcome(seed, round(seconds / 60, 3), planned.pods, planned.slots)
    stage = Stage(
        broker,
        database,
        keyspace,
        f"chaos{seed}",
        folder,
        settings=SLOTS if planned.slots else {},
        pods=planned.pods,
        seed=seed,
    )
    with _forgiving(outcome), stage:
        stage.start()
        broker.save()
        with (
            stage.traffic(seed=seed, rate=rate / 2),
            stage.traffic(seed=seed + 1, rate=rate / 2, poison=0.1),
        ):
            player = _Player(stage, say)
            try:
                player.play(planned.steps, seconds)
            except KeyboardInterrupt:
                say("interrupted: ending what fails at present; once more to leave at once")
                outcome.interrupted = True
            player.end()
            outcome.faults = dict(player.faults)
        outcome.seen = _seen(stage)
        say("everything is back; waiting for rest")
        for pod in stage.pods:
            pod.heal()
        for pod in stage.pods:
            try:
                pod.service.wait_ready(60)
            except AssertionError as error:
                stage.witness.violations.append(f"{pod.name} does not recover: {error}")
        outcome.verdict = stage.wait_verdict(120)
        happened = sum(outcome.seen[name] for name in ("reconnects", "retries", "repeated"))
        if outcome.faults and not happened:
            outcome.verdict.forbidden.append("no fault was seen by any service")
    return outcome


@contextmanager
def _forgiving(outcome: Outcome) -> Iterator[None]:
    """A service that logged a defect says so once more when it is ended: once is enough."""
    try:
        yield
    except AssertionError:
        if outcome.verdict is None or outcome.kept:
            raise


class _Player:
    """Begins and ends the steps of a schedule, each at its time.

    The schedule's clock stands still while a fault is being begun or ended: to start Cassandra
    takes ten seconds, and what was planned for these must not happen all at once.
    """

    def __init__(self, stage: Stage, say: Callable[[str], None]) -> None:
        self.faults: Counter[str] = Counter()
        self._stage = stage
        self._say = say
        self._began = self._started = time.monotonic()
        self._running: list[Step] = []

    def play(self, steps: Iterable[Step], seconds: float) -> None:
        """Begin faults for `seconds`, and wait until all have ended."""
        over = time.monotonic() + seconds
        for step in steps:
            self._wait(step.at)
            if time.monotonic() > over:
                break
            seconds_in = time.monotonic() - self._began
            self._say(f"[{seconds_in:6.1f} s] {step}; {_progress(self._stage)}")
            self._running.append(step)
            self._attempt(step, step.fault.begin)
            self.faults[f"{step.fault.place}: {step.fault.name}"] += 1
        self._wait(max([self._now(), *(step.until for step in self._running)]))

    def end(self) -> None:
        """End what fails at present."""
        while self._running:
            self._end(self._running[0])

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _wait(self, until: float) -> None:
        while True:
            due = min([until, *(step.until for step in self._running)])
            left = due - self._now()
            if left > 0:
                time.sleep(left)
            ended = [step for step in self._running if step.until <= due]
            for step in ended:
                self._end(step)
            if due == until and not ended:
                return

    def _end(self, step: Step) -> None:
        self._running.remove(step)
        self._attempt(step, step.fault.end)

    def _attempt(self, step: Step, change: Callable[[Stage, Pod], None]) -> None:
        began = time.monotonic()
        try:
            change(self._stage, self._stage.pods[step.pod])
        except (AssertionError, BackingError) as error:
            self._stage.witness.violations.append(f"{step}: {error}")
        self._started += time.monotonic() - began


def _progress(stage: Stage) -> str:
    published = len(stage.witness.messages())
    acked = len(stage.witness.acked())
    return f"published {published:,}, acknowledged by the services {acked:,}"


def _seen(stage: Stage) -> dict[str, int]:
    seen = {name: int(stage.seen_total(figure)) for name, figure in _COUNTED.items()}
    for name in ("resumed", "new", "repeated"):
        seen[name] = sum(pod.wire.counts[name] for pod in stage.pods)
    return seen


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status: 0, 1 for a broken promise, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Random faults on a real broker, a real Cassandra and one to three services; "
        "at the end everything that was acknowledged must be there. Ctrl-C ends it with the result "
        "so far.",
    )
    parser.add_argument("--minutes", type=float, default=5, help="how long faults happen (5)")
    parser.add_argument("--seed", type=int, help="of the schedule; a random one by default")
    parser.add_argument("--rate", type=float, default=300, help="messages a second (300)")
    parser.add_argument("--json", action="store_true", help="the ledger as JSON")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed

    # Whoever started us in the background had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    say(f"seed {seed}; starting broker and Cassandra")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shadowsvc-chaos-")))
        broker = stack.enter_context(backing.Mosquitto(persistent=True))
        database = stack.enter_context(backing.Cassandra(settings={"commitlog_sync": "batch"}))
        _migrate(database, "chaos")
        seconds = options.minutes * 60
        try:
            outcome = run(
                seed, seconds, broker, database, "chaos", folder, say=say, rate=options.rate
            )
        except KeyboardInterrupt:
            say(f"left without a result; repeat with --seed {seed}")
            return 130
    if options.json:
        sys.stdout.write(json.dumps(asdict(outcome) | {"kept": outcome.kept}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(outcome.lines()) + "\n")
    return 0 if outcome.kept else 1


if __name__ == "__main__":
    sys.exit(main())
